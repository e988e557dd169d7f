"""Defines Chameleon, an early-fusion transformer over text and image tokens alike.

                   7B (pre-norm)                      30B (swin_norm)
    x = x + attention(norm(x))            x = x + norm(attention(x))
    x = x + mlp(norm(x))                  x = x + norm(mlp(x))

    attention   q, k, v -> QKNorm on q and k -> RoPE -> causal inside each document -> o
    mlp         silu(gate) * up -> down

The layers are stacked on axis 0 (`layers.self_attn.q_proj.kernel` is [L, D, N*H]) and lax.scan
runs them. Weights have the names of the HF checkpoint. All functions run under
`jax.set_mesh(make_mesh(...))`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from medmax_jax.config import Lora, Model, Vocab
from medmax_jax.models.attention import make_packed_attention
from medmax_jax.models.layers import (
    INIT_STD,
    Embed,
    HeadWeights,
    Linear,
    QKNorm,
    RMSNorm,
    dropout,
    full_kernel,
    image_token_columns,
    matmul,
    rope,
    rope_angles,
)
from medmax_jax.models.quantization import PACKED, TILE
from medmax_jax.models.vocab import IMAGE_START
from medmax_jax.sharding import ACT, DOWN, HID, LOGITS, SPLIT, UP, with_shardings

NO_LORA = Lora(rank=0, alpha=0.0, dropout=0.0)
_RESIDUAL = 1  # folded into the key of a step for residual dropout

# The values that are saved for the backward pass, which recomputes all others. "none": no remat.
_BY_NAME = jax.checkpoint_policies.save_only_these_names
REMAT = {
    "all": _BY_NAME(),
    "attn": _BY_NAME("attn"),
    "attn_offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # to the host
        names_which_can_be_saved=[], names_which_can_be_offloaded=["attn"],
        offload_src="device", offload_dst="pinned_host",
    ),
    "qkv_attn": _BY_NAME("q", "k", "v", "attn"),
    "dots": jax.checkpoint_policies.save_from_both_policies(  # every product with a matrix
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _BY_NAME("attn")
    ),
}  # fmt: skip


class Attention(nnx.Module):
    """Applies q, k, v and o with their norms; the caller computes what the queries attend to."""

    def __init__(self, config: Model, lora: Lora, *, keys: Key[Array, "4 2"]):
        wide, narrow = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        linear = functools.partial(Linear, dtype=config.param_dtype, kind=config.quant, lora=lora)
        self.q_proj = linear(config.hidden_size, wide, spec=UP, keys=keys[0])
        self.k_proj = linear(config.hidden_size, narrow, spec=UP, keys=keys[1])
        self.v_proj = linear(config.hidden_size, narrow, spec=UP, keys=keys[2])
        self.o_proj = linear(wide, config.hidden_size, spec=DOWN, keys=keys[3])
        shards, eps, dtype = config.qk_norm_shards, config.qk_norm_eps, config.param_dtype
        self.q_norm = QKNorm(shards, config.head_dim, eps=eps, dtype=dtype)
        self.k_norm = QKNorm(shards, config.head_dim, eps=eps, dtype=dtype)
        self.config = config

    def qkv(
        self, x: Float[Array, "B T D"], angles: tuple, keys, kernel: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """Return [B, N, T, H], [B, K, T, H], [B, K, T, H], normalized and rotated by RoPE.

        `kernel`: the three kernels concatenated, [D, (N+2K)*H], for one product instead of three.
        """
        projections, products = (self.q_proj, self.k_proj, self.v_proj), [None] * 3
        if kernel is not None:
            cuts = np.cumsum([p.kernel.shape[-1] for p in projections])[:-1]
            products = jnp.split(matmul(x, kernel, HID, dtype=x.dtype), cuts, axis=-1)
        q, k, v = (
            _heads(proj(x, HID, key=key, y=y), self.config.head_dim)
            for proj, key, y in zip(projections, keys, products, strict=True)
        )
        q, k = rope(self.q_norm(q), *angles), rope(self.k_norm(k), *angles)
        return tuple(checkpoint_name(a, n) for a, n in ((q, "q"), (k, "k"), (v, "v")))

    def out(self, x: Float[Array, "B N T H"], key) -> Float[Array, "B T D"]:
        x = x.transpose(0, 2, 1, 3)  # [B, T, N, H]
        x = jnp.reshape(x, (*x.shape[:2], -1), out_sharding=HID)  # [B, T, N*H]
        return self.o_proj(x, ACT, key=key)


class MLP(nnx.Module):
    """Applies the SwiGLU MLP."""

    def __init__(self, config: Model, lora: Lora, *, keys: Key[Array, "3 2"]):
        dim, hidden = config.hidden_size, config.intermediate_size
        linear = functools.partial(Linear, dtype=config.param_dtype, kind=config.quant, lora=lora)
        self.gate_proj = linear(dim, hidden, spec=UP, keys=keys[0])
        self.up_proj = linear(dim, hidden, spec=UP, keys=keys[1])
        self.down_proj = linear(hidden, dim, spec=DOWN, keys=keys[2])

    def __call__(self, x: Float[Array, "B T D"], keys) -> Float[Array, "B T D"]:
        hidden = jax.nn.silu(self.gate_proj(x, HID, key=keys[0]))
        hidden *= self.up_proj(x, HID, key=keys[1])
        return self.down_proj(hidden, ACT, key=keys[2])


class Layer(nnx.Module):
    """Applies one transformer layer."""

    def __init__(self, config: Model, lora: Lora, *, keys: Key[Array, "7 2"]):
        self.self_attn = Attention(config, lora, keys=keys[:4])
        self.mlp = MLP(config, lora, keys=keys[4:])
        size, eps, dtype = config.hidden_size, config.rms_norm_eps, config.param_dtype
        self.input_layernorm = RMSNorm(size, eps=eps, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(size, eps=eps, dtype=dtype)
        self.swin = config.swin_norm

    def __call__(
        self, x: Float[Array, "B T D"], attention, keys, drop: Callable = lambda y, branch: y
    ) -> tuple[Array, Any]:
        """Apply the layer; `attention(module, x, keys)` returns its output and an extra result.

        The extra result is returned to the caller. `keys`: seven dropout keys, one per projection;
        None for no dropout. `drop`: residual dropout, of what branch 0 (attention) or 1 (MLP) adds.
        """
        keys = [None] * 7 if keys is None else keys
        if self.swin:
            y, extra = attention(self.self_attn, x, keys[:4])
            x += drop(self.input_layernorm(y), 0)
            return x + drop(self.post_attention_layernorm(self.mlp(x, keys[4:])), 1), extra
        y, extra = attention(self.self_attn, self.input_layernorm(x), keys[:4])
        x += drop(y, 0)
        return x + drop(self.mlp(self.post_attention_layernorm(x), keys[4:]), 1), extra


class ImageColumns(nnx.Param):
    """Marks the columns of lm_head that Anole's stage trains."""


class OutputHead(nnx.Module):
    """Holds the output projection; where its image columns are trained, they are stored separately.

    The trained columns are fp32: in bf16 small steps vanish.
    """

    def __init__(self, kernel: Float[Array, "D V"], image: Float[Array, "D C"] | None):
        self.kernel, self.tuned = nnx.Param(kernel), image is not None
        if self.tuned:
            self.image = ImageColumns(image)


class Chameleon(nnx.Module):
    """Defines the language model; the VQGAN that produces its image tokens is in vqgan.py."""

    def __init__(self, config: Model, vocab: Vocab, lora: Lora, *, key: PRNGKeyArray):
        key_embed, key_layers, key_head = jax.random.split(key, 3)
        dtype = config.param_dtype
        self.embed_tokens = Embed(vocab.size, config.hidden_size, dtype=dtype, key=key_embed)
        # One split for all: XLA compiles every split and every draw separately.
        keys = jax.random.split(key_layers, (config.num_layers, 7, 2))
        self.layers = jax.vmap(lambda k: Layer(config, lora, keys=k))(keys)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        shape, key = (config.hidden_size, vocab.size), jax.random.split(key_head)[0]
        kernel = INIT_STD * jax.random.normal(key, shape, out_sharding=UP)
        self.lm_head = OutputHead(kernel.astype(dtype), None)
        self.config, self.vocab = config, vocab

    def hidden(
        self,
        ids: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "B T D"]:
        """Return the hidden states after the final norm. `key`: adapter dropout; None for none.

        ids        0 17 2 | 0 23 2 | 1      two documents and one token of padding
        segments   1  1 1 | 2  2 2 | 0
        positions  0  1 2 | 0  1 2 | 0
        """
        return self.hidden_and_norms(ids, segments, positions, key=key)[0]

    def hidden_and_norms(
        self,
        ids: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        key: PRNGKeyArray | None,
        residual_dropout: float = 0.0,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T"]]:
        """Return the hidden states, and the L2 norms of the last layer's output, for reports.

        The norms are those of what the final norm reads, which needs the same sum of squares.
        `residual_dropout`: config.train.residual_dropout, applied where `key` is not None.
        """
        x = self._run(ids, segments, positions, key, keep=False, rate=residual_dropout)[0]
        wide = jax.lax.stop_gradient(x).astype(jnp.float32)
        return self.norm(x), jnp.sqrt(jnp.sum(wide * wide, -1))

    def hidden_states_by_layer(
        self,
        ids: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> Float[Array, "M B T D"]:
        """Return the embeddings and each layer's output before the final norm, for parity.

        M = L + 1.
        """
        first = self.embed_tokens(ids, self.config.compute_dtype)
        return jnp.concatenate(
            [first[None], self._run(ids, segments, positions, None, keep=True)[1]]
        )

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return fp32 logits without a mask: image ids have logits like all others."""
        kernel = full_kernel(self.head()).astype(hidden.dtype)
        return matmul(hidden, kernel, LOGITS, dtype=jnp.float32)

    def image_head(self) -> Float[Array, "D K"]:
        """Return the columns of the output projection that belong to the image ids."""
        head, codes = self.head(), self.vocab.image_codes
        if head.image is not None:
            return head.image
        kernel, tp = head.kernel, jax.sharding.get_abstract_mesh().shape["tp"]
        kernel = jax.sharding.reshard(kernel, P("fsdp", None)) if codes % tp else kernel
        return kernel[:, IMAGE_START : IMAGE_START + codes]

    def image_logits(
        self, hidden: Float[Array, "B T D"], head: Float[Array, "D K"]
    ) -> Float[Array, "B T K"]:
        """Return fp32 logits of the image ids alone; `head`: the result of `image_head`."""
        out = P(*LOGITS[:2], jax.typeof(head).sharding.spec[1])
        return matmul(hidden, head.astype(hidden.dtype), out, dtype=jnp.float32)

    def head(self) -> HeadWeights:
        """Return the output projection, with separate image columns where those are trained."""
        head = self.lm_head
        return HeadWeights(head.kernel[...], head.image[...] if head.tuned else None)

    def _run(
        self, ids, segments, positions, key, *, keep: bool, rate: float = 0.0
    ) -> tuple[Array, Array | None]:
        attend_packed = make_packed_attention(segments, impl=self.config.attention)
        angles = self._angles(positions)
        keys, residual_keys = None, None
        if key is not None:
            keys = jax.random.split(key, (self.config.num_layers, 7))
            if rate:  # from another key, so that adapter dropout draws the same with and without it
                residual = jax.random.fold_in(key, _RESIDUAL)
                residual_keys = jax.random.split(residual, (self.config.num_layers, 2))

        def attention(module, x, keys):
            q, k, v = module.qkv(x, angles, keys[:3])
            return module.out(attend_packed(q, k, v), keys[3]), None

        def body(x, xs):
            layer, keys, of_residual = xs
            if of_residual is None:
                x, _ = layer(x, attention, keys)
            else:
                drop = lambda y, branch: dropout(y, rate, key=of_residual[branch])  # noqa: E731
                x, _ = layer(x, attention, keys, drop)
            return x, x if keep else None

        if self.config.remat != "none":
            policy = REMAT[self.config.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)  # scan prevents it
        x = self.embed_tokens(ids, self.config.compute_dtype)
        return jax.lax.scan(body, x, (self.layers, keys, residual_keys))

    def _angles(self, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
        return rope_angles(positions, head_dim=self.config.head_dim, theta=self.config.rope_theta)


def create_model(config: Model, vocab: Vocab, lora: Lora, *, key: PRNGKeyArray) -> Chameleon:
    """Create a random model, each weight initialized in its shards on the ambient mesh."""
    _check_mesh(config, vocab)
    return _create(config, vocab, lora, key)


def abstract_model(config: Model, vocab: Vocab, lora: Lora) -> Chameleon:
    """Return the model tree with ShapeDtypeStructs and shardings: no memory at any size."""
    _check_mesh(config, vocab)
    make = lambda key: Chameleon(config, vocab, lora, key=key)  # noqa: E731
    return with_shardings(jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0))))


def split_adapters(model: Chameleon) -> tuple[Any, Any, Any]:
    """Return (graph, adapters, base); `nnx.merge(graph, adapters, base)` restores the model."""
    # LoRAParam is a Param too: the narrow filter comes first, or the adapters would be base.
    return nnx.split(model, nnx.LoRAParam, ..., graph=False)


def with_image_columns(model: Chameleon) -> Chameleon:
    """Return the model with separate image columns in its head, as Anole's stage trains them."""
    tuned, kernel = nnx.merge(*nnx.split(model, graph=False)), model.head().kernel
    tuned.lm_head = OutputHead(kernel, image_token_columns(kernel, model.vocab.image_codes))
    return tuned


def without_image_columns(model: Chameleon) -> Chameleon:
    """Invert `with_image_columns`: put the trained columns into the kernel, in its dtype."""
    plain, head = nnx.merge(*nnx.split(model, graph=False)), model.head()
    plain.lm_head = OutputHead(full_kernel(head).astype(head.kernel.dtype), None)
    return plain


def count_parameters(tree: Any) -> int:
    """Return the number of parameters in all arrays of a model, a state or an abstract tree."""
    return sum(x.size for x in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # compiled once for equal settings
def _create(config: Model, vocab: Vocab, lora: Lora, key: PRNGKeyArray) -> Chameleon:
    return Chameleon(config, vocab, lora, key=key)


def _heads(x: Float[Array, "B T F"], head_dim: int) -> Float[Array, "B N T H"]:
    shape = (*x.shape[:2], x.shape[2] // head_dim, head_dim)
    return jnp.reshape(x, shape, out_sharding=SPLIT).transpose(0, 2, 1, 3)


def _check_mesh(config: Model, vocab: Vocab) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("no mesh is set; wrap the call in `with jax.set_mesh(make_mesh(...))`")
    sizes = {
        "tp": {
            "model.num_heads": config.num_heads,
            "model.num_kv_heads": config.num_kv_heads,
            "model.intermediate_size": config.intermediate_size,
            "vocab.size": vocab.size,
        },
        "fsdp": {"model.hidden_size": config.hidden_size},
    }
    if config.quant in PACKED:  # TILE rows share a scale and must not be split
        wide = config.num_heads * config.head_dim
        sizes["tp"] |= {
            "model.intermediate_size / 64": config.intermediate_size // TILE,
            "model.num_heads x head_dim / 64": wide // TILE,
        }
        sizes["fsdp"] |= {"model.hidden_size / 64": config.hidden_size // TILE}
    for axis, fields in sizes.items():
        for name, value in fields.items():
            if value % mesh.shape[axis]:
                raise ValueError(
                    f"config.{name} is {value}, not divisible by config.mesh.{axis} = "
                    f"{mesh.shape[axis]}; set the axis to a divisor of {value}"
                )
