"""A reproduction with the shipped model that is killed at random gives the same citation.

The log in docs/guides/reproduce.md: pytest -m slow -s tests/eval/test_reproduce_kill.py
"""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import eval_setup
import pytest
from llm_server import serving
from test_biomedclip import PARITY
from test_reproduce import write_encoder, write_released

from medmax_jax import cli
from medmax_jax.eval.reproduction import citation

ROOT = Path(__file__).parents[2]
KILLS = 6
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


def answered(workdir):
    return sum(path.read_bytes().count(b"\n") for path in workdir.glob("paper/*/records.jsonl"))


@pytest.mark.slow
def test_killed_at_random_it_gives_the_same_citation(tmp_path):
    for name in ("released", "encoder"):
        (tmp_path / name).mkdir()
    released = write_released(tmp_path / "released", count=4, few=2)
    encoder = write_encoder(tmp_path / "encoder")
    seed = random.randrange(1000)
    pick, kills = random.Random(seed), 0
    with serving(eval_setup.judge) as llm:
        process = start(released, encoder, tmp_path / "whole", llm.url)
        output = process.communicate()[0].decode()
        assert process.returncode == cli.DONE, output
        for _ in range(KILLS):
            process = start(released, encoder, tmp_path / "killed", llm.url)
            try:
                process.communicate(timeout=pick.uniform(8, 40))
                break  # it came to its end first
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                assert process.returncode == -signal.SIGKILL
                kills += 1
                print(f"kill {kills}: {answered(tmp_path / 'killed')} answers on disk")
        process = start(released, encoder, tmp_path / "killed", llm.url)
        output = process.communicate()[0].decode()
        assert process.returncode == cli.DONE, f"seed {seed}: {output}"
    whole, killed = (
        json.loads((tmp_path / name / citation.FILE).read_text()) for name in ("whole", "killed")
    )
    scored = [cell for cell in whole["cells"] if cell["released"]]
    assert len(scored) >= 20 and kills >= 2, f"seed {seed}"
    assert killed | {"environment": 0} == whole | {"environment": 0}, f"seed {seed}"
    assert citation.check(tmp_path / "killed" / citation.FILE, tmp_path / "killed")[1] == []
    print(f"{kills} kills, seed {seed}: all {len(whole['cells'])} cells are equal, "
          f"{len(scored)} with a score")  # fmt: skip
