"""The shipped model behind the server: the embedded suite, the guide, and the benchmark."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from serving_setup import ROOT, serving

from medmax_jax.io import journal

OF_RUN = ("model", "seconds")  # of a record: what differs between two evaluations of a model
# What the config of the evaluation sets, as fields of a request.
PARAMETERS = json.dumps({"temperature": 0, "repetition_penalty": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"), [("tiny", []), ("mine", ["--adapter=medmax_jax/tiny_adapter"])]
)
def test_scores_of_the_suite_equal_those_in_process(tmp_path, name, words):
    def evaluate(kind, model, *more):
        command = [sys.executable, "-m", "eval.run", "--config=configs/eval_tiny.py",
                   "--config.probes=", "--config.options=False", "--config.baselines=constant",
                   "--config.counts.image_generation=0", "--config.counts.multimodal=0",
                   f"--model={model}", f"--workdir={tmp_path / kind}", *more]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1_800)
        assert done.returncode == 0, done.stdout + done.stderr
        records = journal.read_jsonl(tmp_path / kind / "records.jsonl")
        summary = json.loads((tmp_path / kind / "summary.json").read_text())
        return {record["id"]: record for record in records}, summary["scores"]

    with serving(
        tmp_path / "serve.log", "--model=medmax_jax/tiny", "--adapter=mine=medmax_jax/tiny_adapter"
    ) as server:
        served, scores = evaluate(
            "served", f"endpoint:{name}@{server.url}", f"--config.service.parameters={PARAMETERS}"
        )
        assert server.metric("generated_tokens_total", name) > 1_000
    local, expected = evaluate("local", "native:medmax_jax/tiny", *words)
    assert len(local) > 100 and served.keys() == local.keys()
    for item, record in local.items():
        assert {k: v for k, v in served[item].items() if k not in OF_RUN} == {
            k: v for k, v in record.items() if k not in OF_RUN
        }
    kept = ("task", "metric", "value", "n", "low", "high", "n_unparsed")
    assert [[row.get(k) for k in kept] for row in scores] == [
        [row.get(k) for k in kept] for row in expected
    ]


@pytest.mark.slow
def test_the_guide_runs_as_written(tmp_path):
    """Its blocks of curl and Python; not those that start the server and the benchmark."""
    page = (ROOT / "docs" / "guides" / "serve.md").read_text()
    for name in ("data", "medmax_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    with serving(
        tmp_path / "serve.log", "--model=medmax_jax/tiny", "--adapter=mine=medmax_jax/tiny_adapter"
    ) as server:
        blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", page, re.M | re.S)
        left = ("medmax_jax.serve --", "benchmarks/serve.py")
        code = [(kind, text) for kind, text in blocks if not any(word in text for word in left)]
        assert [kind for kind, _ in code] == ["bash", "python", "python"]
        outputs = []
        for kind, text in code:
            if kind == "bash" and not shutil.which("curl"):
                continue
            text = text.replace("http://127.0.0.1:8000/v1", server.url)
            words = ["bash", "-euo", "pipefail"] if kind == "bash" else [sys.executable]
            done = subprocess.run(
                [*words, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=900
            )
            assert done.returncode == 0, done.stderr
            outputs.append(done.stdout)
    answer, streamed = outputs[-2].splitlines()[:2]
    assert answer in ("yes", "no") and streamed.startswith(answer) and "image_url" in outputs[-2]
    assert (tmp_path / "ct.png").read_bytes().startswith(b"\x89PNG")
    assert "TextDelta" in outputs[-1] and "Finished(reason='stop'" in outputs[-1]


@pytest.mark.slow
def test_the_benchmark_runs_to_its_last_line():
    words = ["--size=tiny", "--rounds=1", "--requests=8", "--clients=4", "--minutes=0.1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/serve.py", *words], cwd=ROOT, capture_output=True, text=True,
        timeout=1_800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ratio"] > 0 and report["soak"]["complete"] > 0
    assert report["soak"]["mixed"] == report["soak"]["lost"] == 0
