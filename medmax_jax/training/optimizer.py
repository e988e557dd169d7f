"""Builds AdamW with a global-norm clip, linear warm-up and cosine decay.

    w = ceil(warmup_ratio * steps), r = final_lr_ratio, k = 0, 1, .. steps - 1
    k < w    lr(k) = peak * k / w
    k >= w   lr(k) = peak * (r + (1 - r) * (1 + cos(pi * (k - w) / (steps - w))) / 2)

With config.optim.schedule = stage, `steps` and k are of one stage, and every stage has this curve.
k counts the updates already made, so the first update of a run with warm-up has rate 0: the
schedule of the published run (Hugging Face's cosine with warm-up), with a minimum of r * peak.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from medmax_jax.config import Optim


def make_optimizer(
    config: Optim, *, steps: tuple[int, ...]
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer; `update` needs the loss as `value=`. `steps`: see learning_rate."""
    inner = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda count: learning_rate(count, config, steps=steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=weight_decay_mask,
        ),
    )
    if not config.skip_window:
        return optax.with_extra_args_support(inner)
    return skip_spikes(inner, window=config.skip_window, factor=config.skip_factor)


def learning_rate(
    count: Int[Array, ""] | int, config: Optim, *, steps: tuple[int, ...]
) -> Float[Array, ""]:
    """Return the rate of the update after `count` others; `steps`: of each schedule, in sequence.

    Peak 1, steps (10,), warm-up .2: 0 .5 1 .96 ...
    """
    rate, start = _warmup_cosine(count, config, steps=steps[0]), steps[0]
    for length in steps[1:]:
        rate = jnp.where(count < start, rate, _warmup_cosine(count - start, config, steps=length))
        start += length
    return rate


def _warmup_cosine(count: Int[Array, ""] | int, config: Optim, *, steps: int) -> Float[Array, ""]:
    warmup = math.ceil(config.warmup_ratio * steps)
    progress = (count - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    decay = config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine
    return config.peak_lr * jnp.where(count < warmup, count / max(1, warmup), decay)


def weight_decay_mask(params: PyTree) -> PyTree:
    """Return True at the matrices, which weight decay shrinks; False at norm gains and biases."""

    def is_matrix(path: tuple, _: Array) -> bool:
        return not any(
            str(getattr(p, "key", getattr(p, "name", ""))) in ("scale", "bias") for p in path
        )

    return jax.tree_util.tree_map_with_path(is_matrix, params)


# ---- spikes ----
#
# Optional: skip the update of a step whose loss or gradient is an outlier, or is not finite.
#
#     loss > mean + factor * std of the last `window` finite ones, or likewise for the gradient norm
#     -> no update: parameters, moments and the schedule's count stay as they are
#
# The window is part of the optimizer's state, so a resumed run skips what the uninterrupted one
# skips. Until the window is full, only steps that are not finite are skipped. After LIMIT skipped
# steps in a row the run stops. The rule is that of MaxText and OLMo, whose window and factor are
# 128 and 6.

LIMIT = 10  # skipped steps in a row: no longer a spike


class SpikeState(NamedTuple):
    """Holds the last losses and gradient norms, and the state of the inner transformation."""

    losses: Float[Array, "W"]
    norms: Float[Array, "W"]
    seen: Int[Array, ""]  # finite steps so far
    in_row: Int[Array, ""]  # steps skipped since the last update
    inner: optax.OptState


def skip_spikes(
    inner: optax.GradientTransformation, *, window: int, factor: float
) -> optax.GradientTransformationExtraArgs:
    """Return `inner` without its updates at spikes; `update` needs `value=`, the loss."""

    def init(params: optax.Params) -> SpikeState:
        zeros = jnp.zeros(window, jnp.float32)
        return SpikeState(zeros, zeros, jnp.int32(0), jnp.int32(0), inner.init(params))

    def update(
        updates: optax.Updates, state: SpikeState, params: optax.Params, *, value: Array
    ) -> tuple[optax.Updates, SpikeState]:
        norm = optax.tree.norm(updates)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        window_full = state.seen >= window
        outlier = window_full & (
            _is_outlier(value, state.losses, factor) | _is_outlier(norm, state.norms, factor)
        )
        take = finite & ~outlier
        new_updates, inner_state = inner.update(updates, state.inner, params)
        kept_inner = jax.tree.map(
            lambda new, old: jnp.where(take, new, old), inner_state, state.inner
        )
        at = state.seen % window
        new_state = SpikeState(
            losses=state.losses.at[at].set(jnp.where(finite, value, state.losses[at])),
            norms=state.norms.at[at].set(jnp.where(finite, norm, state.norms[at])),
            seen=state.seen + finite,
            in_row=jnp.where(take, 0, state.in_row + 1),
            inner=kept_inner,
        )
        return jax.tree.map(lambda x: jnp.where(take, x, jnp.zeros_like(x)), new_updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def consecutive_skips(state: optax.OptState) -> Int[Array, ""]:
    """Return the steps skipped in a row, including the last one; 0 without spike skipping."""
    return state.in_row if isinstance(state, SpikeState) else jnp.int32(0)


def _is_outlier(value: Float[Array, ""], past: Float[Array, "W"], factor: float) -> Bool[Array, ""]:
    return value > past.mean() + factor * past.std()
