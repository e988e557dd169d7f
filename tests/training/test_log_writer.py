"""The files of a run and its timer: complete rows, one per step; seconds are counted once."""

import json
import math

import pytest

from medmax_jax.training import log_writer


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"kind": "train", "step": s}) for s in (2, 4, 6)]
    path.write_text("\n".join(rows) + '\n{"kind": "tra')
    log_writer.truncate_after_step(str(path), 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]
    log_writer.truncate_after_step(str(path), 4, repeated_kind="train")
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2]
    log_writer.truncate_after_step(str(tmp_path / "none"), 4)


def test_writer_flushes_every_line(tmp_path, capsys):
    writer = log_writer.MetricWriter(str(tmp_path))
    writer.start(step=0)
    writer.log("one line")
    writer.write("train", 1, {"loss": 0.5, "image_nll": math.nan})
    assert (tmp_path / "train.log").read_text() == capsys.readouterr().out == "one line\n"
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"kind": "train", "step": 1, "loss": 0.5, "image_nll": None}
    writer.close()
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.slow  # TensorBoard is in no requirements file: pip install tensorboard
def test_tensorboard_reads_the_curves(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = log_writer.MetricWriter(str(tmp_path))
    writer.start(step=0)
    for step in (1, 2):
        writer.write("train", step, {"loss": 0.5 * step, "image_nll": math.nan})
    writer.close()
    curves = events.EventAccumulator(str(tmp_path)).Reload()
    assert curves.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in curves.Scalars("train/loss")] == [(1, 0.5), (2, 1.0)]


def test_format_step():
    row = dict(
        loss=3.21, text_nll=2.9, image_nll=math.nan, lr=1e-3, fill=0.931, data_share=0.014,
        tokens_per_second_per_chip=5120.4, processed_per_second_per_chip=5499.9, z_loss=0.0,
        text_log_z=9.214, text_log_z_max=12.0, image_log_z=math.nan, image_log_z_max=math.nan,
        text_max_logit=14.06, image_max_logit=math.nan, text_hidden_norm=310.4,
        image_hidden_norm=math.nan, lora_a_norm=12.0, lora_b_norm=0.512,
    )  # fmt: skip
    start = "step 120/300 loss 3.2100 text 2.900 image - log Z 9.21 (max 12) image - (max -) "
    start += "max logit 14.1 image - norm 310 image - A 12 B 0.512 lr 1.0e-03 tok/s/chip 5,120 "
    start += "(5,500 with padding) fill 0.93 data 1%"
    assert log_writer.format_step(120, 300, row, eta=83.0) == f"{start} eta 1:23"
    with_z = log_writer.format_norms(row | dict(z_loss=0.0123))
    assert with_z.endswith("A 12 B 0.512 z-loss 0.0123")
    full_row = row | dict(mfu=0.512, hfu=0.6012, hbm_peak_gib=12.06)
    assert log_writer.format_step(120, 300, full_row, eta=83.0) == (
        f"{start} MFU 51.2% HFU 60.1% HBM 12.1 GiB eta 1:23"
    )
    assert [log_writer.format_duration(s) for s in (0.4, 59.6, 5025.0)] == [
        "0:00",
        "1:00",
        "1:23:45",
    ]


def test_goodput_timer_counts_every_second_once():
    clock = log_writer.GoodputTimer()
    with pytest.raises(KeyError), clock.measure("step"):
        raise KeyError  # time counts also when the block fails
    with clock.measure("data"):
        pass
    report = clock.report()
    assert clock.seconds["step"] > 0 and clock.training == sum(clock.seconds.values())
    assert report["goodput"] <= 1 and report["seconds_total"] >= report["seconds_step"]
