"""The VQGAN as taming-transformers' files: a Lightning checkpoint and the yaml of its net.

vqgan.ckpt   {"state_dict": {"encoder.conv_in.weight": .., "loss.": dropped}}
vqgan.yaml   model.params: embed_dim, n_embed, ddconfig
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import yaml

from configs import base
from medmax_jax import pth
from medmax_jax.config import VQ, build
from medmax_jax.convert import vq_names
from medmax_jax.convert.form import Checkpoint, ConvertError, Tensor, check_dtype, finite
from medmax_jax.storage import ByteFile, Folder

CKPT, YAML = "vqgan.ckpt", "vqgan.yaml"
LOSS = "loss."  # the perceptual net and the discriminator, which only training uses
MAX_YAML = 1_000_000  # bytes; the published one has 1,490


def read(folder: Folder, prefix: str) -> tuple[dict[str, Tensor], VQ]:
    """(tensors by taming's names, settings); without a vqgan.ckpt no tensors, and Chameleon's."""
    if not folder.has(prefix + CKPT):
        return {}, build(VQ, base.get_config().vq)
    if not folder.has(prefix + YAML):
        raise ConvertError(
            f"{folder.path}/{prefix}{YAML}: missing; it says how the net of {CKPT} is built, "
            "copy it from where the checkpoint came from"
        )
    vq, file = _settings(folder, prefix), folder.file(prefix + CKPT)
    found = {n: t for n, t in tensors(file, dropped=()).items() if not n.startswith(LOSS)}
    for tensor in found.values():
        check_dtype(tensor.dtype, tensor.where)
    return vq_names.check(file.name, found, vq), vq


def tensors(file: ByteFile, *, dropped: tuple[str, ...]) -> dict[str, Tensor]:
    """Name -> tensor of a .pth or .ckpt file."""
    found = {}
    for name, entry in pth.open_file(file).items():

        def block(rows: slice, columns: slice, entry=entry) -> np.ndarray:
            first, last, _ = rows.indices(entry.shape[0])
            start = entry.start + first * entry.stride[0]
            shape = (last - first, *entry.shape[1:])
            array = pth.read(file, dataclasses.replace(entry, start=start, shape=shape))
            return array[:, columns] if array.ndim > 1 else array

        if name not in dropped:
            found[name] = Tensor(entry.shape, entry.dtype, block, f"{file.name}: {name}")
    return found


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


def _settings(folder: Folder, prefix: str) -> VQ:
    where = f"{folder.path}/{prefix}{YAML}"
    if folder.size(prefix + YAML) > MAX_YAML:
        raise ConvertError(f"{where}: over {MAX_YAML} bytes; not the settings of a net")
    try:
        params = yaml.safe_load(bytes(folder.read(prefix + YAML)))["model"]["params"]
        net = params["ddconfig"]
        fields = dict(
            image_size=net["resolution"],
            channels=net["ch"],
            channel_mult=list(net["ch_mult"]),
            num_res_blocks=net["num_res_blocks"],
            z_channels=net["z_channels"],
            embed_dim=params["embed_dim"],
            num_codes=params["n_embed"],
            norm_groups=net.get("norm_groups", vq_names.TAMING_GROUPS),
        )
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConvertError(f"{where}: {error!r}; not the yaml of a taming VQGAN") from error
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
