"""Files that a run does not depend on: damage, or a failed write, causes only a warning."""

import json
import logging
import pathlib
import shutil

import numpy as np
import pytest

from medmax_jax import config, quickstart, train_vqgan
from medmax_jax.configs import tiny_vqgan
from medmax_jax.io import run_files
from medmax_jax.io.text_files import TextFileError
from medmax_jax.sweep import expand, runner, status
from medmax_jax.sweep.axes import SweepError
from medmax_jax.sweep.expand import SweepRun, read
from medmax_jax.training import log_writer

ROWS = b'{"kind": "train", "step": 1, "loss": 1.0}\n{"kind": "train", "step": 2, "loss": 1.0}\n'
DAMAGE = {
    "no UTF-8": ROWS[:20] + b"\xff" + ROWS[21:],
    "a bit of the key": ROWS.replace(b'"step"', b'"ste0"', 1),
    "a number": b"5\n" + ROWS,
    "step is text": ROWS.replace(b'"step": 1', b'"step": "1"', 1),
    "step is true": ROWS.replace(b'"step": 1', b'"step": true', 1),
    "loss is text": ROWS.replace(b"1.0", b'"x"', 1),
    "deep": b"[" * 100_000 + b"\n" + ROWS,
}
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
PLANNED = dict(
    run_id="0123456789", sweep="s", config="configs/tiny.py", overrides={"train.steps": 3}, seed=0,
    steps=3, params=1, trainable=1, tokens=1.0, flops=1.0, topology="", slices=1, chips=1,
    fits=None, hbm_gib=None, hours=None, chip_hours=None, usd=None,
)  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_metrics_line_is_skipped_with_a_warning(tmp_path, capsys, name):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(DAMAGE[name] + b'{"kind": "tra')  # torn, as by a kill: that is no damage
    expected = ROWS.splitlines(keepends=True)[-DAMAGE[name].count(b"\n") + 1 :]
    assert run_files.read_metrics(path)[1] == 1
    writer = log_writer.MetricWriter(str(tmp_path))
    writer.start(step=2)
    writer.write("train", 3, {"loss": 0.5})
    writer.close()
    warning = f"WARNING: {path}: skipped 1 unreadable line\n"
    assert capsys.readouterr().out == warning == (tmp_path / "train.log").read_text()
    *kept, new = path.read_bytes().splitlines(keepends=True)
    assert kept == expected and json.loads(new)["step"] == 3


def test_unwritable_log_warns_once(tmp_path, monkeypatch):
    message: list[str] = []
    log = run_files.LogFile(tmp_path, message.append)
    log.write("a")
    log.close()
    assert message == [
        f"WARNING: cannot write {tmp_path} (Is a directory); the run continues without it"
    ]
    log = run_files.LogFile("/dev/full", message.append)
    log.write("a")
    log.write("b")
    log.close()
    assert len(message) == 2 and "No space left on device" in message[1]


def test_vqgan_training_continues_without_log_files(tmp_path, capsys):
    for name in ("train.log", "metrics.jsonl", "reconstructions.png"):
        (tmp_path / name).mkdir()
    settings = config.build(train_vqgan.Run, tiny_vqgan.get_config())
    log = train_vqgan.Log(tmp_path, settings)
    pixels = np.zeros((1, 4, 4, 3), np.float32)
    log.evaluation("validation", {"l1": 0.5}, pixels, pixels.astype(np.uint8))
    log.close()
    out = capsys.readouterr().out
    assert all(
        f"cannot write {tmp_path / name} (" in out for name in ("train.log", "metrics.jsonl")
    )
    assert "WARNING: step 0: images could not be written" in out


def test_curves_skip_damaged_rows(tmp_path):
    rows = [{"kind": "step", "step": n, "l1": 0.5} for n in range(3)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "x", "{}"]) + "\n")
    assert train_vqgan.plot_curves(tmp_path) == 2 and (tmp_path / "curve.png").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("x", "line 1: not JSON"),
        ('{"file": "a.png", "split": "train"}', "line 1: field 'modality' is None"),
    ],
)
def test_vqgan_manifest_error_names_the_line(tmp_path, line, message):
    (tmp_path / "m.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=rf"m\.jsonl {message}"):
        train_vqgan.load_images(tmp_path / "m.jsonl", "train")


def test_quickstart_continues_without_stages_file(tmp_path, caplog):
    (tmp_path / "stages.json").write_text('[{"stage": "tokenize"}]')
    with caplog.at_level(logging.WARNING):
        stages = quickstart.QuickstartRun(tmp_path)
        assert stages.stages == [] and "starting a new stages.json" in caplog.text
        (tmp_path / "stages.json").unlink()
        (tmp_path / "stages.json").mkdir()
        with stages.stage("tokenize") as report_result:
            report_result("done")
        assert stages.stages[0]["what"] == "done" and "cannot write" in caplog.text
        (tmp_path / "metrics.jsonl").write_bytes(DAMAGE["a number"])
        assert len(quickstart._history(tmp_path / "metrics.jsonl")[0]) == 2
        assert "skipped 1 unreadable line" in caplog.text
        assert quickstart._history(tmp_path / "stages.json") == ([], [])


# ---- sweeps


@pytest.mark.parametrize(
    "change, message",
    [
        ({"run_id": "../../../x"}, "run_id is"),
        ({"steps": "3"}, "steps is '3'"),
        ({"overrides": []}, r"overrides is \[\]"),
        ({"fits": 1}, "fits is 1"),
        ({"more": 1}, "exactly the fields"),
    ],
)
def test_sweep_plan_is_validated(tmp_path, change, message):
    (tmp_path / "sweep.jsonl").write_text(json.dumps(PLANNED | {"usd": 2, "fits": True}) + "\n")
    assert read(tmp_path)[0].usd == 2
    (tmp_path / "sweep.jsonl").write_text(json.dumps(PLANNED | change) + "\n")
    with pytest.raises(
        SweepError, match=rf"sweep\.jsonl line 1: .*{message}.*expand the sweep again"
    ):
        read(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_damaged_run_files_raise_one_line_errors(tmp_path, name):
    run = SweepRun(**PLANNED)
    home = tmp_path / run.run_id
    (home / "adapter").mkdir(parents=True)
    (home / "adapter" / "adapter_config.json").write_text("{}")
    facts = {"config": config.to_dict(expand.settings(run)), "epoch_tokens": 10}
    (home / "config.json").write_text(json.dumps(facts))
    (home / "not_finite_x.json").write_text("{}")
    assert status.state(run, tmp_path) == "crashed"
    (home / name).unlink(missing_ok=True)
    (home / name).mkdir()
    with pytest.raises(SweepError, match=rf"{name}: cannot be read .*restore it, or remove"):
        status.state(run, tmp_path)
    shutil.rmtree(home / name)
    (home / name).write_bytes(DAMAGE["deep"])
    if name == "config.json":
        with pytest.raises(SweepError, match=r"config\.json: .*restore it, or remove"):
            status.state(run, tmp_path)
    else:
        assert status.state(run, tmp_path) == "crashed"


def test_run_without_log_file_does_not_stop_the_sweep(tmp_path, capsys):
    run = SweepRun(**PLANNED)
    (tmp_path / run.run_id / "run.log").mkdir(parents=True)
    assert runner.run([run], tmp_path) == {run.run_id: "crashed"}
    assert "could not be started" in capsys.readouterr().out


def test_metrics_path_that_is_a_folder_raises(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(TextFileError, match="Is a directory"):
        run_files.read_metrics(tmp_path / "metrics.jsonl")
    assert run_files.read_metrics(pathlib.Path(tmp_path / "none")) == ([], 0)
