"""Two processes as two hosts: each answers a part on its own devices, the first one merges."""

import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from gs_server import fixture_gs, fixture_server  # noqa: F401
from run_setup import environment

from medmax_jax import cli
from medmax_jax.config import Mesh
from medmax_jax.generation import requests
from medmax_jax.sharding import make_mesh
from medmax_jax.storage import workdir
from medmax_jax.storage.folder import Folder

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "medmax_jax" / "tiny"
ITEMS = 24


def start(words: list[str]) -> list[subprocess.Popen]:
    """Two processes that join each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = environment(devices=2) | {"MEDMAX_COORDINATOR": address, "MEDMAX_PROCESSES": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", *words], env=shared | {"MEDMAX_PROCESS": str(index)}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[str]:
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [cli.DONE] * 2, outputs
    return outputs


def alone(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment(devices=2))
    assert done.returncode == cli.DONE


def kill_second(words: list[str], written: pathlib.Path) -> None:
    """Start two, and kill the second one when it has written its first lines; the other ends."""
    processes = start(words)
    while not (written.exists() and written.read_bytes().count(b"\n")):
        assert processes[1].poll() is None, processes[1].communicate()[0]
        time.sleep(0.005)
    processes[1].kill()
    assert processes[1].wait() == -signal.SIGKILL
    processes[0].kill()  # as the launcher of a pod does
    for process in processes:
        process.communicate()


def records(path: pathlib.Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len({row["id"] for row in rows}), "an answer stands twice"
    return {row["id"]: {k: v for k, v in row.items() if k != "seconds"} for row in rows}


@pytest.mark.slow
def test_generation_of_two_hosts_is_that_of_one(tmp_path):
    """Killed and started again: every prompt has one answer, and the images are the same bytes."""
    prompts = tmp_path / "prompts.jsonl"
    texts = [f"Describe image {n} of the chest" for n in range(ITEMS)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = ["medmax_jax.generate", f"--model={TINY}", f"--prompts={prompts}", "--mode=image"]
    words += ["--rows=2", "--out"]
    alone([*words, str(tmp_path / "one")])
    two = tmp_path / "two"
    kill_second([*words, str(two)], two / "answers.host_1_of_2.jsonl")
    first, second = finish(start([*words, str(two)]))
    assert "gallery: " in first and "gallery: " not in second
    answered = [set(re.findall(r"-> (\d+_0\.png)", output)) for output in (first, second)]
    assert answered[1] and not set.intersection(*answered)  # the first may have answered before
    assert records(two / "answers.jsonl") == records(tmp_path / "one" / "answers.jsonl")
    images = [{p.name: p.read_bytes() for p in f.glob("*.png")} for f in (two, tmp_path / "one")]
    assert images[0] == images[1] and len(images[0]) == ITEMS
    assert not list(two.glob("answers.host_*")) and (two / "gallery.html").exists()


@pytest.mark.slow
def test_evaluation_of_two_hosts_is_that_of_one(tmp_path):
    """Killed and started again: the summary is that of a single process."""
    config = ["--config=configs/eval_tiny.py", "--config.options=False", "--config.rows=4"]
    config += ["--config.probes=blank", "--config.counts.vqa_closed=40", "--config.window=8"]
    counts = ("vqa_mcq", "vqa_open", "captioning", "image_generation", "multimodal", "visual_chat")
    config += [f"--config.counts.{name}={2 * (name == 'image_generation')}" for name in counts]
    words = ["eval.run", *config, "--workdir"]
    alone([*words, str(tmp_path / "one")])
    two = tmp_path / "two"
    kill_second([*words, str(two)], two / "records.shard_1_of_2.jsonl")
    first, second = finish(start([*words, str(two)]))
    assert "report: " in first and "report: " not in second
    summaries = [json.loads((f / "summary.json").read_text()) for f in (two, tmp_path / "one")]
    same = ("scores", "floors", "baselines", "probes", "fingerprints", "settings", "errors")
    for name in (*same, "modality_ceiling"):
        assert summaries[0][name] == summaries[1][name], name
    parts = [records(path) for path in sorted(two.glob("records.shard_*.jsonl"))]
    assert len(parts) == 2 and not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == records(tmp_path / "one" / "records.jsonl")


@pytest.mark.slow
def test_two_hosts_share_folders_on_gs(gs, tmp_path, monkeypatch):
    """They have no disk in common; the second start finds all answers."""
    prompts = tmp_path / "prompts.jsonl"
    texts = [f"Describe image {n} of the chest" for n in range(4)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = ["medmax_jax.generate", f"--model={TINY}", f"--prompts={prompts}", "--mode=image"]
    alone([*words, "--out", str(tmp_path / "one")])
    for stage in ("first", "second"):
        monkeypatch.setenv(workdir.STAGE_VARIABLE, str(tmp_path / stage))
        outputs = finish(start([*words, "--out", f"{gs}/answers"]))
        assert f"gallery: {gs}/answers/gallery.html" in outputs[0], outputs
        for name in Folder(f"{gs}/answers").names():
            Folder(f"{gs}/answers").download(name, tmp_path / stage / "out" / name)
        two = tmp_path / stage / "out"
        assert records(two / "answers.jsonl") == records(tmp_path / "one" / "answers.jsonl")
        assert len(list(two.glob("*.png"))) == 4 and not list(two.glob("answers.host_*"))
    config = ["--config=configs/eval_tiny.py", "--config.options=False", "--config.probes="]
    config += ["--config.counts.vqa_closed=8", "--config.window=8", "--config.rows=4"]
    counts = ("vqa_mcq", "vqa_open", "captioning", "image_generation", "multimodal", "visual_chat")
    config += [f"--config.counts.{name}=0" for name in counts]
    alone(["eval.run", *config, "--workdir", str(tmp_path / "evaluated")])
    finish(start(["eval.run", *config, "--workdir", f"{gs}/eval"]))
    found = Folder(f"{gs}/eval").json("summary.json", allow_nonfinite=True)
    expected = json.loads((tmp_path / "evaluated" / "summary.json").read_text())
    assert found["scores"] == expected["scores"]


def test_a_part_is_refused_with_several_hosts_and_a_mesh_of_all(monkeypatch, tmp_path):
    from test_eval_models import settings, write_items

    from medmax_jax.eval.pipeline import stages

    mesh = make_mesh(Mesh(data=1, fsdp=1, tp=1))
    requests.require_local_mesh(mesh)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(requests.GenerateError, match="process 1 of 2, but the mesh has devices of"):
        requests.require_local_mesh(mesh)
    with pytest.raises(stages.EvalError, match="--shard is '0/2'; omit it, 2 hosts divide"):
        stages.run(
            settings(write_items(tmp_path)), tmp_path / "out", model="baseline:random",
            shard="0/2", progress=print,
        )  # fmt: skip
