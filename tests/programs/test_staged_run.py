"""A run with stages: resumed inside any of them, reported by stage, refused with other stages."""

import pathlib
import shutil

import jax
import micro_run
import numpy as np
import pytest
from run_setup import rows, same_numbers, same_state

from medmax_jax import config, train
from medmax_jax.checkpoints import manager
from medmax_jax.checkpoints.manager import CheckpointError
from medmax_jax.checkpoints.resume import check_meta

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


def staged(data: dict[str, object], stages: tuple = STAGES) -> config.Run:
    changes = dict(train__steps=sum(stage["steps"] for stage in stages), optim__schedule="stage")
    changes |= dict(train__log_every=4, train__eval_every=4)
    settings = micro_run.settings(**data, **changes, train__checkpoint_every=1, train__keep=9)
    settings.stages = stages
    return config.from_config_dict(settings)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> pathlib.Path:
    """The uninterrupted run, with the checkpoints of all steps."""
    folder = tmp_path_factory.mktemp("whole")
    train.run(staged(data), folder)
    return folder


def test_rows_and_log_state_the_stage(whole):
    found = {step: row["stage"] for step, row in rows(whole, "train").items()}
    assert found == {3: 0, 4: 1, 6: 1, 8: 2}  # every 4 steps, and at the end of each stage
    assert {s: row["stage"] for s, row in rows(whole, "validation").items()} == found
    log = (whole / "train.log").read_text()
    assert "step 4/8 stage 1 loss" in log and "validation after step 6 of stage 1: loss" in log
    assert "compiled 2 training steps in" in log
    starts = [f"stage 0: steps 1 to 3, {3 * 8 * 32} tokens", "stage 1: steps 4 to 6", "stage 2: "]
    first, second, third = (
        next(line for line in log.splitlines() if line.startswith(start)) for start in starts
    )
    assert "mixing by source: each document once; trains self_attn" in first
    assert "mixing by task: VQA=1, condition_dropout text 0.5 image 0.0 all 0.5" in second
    assert "image_centric, loss_weights text 1.0 image 2.0; trains lora" in third


@pytest.mark.parametrize(
    "step", [pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(7, marks=pytest.mark.slow)]
)
def test_run_that_died_inside_a_stage_equals_the_uninterrupted_run(data, whole, tmp_path, step):
    """Steps 2, 5 and 7 are inside stages 0, 1 and 2; what was written after them is lost."""
    folder = tmp_path / "died"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "adapter")
    for later in range(step + 1, 9):
        shutil.rmtree(folder / "checkpoints" / str(later))
    train.run(staged(data), folder)
    assert f"resuming after step {step} of 8" in (folder / "train.log").read_text()
    assert same_numbers(folder, whole) and same_state(folder, whole)


def test_stage_that_trains_attention_changes_nothing_else(whole, tmp_path):
    """B is 0 at the start. The moments follow the gradients of every B."""
    shutil.copytree(whole / "checkpoints" / "3", tmp_path / "3")
    _, arrays, _ = manager.read_latest(tmp_path)
    is_set = {name: bool(np.any(array)) for name, array in arrays.items() if "lora_b" in name}
    for name, value in is_set.items():
        assert value == ("self_attn" in name or not name.startswith("trainable.")), name
    assert {name.split(".")[0] for name in is_set} == {"trainable", "opt_state"}
    assert any("mlp" in name for name in is_set)


def test_other_stages_are_refused_and_longer_ones_need_extend(data, whole):
    saved = config.to_dict(staged(data))

    def check(*stages: dict, extend: bool = False) -> list[str]:
        return check_meta({"config": saved}, {"config": config.to_dict(run(stages))}, extend=extend)

    def run(stages: tuple) -> config.Run:
        return staged(data, stages)

    changed = dict(STAGES[2], loss_weights=dict(image=3.0))
    with pytest.raises(CheckpointError, match=r"stages\.2\.loss_weights\.image was 2\.0, is now 3"):
        check(*STAGES[:2], changed, extend=True)
    with pytest.raises(CheckpointError, match=r"stages\.0\.steps was 3, is now 4"):
        check(dict(STAGES[0], steps=4), dict(STAGES[1], steps=2), STAGES[2], extend=True)
    with pytest.raises(CheckpointError, match=r"config\.stages was"):
        check_meta({"config": saved}, {"config": saved | {"stages": []}}, extend=True)
    with pytest.raises(CheckpointError, match=r"config\.stages was \[\]"):
        check_meta({"config": saved | {"stages": []}}, {"config": saved}, extend=True)
    longer = (*STAGES[:2], dict(STAGES[2], steps=3))
    with pytest.raises(CheckpointError, match=r"stages\.2\.steps was 2, is now 3 \(use --extend"):
        check(*longer)
    assert len(check(*longer, extend=True)) == 2  # of train.steps and of stage 2
    with pytest.raises(CheckpointError, match=r"config\.stages\.3 was None"):
        check(*STAGES, dict(steps=1), extend=True)
    assert check(*STAGES) == []


def test_unknown_parameter_is_refused_before_anything_is_loaded(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_data", lambda _: pytest.fail("the records were opened"))
    message = (
        r"config\.stages\[1\]\.trains is 'self_attention': 'self_attention' is no name of a "
        "parameter that train.trains = lora selects, nor a part of one; use parts from down_proj"
    )
    with pytest.raises(config.ConfigError, match=message):
        train.run(staged(data, (dict(steps=2), dict(steps=1, trains="self_attention"))), tmp_path)


def test_one_stage_is_the_run_without_stages(data):
    """The same batches, and the same program, so the same losses bit for bit."""
    plain = micro_run.run(**data)
    batches = train.load_data(plain)[0]
    ours = train.load_data(staged(data, (dict(steps=plain.train.steps),)))[0]
    assert ours.plan == batches.plan and len(ours) == len(batches)
    for step in range(len(batches)):
        pair = (batches.batch(step), ours.batch(step))
        assert jax.tree.all(jax.tree.map(np.array_equal, *pair))
        assert ours.stats(step) == batches.stats(step)
