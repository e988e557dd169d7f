"""A reproduction with the shipped model that is killed at random gives the same citation.

The log in docs/guides/reproduce.md: pytest -m slow -s tests/eval/test_reproduce_kill.py
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import eval_setup
import pytest
from llm_server import serving
from test_biomedclip import PARITY
from test_reproduce import write_encoder, write_released

from medmax_jax import cli
from medmax_jax.eval.reproduction import citation

ROOT = Path(__file__).parents[2]
KILLS = 4
# The program, with the sizes of the small encoder in place of BiomedCLIP's.
PROGRAM = f"""
import runpy, sys
sys.path.insert(0, {str(PARITY)!r})
import biomedclip_cases
from medmax_jax.eval.encoders import biomedclip
biomedclip.PUBLISHED_SIZES = biomedclip_cases.TINY
runpy.run_module("medmax_jax.eval.reproduce", run_name="__main__", alter_sys=True)
"""


def start(released, encoder, workdir, url):
    flags = {
        "model": "native:medmax_jax/tiny",
        "adapter": "medmax_jax/tiny_adapter",
        "rows": released,
        "workdir": workdir,
        "config.judge.endpoint": f"gpt-4o-mini-2024-07-18@{url}",
        "config.judge.service.key_env": "",
        "config.judge.service.credentialed_hosts": url.split("/")[2],
        "config.scorers": f"biomedclip:{encoder}",
        "config.rows": 4,
        "config.window": 4,
        "config.sample.max_gen_len": 48,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def lines_on_disk(workdir):
    """Count the answers, verdicts and scores that a kill now would leave."""
    return sum(path.read_bytes().count(b"\n") for path in workdir.glob("paper/*/*.jsonl"))


def finish(process):
    output = process.communicate()[0].decode()
    assert process.returncode == cli.DONE, output


@pytest.mark.slow
def test_killed_at_random_it_gives_the_same_citation(tmp_path):
    for name in ("released", "encoder"):
        (tmp_path / name).mkdir()
    released = write_released(tmp_path / "released", count=4, few=2)
    encoder = write_encoder(tmp_path / "encoder")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    seed = random.randrange(1000)
    pick, kills = random.Random(seed), []
    with serving(eval_setup.judge) as llm:
        finish(start(released, encoder, whole, llm.url))
        targets = sorted(pick.randrange(1, lines_on_disk(whole) - 4) for _ in range(KILLS))
        for target in targets:
            process = start(released, encoder, killed, llm.url)
            while lines_on_disk(killed) < target and process.poll() is None:
                time.sleep(0.02)
            time.sleep(pick.random())
            process.kill()
            process.communicate()
            if process.returncode == -signal.SIGKILL:
                kills.append(lines_on_disk(killed))
                print(f"kill {len(kills)}: {kills[-1]} lines on disk")
        finish(start(released, encoder, killed, llm.url))
    first, second = (json.loads((folder / citation.FILE).read_text()) for folder in (whole, killed))
    scored = [cell for cell in first["cells"] if cell["released"]]
    assert len(scored) >= 18 and len(set(kills)) >= 2, f"seed {seed}"
    varying = {"environment": 0, "suite": 0}  # suite: the checkout may change during ten minutes
    assert second | varying == first | varying, f"seed {seed}"
    assert citation.check(killed / citation.FILE, killed)[1] == []
    print(f"{len(kills)} kills, seed {seed}: all {len(first['cells'])} cells are equal, "
          f"{len(scored)} with a score")  # fmt: skip
