"""Means over an interval."""

import json
import math

import jax.numpy as jnp
import pytest

from medmax_jax.training import metrics


def interval(
    loss: float, text: tuple[float, float], tokens: float, top: float = 5.0
) -> metrics.TrainMetrics:
    values = dict(
        loss=loss, grad_norm=2.0, finite=1.0, skipped=0.0, lr=0.1, text_nll=text[0],
        text_count=text[1], image_nll=0.0, image_count=0.0, tokens=tokens,
        positions=100.0, steps=1.0,
        kind_nll=[[text[0] / 4, 0.0], [text[0] * 3 / 4, 2.0]],
        kind_count=[[text[1] / 2, 0.0], [text[1] / 2, 4.0]],
        z_loss=0.5, text_log_z=text[1] * top, image_log_z=0.0, text_log_z_max=top,
        image_log_z_max=metrics.LOWEST, text_max_logit=top - 1, image_max_logit=metrics.LOWEST,
        text_hidden_norm=text[1] * 7, image_hidden_norm=0.0, lora_a_norm=3.0, lora_b_norm=top,
        param_norm=metrics.LOWEST,
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


def test_log_z_and_norms_are_means_and_maxima_by_modality():
    both = interval(1.0, (30.0, 10.0), 90, top=9.0).merge(interval(3.0, (10.0, 30.0), 50, top=5.0))
    means = metrics.compute_means(both)
    assert means["text_log_z"] == 6.0  # 90 and 150 over 40 targets
    assert (means["text_log_z_max"], means["text_max_logit"]) == (9.0, 8.0)
    assert means["text_hidden_norm"] == 7.0
    for name in ("log_z", "log_z_max", "max_logit", "hidden_norm"):
        assert math.isnan(means[f"image_{name}"])  # there were none
    assert (means["lora_a_norm"], means["lora_b_norm"]) == (3.0, 5.0)  # the last ones
    assert "param_norm" not in means


def test_an_interval_of_an_older_checkpoint_is_continued():
    old = metrics.to_list(interval(1.0, (30.0, 10.0), 90))[:21]  # the fields before z_loss
    means = metrics.compute_means(metrics.from_list(old).merge(interval(3.0, (10.0, 30.0), 50)))
    assert means["loss"] == 2.0 and means["fill"] == 0.7
    assert means["text_log_z_max"] == 5.0 and means["z_loss"] == 0.5


def test_interval_round_trips_through_json_exactly():
    first, second = interval(0.1, (0.3, 7.0), 31), interval(0.7, (0.9, 3.0), 17)
    saved = json.loads(json.dumps(metrics.to_list(first), allow_nan=False))
    restored = metrics.from_list(saved)
    assert metrics.to_list(restored.merge(second)) == metrics.to_list(first.merge(second))
    assert metrics.from_list(metrics.to_list(None)) is None
