"""A run with stages: resumed inside any of them, reported by stage, refused with other stages."""

import os
import pathlib
import signal

import jax
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
    dict(steps=3, trains="self_attn"),
    dict(
        steps=3, mixing=dict(by="task", weights="VQA=1"), condition_dropout=dict(text=0.5, all=0.5)
    ),
    dict(steps=2, loss_weights=dict(image=2.0), mixing=dict(image_centric=True)),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, object]:
    top = tmp_path_factory.mktemp("records")
    folders = dict(data__train=micro_run.write(top / "train"))
    return folders | dict(data__validation=micro_run.write(top / "held", count=8, seed=1))


def staged(data: dict[str, object], stages: tuple = STAGES, **changes: object) -> config.Run:
    steps = sum(stage["steps"] for stage in stages)
    changes = dict(train__steps=steps, train__log_every=4, optim__schedule="stage") | changes
    settings = micro_run.settings(**data | changes)
    settings.stages = stages
    return config.from_config_dict(settings)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> pathlib.Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train.run(staged(data, train__eval_every=4), folder)
    return folder


def test_rows_and_log_state_the_stage(whole):
    found = {step: row["stage"] for step, row in rows(whole, "train").items()}
    assert found == {3: 0, 4: 1, 6: 1, 8: 2}  # every 4 steps, and at the end of each stage
    assert {s: row["stage"] for s, row in rows(whole, "validation").items()} == found
    log = (whole / "train.log").read_text()
    assert "step 4/8 stage 1 loss" in log and "validation after step 6 of stage 1: loss" in log
    assert "compiled 2 training steps in" in log
    assert "stage 0: steps 1 to 3, mixing by source: each document once; trains self_attn" in log
    line = next(x for x in log.splitlines() if x.startswith("stage 1: steps 4 to 6"))
    assert "mixing by task: VQA=1, condition_dropout text 0.5 image 0.0 all 0.5" in line
    line = next(x for x in log.splitlines() if x.startswith("stage 2: steps 7 to 8"))
    assert "image_centric, loss_weights text 1.0 image 2.0; trains lora" in line


def test_run_stopped_inside_every_stage_equals_the_uninterrupted_run(data, whole, tmp_path):
    """A signal at the save of step s - 1 stops the run after step s."""
    run = staged(data, train__checkpoint_every=1, data__validation="")
    for stop in (2, 5, 7):

        def interrupt(step: int, values: dict, stop: int = stop) -> None:
            if step == stop - 1 and "checkpoint/blocked_seconds" in values:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(cli.Interrupted, match=f"stopped after step {stop}, checkpoint saved"):
            train.run(run, tmp_path, setup.Options(on_metrics=interrupt))
        if stop == 2:
            _check_that_attention_alone_changed(tmp_path)
    train.run(run, tmp_path)
    assert same_numbers(tmp_path, whole) and same_state(tmp_path, whole)


def _check_that_attention_alone_changed(folder: pathlib.Path) -> None:
    """B is 0 at the start; the moments follow the gradients of every B."""
    _, arrays, _ = manager.read_latest(folder / "checkpoints")
    changed = {
        name: bool(np.any(np.asarray(array)))
        for name, array in arrays.items()
        if name.startswith("trainable.") and name.endswith("lora_b")
    }
    assert changed and all(("self_attn" in name) == value for name, value in changed.items())
    moments = [a for n, a in arrays.items() if ".nu." in n and "mlp" in n and "lora_b" in n]
    assert moments and all(np.any(np.asarray(moment)) for moment in moments)


def test_other_stages_are_refused_and_longer_ones_need_extend(data, whole, monkeypatch):
    changed = (*STAGES[:2], STAGES[2] | dict(loss_weights=dict(image=3.0)))
    with pytest.raises(CheckpointError, match=r"stages\.2\.loss_weights\.image was 2\.0, is now 3"):
        train.run(staged(data, changed), whole)
    moved = (dict(STAGES[0], steps=4), dict(STAGES[1], steps=2), STAGES[2])
    with pytest.raises(CheckpointError, match=r"stages\.0\.steps was 3, is now 4"):
        train.run(staged(data, moved), whole)
    with pytest.raises(CheckpointError, match="config.stages was"):
        train.run(micro_run.run(**data, train__steps=8, optim__schedule="stage"), whole)
    longer = (*STAGES[:2], dict(STAGES[2], steps=3), dict(steps=1))
    with pytest.raises(CheckpointError, match=r"stages\.2\.steps was 2, is now 3 \(use --extend"):
        train.run(staged(data, longer), whole)


@pytest.mark.parametrize(
    "stage, error, message",
    [
        (dict(trains="self_attention"), config.ConfigError,
         r"config\.stages\[1\]\.trains is 'self_attention': .* has 'self_attention' in its name; "
         "use names from down_proj"),
        (dict(mixing=dict(weights="nowhere=1")), PackError,
         r"mixing\.weights is 'nowhere=1': .*\(config\.stages\[1\]\)"),
        (dict(loss_weights=dict(tasks="Chess=2")), PackError,
         r"has no task 'Chess'.*\(config\.stages\[1\]\)"),
    ],
)  # fmt: skip
def test_names_that_do_not_exist_are_refused_before_weights_are_loaded(
    data, tmp_path, monkeypatch, stage, error, message
):
    monkeypatch.setattr(setup, "load_or_init_weights", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(error, match=message):
        train.run(staged(data, (dict(steps=2), dict(steps=1) | stage)), tmp_path)


def test_one_stage_is_the_run_without_stages(data, tmp_path):
    """The same batches and the same program, so the same losses bit for bit."""
    plain = micro_run.run(**data)
    staged_run = staged(data, (dict(steps=plain.train.steps),))
    batches, ours = (train.load_data(run)[0] for run in (plain, staged_run))
    assert ours.plan == batches.plan and len(ours) == len(batches)
    for step in range(len(batches)):
        pair = (batches.batch(step), ours.batch(step))
        assert jax.tree.all(jax.tree.map(np.array_equal, *pair))
        assert ours.stats(step) == batches.stats(step)
