"""Run a sweep on this machine, one process after another; it resumes if killed at any point.

    for each run that has not ended: python -m medmax_jax.train ... --workdir D/<run id>

A signal is passed to the run, which saves a checkpoint. If an earlier runner was killed, the
process that it left running is waited for. A run that fails or diverges does not stop the others.
"""

import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from medmax_jax.cli import INTERRUPTED, RESUME, Interrupted, Stop
from medmax_jax.io.progress import report_waiting
from medmax_jax.sweep import status
from medmax_jax.sweep.axes import SweepError
from medmax_jax.sweep.expand import SweepRun

WAIT = 0.2  # seconds between checks of a process
REPORT = 10.0  # seconds between two lines about a run


def run(runs: Sequence[SweepRun], folder: Path) -> dict[str, str]:
    """Return run id -> state, when no run is left. Raises Interrupted after a signal."""
    with open(folder / ".runner.lock", "w") as lock, Stop() as stop:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SweepError(f"{folder} is in use by another runner; wait for it") from error
        for number, sweep_run in enumerate(runs, start=1):
            _run_one(sweep_run, folder, f"{number}/{len(runs)} {sweep_run.run_id}", stop)
    return status.states(runs, folder)


def command(sweep_run: SweepRun, home: Path) -> list[str]:
    """Return the command that starts a run."""
    return [sys.executable, "-m", "medmax_jax.train", *sweep_run.arguments(), f"--workdir={home}"]


def _run_one(sweep_run: SweepRun, folder: Path, name: str, stop: Stop) -> None:
    """Start a run and wait for it, unless it has ended."""
    home = folder / sweep_run.run_id
    if status.state(sweep_run, folder) == "running":
        print(f"{name}: started by another runner, waiting", flush=True)
    while (before := status.state(sweep_run, folder)) == "running":
        _sleep(stop)
    if before not in status.UNFINISHED:
        print(f"{name}: {before}", flush=True)
        return
    begin = time.monotonic()

    def report(line: str) -> None:
        print(f"{line}; {_last_line(home / 'run.log')}", flush=True)

    try:
        home.mkdir(parents=True, exist_ok=True)
        with open(home / status.STARTED, "w") as started, open(home / "run.log", "ab") as log:
            fcntl.flock(started, fcntl.LOCK_EX)  # of the process: it inherits the open file
            process = subprocess.Popen(
                command(sweep_run, home), stdout=log, stderr=subprocess.STDOUT,
                pass_fds=(started.fileno(),),
            )  # fmt: skip
            with report_waiting(f"{name}: running", report, every=REPORT):
                code = _wait(process, stop)
    except OSError as error:  # the other runs may continue
        print(f"{name}: could not be started ({error.filename}: {error.strerror})", flush=True)
        return
    after = status.state(sweep_run, folder)
    print(f"{name}: {after} in {time.monotonic() - begin:.0f} s", flush=True)
    if stop.requested:
        raise Interrupted(f"{stop.requested}: {name} is {after}; {RESUME}")
    if code and after != "diverged":
        print(f"{name}: exit code {code}; {_last_line(home / 'run.log')}", flush=True)


def _wait(process: subprocess.Popen, stop: Stop) -> int:
    signaled = False
    while (code := process.poll()) is None:
        if stop.requested and not signaled:
            process.send_signal(signal.SIGTERM)
            signaled = True
        time.sleep(WAIT)
    return 0 if code == INTERRUPTED and signaled else code


def _sleep(stop: Stop) -> None:
    if stop.requested:
        raise Interrupted(f"{stop.requested} while waiting; {RESUME}")
    time.sleep(WAIT)


def _last_line(path: Path) -> str:
    """Return the error that ended the run, or the last line it wrote."""
    lines = path.read_text(errors="replace").splitlines() or [""]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
