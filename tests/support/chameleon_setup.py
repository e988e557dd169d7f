"""What the Chameleon tests share: a tiny model with the weights of the parity cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from parity import chameleon_cases as cases

from medmax_jax.checkpoints.safetensors_file import dotted_name
from medmax_jax.config import Lora, Model, Vocab
from medmax_jax.models import chameleon

VOCAB = Vocab(size=cases.SIZE, image_codes=512, text_start=8_712)
NO_LORA = Lora(rank=0, alpha=0.0, dropout=0.0)
LORA = Lora(rank=cases.LORA["rank"], alpha=cases.LORA["alpha"], dropout=0.0)

# The tests compile many programs and run each once: LLVM's optimiser costs more than it saves.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def config(case: cases.Case, **changes) -> Model:
    """The case as a Model; `changes` replace fields."""
    fields = dict(
        hidden_size=case.hidden_size,
        num_layers=case.num_layers,
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        intermediate_size=case.intermediate_size,
        context_length=128,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        qk_norm_eps=1e-5,
        qk_norm_shards=case.qk_norm_shards,
        swin_norm=case.swin_norm,
        param_dtype="float32",
        quant="none",
        compute_dtype="float32",
        remat="none",
        attention="xla",
    )
    return Model(**(fields | changes))


def load(model: Model, arrays: dict[str, np.ndarray], lora: Lora = NO_LORA) -> chameleon.Chameleon:
    """A model with these weights, on the ambient mesh; every array must have its place."""
    like = chameleon.abstract_model(model, VOCAB, lora)
    left = dict(arrays)

    def put(path, leaf):
        return jax.device_put(left.pop(dotted_name(path)).astype(leaf.dtype), leaf.sharding)

    loaded = jax.tree_util.tree_map_with_path(put, like)
    assert not left
    return loaded


def rows(ids: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """ids, segments and positions of unpacked rows without padding."""
    batch, length = ids.shape
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    return tuple(jnp.asarray(a) for a in (ids, np.ones_like(ids), positions))


def named(tree) -> dict[str, jax.Array]:
    """Dotted name -> array."""
    return {dotted_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
