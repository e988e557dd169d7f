"""Training as a user runs it: in a process of its own, watched by its files, stopped by signals."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import micro_run
import numpy as np

from medmax_jax.checkpoints import manager

ROOT = pathlib.Path(__file__).parents[2]
NUMBERS = ("loss", "text_nll", "image_nll", "grad_norm", "lr", "tokens", "fill", "epoch")
STEPS = 60


def command(folder: pathlib.Path, **changes: object) -> list[str]:
    """The program on short steps; reports and checkpoints fall on different steps."""
    settings = dict(data__train=micro_run.write(folder / "train", count=40), train__steps=STEPS)
    settings |= dict(train__log_every=2, train__checkpoint_every=3) | changes
    path = folder / "micro.py"
    path.write_text(
        f"import micro_run\n\n\ndef get_config():\n    return micro_run.settings(**{settings})\n"
    )
    return [sys.executable, "-m", "medmax_jax.train", f"--config={path}"]


def environment(devices: int = 1) -> dict[str, str]:
    """The variables of this process, with another number of devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support"), "XLA_FLAGS": flags}


def start(
    words: list[str], workdir: pathlib.Path, variables: dict, cwd: pathlib.Path = ROOT
) -> subprocess.Popen:
    return subprocess.Popen(
        [*words, f"--workdir={workdir}"], cwd=cwd, env=variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def wait_for_step(process: subprocess.Popen, folder: pathlib.Path, step: int) -> None:
    """Until the run has reported `step`."""
    reported = re.compile(rf'"step": ({"|".join(str(s) for s in range(step, STEPS + 1))}),')
    path = folder / "metrics.jsonl"
    wait_until(process, lambda: path.exists() and bool(reported.search(path.read_text())))


def wait_until(process: subprocess.Popen, holds) -> None:
    """Until `holds()`; fails when the process ends before."""
    while process.poll() is None:
        if holds():
            return
        time.sleep(0.002)
    raise AssertionError(finish(process)[1])


def rows(folder: pathlib.Path, kind: str) -> dict[int, dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    steps = [row["step"] for row in found if row["kind"] == kind]
    assert len(steps) == len(set(steps)), "a step stands twice"
    return {row["step"]: row for row in found if row["kind"] == kind}


def same_numbers(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Every reported number of two runs, bit for bit, and the adapters that came out."""
    first, second = rows(a, "train"), rows(b, "train")
    assert first.keys() == second.keys()
    for step, row in first.items():
        for name in NUMBERS:
            assert row[name] == second[step][name], (step, name)
    adapters = [(f / "adapter" / "adapter.safetensors").read_bytes() for f in (a, b)]
    return adapters[0] == adapters[1]


def same_state(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Every array of the two last checkpoints: parameters, moments and step, bit for bit."""
    (first, ours, _), (second, theirs, _) = (manager.read_latest(f / "checkpoints") for f in (a, b))
    assert first == second and ours.keys() == theirs.keys()
    return all(np.asarray(ours[n]).tobytes() == np.asarray(theirs[n]).tobytes() for n in ours)
