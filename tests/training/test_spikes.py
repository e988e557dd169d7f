"""Steps that stand out are left out, exactly and by the optimiser's own state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medmax_jax.config import ConfigError, Optim, build, from_config_dict
from medmax_jax.configs import base
from medmax_jax.training import optimizer

WINDOW = 8


def settings(**changes: float) -> Optim:
    made = base.get_config().optim.to_dict() | dict(peak_lr=0.1, warmup_ratio=0.0)
    return build(Optim, made | changes)


def walk(config: Optim, losses: list[float], scales: list[float]) -> list[np.ndarray]:
    """The parameters after each step; gradients are `scales` in every place."""
    tx = optimizer.make_optimizer(config, steps=len(losses))
    params = {"w": jnp.ones(3)}
    state, seen = tx.init(params), []

    @jax.jit
    def step(params, state, loss, scale):
        grads = jax.tree.map(lambda p: jnp.full_like(p, scale), params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, optimizer.consecutive_skips(state)

    for loss, scale in zip(losses, scales, strict=True):
        params, state, left = step(params, state, loss, scale)
        seen.append((np.asarray(params["w"]), int(left)))
    return seen


def usual(count: int) -> list[float]:
    return [2.0 + 0.01 * (n % 3) for n in range(count)]


@pytest.mark.parametrize("loss, scale", [(9.0, 1.0), (2.0, 500.0), (np.nan, 1.0), (2.0, np.inf)])
def test_a_spike_changes_nothing_but_the_window(loss, scale):
    """The run without that step ends at the same parameters, bit for bit."""
    on = settings(skip_window=WINDOW, skip_factor=6.0)
    losses, scales = usual(2 * WINDOW), [1.0] * (2 * WINDOW)
    plain = walk(on, [*losses, 2.0], [*scales, 1.0])
    hit = walk(on, [*losses, loss], [*scales, scale])
    np.testing.assert_array_equal(hit[-1][0], hit[-2][0])
    assert [left for _, left in hit] == [0] * (2 * WINDOW) + [1]
    np.testing.assert_array_equal(hit[-2][0], plain[-2][0])
    assert (plain[-1][0] != plain[-2][0]).all()


def test_only_the_infinite_is_left_out_while_the_window_fills():
    on = settings(skip_window=WINDOW, skip_factor=6.0)
    seen = walk(on, [2.0, 2.0, 90.0, np.nan, np.nan, 2.0], [1.0] * 6)
    assert [left for _, left in seen] == [0, 0, 0, 1, 2, 0]


def test_a_new_level_is_believed_in_the_end():
    """A spike is remembered, so that losses that stay high do not stop training for ever."""
    on = settings(skip_window=WINDOW, skip_factor=2.0)
    seen = walk(on, usual(WINDOW) + [5.0] * 6, [1.0] * (WINDOW + 6))
    assert seen[WINDOW][1] == 1 and seen[-1][1] == 0


def test_it_is_off_by_default():
    losses = [2.0] * 4 + [90.0]
    plain, on = settings(), settings(skip_window=WINDOW)
    assert plain.skip_window == 0
    for a, b in zip(walk(plain, losses, [1.0] * 5), walk(on, losses, [1.0] * 5), strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-6)


@pytest.mark.parametrize("changes", [dict(skip_window=1), dict(skip_window=4, skip_factor=0.0)])
def test_settings_that_make_no_sense(changes):
    config = base.get_config()
    config.optim.update(changes)
    with pytest.raises(ConfigError, match="optim.skip_"):
        from_config_dict(config)
