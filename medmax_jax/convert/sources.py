"""What lies at a path: which layout, and the checkpoint or adapter in it."""

import dataclasses
import os

from medmax_jax.checkpoint import CheckpointError
from medmax_jax.config import ConfigError
from medmax_jax.convert import hf, meta, meta_vqgan, native, peft
from medmax_jax.convert.form import Adapter, Checkpoint, ConvertError
from medmax_jax.pth import PthError
from medmax_jax.storage import Folder, StorageError
from medmax_jax.tokenizer import TokenizerError
from medmax_jax.weights import WeightsError

ERRORS = (  # all that a conversion raises on what a user can mend
    ConvertError, StorageError, PthError, WeightsError, CheckpointError, ConfigError,
    TokenizerError,
)  # fmt: skip
KNOWN = (
    "a folder of Meta's (consolidated*.pth), of Hugging Face's or of this project's (config.json), "
    "a PEFT adapter (adapter_config.json), a training run, or a vqgan.ckpt with its vqgan.yaml"
)


def read(path: str | os.PathLike) -> Checkpoint | Adapter:
    """The checkpoint or adapter at a path or gs:// prefix; nothing but headers is read."""
    path = str(path)
    if path.endswith(".ckpt"):
        return _vqgan(*os.path.split(path))
    folder = Folder(path)
    if found := peft.find(folder):
        return peft.read(found)
    if folder.has("config.json"):
        config = folder.json("config.json")
        if hf.is_layout(config):
            return hf.read(folder)
        if native.is_layout(config):
            return native.read(folder)
    if folder.has("model/config.json"):  # a run that trained a whole model
        return native.read(Folder(f"{path.rstrip('/')}/model"))
    names = folder.names()
    if any(name.startswith("checkpoints/") for name in names):
        return peft.read_checkpoint(folder)
    if meta.find(folder):
        return meta.read(folder)
    for prefix in ("", "tokenizer/"):
        if folder.has(prefix + meta_vqgan.CKPT):
            return _vqgan(f"{path.rstrip('/')}/{prefix}".rstrip("/"), meta_vqgan.CKPT)
    what = "is empty or not there" if not names else f"has {', '.join(names[:4])}"
    raise ConvertError(f"{path}: {what}; it must be {KNOWN}")


def read_model(path: str | os.PathLike, why: str) -> Checkpoint:
    """A checkpoint with a language model; `why` says what for when it is something else."""
    found = read(path)
    if not isinstance(found, Checkpoint) or found.model is None:
        raise ConvertError(f"{path}: not a model, {why}")
    return found


def with_vqgan(checkpoint: Checkpoint, path: str | os.PathLike) -> Checkpoint:
    """The model with the VQGAN of another path; raises ConvertError unless they fit."""
    given = read(path)
    if not isinstance(given, Checkpoint) or not given.vqgan:
        raise ConvertError(f"--vqgan {path}: no VQGAN; name a vqgan.ckpt, or a model that has one")
    if checkpoint.vq and checkpoint.vq != given.vq:
        raise ConvertError(
            f"--vqgan {path}: {given.vq}, but {checkpoint.path} has {checkpoint.vq}; "
            "use the VQGAN that the model was trained with"
        )
    return dataclasses.replace(checkpoint, vqgan=given.vqgan, vq=given.vq)


def _vqgan(folder: str, name: str) -> Checkpoint:
    if name != meta_vqgan.CKPT:
        raise ConvertError(
            f"{folder}/{name}: call it {meta_vqgan.CKPT}, with {meta_vqgan.YAML} beside"
        )
    pictures, vq = meta_vqgan.read(Folder(folder or "."), "")
    if not pictures:
        raise ConvertError(f"{folder}/{name}: no such file; check the path")
    return Checkpoint(
        layout="meta", path=f"{folder}/{name}", model=None, vocab=None, vq=vq,
        language={}, vqgan=pictures, tokenizer=None, facts={},
    )  # fmt: skip
