"""Generation raises in a multi-process run before anything is read or written."""

import pathlib
import socket
import subprocess
import sys

import pytest
from run_setup import environment

from medmax_jax import cli

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "medmax_jax" / "tiny"
PYTHON = """
import os
from medmax_jax import cli
from medmax_jax.generation import model_bundle
from medmax_jax.generation import requests
cli.init_distributed(os.environ)
try:
    model_bundle.load("nowhere")
except requests.GenerateError as error:
    raise SystemExit(f"error: {error}")
"""


def run_two_processes(*arguments):
    """Return the exit codes and outputs of two processes that join each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = environment() | {"MEDMAX_COORDINATOR": address, "MEDMAX_PROCESSES": "2"}
    runs = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], env=shared | {"MEDMAX_PROCESS": str(index)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    return [(run.returncode, output) for run, output in zip(runs, outputs, strict=True)]


@pytest.mark.parametrize("kind", ["generate", "eval", "python"])
def test_two_processes_raise(tmp_path, kind):
    out = tmp_path / "out"
    arguments = {
        "generate": ("-m", "medmax_jax.generate", f"--model={TINY}", "--prompt=a", f"--out={out}"),
        "eval": (
            "-m", "eval.run", "--config=configs/eval_tiny.py", f"--model=native:{TINY}",
            f"--workdir={out}",
        ),
        "python": ("-c", PYTHON),
    }[kind]  # fmt: skip
    for index, (status, output) in enumerate(run_two_processes(*arguments)):
        assert status == cli.ERROR, output
        assert f"error: this is process {index} of 2; text and images are generated" in output
        assert "eval.run with --shard=i/n, generate with --prompts split into files" in output
        assert "Traceback" not in output
    assert not out.exists() or not list(out.iterdir())
