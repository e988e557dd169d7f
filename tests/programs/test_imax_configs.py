"""The configs of image-centric training: three stages, and arms of equal scored tokens."""

import dataclasses
import json

import pytest

from medmax_jax import config
from medmax_jax.configs import imax_7b, imax_tiny
from medmax_jax.data import prepare
from medmax_jax.data.packing import report
from medmax_jax.data.records import writer
from medmax_jax.sweep import __main__ as sweep_program
from medmax_jax.sweep import expand

TOLERANCE = 0.01  # of the scored tokens of the arm imax; half a step of the tiny runs is less


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working folder of the commands in the config files.

    In place of answers of a model, the pseudo documents are the short answers of the sample.
    """
    top = tmp_path_factory.mktemp("imax")
    prepare.prepare_sample(top / "runs" / "imax" / "train", split="train")
    records = writer.open_records(top / "runs" / "imax" / "train")
    short = [d for d in records if d.task == "VQA"][::2]
    made = [
        dataclasses.replace(d, id=f"{d.id}-pseudo", pseudo=True, generator="ab" * 32) for d in short
    ]
    writer.write(
        top / "runs" / "imax" / "pseudo", [*records, *made],
        shard_size=4_096, layout=records.layout, notes={},
    )  # fmt: skip
    return top


def test_stages_are_mixture_then_windows_then_real_documents():
    for module, pseudo in ((imax_tiny, imax_tiny.PSEUDO), (imax_7b, imax_7b.PSEUDO)):
        run = config.from_config_dict(module.get_config())
        first, windows, last = run.stages
        assert first.steps == pytest.approx(run.train.steps / 2, abs=1)
        assert windows.steps == pytest.approx(run.train.steps / 3, abs=1)
        assert [stage.records for stage in run.stages] == ["", pseudo, ""]
        assert [stage.mixing.image_centric for stage in run.stages] == [False, True, False]
        assert [stage.loss_weights.pseudo for stage in run.stages] == [1.0, 0.5, 1.0]
        assert run.optim.schedule == "run" and last.mixing == first.mixing == run.mixing
    with pytest.raises(ValueError, match="arm is 'imx'; use one of imax, plain, plain_longer"):
        imax_tiny.stages("imx", 1, 1, 1, pseudo="P")


def test_arms_differ_in_one_thing_each():
    arms = {arm: imax_tiny.stages(arm, 3, 2, 1, pseudo="P") for arm in imax_tiny.ARMS}
    middle = {arm: stages[1] for arm, stages in arms.items()}
    assert all(stages[0] == dict(steps=3) for stages in arms.values())
    assert middle["no_windows"] == {k: v for k, v in middle["imax"].items() if k != "mixing"}
    assert middle["no_pseudo"] == dict(steps=2, mixing=middle["imax"]["mixing"])
    assert middle["plain"] == dict(steps=2) and middle["plain_longer"] == dict(steps=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module")
def test_arms_have_equal_scored_tokens(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = ["expand", "--config=configs/sweep_imax_tiny.py", "--config.axes[1].seeds=(0,)"]
    assert sweep_program.main([*words, "--workdir", "sweep"]) == 0
    capsys.readouterr()
    assert prepare.main(["plan", "runs/imax/train", "--sweep", "sweep", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert len(found) == len(imax_tiny.ARMS) and found[0]["share"] == 1.0
    records, planned = writer.open_records("runs/imax/train"), expand.read(folder / "sweep")
    rows = dict(zip(imax_tiny.ARMS, found, strict=True))
    assert abs(rows["no_pseudo"]["share"] - 1) > TOLERANCE  # equal steps are not equal tokens
    assert 1.3 < rows["plain_longer"]["scored"] / rows["plain"]["scored"] < 1.7
    for (arm, row), one in zip(rows.items(), planned, strict=True):
        run = expand.settings(one)
        last = dataclasses.replace(run.stages[-1], steps=row["last_stage_steps"])
        steps = run.train.steps - run.stages[-1].steps + last.steps
        changed = dataclasses.replace(
            run,
            stages=(*run.stages[:-1], last),
            train=dataclasses.replace(run.train, steps=steps),
        )
        if arm != "plain_longer":
            scored = report.run_report(records, changed)["scored"]
            assert scored == pytest.approx(found[0]["scored"], rel=TOLERANCE), arm
            assert row["share_then"] == pytest.approx(scored / found[0]["scored"], abs=1e-4)


@pytest.mark.filterwarnings("ignore:the load_module")
def test_what_cannot_be_compared_is_refused(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    records = str(folder / "runs" / "imax" / "train")
    assert prepare.main(["plan", records, "--sweep", "absent"]) == 1
    assert "file not found; create it: python -m medmax_jax.sweep" in capsys.readouterr().err
    words = ["expand", "--config=configs/sweep_imax_tiny.py", "--limit=1", "--workdir", "sweep"]
    assert sweep_program.main(words) == 0
    assert prepare.main(["plan", records, "--sweep", "sweep"]) == 1
    assert "runs/imax/pseudo, which stage 1 reads, is missing" in capsys.readouterr().err
    assert prepare.main(["plan", records, "--sweep", "sweep", "--seed", "3"]) == 1
    assert "--seed and --sweep=sweep are both given" in capsys.readouterr().err
    assert prepare.main(["plan", records, "--seq_len", "256", "--scored", "3"]) == 1
    assert "--scored is of a run; use it with --config" in capsys.readouterr().err
