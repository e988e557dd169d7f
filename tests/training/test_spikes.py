"""Steps with outliers are skipped, exactly and by the optimizer's own state."""

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
    fields = base.get_config().optim.to_dict() | dict(peak_lr=0.1, warmup_ratio=0.0)
    return build(Optim, fields | changes)


def run_steps(config: Optim, losses: list[float], scales: list[float]) -> list[np.ndarray]:
    """The parameters after each step; gradients are `scales` in every place."""
    tx = optimizer.make_optimizer(config, steps=(len(losses),))
    params = {"w": jnp.ones(3)}
    state, history = tx.init(params), []

    @jax.jit
    def step(params, state, loss, scale):
        grads = jax.tree.map(lambda p: jnp.full_like(p, scale), params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, optimizer.consecutive_skips(state)

    for loss, scale in zip(losses, scales, strict=True):
        params, state, left = step(params, state, loss, scale)
        history.append((np.asarray(params["w"]), int(left)))
    return history


def normal_losses(count: int) -> list[float]:
    return [2.0 + 0.01 * (n % 3) for n in range(count)]


@pytest.mark.parametrize("loss, scale", [(9.0, 1.0), (2.0, 500.0), (np.nan, 1.0), (2.0, np.inf)])
def test_spike_changes_only_the_window(loss, scale):
    """The run without that step ends at the same parameters, bit for bit."""
    on = settings(skip_window=WINDOW, skip_factor=6.0)
    losses, scales = normal_losses(2 * WINDOW), [1.0] * (2 * WINDOW)
    plain = run_steps(on, [*losses, 2.0], [*scales, 1.0])
    spiked = run_steps(on, [*losses, loss], [*scales, scale])
    np.testing.assert_array_equal(spiked[-1][0], spiked[-2][0])
    assert [left for _, left in spiked] == [0] * (2 * WINDOW) + [1]
    np.testing.assert_array_equal(spiked[-2][0], plain[-2][0])
    assert (plain[-1][0] != plain[-2][0]).all()


def test_only_non_finite_steps_are_skipped_while_the_window_fills():
    on = settings(skip_window=WINDOW, skip_factor=6.0)
    history = run_steps(on, [2.0, 2.0, 90.0, np.nan, np.nan, 2.0], [1.0] * 6)
    assert [left for _, left in history] == [0, 0, 0, 1, 2, 0]


def test_training_continues_at_a_permanently_higher_loss():
    """A spike is remembered, so that losses that stay high do not stop training for ever."""
    on = settings(skip_window=WINDOW, skip_factor=2.0)
    history = run_steps(on, normal_losses(WINDOW) + [5.0] * 6, [1.0] * (WINDOW + 6))
    assert history[WINDOW][1] == 1 and history[-1][1] == 0


def test_spike_skipping_is_off_by_default():
    losses = [2.0] * 4 + [90.0]
    plain, on = settings(), settings(skip_window=WINDOW)
    assert plain.skip_window == 0
    for a, b in zip(
        run_steps(plain, losses, [1.0] * 5), run_steps(on, losses, [1.0] * 5), strict=True
    ):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-6)


@pytest.mark.parametrize("changes", [dict(skip_window=1), dict(skip_window=4, skip_factor=0.0)])
def test_invalid_spike_settings_are_rejected(changes):
    config = base.get_config()
    config.optim.update(changes)
    with pytest.raises(ConfigError, match="optim.skip_"):
        from_config_dict(config)
