"""A run whose second stage reads records that the model of its first stage is needed for."""

import dataclasses
import json
import pathlib
import shutil
import signal

import micro_run
import numpy as np
import pytest
import run_setup
from run_setup import rows, same_numbers, same_state

from medmax_jax import cli, config, train
from medmax_jax.checkpoints.manager import CheckpointError
from medmax_jax.data import loader, prepare
from medmax_jax.data.packing.pack import PackError
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import RecordsError
from medmax_jax.training.reporting import TrainError

STEPS = (3, 4, 2)  # of the stages: mixture, with pseudo documents, real ones only


def write_pseudo(folder: str, out: pathlib.Path, seed: int = 5) -> str:
    """All documents of a folder in their order, then 20 with generated answers."""
    records = writer.open_records(folder)
    made = dict(pseudo=True, generator="ab" * 32, task="Captioning")
    generated = [dataclasses.replace(d, **made) for d in micro_run.documents(20, seed)]
    writer.write(out, [*records, *generated], shard_size=16, layout=records.layout, notes={})
    return str(out)


def staged_settings(folder: str, pseudo: str, **changes: object):
    given = dict(train__log_every=2, train__checkpoint_every=2, train__keep=9) | changes
    settings = micro_run.settings(data__train=folder, train__steps=sum(STEPS), **given)
    settings.stages = (
        dict(steps=STEPS[0]),
        dict(steps=STEPS[1], records=pseudo, mixing=dict(image_centric=True),
             loss_weights=dict(pseudo=0.5)),
        dict(steps=STEPS[2], records=pseudo, mixing=dict(pseudo=False)),
    )  # fmt: skip
    return settings


def write_config(path: pathlib.Path, settings) -> str:
    path.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({settings.to_dict()!r})\n"
    )
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Records, records with pseudo documents, and the run that had both from the start."""
    top = tmp_path_factory.mktemp("world")
    folder = micro_run.write(top / "train", count=60)
    pseudo = write_pseudo(folder, top / "pseudo")
    train.run(config.from_config_dict(staged_settings(folder, pseudo)), top / "whole")
    return top, folder, pseudo


def test_run_stops_for_missing_records_and_continues_exactly(world, tmp_path):
    """Stopped at the boundary twice, then continued; equal to the run that had the records."""
    top, folder, pseudo = world
    later = tmp_path / "later"
    run = config.from_config_dict(staged_settings(folder, str(later)))
    message = (
        f"stage 1 reads {later}, which does not exist yet. .* python -m medmax_jax.data.prepare "
        f"pseudo {folder} --model .* --adapter {tmp_path}/run/adapter_stage_0 --out {later}"
    )
    with pytest.raises(TrainError, match=message):
        train.run(run, tmp_path / "run")
    stopped = json.loads((tmp_path / "run" / "adapter_stage_0" / "adapter_config.json").read_text())
    assert stopped["step"] == 3 and not (tmp_path / "run" / "adapter").exists()
    later.mkdir()  # begun, not finished
    with pytest.raises(TrainError, match="does not exist yet"):
        train.run(run, tmp_path / "run")
    shutil.copytree(pseudo, later, dirs_exist_ok=True)
    train.run(run, tmp_path / "run")
    assert same_state(tmp_path / "run", top / "whole")
    pair = [rows(place, "train") for place in (tmp_path / "run", top / "whole")]
    assert pair[0].keys() == pair[1].keys()
    for step, row in pair[0].items():
        assert [row[n] for n in run_setup.NUMBERS] == [pair[1][step][n] for n in run_setup.NUMBERS]


@pytest.mark.slow
def test_a_kill_in_each_stage_loses_nothing(world, tmp_path):
    """The program in processes: stopped for records, then by SIGKILL in stage 1."""
    top, folder, pseudo = world
    later, work = tmp_path / "later", tmp_path / "run"
    settings = staged_settings(folder, str(later), train__checkpoint_every=1)
    path = write_config(tmp_path / "staged.py", settings)
    words = [*run_setup.command(tmp_path)[:3], f"--config={path}"]
    variables = run_setup.environment(devices=8)
    code, output = run_setup.finish(run_setup.start(words, work, variables))
    assert code == cli.ERROR and f"--out {later}; then run the same command again" in output
    shutil.copytree(pseudo, later)
    process = run_setup.start(words, work, variables)
    checkpoint = work / "checkpoints" / "5"
    run_setup.wait_until(process, checkpoint.exists)
    process.send_signal(signal.SIGKILL)
    run_setup.finish(process)
    code, output = run_setup.finish(run_setup.start(words, work, variables))
    assert code == 0, output
    assert same_state(work, top / "whole")


def test_other_records_of_a_stage_that_has_begun_are_refused(world, tmp_path):
    top, folder, pseudo = world
    shutil.copytree(top / "whole", tmp_path / "run")
    for name in ("adapter", "checkpoints/8", "checkpoints/9"):
        shutil.rmtree(tmp_path / "run" / name)
    other = write_pseudo(folder, tmp_path / "other", seed=6)
    run = config.from_config_dict(staged_settings(folder, other))
    with pytest.raises(CheckpointError, match=r"stage_data of stage 1 was .*stages\[1\]\.records"):
        train.run(run, tmp_path / "run")
    run = config.from_config_dict(staged_settings(folder, str(tmp_path / "absent")))
    with pytest.raises(CheckpointError, match="stage_plans of stage 1 was .*, is now None"):
        train.run(run, tmp_path / "run")
    moved = shutil.copytree(pseudo, tmp_path / "moved")
    train.run(config.from_config_dict(staged_settings(folder, str(moved))), tmp_path / "run")
    assert same_numbers(tmp_path / "run", top / "whole") is False  # its metadata has the path
    assert same_state(tmp_path / "run", top / "whole")


def test_stages_draw_and_weigh_pseudo_documents(world):
    _, folder, pseudo = world
    run = config.from_config_dict(staged_settings(folder, pseudo))
    batches = loader.train_batches(run, folder)
    assert batches.available == len(batches) == 9
    drawn = [
        np.concatenate([np.concatenate(batches.documents_of_rows(s)) for s in steps])
        for steps in (range(3), range(3, 7), range(7, 9))
    ]
    assert drawn[0].max() < 60 <= drawn[1].max() and drawn[2].max() < 60
    assert batches.kinds == [("generated", "VQA"), ("generated", "Captioning")]
    part = batches._loaders[1]
    full = dataclasses.replace(
        part._run, loss=dataclasses.replace(run.loss, weights=config.LossWeights.off())
    )
    plain = loader.BatchLoader(full, pseudo, part.records, one_pass=False).batch(0)
    ours = part.batch(0)
    assert np.isclose(ours.weights.sum(), 1) and np.isclose(plain.weights.sum(), 1)
    kinds = np.array([k == ("generated", "Captioning") for k in batches.kinds])
    is_pseudo, scored = kinds[ours.kinds], plain.weights > 0
    ratio = ours.weights[scored] / plain.weights[scored]
    low, high = ratio[is_pseudo[scored]], ratio[~is_pseudo[scored]]
    np.testing.assert_allclose(low, 0.5 * high[0], rtol=1e-5)
    np.testing.assert_allclose(high, high[0], rtol=1e-5)
    documents = np.concatenate(part.documents_of_rows(0))
    assert part.stats(0).loss_weight == pytest.approx(np.where(documents < 60, 1, 0.5).sum())
    lines = "\n".join(batches.describe())
    assert "stage 2: 80 documents of" in lines and "an epoch draws 60 into" in lines


def test_reports_state_the_records_and_the_weights(world, capsys):
    top, folder, pseudo = world
    log = (top / "whole" / "train.log").read_text()
    assert f"records {pseudo}, mixing by source: each document once, image_centric" in log
    assert "loss_weights text 1.0 image 1.0 pseudo 0.5" in log
    assert f"records {pseudo}, mixing by source: each document once, pseudo False" in log
    assert "(text 1, image 1, then text 1, image 1, pseudo 0.5, then" in log
    stored = json.loads((top / "whole" / "config.json").read_text())
    assert len(stored["stage_data"]) == len(stored["stage_plans"]) == 3
    assert prepare.main(["who_saw", "5-3", "--in", str(top), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (seen,) = found["runs"]
    assert 4 <= seen["first_step"] <= seen["last_step"] <= 7  # stage 1 alone draws it
    assert found["checkpoints"][-1]["checkpoint"].endswith("adapter")


@pytest.mark.filterwarnings("ignore:the load_module")
def test_plan_counts_scored_tokens_and_finds_equal_ones(world, tmp_path, capsys):
    _, folder, pseudo = world

    def plan(absent: bool, *flags: str) -> dict:
        settings = staged_settings(folder, str(tmp_path / "absent") if absent else pseudo)
        path = write_config(tmp_path / f"absent_{absent}.py", settings)
        words = ["plan", folder, "--config", path, "--json", *flags]
        code = prepare.main(words)
        printed = capsys.readouterr()
        return json.loads(printed.out) if code == 0 else printed.err

    found = plan(False)
    run = config.from_config_dict(staged_settings(folder, pseudo))
    batches = loader.train_batches(run, folder)
    counts = [batches.stats(step) for step in range(9)]
    assert found["plan"] == batches.plan
    assert found["scored"] == sum(c.scored_text + c.scored_image for c in counts)
    assert found["tokens"] == sum(c.tokens for c in counts)
    last = batches._loaders[2]
    longer = loader.train_batches(
        dataclasses.replace(last._run, train=dataclasses.replace(run.train, steps=90)), pseudo
    )
    sums = np.cumsum([s.scored_text + s.scored_image for s in map(longer.stats, range(90))])
    target = 2 * found["scored"]
    more = plan(False, "--scored", str(target))
    before = found["scored"] - found["stages"][2]["scored"]
    best = int(np.argmin(np.abs(before + sums - target)))
    assert more["last_stage_steps"] == best + 1 > 2
    assert more["scored_then"] == before + sums[best]
    partial = plan(True)
    assert partial["missing"].endswith("which stage 1 reads") and len(partial["stages"]) == 1
    assert "does not exist; make it" in plan(True, "--scored", "5")


def test_wrong_settings_of_records_are_refused(world, tmp_path):
    _, folder, pseudo = world
    settings = staged_settings(folder, pseudo)
    settings.stages = (dict(steps=9, records=pseudo),)
    with pytest.raises(config.ConfigError, match=r"stages\[0\]\.records .* reads data\.train"):
        config.from_config_dict(settings)
    settings.stages = (dict(steps=9, loss_weights=dict(pseudo=-1.0)),)
    with pytest.raises(config.ConfigError, match=r"loss\.weights\.pseudo is -1\.0; it must be at"):
        config.from_config_dict(settings)
    held_out = micro_run.run(data__train=folder, data__validation=pseudo)
    with pytest.raises(RecordsError, match="a model generated the answers of 20 documents"):
        train.run(held_out, tmp_path / "run")
    only = micro_run.write(tmp_path / "only", count=4)
    records = writer.open_records(only)
    made = [dataclasses.replace(d, pseudo=True, generator="ab" * 32) for d in records]
    writer.write(tmp_path / "made", made, shard_size=9, layout=records.layout, notes={})
    run = micro_run.run(data__train=str(tmp_path / "made"), mixing__pseudo=False)
    with pytest.raises(PackError, match="mixing.pseudo = False leave no document"):
        loader.train_batches(run, run.data.train)
