"""The small model's step and decode loop, compiled for TPUs where there is none, within bounds."""

import collections
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
from test_plan import TOO_LARGE, plan

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu has no package for this machine"
)
SMALL = (
    "--config=configs/tiny.py", "--seq=128", "--per_chip_batch=2", "--json",
    "--config.model.param_dtype=bfloat16", "--config.model.compute_dtype=bfloat16",
    "--config.model.attention=splash", "--config.model.remat=all", "--config.lora.dropout=0.0",
    "--config.train.compile=gather",
)  # fmt: skip
SLICES = """
import numpy as np
from medmax_jax.config import Mesh
from medmax_jax.plan.topology import devices
from medmax_jax.plan.topology import parse
from medmax_jax.sharding import make_mesh



chips = devices(parse("v5e:2x2", slices=2))
array = make_mesh(Mesh(data=4, fsdp=2, tp=1), chips).devices
print([sorted({d.slice_index for d in array[row].flat}) for row in range(4)])
try:
    make_mesh(Mesh(data=1, fsdp=8, tp=1), chips)
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


def found(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "machine, gib",
    [
        ("v5e:2x2", 15.75),
        pytest.param("v5p:2x2x1", 95.74, marks=pytest.mark.slow),
        pytest.param("v6e:2x2", 31.25, marks=pytest.mark.slow),
    ],
)
def test_small_step_is_within_bounds(cache, machine, gib):
    words = (*SMALL, f"--topology={machine}", "--mesh=1,2,2", f"--cache={cache}")
    answer = found(plan(*words, "--decode=none"))
    assert answer["how"] == "compiled" and answer["fits"] and answer["hbm_gib"] == gib
    assert answer["peak_hbm_gib"] <= 0.03
    count = collections.Counter()
    for row in answer["collectives"]:
        count[row["kind"]] += row["count"]
    # Four layers, seven matrices, forward and backward: 56 gathers of weights, the adapters' own,
    # and the sums over tp; a weight gathered once more, or activations, would pass these.
    assert 56 <= count["all-gather"] <= 160
    assert 16 <= count["all-reduce"] + count["reduce-scatter"] <= 60
    assert count["collective-permute"] <= 100


def test_programs_are_compiled_once(cache):
    """After the test above: the same program is not compiled again, another one is not found."""
    words = (*SMALL, "--topology=v5e:2x2", "--mesh=1,2,2", f"--cache={cache}", "--decode=none")
    found(plan(*words))
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    found(plan(*words, "--config.optim.peak_lr=3e-4", "--price=1"))
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before


def test_decode_loop_compiles_and_reports_its_cache_size(cache):
    words = (*SMALL, "--topology=v5e:2x2", "--mesh=1,2,2", f"--cache={cache}")
    answer = found(plan(*words))["decode"]
    assert answer["fits"] and (answer["rows"], answer["slots"]) == (2, 512)
    assert 0 < answer["token_limit_s"] < answer["token_s"] < 1e-3
    # keys and values of one row of two, two heads of four, in bf16
    assert answer["cache_gib"] == pytest.approx(2 * 4 * 1 * 2 * 512 * 32 * 2 / 2**30, abs=1e-3)


def test_out_of_memory_is_a_valid_result(cache):
    """Scores of 16,384 rows are 17 GB in fp32."""
    answer = found(
        plan(
            "--config=configs/tiny.py", "--seq=256", "--per_chip_batch=16384", "--json",
            "--topology=v5e:1x1", "--mesh=1,1,1", "--decode=none", f"--cache={cache}",
            "--config.lora.dropout=0.0",
        )
    )  # fmt: skip
    assert not answer["fits"] and answer["peak_hbm_gib"] > 15.75
    assert "exceeds available HBM" in answer["error"]


def test_slices_communicate_only_along_the_data_axis():
    done = subprocess.run(
        [sys.executable, "-c", SLICES], cwd=ROOT, text=True, capture_output=True, timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows, refusal = done.stdout.splitlines()
    assert rows == "[[0], [0], [1], [1]]"
    assert refusal.startswith("config.mesh.data is 1 and the devices are in 2 slices")


@pytest.mark.slow
@pytest.mark.parametrize("line", TOO_LARGE)
def test_compiler_detects_what_does_not_fit(cache, line):
    name, machine, axes, rows, remat = line
    answer = found(
        plan(
            f"--config=configs/{name}.py", f"--topology={machine}", f"--mesh={axes}", "--json",
            f"--per_chip_batch={rows}", "--seq=2048", "--decode=none", f"--cache={cache}",
            "--config.model.attention=splash", f"--config.model.remat={remat}", seconds=3_600,
        )
    )  # fmt: skip
    assert not answer["fits"]
