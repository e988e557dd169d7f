"""The embedded suite through the server equals the evaluation in one process, item by item."""

import json
import subprocess
import sys

import pytest
from serving_setup import ROOT, serving

from medmax_jax.io import journal

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
        assert {k: v for k, v in served[item].items() if k != "model"} == {
            k: v for k, v in record.items() if k != "model"
        }
    assert scores == expected
