"""Tests of the warnings about growing norms, of residual dropout, and of both in a run."""

import dataclasses
import functools
import json
import math
import re

import jax
import micro_run
import numpy as np
import pytest

from medmax_jax import config, sharding, train
from medmax_jax.checkpoints import resume
from medmax_jax.data import loader
from medmax_jax.models import chameleon
from medmax_jax.training import loss, reporting

LEAD = 20  # steps between the first warning and a loss of twice its start
QUICK = {"xla_backend_optimization_level": 0}


def report(text_log_z: float, image_log_z: float = math.nan, norm: float = 100.0) -> dict:
    row = dict(text_log_z=text_log_z, image_log_z=image_log_z)
    return row | dict(text_hidden_norm=norm, image_hidden_norm=math.nan)


def test_growth_of_log_z_and_norm_is_reported_once_per_growth():
    lowest: dict[str, float] = {}
    assert reporting.growth_warnings(report(9.0), lowest) == []
    assert reporting.growth_warnings(report(7.0, 8.0), lowest) == []
    assert reporting.growth_warnings(report(11.9, 12.9), lowest) == []
    assert lowest == dict(text_log_z=7.0, image_log_z=8.0, text_hidden_norm=100.0)
    (warning,) = reporting.growth_warnings(report(9.0, 13.1), lowest)
    assert "mean log Z at image targets is 13.1, up from 8: the loss may diverge" in warning
    assert reporting.growth_warnings(report(9.0, 14.0), lowest) == []  # not again
    (warning,) = reporting.growth_warnings(report(9.0, 18.2), lowest)
    assert "18.2, up from 13.1" in warning
    (warning,) = reporting.growth_warnings(report(9.0, norm=1001.0), lowest)
    assert "norm of the last layer at text targets is 1001, up from 100" in warning


def test_reports_are_in_the_log_and_in_the_metrics(tmp_path, capsys):
    """A run of two steps with z-loss and residual dropout; its log line has the values."""
    folder = micro_run.write(tmp_path / "r")
    run = micro_run.run(
        data__train=folder, train__steps=2, train__residual_dropout=0.05,
        loss__z=dict(text=1e-2, image=1e-3),
    )  # fmt: skip
    last = train.run(run, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    row = next(r for r in rows if r["kind"] == "train" and r["step"] == 2)
    names = ("log_z", "log_z_max", "max_logit", "hidden_norm")
    for name in [f"{m}_{n}" for m in ("text", "image") for n in names]:
        assert math.isfinite(row[name]) and row[name] == last[name]
    assert row["text_log_z_max"] >= row["text_log_z"] > row["text_max_logit"] > 0
    assert row["lora_a_norm"] > row["lora_b_norm"] > 0 and "param_norm" not in row
    # log Z is near log V = 9.08 of random weights; the mean of z (log Z)^2 is in between.
    assert 1e-3 * 9**2 < row["z_loss"] < 1e-2 * 9.2**2
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("step 2/2"))
    assert f"log Z {row['text_log_z']:.3g} (max" in line and " z-loss 0." in line


def test_residual_dropout_is_drawn_apart_from_adapter_dropout(tmp_path):
    run = micro_run.run(data__train=micro_run.write(tmp_path / "r"))
    batch = loader.train_batches(run, run.data.train).batch(0)
    with jax.set_mesh(mesh := sharding.make_mesh(run.mesh)):
        model = chameleon.create_model(run.model, run.vocab, run.lora, key=jax.random.key(0))
        placed = sharding.shard_batch(batch, mesh)

        @functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)
        def objective(key, rate):
            objective = loss.training_objective
            return objective(model, placed, key, trains="lora", residual_dropout=rate)[0]

        total = lambda key, rate: float(objective(key, rate))  # noqa: E731

        first, second = jax.random.key(1), jax.random.key(2)
        values = [total(first, 0.5), total(first, 0.5), total(second, 0.5)]
        assert values[0] == values[1] != values[2]
        # B is zero, so adapter dropout has no effect: any difference is residual dropout's.
        assert total(first, 0.0) == total(second, 0.0) != values[0]
        assert total(None, 0.5) == total(None, 0.0)  # evaluation has none
        np.testing.assert_allclose(values[0], total(None, 0.0), rtol=0.2)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("loss.z.text", -1e-4, "config.loss.z.text is -0.0001; it must be at least 0, and finite"),
        ("loss.z.image", float("nan"), "config.loss.z.image is nan; it must be at least 0"),
        ("loss.z.audio", 0.1, "config.loss.z.audio is not a field; the fields are text, image"),
        ("train.residual_dropout", 1.0, r"train.residual_dropout is 1.0; it must be in \[0, 1\)"),
    ],
)
def test_invalid_settings_are_refused_by_name(path, value, message):
    settings = config.to_dict(micro_run.run())
    *sections, field = path.split(".")
    part = settings
    for section in sections:
        part = part[section]
    part[field] = value
    with pytest.raises(config.ConfigError, match=message):
        config.from_config_dict(settings)


def test_settings_of_older_runs_mean_neither():
    settings = config.to_dict(run := micro_run.run())
    del settings["loss"], settings["train"]["residual_dropout"]
    assert config.from_config_dict(settings) == run
    assert dataclasses.asdict(run.loss.z) == dict(text=0.0, image=0.0)
    old = dict(settings, data={k: v for k, v in settings["data"].items() if k != "seed"})
    assert resume.with_added_fields(old)["loss"] == config.to_dict(run.loss)


@pytest.mark.slow
@pytest.mark.parametrize("z", [0.0, 1e-2])
def test_growth_is_reported_before_the_loss_explodes(tmp_path, capsys, z):
    """All weights train, the rate rises to 1,000 times a good one, and nothing is clipped."""
    folder = micro_run.write(tmp_path / "r", count=200)
    run = micro_run.run(
        data__train=folder, train__trains="full", lora__rank=0, train__steps=60,
        train__log_every=1, train__checkpoint_every=60, optim__peak_lr=3.0,
        optim__warmup_ratio=0.9, optim__clip_norm=1e9, loss__z=dict(text=z, image=z),
    )  # fmt: skip
    train.run(run, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    losses, norms = ([r[name] for r in rows] for name in ("loss", "grad_norm"))
    assert np.isfinite(losses).all() and np.isfinite(norms).all()
    exploded = next(r["step"] for r in rows if r["loss"] > 2 * losses[0])
    warned = re.search(r"WARNING: step (\d+): the mean (log Z|norm)", capsys.readouterr().out)
    assert int(warned[1]) + LEAD <= exploded
