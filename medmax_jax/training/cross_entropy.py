"""Computes cross-entropy over the full vocabulary without storing logits or unused gradients.

    device of fsdp i, tp j holds     rows of the batch [b, T, D]      kernel [D / fsdp, V / tp]
    all_to_all over fsdp                                              kernel [D, V / (tp fsdp)]
    for each chunk of its tokens:
        all_gather over fsdp         tokens [n fsdp, D]  @ kernel ->  its slice of their logits
        max, sum of exp, target      over fsdp and tp: the slices' parts of softmax
        d loss / d hidden            its slice's part, summed and scattered over fsdp, over tp

The head is never gathered, logits exist for one chunk at a time, and the gradient of the hidden
states is computed in the forward pass, where the logits are, so the backward pass only scales it.
For the head, a gradient is computed only for the columns that train: none, all, or those of image
codes.

The z-loss adds z (log Z)^2 to the loss of a token, Z being the sum of exp of its logits: it keeps
logits from growing without a change of their softmax. Its gradient is 2 z log Z softmax, so it
changes one factor of a gradient that is computed anyway. log Z and the largest logit of each token
are returned for reports.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medmax_jax.models.layers import HeadWeights
from medmax_jax.models.vocab import IMAGE_START
from medmax_jax.sharding import ACT, BATCH, UP

# The size of a chunk. 2**24 fp32 logits are 64 MiB, which stay in the VMEM of a v5e (2**25 cost
# 15 % more by the compiler's count); under 1,024 tokens reading the kernel would cost more than the
# product.
CHUNK_LOGITS, CHUNK_TOKENS = 2**24, 1_024
SLICES = ("tp", "fsdp")  # axes that split the vocabulary here


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenValues:
    """Holds values of each position for reports, which have no gradient."""

    nll: Any  # [B, T]; or a cotangent, where a transformation builds this class
    log_z: Any  # log of the sum of exp of all logits
    max_logit: Any


def weighted_nll(
    hidden: Float[Array, "B T D"],
    head: HeadWeights,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    z: Float[Array, "B T"] | None = None,
    *,
    trains_kernel: bool,
    chunks: int,
) -> tuple[Float[Array, ""], TokenValues]:
    """Return the sum of weights x (nll + z log_z^2), and the values of each token in fp32.

    nll[b, t] = -log p(targets[b, t] | hidden[b, t]). The sum has gradients for hidden, for
    head.image and, with `trains_kernel`, for head.kernel. `z`: coefficients of the z-loss; None: no
    z-loss. `chunks` divides the tokens of a device.
    """
    tokens = hidden.shape[0] * hidden.shape[1] // _rows_split()
    if tokens % chunks:
        raise ValueError(
            f"{tokens} tokens are not divisible by {chunks} chunks; use a divisor of {tokens}"
        )
    total, values = _weighted((trains_kernel, chunks), head, hidden, targets, weights, z)
    return total, jax.lax.stop_gradient(values)


def num_chunks(hidden: Float[Array, "B T D"], kernel: Float[Array, "D V"]) -> int:
    """Return the fewest chunks of a device's tokens within CHUNK_LOGITS, or else CHUNK_TOKENS."""
    rows, length, _ = jax.typeof(hidden).sharding.shard_shape(hidden.shape)
    width, vocab = jax.typeof(kernel).sharding.shard_shape(kernel.shape)
    gathered = kernel.shape[0] // width  # devices whose tokens are gathered
    max_tokens = max(CHUNK_TOKENS, CHUNK_LOGITS * gathered // vocab)
    tokens = rows * length
    fitting = (c for c in range(1, tokens) if tokens % c == 0)
    return next((c for c in fitting if tokens // c * gathered <= max_tokens), tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(how, head, hidden, targets, weights, z):
    return _run(how, head, hidden, targets, weights, z, grads=False)[:2]


def _forward(how, head, hidden, targets, weights, z):
    total, values, *grads = _run(how, head, hidden, targets, weights, z, grads=True)
    return (total, values), grads


def _backward(how, grads, cotangents):
    scale = cotangents[0]  # the values have no gradient
    d_hidden, d_kernel, d_image = jax.tree.map(
        lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), grads
    )
    return HeadWeights(d_kernel, d_image), d_hidden, None, None, None


def _run(how, head, hidden, targets, weights, z, *, grads: bool) -> tuple:
    """Return (total, values, d_hidden, d_kernel, d_image) by shard_map; None: unused gradients."""
    trains_kernel, chunks = how
    required = (grads, grads and trains_kernel, grads and head.image is not None)
    specs = 3 * [BATCH] + [s for s, w in zip((ACT, UP, UP), required, strict=True) if w]
    local = functools.partial(_local, required=required, chunks=chunks)
    # Gathered tokens vary over fewer axes than shard_map can infer.
    run = jax.shard_map(
        local, 
        in_specs=(
            HeadWeights(UP, None if head.image is None else UP), ACT, BATCH, BATCH,
            None if z is None else BATCH,
        ),
        out_specs=tuple(specs), check_vma=False,
    )  # fmt: skip
    found = run(head, hidden, targets, weights, z)
    values, left = TokenValues(*found[:3]), iter(found[3:])
    total = (weights * values.nll).sum()
    if z is not None:
        total += (weights * z * values.log_z**2).sum()
    return total, values, *(next(left) if w else None for w in required)


def _local(head, hidden, targets, weights, z, *, required: tuple, chunks: int) -> tuple:
    """Compute the part of one device."""
    kernel, ids, own = _columns(head, hidden.dtype)
    start = 0 if required[1] else own  # first column whose gradient is required

    def chunk(d_head, part):
        x, target, weight, *coefficient = (jax.lax.all_gather(p, "fsdp", tiled=True) for p in part)
        logits = jnp.dot(x, kernel, preferred_element_type=jnp.float32)
        if head.image is not None:
            logits = jnp.where(ids < 0, -jnp.inf, logits)
        top = jax.lax.pmax(logits.max(1), SLICES)
        exp = jnp.exp(logits - top[:, None])
        is_target = target[:, None] == ids
        sums = jnp.stack([exp.sum(1), jnp.where(is_target, logits, 0).sum(1)])
        total, of_target = jax.lax.psum(sums, SLICES)
        log_z = jnp.log(total) + top
        values = [_own_rows(v, part[1].shape[0]) for v in (log_z - of_target, log_z, top)]
        if not required[0]:
            return d_head, (values, None)
        softmax = exp / total[:, None]
        if z is not None:
            softmax *= (1 + 2 * coefficient[0] * log_z)[:, None]
        d_logits = (softmax - is_target) * weight[:, None]
        d_logits = d_logits.astype(hidden.dtype)
        d_x = jax.lax.psum_scatter(jnp.dot(d_logits, kernel.T), "fsdp", tiled=True)
        if d_head is not None:
            d_head += jnp.dot(x.T, d_logits[:, start:], preferred_element_type=jnp.float32)
        return d_head, (values, jax.lax.psum(d_x, "tp"))

    d_head = None
    if required[1] or required[2]:
        d_head = jnp.zeros((kernel.shape[0], kernel.shape[1] - start), jnp.float32)
    split = lambda a: jnp.reshape(a, (chunks, -1, *a.shape[2:]))  # noqa: E731
    parts = tuple(split(a) for a in (hidden, targets, weights, z) if a is not None)
    d_head, (values, d_hidden) = jax.lax.scan(chunk, d_head, parts)
    out = [value.reshape(targets.shape) for value in values]
    if required[0]:
        out.append(d_hidden.reshape(hidden.shape))
    if d_head is not None:
        d_head = jax.lax.psum(d_head, "data")  # the other rows of the batch
        cut = own - start
        if required[1]:
            out.append(_back(d_head[:, :cut], head.kernel.dtype))
        if required[2]:
            out.append(_back(d_head[:, cut:], head.image.dtype))
    return tuple(out)


def _columns(head: HeadWeights, dtype) -> tuple[Array, Array, int]:
    """Return (matrix [D, v], the ids of its columns, how many are of the kernel) of this device.

    Where image columns train, they follow those of the kernel, and the kernel's own image columns
    have id -1.
    """
    kernel = _sliced(head.kernel, dtype)
    own = kernel.shape[1]
    shard = jax.lax.axis_index("tp") * jax.lax.axis_size("fsdp") + jax.lax.axis_index("fsdp")
    ids = shard * own + jnp.arange(own)
    if head.image is None:
        return kernel, ids, own
    image = _sliced(head.image, dtype)
    per_shard, all_codes = image.shape[1], image.shape[1] * jax.lax.axis_size(SLICES)
    ids = jnp.where((ids >= IMAGE_START) & (ids < IMAGE_START + all_codes), -1, ids)
    codes = IMAGE_START + shard * per_shard + jnp.arange(per_shard)
    return jnp.concatenate([kernel, image], 1), jnp.concatenate([ids, codes]), own


def _sliced(matrix: Array, dtype) -> Array:
    """Reshard [D / fsdp, v] -> [D, v / fsdp], with complete columns."""
    return jax.lax.all_to_all(matrix.astype(dtype), "fsdp", 1, 0, tiled=True)


def _own_rows(gathered: Array, count: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(gathered, jax.lax.axis_index("fsdp") * count, count)


def _back(matrix: Array, dtype) -> Array:
    """Invert `_sliced`."""
    return jax.lax.all_to_all(matrix.astype(dtype), "fsdp", 0, 1, tiled=True)


_weighted.defvjp(_forward, _backward)


def _rows_split() -> int:
    sizes = jax.sharding.get_abstract_mesh().shape
    return sizes["data"] * sizes["fsdp"]
