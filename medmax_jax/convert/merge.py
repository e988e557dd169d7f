"""Adapters into the weights they were trained on: W + alpha / rank B A, in fp32, rounded once."""

import dataclasses

import numpy as np

from medmax_jax import export
from medmax_jax.convert.form import (
    DTYPES,
    Adapter,
    Checkpoint,
    ConvertError,
    Tensor,
)


def check_base(adapter: Adapter, base: Checkpoint) -> str:
    """What the adapter calls the base; raises ConvertError when it belongs to another model."""
    if base.quant != "none":
        raise ConvertError(
            f"{base.path}: its matrices are {base.quant}, which lost digits; give the weights that "
            "it was made from as --base"
        )
    for name, (a, b) in adapter.matrices.items():
        shape = (b.shape[0], a.shape[1])
        have = base.language[name].shape if name in base.language else None
        if have != shape:
            raise ConvertError(
                f"{adapter.path}: an adapter for {name} {shape}, but in {base.path} it is {have}; "
                "an adapter for another base"
            )
    _check_all_layers(adapter, base)
    names = [base.fingerprint]
    if base.layout == "native":  # a small model's one file has its own name, see export.identity
        names.insert(0, export.identity(base.path))
    wanted = adapter.facts.get("base", names[0])
    if wanted not in names:
        raise ConvertError(
            f"{adapter.path}: was trained on base weights {wanted[:12]}, {base.path} has "
            f"{names[0][:12]}; give the base that it was trained from"
        )
    return wanted


def _check_all_layers(adapter: Adapter, base: Checkpoint) -> None:
    """Raise ConvertError where a module has matrices in some layers and none in others."""
    modules = {name.split(".", 3)[3] for name in adapter.matrices}
    wanted = (f"model.layers.{i}.{m}" for m in modules for i in range(base.model.num_layers))
    if missing := sorted(name for name in wanted if name not in adapter.matrices):
        raise ConvertError(
            f"{adapter.path}: has no LoRA on {missing[0]}, but on that module of other layers "
            f"({len(missing)} such); an incomplete copy: copy the adapter again"
        )


def merged(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The base with the adapter in its matrices, each in the dtype that it has there."""
    language = dict(base.language)
    for name, (a, b) in adapter.matrices.items():
        language[name] = _sum(language[name], a, b, np.float32(adapter.scale(name)))
    return dataclasses.replace(base, language=language)


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: np.float32) -> Tensor:
    def block(rows: slice, columns: slice) -> np.ndarray:
        left = b.block(rows, slice(None)).astype(np.float32)
        right = a.block(slice(0, a.shape[0]), columns).astype(np.float32)
        whole = weight.block(rows, columns).astype(np.float32) + scale * (left @ right)
        return whole.astype(DTYPES[weight.dtype])

    return Tensor(weight.shape, weight.dtype, block, weight.where)
