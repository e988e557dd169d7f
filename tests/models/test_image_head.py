"""Anole's stage end to end: trained, interrupted, resumed, exported."""

import json
import os
import signal

import jax
import micro_run
import numpy as np
import pytest
from safetensors.numpy import load_file

from medmax_jax import cli, config, train
from medmax_jax.training import reporting as training_reporting


def settings(folder: str, **changes: object) -> config.Run:
    return micro_run.run(
        data__train=folder, lora__rank=0, train__trains="image_head", optim__warmup_ratio=0.0,
        train__steps=6, train__checkpoint_every=3, **changes,
    )  # fmt: skip


def test_anoles_stage_resumes_and_exports_one_head(tmp_path, monkeypatch):
    data = micro_run.write(tmp_path / "records")
    full = micro_run.run(data__train=data, train__trains="full", lora__rank=0, train__steps=1)
    train.run(full, tmp_path / "base")
    base = str(tmp_path / "base" / "model")
    run = settings(data, train__init_from=base)
    last = train.run(run, tmp_path / "uninterrupted")
    assert last["image_nll"] > 0 and last["step"] == 6
    before = load_file(f"{base}/model.safetensors")
    after = load_file(tmp_path / "uninterrupted" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {"lm_head.kernel"}
    columns = (before["lm_head.kernel"] != after["lm_head.kernel"]).any(axis=0)
    np.testing.assert_array_equal(np.flatnonzero(columns), np.arange(4, 20))
    row = json.loads((tmp_path / "uninterrupted" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"source/generated/image_nll", "task/VQA/text_nll"} <= row.keys()
    _stop_after(monkeypatch, 3)
    with pytest.raises(cli.Interrupted):
        train.run(run, tmp_path / "resumed")
    monkeypatch.undo()
    train.run(run, tmp_path / "resumed")
    resumed = load_file(tmp_path / "resumed" / "model" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, resumed, after)


def _stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Send SIGTERM to this process once step `steps` is reported."""
    report = training_reporting.Reporter.report

    def reporting(self, done):
        report(self, done)
        if done == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training_reporting.Reporter, "report", reporting)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lora__rank=4), "lora.rank is 4; it must be 0 when train.trains is image_head"),
        (dict(model__quant="int8", train__init_from="x"), "none when train.trains is image_head"),
    ],
)
def test_invalid_settings_raise(changes, message):
    with pytest.raises(config.ConfigError, match=message):
        micro_run.run(**(dict(train__trains="image_head", lora__rank=0) | changes))
