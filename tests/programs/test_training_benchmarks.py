"""The training benchmarks at a tiny size, without the other side: logic, resumption, skipping."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import same_weights  # noqa: E402
import sides  # noqa: E402


def program(name: str, *words: str, code: int = 0) -> dict:
    """The last line of a benchmark."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def gpu(part: str, folder: pathlib.Path, *words: str, code: int = 0) -> dict:
    return program(
        "gpu.py", "--part", part, "--size", "tiny", "--workdir", str(folder), *words, code=code
    )


@pytest.mark.slow
def test_benchmark_part_stops_in_time_and_resumes(tmp_path):
    """Training on a CPU; without a torch Python the other side is skipped by name."""
    stopped = gpu("train", tmp_path, "--minutes", "0", code=75)
    assert stopped["unfinished"][0] == "same" and stopped["ours"] is None
    found = gpu("train", tmp_path)
    assert not found["unfinished"] and not found["failed"]
    assert found["theirs"] is None and found["ratio"] is None
    assert found["skipped"] == "theirs: no --torch_python"
    rates = [m["sides"]["ours"]["rate"] for m in found["measured"].values()]
    assert found["ours"] == max(rates) > 0
    assert all(p["plan_gib"] > 0 for p in found["plan"].values())
    again = gpu("train", tmp_path, "--minutes", "0")  # nothing is left, so no time is needed
    assert again["measured"] == found["measured"]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["qlora", "decode", "vq"])
def test_other_benchmark_parts_run(part, tmp_path):
    found = gpu(part, tmp_path)
    assert found["ours"] > 0 and not found["failed"] and not found["unfinished"]


def test_a_python_without_the_packages_is_named(tmp_path):
    found = gpu("vq", tmp_path, "--minutes", "0", "--torch_python", sys.executable, code=75)
    assert found["skipped"] == f"theirs: {sys.executable} lacks torch"


@pytest.mark.slow
def test_train_cpu_runs():
    found = program("train_cpu.py", "--size", "tiny", "--rounds", "1", "--steps", "1")
    assert found["ours"] > 0 and found["ratio"] is None and "no --torch_python" in found["skipped"]


@pytest.mark.slow
def test_memory_growth_is_bounded():
    found = program("scaling_of_step.py", "--points", "2", "--repeats", "1", "--json")
    slopes = {
        axis: found[axis]["slopes"]["temporaries_mib"] for axis in ("length", "rows", "depth")
    }
    assert slopes["length"] > slopes["rows"] > 0 and slopes["depth"] < 1


# ---- what makes the sides comparable


def test_curves_agree_only_if_close_and_changing():
    falling = [9.0, 8.0, 7.0]
    assert sides.agree(falling, [9.0, 8.0, 7.0001], within=1e-4)["ok"]
    assert not sides.agree(falling, [9.0, 8.0, 7.01], within=1e-4)["ok"]
    flat = [9.0, 9.0, 9.0]
    assert not sides.agree(flat, flat, within=1e-4)["ok"]  # two sides that train nothing


def test_wide_and_narrow_integers_give_the_same_weights():
    """uint32, as JAX has it, and int64, as torch has it: products wrap at other places."""
    salt, place = same_weights.salt("layers.mlp.up_proj.kernel", 3), np.arange(100_000)
    narrow = same_weights.bits(place.astype(np.uint32), np.uint32(salt), np.uint32)
    with np.errstate(over="ignore"):
        wide = same_weights.bits(place.astype(np.int64), np.int64(salt), np.int64)
    assert (narrow == wide).all() and narrow.max() < 2**24
    value = (narrow / 2**24 - 0.5) * same_weights.width("a.kernel", 8)
    np.testing.assert_allclose(value.std(), same_weights.STD, rtol=0.01)
    assert abs(value.mean()) < 1e-3


def test_failed_side_is_reported():
    side = sides.Side("ours", [sys.executable, "-c", "import sys; sys.exit(3)"])
    with pytest.raises(sides.Failed, match="ours ended with exit code 3"):
        side.ask(do="steps", count=1)
