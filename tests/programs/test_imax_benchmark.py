"""benchmarks/imax.py: cells, intervals, the slope by entries, the tables, and a quick form."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import imax  # noqa: E402
import imax_results as results  # noqa: E402

PAGE = ROOT / "docs" / "explanation" / "image_centric_results.md"
STORED = ROOT / "docs" / "explanation" / "image_centric" / "results.json"


@pytest.mark.parametrize(
    ("task", "answer", "family"),
    [
        ("VQA", "yes", "VQA closed"),
        ("VQA", "No.", "VQA closed"),
        ("VQA", "B", "VQA multiple choice"),
        ("VQA", "7", "VQA open"),
        ("VQA", "chest", "VQA open"),
        ("Visual Chat", "yes", "Visual Chat"),
    ],
)
def test_family_of_a_document(task, answer, family):
    assert results.family_of(task, answer) == family


def test_cells_average_documents_then_families():
    keys = {"1": ("a", "g"), "2": ("a", "g"), "3": ("b", "g"), "4": ("a", "h")}
    found = results.cells([{"1": 1.0, "2": 3.0, "3": 8.0, "4": 6.0}], keys)
    assert found == {"all": [[5.0, 6.0]], "a": [[2.0, 6.0]], "b": [[8.0]]}  # b: no column of h


def arms(names, value):
    """Return arms of 3 seeds and 8 groups, value(name, seed, group)."""
    grid = np.indices((3, 8))
    return {
        name: dict(nll={"all": value(name, *grid)}, accuracy={"all": value(name, *grid)},
                   probe=[[dict(spectral_entropy=1.0 + s, leading_share=0.5)] * 2
                          for s in range(3)],
                   batch=[[dict(spectral_entropy=1.0, leading_share=0.5)] * 2] * 3)
        for name in names
    }  # fmt: skip


def test_contrasts_are_paired_by_seed_and_group():
    """A difference that is the same in all cells, under large differences of seeds and groups."""
    shift = {"dmax": 0.0, "imax": -0.25}
    found = results.summary(arms(shift, lambda name, s, g: 10 * s + 3 * g**2 + shift[name]))
    (row,) = found["nll"]
    assert row["contrast"] == "imax - dmax" and row["diff"] == pytest.approx(-0.25)
    assert row["ci_low"] is None or row["ci_high"] - row["ci_low"] < 1e-6
    assert found["slopes"] == [] and len(found["probe"]) == 4

    rng = np.random.default_rng(0)
    noisy = results.summary(arms(shift, lambda name, s, g: rng.normal(size=s.shape)))
    (row,) = noisy["nll"]
    assert row["ci_low"] < 0 < row["ci_high"] and noisy["intervals"] >= 2


def test_slope_is_the_change_when_entries_double():
    names = [f"entries_{n}" for n in results.ENTRIES]
    exponent = {name: number for number, name in enumerate(names)}
    rng = np.random.default_rng(1)
    value = lambda name, s, g: g + 0.1 * exponent[name] + rng.normal(0, 0.01, s.shape)  # noqa: E731
    (row,) = results.summary(arms(names, value))["slopes"]
    assert row["ci_low"] < 0.1 < row["ci_high"] < 0.12
    assert row["means"] == pytest.approx([3.5, 3.6, 3.7, 3.8], abs=0.01)


def test_stages_end_where_the_tokens_are_equal():
    """Stages one and two have fixed steps, and the last one adapts."""
    stages = imax.settings_of("pseudo", 0, 70, 64, "P").stages
    assert [stage["steps"] for stage in stages] == [32, 21, 17]
    assert [stage.get("records", "") for stage in stages] == ["", "P", ""]
    stages = imax.settings_of("windows", 0, 70, 64).stages
    assert [stage.get("mixing") for stage in stages] == [None, dict(image_centric=True), None]
    assert not imax.settings_of("dmax", 0, 64, 64).mixing.image_centric
    assert imax.settings_of("imax", 0, 64, 64).mixing.image_centric


def test_a_folder_of_other_sizes_is_refused(tmp_path):
    for _ in range(2):
        imax.check_same(tmp_path, dict(steps=64, documents=576))
    with pytest.raises(SystemExit, match="use another folder"):
        imax.check_same(tmp_path, dict(steps=32, documents=576))


def test_the_page_has_the_stored_numbers():
    found = json.loads(STORED.read_text())
    page = PAGE.read_text()
    again = results.summary(found["arms"])
    assert json.loads(json.dumps(again)) == found["summary"]
    assert results.with_tables(page, found) == page
    without = [line for line in page.splitlines() if not line.startswith("| all |")]
    assert results.with_tables("\n".join(without), found) == page
    for arm in found["arms"].values():  # equal scored tokens within one step
        for run in arm["runs"]:
            assert abs(run["scored"] / run["target"] - 1) < 1 / min(run["steps"], found["steps"])


@pytest.mark.slow
def test_quick_form_trains_resumes_and_compares(tmp_path):
    words = ("--workdir", str(tmp_path / "w"), "--seeds", "1", "--steps", "12", "--out",
             str(tmp_path), "--arms", "dmax,imax,plain,windows")  # fmt: skip
    command = [sys.executable, str(ROOT / "benchmarks" / "imax.py"), *words]
    done = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True) for _ in range(2)]
    assert all(run.returncode == 0 for run in done), done[0].stderr[-3000:]
    found, again = (json.loads(run.stdout.splitlines()[-1]) for run in done)
    assert found["arms"] == again["arms"]  # nothing was trained again
    tasks = [arm["runs"][0]["tasks"] for arm in found["arms"].values()]
    assert all(counts == tasks[0] for counts in tasks)
    assert found["held_out"] > 200 and len(found["arms"]["imax"]["nll"]) == 9
    assert {row["contrast"] for row in found["summary"]["nll"]} == {
        "imax - dmax", "dmax - plain", "windows - dmax"
    }  # fmt: skip
    assert {"results.json", "results.png"} <= {path.name for path in tmp_path.iterdir()}
