"""A run that is killed repeatedly equals, bit for bit, an uninterrupted run.

The log in docs/guides/launch.md: pytest -m slow -s tests/programs/test_kill.py
"""

import pathlib
import random
import re
import signal
import subprocess
import time

import pytest
from run_setup import (
    ROOT,
    STEPS,
    command,
    environment,
    finish,
    rows,
    same_numbers,
    same_state,
    start,
    wait_for_step,
    wait_until,
)

from medmax_jax import cli

KILLS = 8  # of the long test: half at random moments, half inside a save


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    return command(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    return environment()


@pytest.fixture(scope="module")
def whole(words, variables, tmp_path_factory) -> pathlib.Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    status, output = finish(start(words, folder, variables))
    assert status == cli.DONE, output
    assert rows(folder, "train")[STEPS]["epoch"] > 2
    return folder


def test_killed_and_terminated_run_equals_the_uninterrupted_run(words, variables, whole, tmp_path):
    folder, seed = tmp_path / "stopped", random.randrange(1000)
    pick = random.Random(seed)  # so that a failure can be had again
    process = start(words, folder, variables)
    wait_for_step(process, folder, pick.randrange(4, 24))
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL, f"seed {seed}: it was too quick to be killed"

    process = start(words, folder, variables)
    wait_for_step(process, folder, pick.randrange(30, 50))
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    status, output = finish(process)
    assert status == cli.INTERRUPTED == 75, f"seed {seed}: {output}"
    assert time.monotonic() - begin < 30  # seconds: what a spot machine leaves
    assert "SIGTERM: stopped after step" in output and cli.RESUME in output

    status, output = finish(start(words, folder, variables))
    assert status == cli.DONE and "resuming after step" in output, output
    assert same_numbers(folder, whole) and same_state(folder, whole), f"seed {seed}"


@pytest.mark.slow
def test_many_kills(words, variables, whole, tmp_path):
    folder, seed = tmp_path / "killed", random.randrange(1000)
    pick, said = random.Random(seed), []
    for kill in range(KILLS):
        before, begun = sealed(folder), starts(folder)
        process = start(words, folder, variables)
        wait_until(process, lambda begun=begun: starts(folder) > begun)  # old rows are gone
        wait_for_step(process, folder, min(before + pick.randrange(2, 12), STEPS - 2))
        if kill % 2:
            wait_until(process, lambda: saving(folder))
            where = f"inside the save of step {saving(folder)}"
        else:
            time.sleep(pick.random() * 0.05)
            where = "at a random moment"
        process.kill()
        if finish(process)[0] != -signal.SIGKILL:
            break  # the run came to its end first
        last = rows(folder, "train")
        at = f"after step {max(last)} of epoch {last[max(last)]['epoch']}"
        said.append(f"kill {kill + 1}: {where}, {at}, newest seal {sealed(folder)}")
        print(said[-1])
    status, output = finish(start(words, folder, variables))
    assert status == cli.DONE, output
    assert len(said) >= KILLS // 2 and same_numbers(folder, whole), f"seed {seed}"
    assert same_state(folder, whole), f"seed {seed}"
    print(f"{len(said)} kills, seed {seed}: parameters, moments, step and {STEPS // 2} reports "
          "are those of the run never killed, bit for bit")  # fmt: skip


def starts(folder: pathlib.Path) -> int:
    """How often a process has begun, after it dropped what no checkpoint covers."""
    path = folder / "train.log"
    text = path.read_text() if path.exists() else ""
    return len(re.findall(r"^(?:starting|resuming)", text, re.M))


def sealed(folder: pathlib.Path) -> int:
    """The newest step with a seal, or 0."""
    seals = (folder / "checkpoints").glob("[0-9]*/sha256.json")
    return max((int(p.parent.name) for p in seals), default=0)


def saving(folder: pathlib.Path) -> int:
    """A step that is being written, without a seal yet; 0: none."""
    names = [p for p in (folder / "checkpoints").glob("[0-9]*") if not (p / "sha256.json").exists()]
    return max((int(p.name.split(".")[0]) for p in names), default=0)


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--workdir=w", "--config.optim.lrr=1"], cli.USAGE, "--config.optim.lrr is not a field"),
        (["--workdir=README.md/w"], cli.ERROR, "--workdir README.md/w is not writable"),
        (["--workdir=gs://bucket/w"], cli.ERROR, "no valid credentials"),
        (["--workdir=w", "--profile_steps=4"], cli.USAGE, "write FIRST:LAST, for example 10:12"),
    ],
)  # fmt: skip
def test_one_line_and_a_status(words, variables, arguments, status, message):
    found = subprocess.run(
        [*words, *arguments], cwd=ROOT, env=variables, text=True, capture_output=True
    )
    assert found.returncode == status and message in found.stderr
    assert found.stderr.count("\n") == 1, found.stderr


def test_full_disk_stops_the_run_and_it_resumes(words, variables, whole, tmp_path):
    """With a real limit on file sizes the run fails with an error, and resumes without it."""
    folder = tmp_path / "full"
    # KiB. Orbax's own _sharding file has 15 in every checkpoint, however its data are split; the
    # logs of three steps have less than 5.
    limited = ["bash", "-c", 'ulimit -f 12; exec "$@"', "bash", *words]
    status, output = finish(start(limited, folder, variables))
    assert status == cli.ERROR and "could not be written" in output, output
    assert "there is no earlier one" in output and not list(folder.glob("adapter*"))
    status, output = finish(start(words, folder, variables))
    assert status == cli.DONE, output
    assert same_numbers(folder, whole)
