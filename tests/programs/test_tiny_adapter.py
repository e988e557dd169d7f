"""The shipped adapter: its name, its recipe, and the examples of the README that it answers."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from medmax_jax import config
from medmax_jax.checkpoints import export, resume
from medmax_jax.config import build
from medmax_jax.configs import eval_tiny, tiny_instruct
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.eval.config import Settings
from medmax_jax.eval.models import loading
from medmax_jax.generation import model_bundle
from medmax_jax.io.run_files import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
ADAPTER = ROOT / "medmax_jax" / "tiny_adapter"
RECIPE = (ADAPTER / "README.md").read_text()
EXAMPLE = re.compile(r"^(python -m medmax_jax\.generate .*)\n#   -> (.*)$", re.M)
LOSSES = re.compile(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", re.M)


def test_the_readmes_example_prints_the_answer_of_the_readme(tmp_path):
    examples = EXAMPLE.findall((ROOT / "README.md").read_text())
    assert len(examples) == 1
    command, answer = examples[0]
    words = shlex.split(command)
    flags = dict(word[2:].split("=", 1) for word in words[3:])
    sample = pathlib.Path("data/sample")
    rows = read_manifest(ROOT / sample / "manifest.jsonl")
    assert [r["split"] for r in rows if str(sample / r["file"]) == flags["image"]] == ["test"]
    assert (flags["model"], flags["adapter"]) == export.SHIPPED
    words = [f"--out={tmp_path}" if word.startswith("--out=") else word for word in words[1:]]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert f"\n  -> {answer}\n" in done.stdout, done.stdout + done.stderr
    [line] = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(line)["segments"] == [{"text": answer}]


def test_the_shipped_folders_are_found_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export.locate("medmax_jax/tiny_adapter") == str(ADAPTER)
    settings = build(Settings, eval_tiny.get_config())
    model = (settings.model, settings.adapter, False, settings)
    spec = loading.parse_model_spec(*model, progress=print)
    assert pathlib.Path(spec.adapter) == ADAPTER and spec.adapter_digest
    assert spec.fingerprint == export.base_fingerprint(ROOT / "medmax_jax" / "tiny")
    g = model_bundle.load("medmax_jax/tiny", adapter="medmax_jax/tiny_adapter")
    assert g.model.config.num_layers == 4
    (tmp_path / "medmax_jax" / "tiny").mkdir(parents=True)  # a folder of this name comes first
    assert export.locate("medmax_jax/tiny") == "medmax_jax/tiny"
    assert export.locate("runs/tiny_adapter") == "runs/tiny_adapter"


def test_the_shipped_adapter_is_that_of_its_config():
    stored = json.loads((ADAPTER / "adapter_config.json").read_text())
    run = config.from_config_dict(tiny_instruct.get_config())
    of_config = json.loads(json.dumps(config.to_dict(run)))
    for section, fields in stored["config"].items():
        for name, value in fields.items():  # later versions may add fields
            assert of_config[section][name] == value, f"{section}.{name}"
    added = resume.with_added_fields(stored["config"])
    assert all(added[name] == of_config[name] for name in ("loss", "stages"))
    assert stored["base"] == export.base_fingerprint(ROOT / "medmax_jax" / "tiny")
    assert stored["step"] == run.train.steps and stored["credentials"] == {"no": 16_964}


@pytest.mark.slow
def test_the_recipe_repeats_its_first_steps(tmp_path):
    """The commands of the adapter's README, up to the second row of its table of losses."""
    commands = re.search(r"```bash\n(.*?)```", RECIPE, re.S)[1].splitlines()
    expected = {int(step): tuple(map(float, rest)) for step, *rest in LOSSES.findall(RECIPE)}
    first = sorted(expected)[:2]
    for name in ("configs", "data", "eval", "medmax_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    *prepare, train = [[sys.executable, *shlex.split(line)[1:]] for line in commands]
    for command in prepare:
        subprocess.run(command, cwd=tmp_path, env=env, check=True)
    metrics = tmp_path / "runs" / "tiny_instruct" / "metrics.jsonl"
    process = subprocess.Popen(train, cwd=tmp_path, env=env)
    rows: dict[int, tuple[float, ...]] = {}
    deadline = time.monotonic() + 1_200
    while not set(first) <= set(rows) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(1)
        found = read_metrics(metrics)[0] if metrics.exists() else []
        rows = {
            row["step"]: (row["loss"], row["text_nll"], row["image_nll"])
            for row in found
            if row["kind"] == "train"
        }
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    for step in first:
        assert rows[step] == pytest.approx(expected[step], rel=2e-3), step
