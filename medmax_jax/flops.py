"""Computes the arithmetic cost of a model: parameters, FLOPs per token, bytes read in decoding.

    forward of a token      2 x matrices                  + 2 S d L   causal attention, d = N H
    train, lora             4 x frozen + 6 x adapters     + 6 S d L   no gradient of a frozen matrix
    train, full             6 x matrices                  + 6 S d L
    train, image_head       2 x layers + (2 + share) head + 2 S d L   no gradient below the head

A multiply-add counts as two FLOPs. S is sum(len^2) / sum(len) over the documents of the rows, not
the row length: packed documents do not attend to each other. The head is a matrix; looking up an
embedding costs nothing. HFU includes recomputation and MFU does not. MaxText, LLaMA-Factory and
Tunix count 6 x all parameters for LoRA too, which gives an MFU of 1.5 times this one. The module
also has the limits of known chips.
"""

import dataclasses
from collections.abc import Sequence

from medmax_jax.config import Lora, Model, Vocab

GIB = 2**30
Number = float | int  # a length is either
BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """Counts the parameters in each part of a model."""

    layers: int  # matrices of all layers
    head: int
    embedding: int
    norms: int
    lora: int

    @property
    def matmul(self) -> int:
        """Return the count of frozen parameters that every token is multiplied with."""
        return self.layers + self.head

    @property
    def base(self) -> int:
        """Return the count of all parameters except the adapters."""
        return self.matmul + self.embedding + self.norms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Holds the peak rates of one device, per second."""

    name: str
    flops: float  # bf16, dense
    hbm: float  # bytes
    hbm_rate: float  # bytes
    link_rate: float  # bytes in one direction: of an ICI link, of all NVLinks, of PCIe
    links: int  # used at once along one axis: a TPU ring transfers in both directions


# TPUs: scaling-book (jax-ml.github.io/scaling-book/tpus) and docs.cloud.google.com/tpu/docs/{v4,
# v5e,v5p,v6e}. GPUs: NVIDIA's data sheets A100 (80 GB SXM), H100, H200 (SXM), L40S, the dense
# figures: the 1,979 TF of an H100 in its data sheet are for 2:4 sparse matrices.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(name="v4", flops=275e12, hbm=32e9, hbm_rate=1.228e12, link_rate=45e9, links=2),
        Chip(name="v5e", flops=197e12, hbm=16e9, hbm_rate=0.819e12, link_rate=45e9, links=2),
        Chip(name="v5p", flops=459e12, hbm=95e9, hbm_rate=2.765e12, link_rate=90e9, links=2),
        Chip(name="v6e", flops=918e12, hbm=32e9, hbm_rate=1.638e12, link_rate=90e9, links=2),
        Chip(name="A100-80", flops=312e12, hbm=80e9, hbm_rate=2.039e12, link_rate=300e9, links=1),
        Chip(name="H100", flops=989e12, hbm=80e9, hbm_rate=3.350e12, link_rate=450e9, links=1),
        Chip(name="H200", flops=989e12, hbm=141e9, hbm_rate=4.800e12, link_rate=450e9, links=1),
        Chip(name="L40S", flops=362e12, hbm=48e9, hbm_rate=0.864e12, link_rate=32e9, links=1),
    )
}
# jax.Device.device_kind -> the name above. Variants with other limits (H100 PCIe) are not listed.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-80GB": "A100-80",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA L40S": "L40S",
}


def chip(device_kind: str) -> Chip | None:
    """Return the limits of `jax.devices()[0].device_kind`; None where they are unknown."""
    name = KINDS.get(device_kind)
    return None if name is None else CHIPS[name]


def parameters(model: Model, vocab: Vocab, lora: Lora) -> Parameters:
    """Count parameters by formula; the counts equal those of `chameleon.abstract_model`."""
    m, d = model, model.hidden_size
    shapes = _matrices(m)
    gains = 2 * 2 * m.qk_norm_shards * m.head_dim  # scale and bias, of q and of k
    return Parameters(
        layers=m.num_layers * sum(rows * columns for rows, columns in shapes.values()),
        head=d * vocab.size,
        embedding=d * vocab.size,
        norms=m.num_layers * (2 * d + gains) + d,
        lora=m.num_layers * lora.rank * sum(rows + columns for rows, columns in shapes.values()),
    )


def attended_length(lengths: Sequence[int]) -> float:
    """Return S of packed rows: [3, 1] -> (9 + 1) / (3 + 1) = 2.5."""
    return sum(n * n for n in lengths) / sum(lengths)


def train_flops(model: Model, vocab: Vocab, lora: Lora, *, trains: str, length: Number) -> float:
    """Return the required FLOPs of one real token, which MFU counts. `length`: S above."""
    n, attention = parameters(model, vocab, lora), _attention(model, length)
    if trains == "lora":
        return 4 * n.matmul + 6 * n.lora + 3 * attention
    if trains == "full":
        return 6 * n.matmul + 3 * attention
    if trains == "image_head":
        return 2 * n.matmul + 2 * n.head * vocab.image_codes / vocab.size + attention
    raise ValueError(f"config.train.trains is {trains!r}; use lora, full or image_head")


def remat_flops(model: Model, *, trains: str, length: Number) -> float:
    """Return the FLOPs of one token that the backward pass recomputes, by config.model.remat.

    The scores of attention are recomputed whatever is saved of its result, and so are the products
    that are the inputs of the q and k norms; saving v avoids recomputing one matrix product.
    """
    if model.remat == "none" or trains == "image_head":
        return 0.0
    shapes, attention = _matrices(model), _attention(model, length)
    forward = {name: 2 * model.num_layers * i * o for name, (i, o) in shapes.items()}
    layers = sum(forward.values())
    again = {
        "all": layers + attention,
        "attn": layers + attention / 2,
        "attn_offload": layers + attention / 2,
        "qkv_attn": layers - forward["v_proj"] + attention / 2,
        "dots": attention / 2,
    }
    if model.remat not in again:
        raise ValueError(f"config.model.remat is {model.remat!r}; its FLOPs are not counted here")
    return again[model.remat]


def decode_flops(model: Model, vocab: Vocab, lora: Lora, *, context: Number) -> float:
    """Return the FLOPs of one generated token that attends to `context` others."""
    n = parameters(model, vocab, lora)
    return 2 * (n.matmul + n.lora) + 2 * _attention(model, context)


def decode_bytes(model: Model, vocab: Vocab, lora: Lora, *, context: Number, rows: int) -> float:
    """Return the bytes read by a step of `rows` rows: weights once, and each row's KV cache."""
    n, width = parameters(model, vocab, lora), BYTES[model.param_dtype]
    weights = n.layers * matrix_bytes(model) + (n.head + n.norms) * width + 4 * n.lora
    return weights + rows * context * cache_bytes(model)


def cache_bytes(model: Model) -> int:
    """Return the bytes of the keys and values of one token in all layers."""
    heads = model.num_kv_heads * model.head_dim
    return 2 * model.num_layers * heads * BYTES[model.compute_dtype]


def matrix_bytes(model: Model) -> float:
    """Return the bytes per number in a frozen matrix of the layers, with its share of a scale."""
    return {
        "none": float(BYTES[model.param_dtype]),
        "int8": 1.0,  # one scale per column: under 0.1%
        "int4": 0.5 + 4 / 64,
        "nf4": 0.5 + 4 / 64,
    }[model.quant]


def mfu(tokens_per_second: Number, flops: Number, *, chips: int, chip: Chip | None) -> float | None:
    """Return `flops` per real token as a share of the chips' peak; None for an unknown chip."""
    return None if chip is None else tokens_per_second * flops / (chips * chip.flops)


def hfu(mfu: float | None, flops: Number, again: Number) -> float | None:
    """Return the share of the peak that the hardware executes, including recomputation."""
    return None if mfu is None else mfu * (flops + again) / flops


def _matrices(model: Model) -> dict[str, tuple[int, int]]:
    """Return the shape [in, out] of each matrix of one layer."""
    d, f = model.hidden_size, model.intermediate_size
    wide, narrow = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
    return {
        "q_proj": (d, wide),
        "k_proj": (d, narrow),
        "v_proj": (d, narrow),
        "o_proj": (wide, d),
        "gate_proj": (d, f),
        "up_proj": (d, f),
        "down_proj": (f, d),
    }


def _attention(model: Model, length: Number) -> float:
    """Return the forward FLOPs of causal attention for one token in a document of `length`."""
    return 2.0 * length * model.num_heads * model.head_dim * model.num_layers
