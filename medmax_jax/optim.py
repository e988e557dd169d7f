"""AdamW behind a global-norm clip, with linear warm-up and cosine decay.

    w = ceil(warmup_ratio * steps), r = final_lr_ratio, k = 0, 1, .. steps - 1
    k < w    lr(k) = peak * k / w
    k >= w   lr(k) = peak * (r + (1 - r) * (1 + cos(pi * (k - w) / (steps - w))) / 2)

k counts the updates already made, so the first update of a warmed-up run has rate 0: the schedule
of the published run (Hugging Face's cosine with warm-up), with a floor r.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from medmax_jax import spikes
from medmax_jax.config import Optim


def make(config: Optim, *, steps: int) -> optax.GradientTransformationExtraArgs:
    """Gradients, and the loss as `value=`, to updates; `steps` is the length of the whole run."""
    inner = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda count: learning_rate(count, config, steps=steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
    if not config.skip_window:
        return optax.with_extra_args_support(inner)
    return spikes.guarded(inner, window=config.skip_window, factor=config.skip_factor)


def learning_rate(count: Int[Array, ""] | int, config: Optim, *, steps: int) -> Float[Array, ""]:
    """The rate of the update after `count` others. Peak 1, 10 steps, warm-up .2: 0 .5 1 .96 ..."""
    warmup = math.ceil(config.warmup_ratio * steps)
    progress = (count - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    decay = config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine
    return config.peak_lr * jnp.where(count < warmup, count / max(1, warmup), decay)


def decayed(params: PyTree) -> PyTree:
    """True at the matrices, which weight decay shrinks; False at the gains and biases of norms."""

    def is_matrix(path: tuple, _: Array) -> bool:
        return not any(
            str(getattr(p, "key", getattr(p, "name", ""))) in ("scale", "bias") for p in path
        )

    return jax.tree_util.tree_map_with_path(is_matrix, params)
