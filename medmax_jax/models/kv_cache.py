"""Runs Chameleon against a KV cache: a chunk of a prompt, or one more token per row.

    cache   k, v [L, B, K, S, H], in the layout that the products of attention read
    slot    one of the B rows of the cache; it holds one sequence, and token s is stored at its
            position s, of S = `cache_length` positions
    int8    one byte per number, and one fp32 scale for each token and head: greatest of H / 127

A KV-cache slot is read only up to the position of the query token, so later positions are never
used: an older, longer sequence does not have to be erased. KV-cache slots are split over data x
fsdp in shards, heads over tp; each device writes and reads its own, so this part of attention needs
no communication.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from medmax_jax.config import Model
from medmax_jax.models.chameleon import Chameleon
from medmax_jax.models.layers import rope_angles
from medmax_jax.sharding import BATCH, CACHE, HEADS, ROWS

SCALES = P(None, ROWS, "tp", None)  # [L, B, K, S]
SLOTS = P(ROWS)  # [B]
CACHE_DTYPES = ("model", "int8")

MAX_UNSTACKED_BYTES = 2 << 30  # of layers, which unstack_layers copies at most

# Each layer's own arrays, and its q, k and v kernels concatenated.
UnstackedLayers = tuple[tuple[Any, Array | None], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Holds keys and values of all layers, [L, B, K, S, H]; with int8 their scales [L, B, K, S]."""

    k: Any  # arrays, or their shardings
    v: Any
    k_scale: Any
    v_scale: Any


def init_cache(config: Model, *, num_slots: int, cache_length: int, cache_dtype: str) -> Cache:
    """Allocate a cache of `num_slots` slots of `cache_length` positions each.

    `cache_dtype`: "model", the compute dtype; or "int8".
    """
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(
            f"cache_dtype is {cache_dtype!r}; it must be one of {', '.join(CACHE_DTYPES)}"
        )
    shape = (config.num_layers, num_slots, config.num_kv_heads, cache_length, config.head_dim)
    dtype = jnp.int8 if cache_dtype == "int8" else config.compute_dtype
    k, v = (jnp.zeros(shape, dtype, out_sharding=CACHE) for _ in "kv")
    if cache_dtype != "int8":
        return Cache(k=k, v=v, k_scale=None, v_scale=None)
    scales = [jnp.zeros(shape[:-1], jnp.float32, out_sharding=SCALES) for _ in "kv"]
    return Cache(k, v, *scales)


def cache_bytes(config: Model, *, num_slots: int, cache_length: int, cache_dtype: str) -> int:
    """Return the bytes that `init_cache` allocates, over all devices."""
    heads = 2 * config.num_layers * num_slots * config.num_kv_heads * cache_length
    if cache_dtype == "int8":
        return heads * (config.head_dim + 4)
    return heads * config.head_dim * jnp.dtype(config.compute_dtype).itemsize


def decode(
    model: Chameleon,
    ids: Int[Array, "B T"],
    cache: Cache,
    positions: Int[Array, "B T"],
    *,
    slots: Int[Array, "B"] | None,
    span: int,
    layers: UnstackedLayers | None = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Return the hidden states of T more tokens of each row, and the cache with their KV pairs.

    Token t of row b is stored at position positions[b, t] of its KV-cache slot and attends to all
    positions up to it. Position -1 is an idle token: nothing is written for it and its result has
    no meaning.

        positions  5 6 7     row 0 reads three tokens of its prompt
                   9 -1 -1   row 1 reads one, and waits

    slots: the slot of each row, counted inside its device's shard; None: row b of a shard uses its
    slot b. span: positions that are read, at least the greatest position + 1. layers: the
    result of `unstack_layers`; None: the stacked layers of the model.
    """
    config = model.config
    angles = rope_angles(positions, head_dim=config.head_dim, theta=config.rope_theta)

    def body(carry, xs):
        x, cache = carry
        layer, qkv, index = xs

        def attention(module, x, keys):
            q, k, v = module.qkv(x, angles, keys[:3], qkv)
            out, updated = attend(q, k, v, cache, index, positions, slots, span=span)
            return module.out(out, keys[3]), updated

        x, cache = layer(x, attention, None)
        return (x, cache), None

    # The complete cache is carried, not sliced by scan, so that XLA writes it in place.
    start = (model.embed_tokens(ids, config.compute_dtype), cache)
    if layers is not None:
        for index, (layer, qkv) in enumerate(layers):
            start, _ = body(start, (layer, qkv, jnp.int32(index)))
        return model.norm(start[0]), start[1]
    stack = (model.layers, None, jnp.arange(config.num_layers))
    (x, cache), _ = jax.lax.scan(body, start, stack)
    return model.norm(x), cache


def unstack_layers(model: Chameleon, mesh: jax.sharding.Mesh) -> UnstackedLayers | None:
    """Return a second copy of the layers, as XLA reads them fastest on CPUs; None elsewhere.

    On CPUs XLA would copy each layer out of the stack for every token, and it splits a product of
    few rows over cores only where the product is wide. Large models return None: both copies may
    not fit into memory.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(model.layers))
    if mesh.devices.flat[0].platform != "cpu" or size > MAX_UNSTACKED_BYTES:
        return None
    with jax.set_mesh(mesh):
        return _unstack(model)


@jax.jit
def _unstack(model: Chameleon) -> UnstackedLayers:
    layers, config = [], model.config
    concatenate = config.quant == "none" and jax.sharding.get_abstract_mesh().shape["tp"] == 1
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda x, i=index: x[i], model.layers)
        attention, qkv = layer.self_attn, None
        if concatenate:
            kernels = [
                proj.kernel[...] for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
            ]
            qkv = jnp.concatenate(kernels, axis=1).astype(config.compute_dtype)
        layers.append((layer, qkv))
    return tuple(layers)


def attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    cache: Cache,
    layer: Int[Array, ""],
    positions: Int[Array, "B T"],
    slots: Int[Array, "B"] | None,
    *,
    span: int,
) -> tuple[Float[Array, "B N T H"], Cache]:
    """Write k and v to their positions, then attend to the first `span` of each KV-cache slot."""

    def local(q, k, v, cache, layer, positions, slots):
        index = _cache_index(cache, layer, positions, slots)
        cache = _write(cache, index, k, v)
        keys, values = (_read(s, layer, slots, len(q), span) for s in (cache.k, cache.v))
        scales = [None, None]
        if cache.k_scale is not None:
            stores = (cache.k_scale, cache.v_scale)
            scales = [_read(s, layer, slots, len(q), span) for s in stores]
        return _attend(q, keys, values, *scales, positions), cache

    scale = None if cache.k_scale is None else SCALES
    spec = Cache(CACHE, CACHE, scale, scale)
    run = jax.shard_map(
        local,
        in_specs=(HEADS, HEADS, HEADS, spec, P(), BATCH, None if slots is None else SLOTS),
        out_specs=(HEADS, spec),
    )
    positions = jax.sharding.reshard(positions, BATCH)
    return run(q, k, v, cache, layer, positions, slots)


def copy_slots(
    cache: Cache, sources: Int[Array, "M"], targets: Int[Array, "M"], *, span: int
) -> Cache:
    """Copy the first `span` positions of slot sources[i] to slot targets[i], in sequence.

    Both are counted inside a device's shard, M pairs in all, M / shards of each; a pair of equal
    numbers does nothing.
    """

    def local(cache, sources, targets):
        def copy_pair(i, cache):
            def copy(store):
                sizes = (store.shape[0], 1, store.shape[2], span, *store.shape[4:])
                rest = (0,) * (store.ndim - 2)
                prefix = jax.lax.dynamic_slice(store, (0, sources[i], *rest), sizes)
                return jax.lax.dynamic_update_slice(store, prefix, (0, targets[i], *rest))

            return jax.tree.map(copy, cache)

        return jax.lax.fori_loop(0, len(sources), copy_pair, cache)

    scale = None if cache.k_scale is None else SCALES
    spec = Cache(CACHE, CACHE, scale, scale)
    return jax.shard_map(local, in_specs=(spec, SLOTS, SLOTS), out_specs=spec)(
        cache, sources, targets
    )


def quantize_int8(x: Float[Array, "*B H"]) -> tuple[Int[Array, "*B H"], Float[Array, "*B"]]:
    """Return integers up to 127 and the scale that they are multiples of: x = code * scale."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1) / 127
    codes = jnp.round(wide / jnp.where(scale > 0, scale, 1)[..., None])
    return codes.astype(jnp.int8), scale


def _cache_index(cache, layer, positions, slots):
    """Return the cache index of each token; past the end where nothing is to be written."""
    positions = jnp.where(positions < 0, cache.k.shape[3], positions)[:, None]  # [B, 1, T]
    rows = (jnp.arange(len(positions)) if slots is None else slots)[:, None, None]
    # Heads are indexed too, so that TPUs need not put them next to H, and keep the cache layout.
    return (layer, rows, jnp.arange(cache.k.shape[2])[:, None], positions)


def _write(cache, index, k, v):
    if cache.k_scale is None:
        put = lambda store, new: store.at[index].set(new.astype(store.dtype), mode="drop")  # noqa: E731
        return Cache(put(cache.k, k), put(cache.v, v), None, None)
    (k, k_scale), (v, v_scale) = quantize_int8(k), quantize_int8(v)
    updates = (k, v, k_scale, v_scale)
    stores = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    return Cache(*(s.at[index].set(u, mode="drop") for s, u in zip(stores, updates, strict=True)))


def _read(store, layer, slots, rows: int, span: int):
    """Return [b, K, span, H] of one layer, or [b, K, span] of its scales."""
    if slots is not None:
        return store[layer, slots, :, :span]
    sizes = (1, rows, store.shape[2], span, *store.shape[4:])
    return jax.lax.dynamic_slice(store, (layer, *[0] * (store.ndim - 1)), sizes)[0]


def _attend(q, k, v, k_scale, v_scale, positions):
    """Attend with scores and softmax in fp32; scales are applied outside the int8 products."""
    (rows, heads, tokens, dim), shared = q.shape, k.shape[1]
    groups = heads // shared
    q = q.reshape(rows, shared, groups * tokens, dim)  # [B, K, G*T, H]
    scores = jnp.einsum("bkmh,bksh->bkms", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
    if k_scale is not None:
        scores *= k_scale[:, :, None]
    seen = jnp.arange(k.shape[2]) <= positions[:, :, None]  # [B, T, S]
    seen = jnp.tile(seen, (1, groups, 1))[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores * dim**-0.5, -1e30), -1)
    if v_scale is not None:
        weights *= v_scale[:, :, None]
    out = jnp.einsum("bkms,bksh->bkmh", weights.astype(q.dtype), v.astype(q.dtype))
    return out.reshape(rows, heads, tokens, dim)
