"""The VQGAN's tensors: names and layout of taming-transformers and of this project.

    encoder.down.0.block.0.conv1.weight [O, I, h, w]  <->  ..conv1.kernel [h, w, I, O]
    encoder.norm_out.weight                           <->  encoder.norm_out.scale
    quantize.embedding.weight                         <->  quantize.embedding

Meta's vqgan.ckpt and HF's `model.vqmodel.` have the same names; HF's own files lack `decoder.`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import yaml

from medmax_jax.checkpoints import safetensors_file, torch_file
from medmax_jax.config import VQ, ConfigError, build, check_vq
from medmax_jax.convert import safetensors_stream
from medmax_jax.convert.state_dict import (
    Checkpoint,
    ConvertError,
    LazyTensor,
    check_dtype,
    check_finite,
    check_shapes,
    section,
)
from medmax_jax.io.errors import quoted
from medmax_jax.io.settings_files import MAX_YAML_BYTES, parse_yaml
from medmax_jax.io.text_files import TextFileError
from medmax_jax.models import vqgan
from medmax_jax.storage.folder import Folder

TAMING_GROUPS = 32  # of every GroupNorm, fixed in the code of taming-transformers and of HF


class TensorLocation(NamedTuple):
    """The location of a taming tensor in this project, and its shape there."""

    name: str
    shape: tuple[int, ...]


def settings(fields: dict[str, Any], *, double: Any, attention: Any, where: str) -> VQ:
    """Return a VQ; raise ConvertError on invalid sizes and on parts that Chameleon's lacks.

    attention: sides in codes at which the net would attend; sides that do not occur are harmless
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
            f"{where}: attention at {quoted(attention)}; it must be a list of integers"
        )
    levels = {vq.image_size // 2**level for level in range(len(vq.channel_mult))}
    if double or levels & set(sides):
        raise ConvertError(
            f"{where}: double latents are {quoted(double)}, attention is at {quoted(attention)}; "
            "the VQGAN of this family has neither"
        )
    return vq


@functools.lru_cache(maxsize=8)  # tracing the net takes seconds
def key_map(vq: VQ) -> dict[str, TensorLocation]:
    """Return taming name -> location of every tensor of the VQGAN; must not be modified."""
    locations = {}
    for name, leaf in safetensors_file.flatten_named(vqgan.abstract(vq)).items():
        path, _, last = name.rpartition(".")
        taming = f"{name}.weight" if last == "embedding" else f"{path}.weight"
        locations[name if last == "bias" else taming] = TensorLocation(name, tuple(leaf.shape))
    return locations


def shapes(vq: VQ, *, decoder: bool) -> dict[str, tuple[int, ...]]:
    """Return taming name -> shape in taming-transformers."""
    taming_shapes = {name: _taming_shape(location.shape) for name, location in key_map(vq).items()}
    return {n: s for n, s in taming_shapes.items() if decoder or not n.startswith("decoder.")}


def check(path: str, tensors: dict[str, LazyTensor], vq: VQ) -> dict[str, LazyTensor]:
    """Return the tensors; raise ConvertError unless they are a VQGAN, with or without decoder."""
    if tensors:
        vqgan.check_blocks(tensors, vq, path)
        check_shapes(
            path, tensors, shapes(vq, decoder=any(n.startswith("decoder.") for n in tensors))
        )
    return tensors


def as_native(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """Return a taming tensor [O, I, h, w] in this project's layout; others unchanged."""
    if len(shape) != 4:
        return tensor

    def block(rows: slice, columns: slice) -> np.ndarray:
        return tensor.read().transpose(2, 3, 1, 0)[rows, columns]

    return LazyTensor(shape, tensor.dtype, block, tensor.where)


def from_native(tensor: LazyTensor) -> LazyTensor:
    """Return this project's tensor [h, w, I, O] in taming's layout; others unchanged."""
    if len(tensor.shape) != 4:
        return tensor

    def block(rows: slice, columns: slice) -> np.ndarray:
        return tensor.read().transpose(3, 2, 0, 1)[rows, columns]

    return LazyTensor(_taming_shape(tensor.shape), tensor.dtype, block, tensor.where)


def missing_decoder_message(path: str) -> ConvertError:
    """Return the error for a missing decoder where one is needed."""
    return ConvertError(
        f"{path}: has no VQGAN decoder, as HF's checkpoints of this family; "
        "give Meta's with --vqgan=PATH/tokenizer/vqgan.ckpt"
    )


def _taming_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape


# ---- The VQGAN as taming-transformers' files: a Lightning checkpoint and the yaml of its net ----
#
# vqgan.ckpt   {"state_dict": {"encoder.conv_in.weight": .., "loss.": dropped}}
# vqgan.yaml   model.params: embed_dim, n_embed, ddconfig

CKPT, YAML = "vqgan.ckpt", "vqgan.yaml"
LOSS = "loss."  # the perceptual net and the discriminator, which only training uses


def read_vqgan(folder: Folder, prefix: str) -> tuple[dict[str, LazyTensor], VQ]:
    """Return (tensors by taming's names, settings).

    Without a vqgan.ckpt there are no tensors, and the settings are Chameleon's.
    """
    if not folder.has(prefix + CKPT):
        return {}, vqgan.RELEASED
    if not folder.has(prefix + YAML):
        raise ConvertError(
            f"{folder.path}/{prefix}{YAML} is missing; it defines the network of {CKPT}, "
            "so copy it from the source of the checkpoint"
        )
    vq, file = meta_vqgan_settings(folder, prefix), folder.file(prefix + CKPT)
    stored = safetensors_stream.read_torch(file)
    tensors = {name: tensor for name, tensor in stored.items() if not name.startswith(LOSS)}
    for tensor in tensors.values():
        check_dtype(tensor.dtype, tensor.where)
    return check(file.name, tensors, vq), vq


def write(
    folder: Folder, prefix: str, checkpoint: Checkpoint, *, progress: Callable[[int], None]
) -> None:
    """Write both files; raise ConvertError without a decoder, since taming's net has one."""
    if not checkpoint.has_decoder:
        raise missing_decoder_message(checkpoint.path)

    def parts():
        for name, tensor in checkpoint.vqgan.items():

            def read_tensor(tensor=tensor) -> np.ndarray:
                progress(tensor.nbytes)
                return check_finite(tensor.read(), tensor.where)

            yield name, tensor.shape, tensor.dtype, read_tensor

    with folder.stream(prefix + CKPT) as out:
        torch_file.write(out, parts(), wrap="state_dict")
    text = yaml.safe_dump(_yaml(checkpoint.vq), sort_keys=False)
    folder.write(prefix + YAML, [text.encode()])


def meta_vqgan_settings(folder: Folder, prefix: str) -> VQ:
    """Return the settings of vqgan.yaml; raise ConvertError on a net of another kind."""
    where = f"{folder.path}/{prefix}{YAML}"
    if folder.size(prefix + YAML) > MAX_YAML_BYTES:
        raise ConvertError(
            f"{where}: more than {MAX_YAML_BYTES} bytes; not the settings of a VQGAN"
        )
    try:
        content = parse_yaml(bytes(folder.read(prefix + YAML)), where)
    except TextFileError as error:
        raise ConvertError(f"{error}; not the yaml of a taming VQGAN") from error
    params = section(section(content, "model", where), "params", where)
    net = section(params, "ddconfig", where)
    fields = dict(
        image_size=net.get("resolution"),
        channels=net.get("ch"),
        channel_mult=net.get("ch_mult"),
        num_res_blocks=net.get("num_res_blocks"),
        z_channels=net.get("z_channels"),
        embed_dim=params.get("embed_dim"),
        num_codes=params.get("n_embed"),
        norm_groups=net.get("norm_groups", TAMING_GROUPS),
    )
    where = f"{where}: not the yaml of a taming VQGAN"
    return settings(
        fields, double=net.get("double_z"), attention=net.get("attn_resolutions"), where=where
    )


def _yaml(vq: VQ) -> dict[str, Any]:
    net = dict(
        double_z=False,
        z_channels=vq.z_channels,
        resolution=vq.image_size,
        in_channels=3,
        out_ch=3,
        ch=vq.channels,
        ch_mult=list(vq.channel_mult),
        num_res_blocks=vq.num_res_blocks,
        attn_resolutions=[],
        dropout=0.0,
    )
    if vq.norm_groups != TAMING_GROUPS:
        net["norm_groups"] = vq.norm_groups
    params = dict(embed_dim=vq.embed_dim, n_embed=vq.num_codes, ddconfig=net)
    return {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}
