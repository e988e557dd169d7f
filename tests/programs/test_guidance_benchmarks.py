"""benchmarks/guidance.py and guidance_toy.py: exact distributions, intervals, and quick forms."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from generate_setup import noise
from scipy import stats

from medmax_jax.checkpoints import safetensors_file
from medmax_jax.models import chameleon
from medmax_jax.sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import guidance_results  # noqa: E402
import guidance_toy as toy  # noqa: E402


@pytest.fixture(scope="module")
def chain() -> toy.Chain:
    return toy.make_chain(0)


def test_exact_streams_are_bayes_rule(chain):
    """Against sums over all images, without a posterior."""
    images, streams = toy.all_images(), toy.exact_streams(chain)
    given = chain.start[:, images[:, 0]]
    for place in range(1, toy.IMAGE):
        given = given * chain.move[:, images[:, place - 1], images[:, place]]
    np.testing.assert_allclose(np.exp(toy.guided(streams, 1.0)), given, rtol=1e-4)
    marginal = np.broadcast_to(toy.PRIOR @ given, given.shape)
    np.testing.assert_allclose(np.exp(toy.guided(streams, 0.0)), marginal, rtol=1e-4)
    np.testing.assert_allclose(np.exp(toy.guided(streams, 3.0)).sum(1), 1, rtol=1e-4)


def test_guidance_of_one_code_is_that_of_the_image(chain):
    """Normalizing at each code differs from normalizing once; for the last code alone it cannot."""
    streams, last = toy.exact_streams(chain), slice(0, toy.CODES)  # images that differ in the last
    by_code, whole = toy.guided(streams, 3.0), toy.guided_as_a_whole(chain, 3.0)
    assert toy.kl(by_code, whole) > 0.05
    shift = (by_code - whole)[:, last]
    np.testing.assert_allclose(shift, np.repeat(shift[:, :1], toy.CODES, 1), atol=1e-4)
    for scale in (0.0, 1.0):
        assert abs(toy.kl(toy.guided(streams, scale), toy.guided_as_a_whole(chain, scale))) < 1e-5


def test_documents_are_drawn_from_the_chains(chain):
    conditions, images = toy.draw(chain, 40_000, seed=1)
    numbers = np.ravel_multi_index(images.T[:2], (toy.CODES,) * 2)
    for condition, prior in enumerate(toy.PRIOR):
        chosen = numbers[conditions == condition]
        expected = (chain.start[condition][:, None] * chain.move[condition]).reshape(-1)
        counts = np.bincount(chosen, minlength=expected.size)
        assert stats.chisquare(counts, expected * len(chosen)).pvalue > 1e-3
        assert abs(len(chosen) / 40_000 - prior) < 0.01


def test_decoding_samples_the_distribution_of_the_logits(chain):
    """With random weights, whose streams differ: a wrong stream or order of codes is found."""
    run = toy.run_of(pathlib.Path("none"), dropout=0.0, seed=0, steps=1)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=1))
    mesh = make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        abstract = chameleon.abstract_model(run.model, run.vocab, run.lora)
        graph, *states = nnx.split(abstract, nnx.LoRAParam, ..., graph=False)
        named = noise(abstract, std=0.4)
        flat = safetensors_file.flatten_named(states[1])
        leaves = [jax.device_put(named[name], leaf.sharding) for name, leaf in flat.items()]
        base = jax.tree.unflatten(jax.tree.structure(states[1]), leaves)
        model = nnx.merge(graph, states[0], base)
    streams, exact = toy.model_streams(run, model), toy.exact_streams(chain)
    assert toy.kl(toy.guided(streams, 0.0), toy.guided(streams, 1.0)) > 0.05  # streams differ
    ours, target = toy.guided(streams, 2.0), toy.guided(exact, 2.0)
    images = toy.decoded(run, model, scale=2.0, count=400, seed=0)
    ratios = np.take_along_axis(ours - target, images, axis=1)
    error = np.sqrt(toy.PRIOR**2 @ ratios.var(1, ddof=1) / 400)
    assert abs(toy.PRIOR @ ratios.mean(1) - toy.kl(ours, target)) < 4 * error


def test_intervals_cover_seeds_and_prompts():
    """Against Student's t where one factor alone varies, and by coverage where both do."""
    values = np.random.default_rng(0).normal(size=5)
    found = guidance_results.crossed_interval(values)
    t = stats.t.interval(0.95, 4, values.mean(), values.std(ddof=1) / np.sqrt(5))
    np.testing.assert_allclose([found["ci_low"], found["ci_high"]], t)
    rng, covered = np.random.default_rng(1), []
    for _ in range(400):
        seeds, prompts = rng.normal(size=(3, 1)), rng.normal(size=(1, 20))
        row = guidance_results.crossed_interval(0.3 * seeds + prompts + rng.normal(size=(3, 20)))
        covered.append(row["ci_low"] < 0 < row["ci_high"])
    assert 0.93 < np.mean(covered) < 1
    assert guidance_results.crossed_interval([[1.0, 2.0]])["ci_low"] is None  # one seed


def program(name: str, *words: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_toy_shows_the_difference(tmp_path):
    """One seed, a third of the steps: guidance is far from exact without dropout."""
    words = ("--seeds", "1", "--steps", "160", "--images", "100")
    found = program("guidance_toy.py", "--scratch", str(tmp_path), "--out", str(tmp_path), *words)
    without, dropped = ({r["scale"]: r[arm]["value"] for r in found["rows"]}
                        for arm in guidance_results.ARMS)  # fmt: skip
    assert dropped[0] < without[0] / 2 and dropped[3] < without[3] / 1.5
    assert abs(dropped[1] - without[1]) < 0.3
    counts = found["decoded"]
    assert counts["within"] > 0.6 * counts["pairs"]
    tokens = [seeds[0]["tokens"] for seeds in found["arms"].values()]
    assert abs(tokens[0] / tokens[1] - 1) < 0.02
    assert (tmp_path / "toy.png").stat().st_size > 5_000


@pytest.mark.slow
def test_embedded_runs(tmp_path):
    words = ("--seeds", "1", "--steps", "2", "--images", "2")
    found = program("guidance.py", "--scratch", str(tmp_path), "--out", str(tmp_path), *words)
    for name in ("match", "kid", "diversity"):
        assert [row["scale"] for row in found["summary"][name]] == [1.0, 1.5, 2.0, 3.0, 5.0]
    assert all(0 <= row["with dropout"]["value"] <= 1 for row in found["summary"]["match"])
    assert {"embedded.json", "embedded.png", "samples.png"} <= {p.name for p in tmp_path.iterdir()}
