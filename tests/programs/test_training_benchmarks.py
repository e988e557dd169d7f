"""Benchmarks of training and of accelerators, tiny and without the other side."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import accelerator  # noqa: E402
import accelerator_page  # noqa: E402
import accelerator_parts  # noqa: E402
import same_weights  # noqa: E402
import sides  # noqa: E402
import tpu  # noqa: E402

from medmax_jax import flops  # noqa: E402


def program(name: str, *words: str, code: int = 0) -> dict:
    """The last line of a benchmark."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- gpu.py and tpu.py


def smoke(name: str, folder: pathlib.Path, *words: str, code: int = 0) -> dict:
    return program(f"{name}.py", "--smoke", "--workdir", str(folder), *words, code=code)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_smoke_measures_every_part_and_resumes(name, tmp_path):
    """On a CPU, of which tpu.py uses two devices; without torch the other side is skipped."""
    stopped = smoke(name, tmp_path, "--minutes", "0", code=75)
    assert stopped["unfinished"] and not stopped["measurements"]
    found = smoke(name, tmp_path)
    records = found["measurements"]
    assert list(records) == stopped["unfinished"] and not found["unfinished"]
    assert {r["outcome"] for r in records.values()} == {"measured"}
    assert {r["part"] for r in records.values()} == {*accelerator_parts.PARTS}
    assert {r["chips"] for r in records.values()} == ({1, 2} if name == "tpu" else {1})
    assert all(r["sides"]["ours"]["rate"] > 0 for r in records.values())
    assert all(r["plan"]["gib"] > 0 for r in records.values() if r["part"] != "vq")
    page = (tmp_path / "page.html").read_text()
    assert "no roofline: unknown chip cpu" in page and all(name in page for name in records)
    again = smoke(name, tmp_path, "--minutes", "0")  # nothing is left, so no time is needed
    assert again["measurements"] == records


def test_a_python_without_the_packages_is_named(tmp_path):
    words = ("--parts", "vq", "--minutes", "0", "--torch_python", sys.executable)
    found = smoke("gpu", tmp_path, *words, code=75)
    assert found["skipped"]["vq"] == f"{sys.executable} lacks torch"
    assert found["unfinished"] == ["vq: encode, 1 image", "vq: decode, 1 image"]


@pytest.fixture(scope="module")
def seven(tmp_path_factory) -> dict[str, accelerator_parts.Measurement]:
    """The measurements of 7B on one TPU chip and on four, by name."""
    found = accelerator_parts.measurements(
        [*accelerator_parts.PARTS], tpu.TPU, chips=4, smoke=False,
        folder=tmp_path_factory.mktemp("seven"), theirs=set(),
    )  # fmt: skip
    assert [m.part for m in found[:4]] == ["train", "qlora", "int8", "decode"]
    return {m.name: m for m in found}


def measured(m: accelerator_parts.Measurement, **side) -> dict:
    """The record of made-up measurements."""
    chip = flops.CHIPS["v5p"]
    side = dict(device="TPU v5p", peak_gib=None, versions=dict(jax="0"), seconds=[2.0]) | side
    record = dict(
        part=m.part, unit=m.unit, chips=m.chips, plan=accelerator_parts.plan(m, chip),
        outcome="measured", sides=dict(ours=accelerator._rates(m, side)),
    )  # fmt: skip
    return record | accelerator._compared(m, record, chip)


def test_records_have_utilization_and_errors_of_the_plan(seven):
    m = seven["train: 4 rows per chip, remat attn, splash, 4 chips"]
    record = measured(m, tokens=30_000.0, attended_length=2_048.0, peak_gib=50.0)
    assert record["sides"]["ours"]["rate"] == 15_000  # real tokens, not positions
    # 3,750 tokens/s of a chip, where 7,961 are half of the peak (tests/programs/test_flops.py).
    assert record["utilization"]["mfu_lora"] == pytest.approx(0.5 * 3_750 / 7_961, rel=1e-3)
    plan, error = record["plan"], record["plan_error"]
    assert error["seconds"] == pytest.approx(plan["seconds"] / 2 - 1, abs=1e-3)
    assert error["gib"] == pytest.approx(plan["gib"] / 50 - 1, abs=1e-3)
    assert record["roofline"]["flops_per_s"] < flops.CHIPS["v5p"].flops


def test_plan_of_decoding_is_bound_by_memory(seven):
    """One row reads the weights once per token; more rows add a cache each."""
    single, many = (
        accelerator_parts.plan(seven[f"decode: {rows}"], flops.CHIPS["v5p"])
        for rows in ("1 row", "32 rows")
    )
    weights = 2 * (7_034_847_232 - 65_536 * 4_096)  # bf16, without the embedding
    assert single["seconds"] == pytest.approx(256 * weights / 2.765e12, rel=0.1)
    assert many["gib"] - single["gib"] == pytest.approx(31 * 1_290 * 2**19 / 2**30, abs=0.1)
    assert single["seconds"] < many["seconds"]
    four = accelerator_parts.plan(seven["decode: 1 row, 4 chips"], flops.CHIPS["v5p"])
    assert four["seconds"] == pytest.approx(single["seconds"] / 4, rel=1e-3)


def test_page_shows_limits_and_what_did_not_fit(seven):
    m, other = seven["train: 4 rows per chip, remat attn, splash"], seven["decode: 32 rows"]
    failed = dict(part="decode", unit="tokens/s", chips=1, outcome="out of memory", message="full")
    failed["plan"] = accelerator_parts.plan(other, flops.CHIPS["v5p"])
    results = dict(
        machine=dict(platform="tpu", kind="TPU v5p", chips=4, smoke=False), program="tpu.py",
        measurements={
            m.name: measured(m, tokens=8_192.0, attended_length=2_048.0), other.name: failed
        },
        environment={"date": "2026-01-01", "commit": "abc"}, comparison={},
        unfinished=["image: 1 row"], skipped=dict(train="no --torch_python"),
    )  # fmt: skip
    page = accelerator_page.page(results)
    assert "date 2026-01-01" in page and "commit abc" in page
    assert "limits of v5p: 459 TFLOP/s in bf16, 2.77 TB/s" in page and "no roofline" not in page
    assert "1 measured, 1 out of memory, 1 not started." in page
    assert f"{failed['plan']['gib']:.3f}" in page and "the same command resumes" in page


def test_outcomes_that_are_results_are_not_repeated():
    assert not accelerator._is_done(None, 180)
    for outcome, done in (("measured", True), ("out of memory", True), ("failed", False)):
        assert accelerator._is_done(dict(outcome=outcome), 180) is done
    late = dict(outcome="time limit", limit_s=180)
    assert accelerator._is_done(late, 180) and not accelerator._is_done(late, 300)


def test_the_ratio_requires_equal_results():
    def record(agreement, **rates):
        return dict(
            part="train", chips=1, **agreement, sides={n: dict(rate=r) for n, r in rates.items()}
        )

    for ok, ratio in ((True, 1.5), (False, None)):
        done = dict(
            same=record(dict(agreement=dict(ok=ok)), ours=2.0, theirs=4.0),
            ours=record({}, ours=9.0), theirs=record({}, theirs=6.0),
        )  # fmt: skip
        found = accelerator._comparison(done)["train"]
        assert (found["ours"], found["theirs"], found["ratio"]) == (9.0, 6.0, ratio)


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


SIDE = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import sides; "


@pytest.mark.parametrize(
    "code, outcome, message",
    [
        ("import jax.numpy as jnp; sides.serve(lambda: jnp.zeros(2**50))", "out of memory", "ours"),
        ("sides.serve(lambda: 1 / 0)", "failed", "ours: division by zero"),
        ("import time; time.sleep(600)", "time limit", "ours was stopped after 1 s"),
    ],
)
def test_outcome_of_a_failed_side(code, outcome, message):
    limit = 1 if outcome == "time limit" else 100
    side = sides.Side("ours", [sys.executable, "-c", SIDE + code], limit_s=limit)
    with pytest.raises(sides.Failed, match=message) as caught:
        side.ask(do="steps", count=1)
    side.close()
    assert caught.value.outcome == outcome
