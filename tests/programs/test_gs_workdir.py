"""Runs whose workdir is under gs://, killed again and again, equal uninterrupted ones bit for bit.

The server between them and fake-gcs-server refuses requests with 429 and 503 and delays others.
The log in docs/guides/launch.md: pytest -m slow -s tests/programs/test_gs_workdir.py
"""

import importlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from eval_setup import says_yes_after, write_items
from gs_server import Faults, faulty, fixture_server, use_server, variables_of  # noqa: F401
from llm_server import serving
from run_setup import (
    ROOT,
    command,
    environment,
    finish,
    rows,
    same_numbers,
    same_state,
)

from medmax_jax import cli
from medmax_jax.checkpoints import checksums
from medmax_jax.eval import report
from medmax_jax.storage import gcs, lease, workdir
from medmax_jax.storage.folder import Folder

KILLS = 8  # of the long test: half at random moments, half inside an upload


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    return command(tmp_path_factory.mktemp("config"))


def begin(words: list[str], where: str | pathlib.Path, variables: dict) -> subprocess.Popen:
    return subprocess.Popen(
        [*words, f"--workdir={where}"], cwd=ROOT, env=variables, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was too quick to be killed"


def variables(url: str, stage: pathlib.Path) -> dict[str, str]:
    own = {workdir.STAGE_VARIABLE: str(stage), workdir.SYNC_VARIABLE: "0.5"}
    return environment() | variables_of(url) | own | {lease.LEASE_VARIABLE: "10"}


def fetched(gs: str, folder: pathlib.Path) -> pathlib.Path:
    for name in Folder(gs).names():
        Folder(gs).download(name, folder / name)
    return folder


def committed(gs: str) -> list[str]:
    return [n.split("/")[1] for n in Folder(gs).names() if n.endswith("/sha256.json")]


def killed_run(words, gs: str, url: str, faults: Faults, stage, kills: int, seed: int) -> list[str]:
    """Start and kill the run; `stage` is another folder for each start, as of another machine."""
    pick, lines = random.Random(seed), []
    for number in range(kills):
        before = len(committed(gs))
        process = begin(words, gs, variables(url, stage / str(number)))
        while len(committed(gs)) <= before and process.poll() is None:
            time.sleep(0.02)  # each start gets a step further
        if number % 2:
            while faults.uploads.acquire(blocking=False):
                pass
            faults.uploads.acquire(timeout=30)
        else:
            time.sleep(pick.random() * 0.5)
        kill(process)
        lines.append(
            f"kill {number + 1}, {'inside an upload' if number % 2 else 'at a random moment'}: "
            f"steps {', '.join(committed(gs))} committed"
        )
    return lines


@pytest.mark.parametrize(
    "kills", [1, pytest.param(KILLS, marks=pytest.mark.slow)], ids=["once", "often"]
)
def test_a_killed_run_equals_the_uninterrupted_one(words, server, tmp_path, monkeypatch, kills):
    use_server(monkeypatch, server)
    if kills == 1:  # a refused request costs a second or more
        words = [*words, "--config.train.steps=9"]
    whole = tmp_path / "whole"
    status, output = finish(begin(words, whole, environment()))
    assert status == cli.DONE, output
    gs, seed = f"gs://bucket/{tmp_path.name}/run", random.randrange(1000)
    faults = Faults(seed, share=0.02 if kills == 1 else 0.08)
    with faulty(server, faults) as url:
        lines = killed_run(words, gs, url, faults, tmp_path, kills, seed)
        status, output = finish(begin(words, gs, variables(url, tmp_path / "last")))
    assert status == cli.DONE and "resuming after step" in output, output
    killed = fetched(gs, tmp_path / "killed")
    assert same_numbers(killed, whole) and same_state(killed, whole), f"seed {seed}"
    assert set(rows(killed, "train")) == set(rows(whole, "train")) and faults.done["slow"]
    assert not [n for n in gcs.Bucket(gs).generations() if n.startswith(".lease")]
    print("\n".join([*lines, f"requests: {dict(faults.done)}; 0 bits differ (seed {seed})"]))


@pytest.mark.slow
def test_flipped_bits_of_stored_checkpoints_are_found(words, server, tmp_path, monkeypatch):
    """In each object of the last step; the run then resumes from the one before."""
    use_server(monkeypatch, server)
    gs = f"gs://bucket/{tmp_path.name}/run"
    short = [*words, "--config.train.steps=6"]
    status, output = finish(begin(short, gs, variables(server, tmp_path)))
    assert status == cli.DONE, output
    step, pick = Folder(f"{gs}/checkpoints/6"), random.Random(0)
    for name in step.names():
        content = bytearray(step.read(name).tobytes())
        for _ in range(2 if content else 0):
            bit = pick.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            step.write(name, [bytes(content)])
            assert checksums.find_corrupt_file(step), f"bit {bit} of {name}"
            content[bit // 8] ^= 1 << bit % 8
            step.write(name, [bytes(content)])
    assert checksums.find_corrupt_file(step) == ""
    victim = next(n for n in step.names() if n.startswith("state/d/"))
    content = step.read(victim).tobytes()
    step.write(victim, [content[:-1] + bytes([content[-1] ^ 1])])
    longer = [*words, "--config.train.steps=9", "--extend"]
    status, output = finish(begin(longer, gs, variables(server, tmp_path)))
    assert status == cli.DONE and "checkpoint 6 is damaged" in output, output
    assert "resuming after step 3" in output
    assert {"9", "damaged_6"} <= set(Folder(f"{gs}/checkpoints").children())


def test_a_second_run_in_the_same_place_is_refused(words, server, tmp_path, monkeypatch):
    use_server(monkeypatch, server)
    gs = f"gs://bucket/{tmp_path.name}/run"
    first = begin(words, gs, variables(server, tmp_path / "a"))
    try:
        while ".lease" not in gcs.Bucket(gs).generations() and first.poll() is None:
            time.sleep(0.05)
        status, output = finish(begin(words, gs, variables(server, tmp_path / "b")))
        assert status == cli.ERROR and f"error: {gs}: in use by" in output, output
        assert "Traceback" not in output
    finally:
        kill(first)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, KILLS], ids=["once", "often"])
def test_a_killed_evaluation_equals_the_uninterrupted_one(
    server, tmp_path, monkeypatch, capsys, kills
):
    use_server(monkeypatch, server)
    gs, seed = f"gs://bucket/{tmp_path.name}/eval", random.randrange(1000)
    items, faults, pick = write_items(tmp_path / "data"), Faults(seed), random.Random(seed)
    with serving(says_yes_after(0.1)) as llm, faulty(server, faults) as url:

        def start(where, environment) -> subprocess.Popen:
            words = [sys.executable, "-m", "medmax_jax.eval.run"]
            words += ["--config=configs/eval_tiny.py", f"--model=endpoint:m@{llm.url}"]
            words += [f"--config.questions={items}", f"--config.images={items.parent}"]
            words += ["--config.baselines=constant", "--config.probes=", "--config.options=False"]
            words += ["--config.service.concurrency=1", "--config.resamples=2_000"]
            return begin(words, where, environment)

        status, output = finish(start(tmp_path / "whole", variables(url, tmp_path / "stage")))
        assert status == cli.DONE, output
        for number in range(kills):
            process, requests = start(gs, variables(url, tmp_path / str(number))), len(llm.requests)
            while len(llm.requests) < requests + 2 and process.poll() is None:
                time.sleep(0.02)
            time.sleep(pick.random())
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        status, output = finish(start(gs, variables(url, tmp_path / "last")))
    assert status == cli.DONE and f"report: {gs}/report.html" in output, output
    ended = fetched(gs, tmp_path / "fetched")
    for name in ("records.jsonl", "summary.json"):
        ours, theirs = ((folder / name).read_text() for folder in (ended, tmp_path / "whole"))
        for our, their in zip(comparable(ours), comparable(theirs), strict=True):
            different = {k: (our[k], their[k]) for k in our if our[k] != their.get(k)}
            assert our == their, f"{name}, seed {seed}: {different}"
    page = Folder(gs).stored("report.html")
    assert report.main(["--workdir", gs]) == 0 and Folder(gs).stored("report.html") == page
    compared = [gs, str(tmp_path / "whole"), "--workdir", f"{gs}_compared", "--resamples=2000"]
    program = importlib.import_module("medmax_jax.eval.compare")  # the package has a function
    assert program.main(compared) == 0
    assert f"page: {gs}_compared/comparison.html" in capsys.readouterr().out
    assert gs in Folder(f"{gs}_compared").read("comparison.html").tobytes().decode()


def comparable(text: str) -> list:
    """The values of a file, without those that differ between two runs of anything."""
    changing = ("seconds", "date", "machine", "history", "spent")  # of each start

    def clean(value):
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if not any(c in k for c in changing)}
        return [clean(v) for v in value] if isinstance(value, list) else value

    lines = [text] if text.startswith("{\n") else text.splitlines()
    return sorted((clean(json.loads(line)) for line in lines), key=str)
