"""The programs as functions, as a notebook calls them: everything in one process of its own."""

import json
import os
import pathlib
import subprocess
import sys
import types

import micro_run
import pytest
from run_setup import environment

import medmax_jax
from medmax_jax.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
# ml_collections reads config files with a method that Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")
SESSION = """
import logging, os, signal, sys, threading
import medmax_jax

assert "jax" not in sys.modules  # the import is cheap
from medmax_jax import evaluate, generate, load_config, plan, train
from medmax_jax.data import prepare_sample
import jax

def state():
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    loggers = [logging.getLogger(name) for name in (None, "absl")]
    mesh = jax.sharding.get_abstract_mesh()
    return handlers, [(x.level, list(x.handlers)) for x in loggers], threading.enumerate(), mesh

print("documents", prepare_sample("records", split="validation")["documents"])
fields = {"data.train": "micro", "train.steps": 4}
before = state()
print("first", train(load_config("micro.py", fields), "run").step)

def interrupt(step, metrics):
    if "train/loss" in metrics:
        seen.append(step)
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)  # as the interrupt of a notebook

seen = []
longer = load_config("micro.py", fields | {"train.steps": 8})
try:
    train(longer, "run", extend=True, on_metrics=interrupt)
except KeyboardInterrupt as stop:
    print("stopped", stop)
print("steps seen", seen)
print("resumed", train(longer, "run"))

settings = load_config("configs/tiny.py")
print("fits", plan(settings, "v5e:1x1", "plans", analytic=True)["fits"], settings.data.batch_size)
[answer] = generate("medmax_jax/tiny", ["Generate an MRI"], "answers", mode="image")
print("image", answer.images[0].size, repr(answer.text))

class Mine:
    def generate(self, requests):
        return ["yes" for request in requests]

counts = dict.fromkeys(("vqa_mcq", "vqa_open", "captioning", "image_generation", "multimodal"), 0)
chosen = dict(counts=counts | {"vqa_closed": 8}, baselines="constant", probes="", options=False)
print("scores", len(evaluate(Mine(), "sample", "evaluation", **chosen)["scores"]))
for call in (
    lambda: train(load_config("micro.py", fields | {"data.train": "none"}), "run"),
    lambda: plan(settings, "v5e:9", "plans"),
    lambda: generate("none", ["?"], "answers"),
):
    try:
        call()
    except Exception as error:
        print("error", type(error).__name__, error)
assert state() == before, (state(), before)
"""


def test_a_session_runs_every_program(tmp_path):
    """Train, extend, interrupt and resume, plan, generate, evaluate; nothing is left behind."""
    micro_run.write(tmp_path / "micro")
    (tmp_path / "micro.py").write_text("from micro_run import settings as get_config\n")
    variables = environment()
    variables["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", SESSION], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    for line in (
        "documents 228", "first 4", "resuming after step 4 of 8; the tables are in the log of the "
        "first start", "steps seen [5, 6]", "resuming after step 6 of 8; the tables are in the "
        "log of the first start", "fits True 8", "image (64, 64) ''",
        "error PlanError --topology=v5e:9; v5e has 2 dimensions, each 1 or more",
    ):  # fmt: skip
        assert line in lines, (line, done.stdout)
    for start in (
        "resumed TrainResult(step=8, loss=", "stopped SIGINT: stopped after step 6, checkpoint",
        "error RecordsError none: no such folder. To make it: python -m medmax_jax.data.prepare",
        "error GenerateError none",
    ):  # fmt: skip
        assert any(line.startswith(start) for line in lines), (start, done.stdout)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, 9))
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert f"scores {len(summary['scores'])}" in lines


def test_modules_of_programs_are_functions_too():
    """Whichever was imported first, and the modules keep their other names."""
    from medmax_jax import generate, plan, train
    from medmax_jax.generate import load
    from medmax_jax.plan import topology

    assert generate.load is load and plan.topology is topology and train.ERRORS
    for program in (generate, plan, train):
        assert isinstance(program, types.ModuleType) and callable(program)
    with pytest.raises(TypeError, match="missing a required argument: 'settings'"):
        train()
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        medmax_jax.trian  # noqa: B018


def test_load_config_is_that_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where configs/tiny.py is no file
    config = medmax_jax.load_config(
        "configs/tiny.py", {"optim.peak_lr": 1e-3, "vq.channel_mult": (1, 2), "data.train": "a b"}
    )
    assert config.optim.peak_lr == 1e-3 and config.vq.channel_mult == (1, 2)
    assert config.data.train == "a b" and config.model.num_layers == 4
    for path, fields, message in (
        ("configs/tiny.py", {"optim.lr": 1}, "did you mean --config.optim.peak_lr?"),
        ("configs/tiny.py", {"train.steps": "x"}, "train.steps=x: invalid literal"),
        ("configs/tinny.py", {}, "no such file; did you mean configs/tiny.py?"),
    ):
        with pytest.raises(ConfigError, match=message):
            medmax_jax.load_config(path, fields)
