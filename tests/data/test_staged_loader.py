"""The loader of a run with stages: each stage as a run of its own, from any step."""

import dataclasses
import itertools

import jax
import micro_run
import numpy as np
import pytest

from medmax_jax import config
from medmax_jax.data import loader
from medmax_jax.data.packing.pack import PackError

STAGES = (
    dict(steps=4),
    dict(steps=5, condition_dropout=dict(all=0.9), loss_weights=dict(text=0.5)),
    dict(steps=3, mixing=dict(image_centric=True, fraction=0.5)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return micro_run.write(tmp_path_factory.mktemp("records"), count=60)


def staged(folder: str, **changes: object) -> config.Run:
    settings = micro_run.settings(data__train=folder, train__steps=12, **changes)
    settings.stages = STAGES
    return config.from_config_dict(settings)


def equal(a: object, b: object) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_each_stage_is_loaded_as_a_run_of_its_own(folder):
    run = staged(folder)
    batches = loader.train_batches(run, folder)
    assert len(batches) == 12 and len({id(part.records) for part in batches._loaders}) == 1
    start = 0
    for number, stage in enumerate(run.stages):
        alone = loader.train_batches(config.run_of_stage(run, number), folder)
        assert len(alone) == stage.steps
        for step in range(stage.steps):
            assert equal(batches.batch(start + step), alone.batch(step))
            assert batches.stats(start + step) == alone.stats(step)
            assert batches.document_names(start + step) == alone.document_names(step)
        start += stage.steps
    assert [batches.stats(s).epoch for s in (0, 4, 9)] == [0, 0, 0]
    assert {batches.stats(s).epoch for s in range(4, 9)} == {0, 1}  # longer than an epoch
    with pytest.raises(IndexError, match="step 12 of 12; increase train.steps"):
        batches.batch(12)


def test_a_stage_changes_what_it_sets(folder):
    batches = loader.train_batches(staged(folder), folder)
    streams = [np.concatenate([row.streams for row in part._rows(0)]) for part in batches._loaders]
    assert [bool(s.any()) for s in streams] == [False, True, False]
    drawn = [set(part._documents(s)) for part in batches._loaders for s in range(2)]
    assert drawn[0] != drawn[2]  # epoch 0 of each stage has an order of its own
    first = loader.train_batches(dataclasses.replace(staged(folder), stages=()), folder)
    assert equal(first.batch(0), batches.batch(0))  # that of stage 0 is the run's


@pytest.mark.parametrize("start", [0, 2, 4, 8, 9, 11, 12])
def test_a_stream_begins_at_any_step(folder, start):
    batches = loader.train_batches(staged(folder), folder)
    rest = list(batches.stream(start))
    assert len(rest) == 12 - start
    for step, batch in zip(itertools.count(start), rest, strict=False):
        assert equal(batch, batches.batch(step))


def test_the_plan_is_that_of_all_stages(folder):
    batches = loader.train_batches(staged(folder), folder)
    again = loader.train_batches(staged(folder, data__plan=batches.plan), folder)
    assert again.plan == batches.plan
    with pytest.raises(PackError, match=f"config.data.plan is abc, but .* plan {batches.plan}"):
        loader.train_batches(staged(folder, data__plan="abc"), folder)
    smaller = dataclasses.replace(batches._run.stages[2].mixing, fraction=0.25)
    changed = dataclasses.replace(batches._run.stages[2], mixing=smaller)
    other = dataclasses.replace(batches._run, stages=(*batches._run.stages[:2], changed))
    assert loader.train_batches(other, folder).plan != batches.plan


def test_descriptions_and_unique_tokens_are_of_all_stages(folder):
    batches = loader.train_batches(staged(folder), folder)
    lines = batches.describe()
    assert lines[0] == f"3 stages, plan {batches.plan[:12]}"
    for number in range(3):
        assert any(line.startswith(f"stage {number}: 60 documents of") for line in lines)
    assert any(line.startswith("stage 1: condition dropout: ") for line in lines)
    parts = [part.epoch_tokens() for part in batches._loaders]
    assert parts[2] < batches.epoch_tokens() == parts[0] == parts[1]


@pytest.mark.parametrize(
    "stage, message",
    [
        (dict(mixing=dict(weights="nowhere=1")),
         r"mixing\.weights is 'nowhere=1': .* \(config\.stages\[1\]\)"),
        (dict(mixing=dict(leave_out="nothing")), r"mixing\.leave_out is 'nothing': .*stages\[1\]"),
        (dict(loss_weights=dict(tasks="Chess=2")), r"has no task 'Chess'.*config\.stages\[1\]"),
    ],
)  # fmt: skip
def test_names_that_the_records_lack_are_refused(folder, stage, message):
    settings = micro_run.settings(data__train=folder)
    settings.stages = (dict(steps=2), dict(steps=3) | stage)
    with pytest.raises(PackError, match=message):
        loader.train_batches(config.from_config_dict(settings), folder)
