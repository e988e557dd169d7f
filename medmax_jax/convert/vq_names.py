"""The VQGAN's tensors: taming-transformers' names and layout beside this project's.

    encoder.down.0.block.0.conv1.weight [O, I, h, w]  <->  ..conv1.kernel [h, w, I, O]
    encoder.norm_out.weight                           <->  encoder.norm_out.scale
    quantize.embedding.weight                         <->  quantize.embedding

Meta's vqgan.ckpt and HF's `model.vqmodel.` have the same names; HF's own files lack `decoder.`.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from medmax_jax import vqgan, weights
from medmax_jax.config import VQ, ConfigError, build, check_vq
from medmax_jax.convert.form import ConvertError, Tensor, require
from medmax_jax.io.errors import quoted

TAMING_GROUPS = 32  # of every GroupNorm, fixed in the code of taming-transformers and of HF


class Place(NamedTuple):
    """Where a taming tensor stands in this project, and its shape there."""

    name: str
    shape: tuple[int, ...]


def settings(fields: dict[str, Any], *, double: Any, attention: Any, where: str) -> VQ:
    """A VQ; raises ConvertError on sizes of a wrong kind and on parts that Chameleon's has not.

    attention: sides in codes at which the net would attend; those it never has are harmless
    (MedMax's own recipe names 16, the released net goes from 512 to 32).
    """
    try:
        vq = build(VQ, fields)
        check_vq(vq)
    except ConfigError as error:
        raise ConvertError(f"{where}: {error}") from error
    sides = [] if attention is None else attention
    if not isinstance(sides, list) or not all(type(side) is int for side in sides):
        raise ConvertError(
            f"{where}: attention at {quoted(attention)}; it must be a list of whole numbers"
        )
    levels = {vq.image_size // 2**level for level in range(len(vq.channel_mult))}
    if double or levels & set(sides):
        raise ConvertError(
            f"{where}: double latents {quoted(double)}, attention at {quoted(attention)}; the "
            "VQGAN of this family has neither"
        )
    return vq


@functools.lru_cache(maxsize=8)  # tracing the net takes seconds
def table(vq: VQ) -> dict[str, Place]:
    """Taming name -> place, for every tensor of the VQGAN; not to be changed."""
    found = {}
    for name, leaf in weights.named(vqgan.abstract(vq)).items():
        path, _, last = name.rpartition(".")
        taming = f"{name}.weight" if last == "embedding" else f"{path}.weight"
        found[name if last == "bias" else taming] = Place(name, tuple(leaf.shape))
    return found


def shapes(vq: VQ, *, decoder: bool) -> dict[str, tuple[int, ...]]:
    """Taming name -> shape there."""
    found = {name: _taming_shape(place.shape) for name, place in table(vq).items()}
    return {n: s for n, s in found.items() if decoder or not n.startswith("decoder.")}


def check(path: str, have: dict[str, Tensor], vq: VQ) -> dict[str, Tensor]:
    """The tensors; raises ConvertError unless they are a VQGAN, with or without its decoder."""
    if have:
        vqgan.check_blocks(have, vq, path)
        require(path, have, shapes(vq, decoder=any(n.startswith("decoder.") for n in have)))
    return have


def as_native(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor [O, I, h, w] of taming's as this project's; anything else as it is."""
    if len(shape) != 4:
        return tensor

    def block(rows: slice, columns: slice) -> np.ndarray:
        return tensor.all().transpose(2, 3, 1, 0)[rows, columns]

    return Tensor(shape, tensor.dtype, block, tensor.where)


def from_native(tensor: Tensor) -> Tensor:
    """A tensor [h, w, I, O] of this project as taming's; anything else as it is."""
    if len(tensor.shape) != 4:
        return tensor

    def block(rows: slice, columns: slice) -> np.ndarray:
        return tensor.all().transpose(3, 2, 0, 1)[rows, columns]

    return Tensor(_taming_shape(tensor.shape), tensor.dtype, block, tensor.where)


def no_decoder(path: str) -> ConvertError:
    """What to say where a decoder is needed and none is there."""
    return ConvertError(
        f"{path}: has no VQGAN decoder, as HF's checkpoints of this family; "
        "give Meta's with --vqgan=PATH/tokenizer/vqgan.ckpt"
    )


def _taming_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape
