"""Sweeps that run: states, the table, what is missing or diverged, a runner killed twice."""

import csv
import dataclasses
import fcntl
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import micro_run
import pytest
from gs_server import fixture_gs, fixture_server  # noqa: F401
from run_setup import environment

from medmax_jax import train
from medmax_jax.scaling import __main__ as scaling
from medmax_jax.storage import workdir
from medmax_jax.storage.folder import Folder
from medmax_jax.sweep import __main__ as program
from medmax_jax.sweep import expand, runner, status
from medmax_jax.sweep.axes import SweepError
from medmax_jax.training import reporting, setup

ROOT = pathlib.Path(__file__).parents[2]
# ml_collections 1.1 loads config files in a way that Python 3.12 no longer has.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> pathlib.Path:
    """A config file of micro runs on records of their own, with held-out ones."""
    folder = tmp_path_factory.mktemp("data")
    settings = dict(
        data__train=micro_run.write(folder / "train"),
        data__validation=micro_run.write(folder / "validation", count=9, seed=1),
        train__steps=6,
        train__eval_every=100,
    )
    path = folder / "micro.py"
    path.write_text(
        f"import sys\n\nsys.path.insert(0, {str(ROOT / 'tests' / 'support')!r})\n"
        "import micro_run\n\n\n"
        f"def get_config():\n    return micro_run.settings(**{settings})\n"
    )
    return path


def planned(file: pathlib.Path, *axes: dict) -> list[expand.SweepRun]:
    return expand.plan_runs(
        expand.Sweep(
            name="micro", config=str(file), axes=axes, topology="", slices=1, utilisation=0.4,
            price=0.0, fill=0.6, said={"tuning": "none"},
        )
    )  # fmt: skip


def state(run: expand.SweepRun, folder: pathlib.Path) -> str:
    return status.state(run, folder)


@pytest.fixture(scope="module")
def ended(file, tmp_path_factory) -> tuple[list[expand.SweepRun], pathlib.Path]:
    """Two finished runs and one that diverged, as medmax_jax.train leaves them."""
    folder = tmp_path_factory.mktemp("sweep")
    half = {"grid": {"mixing.fraction": (0.5, 1.0)}}
    runs = planned(file, {"union": (half, {"fixed": {"optim.peak_lr": 1e30}})})
    expand.write(runs, folder)
    for run in runs[:2]:
        train.run(expand.settings(run), folder / run.run_id)
    with pytest.raises(reporting.TrainError, match="not finite"):
        train.run(expand.settings(runs[2]), folder / runs[2].run_id)
    return runs, folder


def test_states_of_run_folders(ended, tmp_path, capsys):
    runs, folder = ended
    assert list(status.states(runs, folder).values()) == ["finished", "finished", "diverged"]
    assert state(runs[0], tmp_path) == "pending"
    home = tmp_path / runs[0].run_id
    home.mkdir()
    assert state(runs[0], tmp_path) == "pending"  # its process is starting: it has written nothing
    (home / ".lock").touch()
    assert state(runs[0], tmp_path) == "crashed"
    assert program.main(["status", "--workdir", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == {"finished": 2, "diverged": 1, "runs": 3}


def test_collected_table_is_readable_by_a_fit(ended, capsys):
    runs, folder = ended
    assert program.main(["collect", "--workdir", str(folder)]) == 0
    first = (folder / "table.csv").read_bytes()
    assert f"(nan in the table): {runs[2].run_id}" in capsys.readouterr().out
    assert program.main(["collect", "--workdir", str(folder)]) == 0
    assert (folder / "table.csv").read_bytes() == first, "collecting twice changes nothing"
    with open(folder / "table.csv") as text:
        rows = list(csv.DictReader(text))
    metrics = (folder / runs[1].run_id / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in metrics]
    seen = sum(r["tokens"] for r in logged if r["kind"] == "train")  # a report a step
    held = next(r for r in logged if r["kind"] == "validation")
    assert float(rows[1]["tokens"]) == round(seen)
    assert float(rows[1]["loss"]) == held["loss"]
    assert float(rows[1]["loss_text"]) == held["text_nll"] != held["image_nll"]
    assert (
        0 < int(rows[0]["unique_tokens"]) < int(rows[1]["unique_tokens"]) <= int(rows[1]["tokens"])
    )
    # Half of the images, each document of the epoch counted once.
    facts = json.loads((folder / runs[0].run_id / "config.json").read_text())
    assert int(rows[0]["unique_tokens"]) == min(facts["epoch_tokens"], int(rows[0]["tokens"]))
    table = ["--table", str(folder / "table.csv"), "--law", "power"]
    assert scaling.main(table) == 1
    assert f"row 3, run {runs[2].run_id}: loss is nan: a diverged run" in capsys.readouterr().err
    assert scaling.main([*table, "--exclude", "state=diverged"]) == 1
    assert "too few points for law power: 2 runs, 3 parameters" in capsys.readouterr().err
    assert json.loads((folder / "table.json").read_text())["said"]["split"].startswith(
        "all held-out"
    )


def test_finished_runs_are_not_repeated(ended, capsys):
    runs, folder = ended
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("metrics.jsonl")}
    assert runner.run(runs, folder) == status.states(runs, folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("metrics.jsonl")} == before
    assert "3/3" in capsys.readouterr().out


def test_missing_results_are_named(ended, file, tmp_path):
    runs, folder = ended
    more = [*runs, *planned(file, {"seeds": (5,)})]
    with pytest.raises(
        SweepError, match=rf"1 of 4 runs have not ended: {more[3].run_id} \(pending\)"
    ):
        status.collect(more, folder, partial=False)
    assert len(status.collect(more, folder, partial=True)) == 3
    for name in ("config.json", "adapter", "train.log"):
        source = folder / runs[0].run_id / name
        target = tmp_path / runs[0].run_id / name
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(source)
    lines = (folder / runs[0].run_id / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"validation"' not in line]
    (tmp_path / runs[0].run_id / "metrics.jsonl").write_text("\n".join(kept))
    with pytest.raises(SweepError, match="no held-out loss at step 6; set data.validation"):
        status.collect(runs[:1], tmp_path, partial=False)
    other = dataclasses.replace(runs[0], overrides=runs[0].overrides | {"optim.peak_lr": 0.5})
    with pytest.raises(
        SweepError, match=r"contains another run: config.optim.peak_lr is 0.01, not 0.5"
    ):
        state(other, folder)


def test_only_unfinished_runs_are_rendered(ended, file, tmp_path, capsys):
    runs, folder = ended
    again = tmp_path / "sweep"
    again.mkdir()
    expand.write([*runs, *planned(file, {"seeds": (5,)})], again)
    for run in runs:
        (again / run.run_id).symlink_to(folder / run.run_id)
    given = f"render --workdir {again} --form plain --out {tmp_path / 'out'}"
    assert program.main(given.split()) == 0
    lines = (tmp_path / "out" / "commands.sh").read_text().splitlines()[1:]
    assert len(lines) == 1 and "--config.train.seed=5" in lines[0]


def test_only_one_runner_per_sweep(ended, tmp_path):
    import fcntl

    runs, _ = ended
    with open(tmp_path / ".runner.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SweepError, match="is in use by another runner"):
            runner.run(runs, tmp_path)


# ---- in processes of their own


def start(folder: pathlib.Path | str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "medmax_jax.sweep", "run", "--workdir", str(folder)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(),
    )  # fmt: skip


def wait_for(process: subprocess.Popen, path: pathlib.Path, text: str) -> None:
    """Until a file holds a text."""
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.slow
def test_runner_killed_twice_gives_the_same_table(file, tmp_path):
    """Once with SIGKILL, its run left alone; once with SIGTERM, its run told to save."""
    axes = {"fixed": {"train.steps": 40, "train.checkpoint_every": 4}}, {"seeds": (0, 1)}
    runs = planned(file, *axes)
    tables = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        expand.write(runs, folder)
        first, second = (folder / run.run_id / "metrics.jsonl" for run in runs)
        if name == "killed":
            process = start(folder)
            wait_for(process, first, '"step": 6,')
            process.kill()  # and not the run: the next runner finds it at work
            process.communicate()
            process = start(folder)
            wait_for(process, second, '"step": 9,')
            process.send_signal(signal.SIGTERM)
            output = process.communicate(timeout=600)[0]
            assert process.returncode == 75, output
            assert status.state(runs[1], folder) in ("stopped", "finished")
        process = start(folder)
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output
        assert program.main(["collect", "--workdir", str(folder)]) == 0
        tables.append((folder / "table.csv").read_text())
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_sweep_on_gs_gives_the_same_table(ended, gs, tmp_path, monkeypatch, capsys):
    """The runner is killed after its first run; another machine continues."""
    runs, local = ended
    with workdir.opened(gs) as work:
        expand.write(runs[:2], work.folder)
    monkeypatch.setenv(workdir.SYNC_VARIABLE, "0.5")
    monkeypatch.setenv(workdir.STAGE_VARIABLE, str(tmp_path / "first"))
    process = start(gs)
    exported = f"{runs[0].run_id}/adapter/adapter_config.json"
    while not Folder(gs).has(exported):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    monkeypatch.setenv(workdir.STAGE_VARIABLE, str(tmp_path / "second"))
    assert program.main(["status", "--workdir", gs]) == 0
    assert "finished" in capsys.readouterr().out.splitlines()[0]
    process = start(gs)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0 and f"1/2 {runs[0].run_id}: finished" in output, output
    assert program.main(["collect", "--workdir", gs, "--json"]) == 0
    expand.write(runs[:2], tmp_path / "local")
    for run in runs[:2]:
        (tmp_path / "local" / run.run_id).symlink_to(local / run.run_id)
    assert program.main(["collect", "--workdir", str(tmp_path / "local")]) == 0
    tables = [Folder(gs).read("table.csv").tobytes().decode()]
    tables.append((tmp_path / "local" / "table.csv").read_text())
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(file, tmp_path):
    runs = planned(file, {"union": ({"fixed": {"data.train": "nowhere"}}, {"seeds": (3,)})})
    expand.write(runs, tmp_path)
    process = start(tmp_path)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 1
    assert f"1 of 2 runs failed: {runs[0].run_id}" in output and "nowhere: no such folder" in output
    assert status.state(runs[1], tmp_path) == "finished"


LOCKED = """
import fcntl, pathlib, sys
folder = pathlib.Path(sys.argv[1])
try:
    fcntl.flock(open(folder / ".started"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    (folder / "locked").touch()
"""


def test_a_starting_run_is_running(file, tmp_path, monkeypatch, capsys):
    """The process that the runner starts holds a lock from its first instruction to its end."""
    (one,) = planned(file, {"seeds": (0,)})
    home = tmp_path / one.run_id
    monkeypatch.setattr(runner, "command", lambda *_: [sys.executable, "-c", LOCKED, str(home)])
    assert runner.run([one], tmp_path) == {one.run_id: "crashed"}  # it has ended without a result
    assert (home / "locked").exists()
    with open(home / status.STARTED) as started:
        fcntl.flock(started, fcntl.LOCK_EX)
        assert state(one, tmp_path) == "running"


def test_the_status_of_a_sweep_does_not_stop_a_starting_run(tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as status.state does, for an instant
        release = threading.Timer(0.07, fcntl.flock, (file, fcntl.LOCK_UN))
        release.start()
        with setup.workdir_lock(tmp_path):
            release.join()
