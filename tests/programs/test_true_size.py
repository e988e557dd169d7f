"""The stages of true_size.py: on tiny widths they run, and too small machines are refused."""

import argparse
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.slow
def test_every_stage_runs_on_tiny_widths(tmp_path):
    """Without a torch Python; what a stage needs of the ones before it is there."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "true_size.py"),
        "--scratch",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, "--smoke"], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["skipped"] == "no --torch_python"
    stages = {name: result["found"] for name, result in found["stages"].items()}
    assert stages["records"]["documents"] == 65 and len(stages["records"]["tasks"]) == 7
    assert stages["forward"]["documents"] > 1 and stages["forward"]["image_tokens"] >= 128
    assert list(stages["train"]["losses"]) == ["1", "2", "3"] and stages["train"]["resumed"]
    assert stages["evaluate"]["items"] == 8
    assert stages["quantize"]["correlation of logits"]["int8"] > 0.98
    assert all(0 < result["peak_gb"] < 3 for result in found["stages"].values())
    assert not tmp_path.exists()  # it cleans up


@pytest.mark.parametrize("short", ["memory", "disk"])
def test_a_stage_states_its_need_before_it_starts(short, tmp_path, monkeypatch):
    import true_size

    args = argparse.Namespace(scratch=tmp_path, smoke=False)
    pipeline, stage = true_size.Pipeline(args), true_size.STAGES["inputs"]
    free = {"memory": 10**12, "disk": 10**12} | {short: 2 * 10**9}
    usage = argparse.Namespace(free=free["disk"])
    monkeypatch.setattr(true_size.full_check, "available_memory", lambda: free["memory"])
    monkeypatch.setattr(true_size.shutil, "disk_usage", lambda _: usage)
    need = {"memory": stage.memory_gb, "disk": stage.disk_gb}[short]
    with pytest.raises(SystemExit, match=f"inputs needs {need} GB of {short}, but 2.0 GB are free"):
        true_size.check("inputs", stage, pipeline)
    monkeypatch.setattr(true_size.full_check, "available_memory", lambda: 10**12)
    monkeypatch.setattr(true_size.shutil, "disk_usage", lambda _: argparse.Namespace(free=10**12))
    true_size.check("inputs", stage, pipeline)
    with pytest.raises(SystemExit, match="stage convert needs inputs; add --stage inputs"):
        true_size.check("convert", true_size.STAGES["convert"], pipeline)
