"""One update is the same on every mesh: each attention, base and training mode, and pairs of them.

    loss, its parts, gradient norm, moments (the gradients, clipped), weights after the update

A gradient sums over rows and heads in another order on each mesh, so fp32 agrees within 1e-5 of
the largest; that is also what one device gives against itself with another batch order.
"""

import functools

import jax
import micro_run
import numpy as np
import pytest
from test_step import numpy, setup, take

from medmax_jax import config, sharding
from medmax_jax.checkpoints import safetensors_file
from medmax_jax.models import chameleon
from medmax_jax.training import metrics

MESHES = ((1, 8, 1), (2, 2, 2), (1, 2, 4))
QUANT = dict(model__hidden_size=512, model__intermediate_size=256, train__init_from="abstract")
LONG = dict(data__seq_len=128)
PLAIN = dict(lora__dropout=0.0)
Z_LOSS = dict(loss__z=dict(text=1e-3, image=1e-2))
CASES: dict[str, dict] = {
    # pairs that interact, on a mesh of all axes in every run
    "splash, dropout, remat, z-loss": LONG | Z_LOSS | dict(
        model__attention="splash_interpret", model__remat="attn", train__residual_dropout=0.05
    ),
    "nf4, accumulation, dropout, remat, z-loss": QUANT | Z_LOSS | dict(
        model__quant="nf4", optim__accumulate=2, model__remat="dots"
    ),
    "image head, bf16 base": dict(
        train__trains="image_head", lora__rank=0, model__param_dtype="bfloat16"
    ),
    # each by itself
    "xla": PLAIN,
    "splash": LONG | PLAIN | dict(model__attention="splash_interpret"),
    "dropout, remat": dict(model__remat="all"),
    "bf16 base": PLAIN | dict(model__param_dtype="bfloat16"),
    "int8": QUANT | PLAIN | dict(model__quant="int8"),
    "int4": QUANT | PLAIN | dict(model__quant="int4"),
    "nf4": QUANT | PLAIN | dict(model__quant="nf4"),
    "full": dict(train__trains="full", lora__rank=0),
    "image head": dict(train__trains="image_head", lora__rank=0),
    "accumulation": PLAIN | dict(optim__accumulate=2),
}  # fmt: skip
QUICK = ("splash, dropout, remat, z-loss", "image head, bf16 base")  # the others are slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return micro_run.write(tmp_path_factory.mktemp("records") / "r", count=120)


@functools.cache
def run_of(case: str, folder: str) -> config.Run:
    sizes = dict(model__num_heads=8, model__num_kv_heads=4, model__head_dim=32)
    return micro_run.run(
        data__train=folder, data__batch_size=16, optim__warmup_ratio=0.0, train__steps=100,
        **(sizes | CASES[case]),
    )  # fmt: skip


@functools.cache
def updated(case: str, folder: str, shape: tuple[int, int, int]) -> tuple[dict, dict]:
    """(reported means, the state after an update) of a step on a mesh."""
    run = run_of(case, folder)
    with jax.set_mesh(sharding.make_mesh(config.Mesh(data=1, fsdp=1, tp=1))):
        model = filled(chameleon.abstract_model(run.model, run.vocab, run.lora))
    s = setup(run, model, shape)
    assert np.asarray(s.batch.segments).max() > 1  # packed
    state, sums = take(s, s.fresh())
    kinds = {f"kind {i}": v for i, v in enumerate(np.ravel(sums.kinds.total)[:8])}
    return metrics.compute_means(sums) | kinds, numpy(state)


def filled(like: chameleon.Chameleon) -> chameleon.Chameleon:
    """Random weights large enough to matter, B not zero; any code of a quantised matrix."""
    rng = np.random.default_rng(0)

    def fill(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if np.issubdtype(leaf.dtype, np.integer):
            value = rng.integers(0, 256, leaf.shape).astype(np.uint8).view(leaf.dtype)
        elif "kernel.scale" in name:
            value = rng.uniform(0.5, 1, leaf.shape) * (
                3e-4 if like.config.quant == "int8" else 0.02
            )
        else:
            value = rng.standard_normal(leaf.shape) * 0.1 + name.endswith("norm.scale")
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    named = safetensors_file.flatten_named(like)
    return jax.tree.unflatten(jax.tree.structure(like), [fill(n, x) for n, x in named.items()])


@pytest.mark.parametrize(
    "case, shape",
    [(case, (2, 2, 2)) for case in QUICK]
    + [pytest.param(c, m, marks=pytest.mark.slow) for c in CASES for m in MESHES
       if (c in QUICK) <= (m != (2, 2, 2))],
    ids=str,
)  # fmt: skip
def test_an_update_is_the_same_on_every_mesh(case, shape, folder):
    (want_means, want), (means, got) = (updated(case, folder, m) for m in ((1, 1, 1), shape))
    for name, value in want_means.items():
        np.testing.assert_allclose(means[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert want.keys() == got.keys()
    for name, value in want.items():
        atol = 1e-5 * max(np.abs(value).max(), 1e-12)
        if name.startswith("trainable"):  # Adam's first update is lr * sign(g): sure where g is
            moment = np.abs(want[name.replace("trainable", "opt_state.1.0.mu")])
            sure = moment > 1e-3 * moment.max()
            assert sure.any(), name  # few rows of an embedding are in a batch
            np.testing.assert_allclose(got[name][sure], value[sure], atol=2e-5, err_msg=name)
        else:
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=atol, err_msg=name)
