"""The benchmarks of decoding run to their last line: ours alone, and compiled for a TPU."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def last_line(*words):
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_only_our_side_runs_without_torch_python():
    report = last_line("benchmarks/decode_cpu.py", "--size=tiny", "--rounds=1")
    assert report["ratio"] is None and report["skipped"] == "theirs: no --torch_python"
    assert report["ours"] > 0 and report["shared"]["same"]
    assert set(report["guidance"]["tokens_per_second"]) == {"1", "2", "3"}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu here")
def test_no_token_copies_the_cache():
    report = last_line("benchmarks/decode_aot.py", "--layers=2")
    assert report["fits"] and report["copies"]["loops"] == 0
    assert report["temp"] <= report["cache"] + 0.1  # half a copy for each chunk, not for each token
