"""Runs programs without paying for the imports of each: processes forked from one that has them."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
# Runs programs as modules or files, each in a process of its own that has imported what most of
# them import, and prints the list of [status, stdout and stderr]. A module that has been imported
# runs once more, as a program; runpy warns of that.
SCRIPT = """
import argparse, json, os, pathlib, runpy, sys, tempfile, traceback, warnings

sys.path[:0] = [os.getcwd(), "benchmarks", "tests"]
import jax, flax.nnx, orbax.checkpoint, ml_collections, medmax_jax.quickstart
warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")

def start(name, *arguments):
    sys.argv = [name, *arguments]
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)

results = []
for words in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = 0
            try:
                start(*words)
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
                status = 70
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        results.append([status, output.read()])
print(json.dumps(results))
"""


def forked(*commands: list[str]) -> list[tuple[int, str]]:
    """The status of each program, and what it printed; each begins when the one before ends."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout.splitlines()[-1])]
