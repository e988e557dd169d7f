"""The VQGAN as taming-transformers' files: a Lightning checkpoint and the yaml of its net.

vqgan.ckpt   {"state_dict": {"encoder.conv_in.weight": .., "loss.": dropped}}
vqgan.yaml   model.params: embed_dim, n_embed, ddconfig
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import yaml

from configs import base
from medmax_jax import pth
from medmax_jax.config import VQ, build
from medmax_jax.convert import tensor_files, vq_names
from medmax_jax.convert.form import (
    Checkpoint,
    ConvertError,
    Tensor,
    check_dtype,
    finite,
    section,
)
from medmax_jax.io.settings_files import MAX_YAML_BYTES, parse_yaml
from medmax_jax.io.text_files import TextFileError
from medmax_jax.storage import Folder

CKPT, YAML = "vqgan.ckpt", "vqgan.yaml"
LOSS = "loss."  # the perceptual net and the discriminator, which only training uses


def read(folder: Folder, prefix: str) -> tuple[dict[str, Tensor], VQ]:
    """(tensors by taming's names, settings); without a vqgan.ckpt no tensors, and Chameleon's."""
    if not folder.has(prefix + CKPT):
        return {}, build(VQ, base.get_config().vq)
    if not folder.has(prefix + YAML):
        raise ConvertError(
            f"{folder.path}/{prefix}{YAML}: missing; it says how the net of {CKPT} is built, "
            "copy it from where the checkpoint came from"
        )
    vq, file = settings(folder, prefix), folder.file(prefix + CKPT)
    held = tensor_files.read_torch(file)
    found = {name: tensor for name, tensor in held.items() if not name.startswith(LOSS)}
    for tensor in found.values():
        check_dtype(tensor.dtype, tensor.where)
    return vq_names.check(file.name, found, vq), vq


def write(
    folder: Folder, prefix: str, checkpoint: Checkpoint, *, progress: Callable[[int], None]
) -> None:
    """Both files; raises ConvertError without a decoder, since taming's net has one."""
    if not checkpoint.has_decoder:
        raise vq_names.no_decoder(checkpoint.path)

    def parts():
        for name, tensor in checkpoint.vqgan.items():

            def whole(tensor=tensor) -> np.ndarray:
                progress(tensor.nbytes)
                return finite(tensor.all(), tensor.where)

            yield name, tensor.shape, tensor.dtype, whole

    with folder.stream(prefix + CKPT) as out:
        pth.write(out, parts(), wrap="state_dict")
    text = yaml.safe_dump(_yaml(checkpoint.vq), sort_keys=False)
    folder.write(prefix + YAML, [text.encode()])


def settings(folder: Folder, prefix: str) -> VQ:
    """Return the settings of vqgan.yaml; raise ConvertError on a net of another kind."""
    where = f"{folder.path}/{prefix}{YAML}"
    if folder.size(prefix + YAML) > MAX_YAML_BYTES:
        raise ConvertError(f"{where}: over {MAX_YAML_BYTES} bytes; not the settings of a net")
    try:
        found = parse_yaml(bytes(folder.read(prefix + YAML)), where)
    except TextFileError as error:
        raise ConvertError(f"{error}; not the yaml of a taming VQGAN") from error
    params = section(section(found, "model", where), "params", where)
    net = section(params, "ddconfig", where)
    fields = dict(
        image_size=net.get("resolution"),
        channels=net.get("ch"),
        channel_mult=net.get("ch_mult"),
        num_res_blocks=net.get("num_res_blocks"),
        z_channels=net.get("z_channels"),
        embed_dim=params.get("embed_dim"),
        num_codes=params.get("n_embed"),
        norm_groups=net.get("norm_groups", vq_names.TAMING_GROUPS),
    )
    where = f"{where}: not the yaml of a taming VQGAN"
    return vq_names.settings(
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
    if vq.norm_groups != vq_names.TAMING_GROUPS:
        net["norm_groups"] = vq.norm_groups
    params = dict(embed_dim=vq.embed_dim, n_embed=vq.num_codes, ddconfig=net)
    return {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}
