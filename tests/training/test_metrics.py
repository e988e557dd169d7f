"""Means over an interval."""

import json
import math

import jax.numpy as jnp
import pytest

from medmax_jax.training import metrics


def interval(loss: float, text: tuple[float, float], tokens: float) -> metrics.TrainMetrics:
    values = dict(
        loss=loss, grad_norm=2.0, finite=1.0, skipped=0.0, lr=0.1, text_nll=text[0],
        text_count=text[1], image_nll=0.0, image_count=0.0, tokens=tokens,
        positions=100.0, steps=1.0,
        kind_nll=[[text[0] / 4, 0.0], [text[0] * 3 / 4, 2.0]],
        kind_count=[[text[1] / 2, 0.0], [text[1] / 2, 4.0]],
    )  # fmt: skip
    collection = metrics.TrainMetrics.single_from_model_output(
        **{k: jnp.float32(v) for k, v in values.items()}
    )
    return metrics.to_host(collection)


def test_means_are_over_targets_and_over_steps():
    both = interval(1.0, (30.0, 10.0), 90).merge(interval(3.0, (10.0, 30.0), 50))
    means = metrics.compute_means(both)
    assert means["loss"] == 2.0  # over steps
    assert means["text_nll"] == 1.0  # 40 nats over 40 targets
    assert math.isnan(means["image_nll"])  # there were none
    assert means["tokens"] == 70.0 and means["fill"] == 0.7 and means["lr"] == pytest.approx(0.1)


def test_means_by_source_and_task():
    both = interval(1.0, (30.0, 10.0), 90).merge(interval(3.0, (10.0, 30.0), 50))
    means = metrics.by_kind(both, [("SLAKE", "VQA"), ("MIMIC", "VQA")])
    assert means == {
        "source/MIMIC/image_nll": 0.5,  # 4 nats over 8 targets
        "source/MIMIC/text_nll": 1.5,  # 30 over 20
        "source/SLAKE/text_nll": 0.5,  # 10 over 20; it has no images
        "task/VQA/image_nll": 0.5,
        "task/VQA/text_nll": 1.0,
    }
    assert "kinds" not in metrics.compute_means(both)


def test_interval_round_trips_through_json_exactly():
    first, second = interval(0.1, (0.3, 7.0), 31), interval(0.7, (0.9, 3.0), 17)
    saved = json.loads(json.dumps(metrics.to_list(first)))
    restored = metrics.from_list(saved)
    assert metrics.to_list(restored.merge(second)) == metrics.to_list(first.merge(second))
    assert metrics.from_list(metrics.to_list(None)) is None
