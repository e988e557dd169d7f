"""A run with stages: resumed inside any of them, equal to plain runs, reported by stage."""

import json
import os
import pathlib
import signal

import micro_run
import numpy as np
import pytest
from run_setup import rows, same_numbers, same_state

from medmax_jax import cli, config, train
from medmax_jax.checkpoints import manager
from medmax_jax.checkpoints.manager import CheckpointError
from medmax_jax.data.packing.pack import PackError
from medmax_jax.training import setup

STAGES = (
    dict(steps=2, trains="self_attn"),
    dict(
        steps=3, mixing=dict(by="task", weights="VQA=1"), condition_dropout=dict(text=0.5, all=0.5)
    ),
    dict(steps=2, loss_weights=dict(image=2.0), mixing=dict(image_centric=True)),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, object]:
    top = tmp_path_factory.mktemp("records")
    folders = dict(data__train=micro_run.write(top / "train"))
    folders |= dict(data__validation=micro_run.write(top / "held", count=8, seed=1))
    return folders | dict(train__eval_every=4, train__log_every=4)


def staged(data: dict[str, object], stages: tuple = STAGES, **changes: object) -> config.Run:
    settings = micro_run.settings(
        **data, train__steps=sum(s["steps"] for s in stages), optim__schedule="stage"
    )
    settings.stages = stages
    for name, value in changes.items():
        section, field = name.split("__")
        settings[section][field] = value
    return config.from_config_dict(settings)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> pathlib.Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train.run(staged(data), folder)
    return folder


def test_rows_and_log_state_the_stage(whole):
    found = {step: row["stage"] for step, row in rows(whole, "train").items()}
    assert found == {2: 0, 4: 1, 5: 1, 7: 2}  # every 4 steps, and at the end of each stage
    validated = {step: row["stage"] for step, row in rows(whole, "validation").items()}
    assert validated == found
    log = (whole / "train.log").read_text()
    assert "step 4/7 stage 1 loss" in log and "validation after step 5 of stage 1: loss" in log
    assert "compiled 2 training steps in" in log
    assert "stage 0: steps 1 to 2, mixing by source: each document once; trains self_attn" in log
    line = next(x for x in log.splitlines() if x.startswith("stage 1: steps 3 to 5"))
    assert "mixing by task: VQA=1, condition_dropout text 0.5 image 0.0 all 0.5" in line
    line = next(x for x in log.splitlines() if x.startswith("stage 2: steps 6 to 7"))
    assert "image_centric, loss_weights text 1.0 image 2.0; trains lora" in line


def test_stopped_inside_every_stage_equals_the_uninterrupted_run(data, whole, tmp_path):
    """Stopped after steps 1 (stage 0), 3 and 4 (stage 1), and 6 (stage 2)."""
    run = staged(data, train__log_every=1)
    reference = tmp_path / "reference"
    train.run(run, reference)
    for stop in (1, 3, 4, 6):

        def interrupt(step: int, values: dict, stop: int = stop) -> None:
            if step == stop and "train/loss" in values:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(cli.Interrupted, match=f"stopped after step {stop}, checkpoint saved"):
            train.run(run, tmp_path / "stopped", setup.Options(on_metrics=interrupt))
    train.run(run, tmp_path / "stopped")
    assert same_numbers(tmp_path / "stopped", reference)
    assert same_state(tmp_path / "stopped", reference)
    assert same_state(whole, reference)  # reports change nothing
