"""The schedule by hand-computed values, the clip, and what weight decay touches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medmax_jax import config
from medmax_jax.configs import base
from medmax_jax.training import optimizer

OPTIM = config.build(config.Optim, base.get_config().optim)


def rate(k: int, steps: int = 10, **changes: float) -> float:
    return float(optimizer.learning_rate(k, dataclasses.replace(OPTIM, **changes), steps=(steps,)))


@pytest.mark.parametrize(
    "k, factor",
    [  # 10 steps, warm-up ratio 0.2, so w = 2; torch's LambdaLR multiplies the peak by
        (0, 0.0),  # 0 / 2
        (1, 0.5),  # 1 / 2
        (2, 1.0),  # (1 + cos(pi * 0 / 8)) / 2
        (3, 0.9619397662556434),  # (1 + cos(pi / 8)) / 2
        (4, 0.8535533905932737),  # (1 + cos(pi / 4)) / 2
        (6, 0.5),  # (1 + cos(pi / 2)) / 2
        (9, 0.03806023374435663),  # (1 + cos(7 pi / 8)) / 2
        (10, 0.0),  # after the last step
        (12, 0.0),  # and it stays there
    ],
)
def test_warm_up_and_cosine(k, factor):
    assert rate(k, peak_lr=1e-4, warmup_ratio=0.2) == pytest.approx(1e-4 * factor, abs=1e-11)
    with_floor = 1e-4 * (0.1 + 0.9 * factor) if k >= 2 else 1e-4 * factor
    assert rate(k, peak_lr=1e-4, warmup_ratio=0.2, final_lr_ratio=0.1) == pytest.approx(with_floor)


def test_warm_up_is_rounded_up():
    """ceil(0.1 * 25) = 3 steps, as the trainer of the published run."""
    assert rate(3, steps=25, peak_lr=1.0, warmup_ratio=0.1) == 1.0
    assert rate(2, steps=25, peak_lr=1.0, warmup_ratio=0.1) == pytest.approx(2 / 3)


def test_no_warm_up_starts_at_the_peak():
    assert rate(0, peak_lr=1.0, warmup_ratio=0.0) == 1.0
    assert rate(0, steps=1, peak_lr=1.0, warmup_ratio=0.0) == 1.0


def test_first_updates_match_adamw_after_clipping():
    """Two updates against AdamW written out; the gradient of norm 5 is scaled to norm 1."""
    settings = dataclasses.replace(
        OPTIM, peak_lr=0.1, warmup_ratio=0.0, final_lr_ratio=1.0, weight_decay=0.5
    )
    tx = optimizer.make_optimizer(settings, steps=(10,))
    params = {"kernel": jnp.array([1.0, 2.0]), "scale": jnp.array([3.0])}
    state = tx.init(params)
    m, v, expected = np.zeros(3), np.zeros(3), np.array([1.0, 2.0, 3.0])
    for k in (1, 2):
        grads = {"kernel": jnp.array([3.0, 0.0]), "scale": jnp.array([4.0])}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        g = np.array([3.0, 0.0, 4.0]) / 5.0
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        direction = (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
        expected = expected - 0.1 * (direction + 0.5 * expected * np.array([1, 1, 0]))
        np.testing.assert_allclose(np.r_[params["kernel"], params["scale"]], expected, rtol=1e-5)


def test_small_gradients_are_not_scaled_up():
    tx = optax.clip_by_global_norm(OPTIM.clip_norm)
    grads = {"a": jnp.array([0.3, 0.4])}
    np.testing.assert_array_equal(tx.update(grads, tx.init(grads))[0]["a"], grads["a"])


def test_norm_gains_are_not_decayed():
    tree = {"q_norm": {"scale": 0, "bias": 0}, "q_proj": {"kernel": 0, "lora_a": 0}, "embedding": 0}
    assert optimizer.weight_decay_mask(jax.tree.map(jnp.float32, tree)) == {
        "q_norm": {"scale": False, "bias": False},
        "q_proj": {"kernel": True, "lora_a": True},
        "embedding": True,
    }
