"""The two tiny Chameleons of the parity goldens; numpy only, so both sides make the same weights.

No weight is stored: each comes from a generator seeded with its name, and the golden files hold
outputs alone. Gains and biases are random too, so that a forgotten one shows.
"""

import dataclasses
import zlib

import numpy as np

SIZE = 8_800  # rows of the embedding: all special ids, and 88 of text
IMAGE = np.r_[0, 8_720:8_726, 8_197, 4:20, 700:708, 8_196, 8_710]  # <s> text BOI codes EOI SEP
TOKENS = 48
COLUMNS = np.r_[0:64, 700:716, 8_190:8_200, 8_705:8_800]  # of the logits that are stored
LORA = dict(rank=4, alpha=6.0)
STEPS, LR = 5, 1e-3
SEED = 6  # of weights and text
SCORED = slice(12, None)  # targets in the loss: part of the image, EOI, SEP and the answer


@dataclasses.dataclass(frozen=True)
class Case:
    """The fields of medmax_jax.config.Model that shape the weights."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm_shards: int
    swin_norm: bool
    hidden_size: int = 64
    num_layers: int = 3
    intermediate_size: int = 96


BASE = Case("base", 4, 4, 16, 1, False)  # as 7B
SWIN = Case("swin", 8, 4, 8, 4, True)  # as 30B: swin-norm, grouped keys, gains of 4 shards
CASES = {case.name: case for case in (BASE, SWIN)}


def ids() -> np.ndarray:
    """Two rows, [2, TOKENS]: one opens with an image, one has it in the answer."""
    text = np.random.default_rng(SEED).integers(8_712, SIZE, (2, TOKENS))
    text[0, : len(IMAGE)] = IMAGE
    text[1, 0], text[1, -len(IMAGE) :] = 0, np.r_[IMAGE[1:], 2]
    return text.astype(np.int32)


def weights(case: Case, *, lora: bool) -> dict[str, np.ndarray]:
    """Every array by its dotted name, in fp32; matrices [in, out], layers stacked on axis 0."""
    return {name: _draw(name, shape) for name, shape in shapes(case, lora=lora).items()}


def shapes(case: Case, *, lora: bool) -> dict[str, tuple[int, ...]]:
    """Dotted name -> shape of each array."""
    dim, ffn, depth = case.hidden_size, case.intermediate_size, case.num_layers
    wide, narrow = case.num_heads * case.head_dim, case.num_kv_heads * case.head_dim
    found = {"embed_tokens.embedding": (SIZE, dim), "norm.scale": (dim,)}
    found["lm_head.kernel"] = (dim, SIZE)
    for name in ("input_layernorm", "post_attention_layernorm"):
        found[f"layers.{name}.scale"] = (depth, dim)
    for name in ("q_norm", "k_norm"):
        for gain in ("scale", "bias"):
            found[f"layers.self_attn.{name}.{gain}"] = (depth, case.qk_norm_shards, case.head_dim)
    for name, (din, dout) in {
        "self_attn.q_proj": (dim, wide),
        "self_attn.k_proj": (dim, narrow),
        "self_attn.v_proj": (dim, narrow),
        "self_attn.o_proj": (wide, dim),
        "mlp.gate_proj": (dim, ffn),
        "mlp.up_proj": (dim, ffn),
        "mlp.down_proj": (ffn, dim),
    }.items():
        found[f"layers.{name}.kernel"] = (depth, din, dout)
        if lora:
            found[f"layers.{name}.lora_a"] = (depth, din, LORA["rank"])
            found[f"layers.{name}.lora_b"] = (depth, LORA["rank"], dout)
    return found


def tolerance(name: str, golden: np.ndarray) -> float:
    """2e-5 x max(1, std); a loss or a norm is one number, and its size stands for the std."""
    scale = np.abs(golden).max() if name in ("losses", "norms") else golden.std()
    return 2e-5 * max(1.0, float(scale))


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Sizes that keep activations near 1 and logits above it; gains about 1, biases about 0."""
    x = np.random.default_rng([SEED, zlib.crc32(name.encode())]).standard_normal(shape)
    leaf = name.rsplit(".", 1)[1]
    if leaf == "scale":
        x = 1 + 0.3 * x
    elif leaf == "bias":
        x = 0.3 * x
    elif name == "lm_head.kernel":
        x = 0.25 * x
    elif leaf in ("kernel", "lora_a", "lora_b"):
        x = x * shape[-2] ** -0.5
    return x.astype(np.float32)
