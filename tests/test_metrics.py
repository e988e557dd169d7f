"""Reports: means over an interval, rows that survive a kill, and the line that people read."""

import json
import math

import jax.numpy as jnp
import pytest

from medmax_jax import metrics


def interval(loss: float, text: tuple[float, float], tokens: float) -> metrics.Interval:
    values = dict(
        loss=loss, grad_norm=2.0, finite=1.0, lr=0.1, text_nll=text[0], text_count=text[1],
        image_nll=0.0, image_count=0.0, tokens=tokens, slots=100.0, steps=1.0,
        kind_nll=[[text[0] / 4, 0.0], [text[0] * 3 / 4, 2.0]],
        kind_count=[[text[1] / 2, 0.0], [text[1] / 2, 4.0]],
    )  # fmt: skip
    made = metrics.Interval.single_from_model_output(
        **{k: jnp.float32(v) for k, v in values.items()}
    )
    return metrics.on_host(made)


def test_means_are_over_targets_and_over_steps():
    both = interval(1.0, (30.0, 10.0), 90).merge(interval(3.0, (10.0, 30.0), 50))
    found = metrics.means(both)
    assert found["loss"] == 2.0  # over steps
    assert found["text_nll"] == 1.0  # 40 nats over 40 targets
    assert math.isnan(found["image_nll"])  # there were none
    assert found["tokens"] == 70.0 and found["fill"] == 0.7 and found["lr"] == pytest.approx(0.1)


def test_means_by_source_and_task():
    both = interval(1.0, (30.0, 10.0), 90).merge(interval(3.0, (10.0, 30.0), 50))
    found = metrics.by_kind(both, [("SLAKE", "VQA"), ("MIMIC", "VQA")])
    assert found == {
        "source/MIMIC/image_nll": 0.5,  # 4 nats over 8 targets
        "source/MIMIC/text_nll": 1.5,  # 30 over 20
        "source/SLAKE/text_nll": 0.5,  # 10 over 20; it has no images
        "task/VQA/image_nll": 0.5,
        "task/VQA/text_nll": 1.0,
    }
    assert "kinds" not in metrics.means(both)


def test_an_interval_goes_through_json_bit_for_bit():
    first, second = interval(0.1, (0.3, 7.0), 31), interval(0.7, (0.9, 3.0), 17)
    saved = json.loads(json.dumps(metrics.to_list(first)))
    again = metrics.from_list(saved)
    assert metrics.to_list(again.merge(second)) == metrics.to_list(first.merge(second))
    assert metrics.from_list(metrics.to_list(None)) is None


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"kind": "train", "step": s}) for s in (2, 4, 6)]
    path.write_text("\n".join(rows) + '\n{"kind": "tra')
    metrics.drop_after(str(path), 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]
    metrics.drop_after(str(tmp_path / "none"), 4)


def test_writer_flushes_every_line(tmp_path, capsys):
    writer = metrics.Writer(str(tmp_path))
    writer.start(step=0)
    writer.log("one line")
    writer.numbers("train", 1, {"loss": 0.5, "image_nll": math.nan})
    assert (tmp_path / "train.log").read_text() == capsys.readouterr().out == "one line\n"
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"kind": "train", "step": 1, "loss": 0.5, "image_nll": None}
    writer.close()
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_step_line():
    row = dict(
        loss=3.21, text_nll=2.9, image_nll=math.nan, lr=1e-3, tokens_per_second=5120.4, fill=0.931
    )
    assert metrics.step_line(120, 300, row, eta=83.0) == (
        "step 120/300 loss 3.2100 text 2.900 image - lr 1.0e-03 tok/s 5,120 fill 0.93 eta 1:23"
    )
    assert [metrics.clock_face(s) for s in (0.4, 59.6, 5025.0)] == ["0:00", "1:00", "1:23:45"]


def test_clock_counts_every_second_once():
    clock = metrics.Clock()
    with pytest.raises(KeyError), clock.spend("step"):
        raise KeyError  # time counts also when the block fails
    with clock.spend("data"):
        pass
    report = clock.report()
    assert clock.seconds["step"] > 0 and clock.training == sum(clock.seconds.values())
    assert report["goodput"] <= 1 and report["seconds_total"] >= report["seconds_step"]
