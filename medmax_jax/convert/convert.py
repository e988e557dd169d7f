"""Convert from a path to a path atomically: read, merge, quantize, write."""

import dataclasses
import os
import types
from collections.abc import Callable, Mapping

from medmax_jax.checkpoints.manager import CheckpointError
from medmax_jax.checkpoints.safetensors_file import WeightsError
from medmax_jax.checkpoints.torch_unpickler import PthError
from medmax_jax.config import ConfigError
from medmax_jax.convert import adapters, hf, meta, model_card, native
from medmax_jax.convert import vqgan as vqgan_layout
from medmax_jax.convert.state_dict import Adapter, Checkpoint, ConvertError
from medmax_jax.io.atomic_folder import atomic_folder
from medmax_jax.io.progress import ByteProgress
from medmax_jax.io.storage import Folder, StorageError
from medmax_jax.models.tokenizer import TokenizerError

FORMATS = ("native", "hf", "meta", "peft")
SEALS = dict(native="config.json", hf="config.json", meta="README.md", peft="adapter_config.json")
SHARD_BYTES = 5 * 10**9  # per safetensors file, the size that transformers uses
REMOTE_SHARD_BYTES = 10**9  # an upload is kept in memory
SHARE = {
    "none": 1.02,
    "int8": 0.6,
    "int4": 0.45,
    "nf4": 0.45,
}  # share of the source's bytes that a target needs
SLACK = 64 * 2**20  # bytes, for tokenizer and settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The destination of a conversion and its options."""

    path: str
    layout: str  # one of FORMATS
    quant: str  # of a native base: none | int8 | int4 | nf4
    decoder: bool  # hf: with the VQGAN's decoder
    merges: bool  # whether an adapter is merged into its base
    say: Callable[[str], None]
    data_sources: Mapping[str, model_card.SourceTerms]

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]


def convert(
    source: str,
    target: str,
    *,
    layout: str,
    base: str | None = None,
    vqgan: str | None = None,
    quant: str = "none",
    merge_native: bool = False,
    decoder: bool = True,
    say: Callable[[str], None] = print,
    data_sources: Mapping[str, model_card.SourceTerms] = types.MappingProxyType({}),
) -> None:
    """Convert `source` to `target`, a new folder.

    Args:
        source: a checkpoint, adapter or run; a path or a gs:// prefix.
        target: the path of the new folder.
        layout: one of FORMATS.
        base: the weights that an adapter is merged into.
        vqgan: a path to take the VQGAN from.
        quant: of a native base, none | int8 | int4 | nf4.
        merge_native: merge an adapter into a native model too, instead of writing it separately.
        decoder: False writes an hf target without the VQGAN's decoder.
        say: logs a line.
        data_sources: terms of the training data by source, for the model card.

    Raises one of ERRORS and then leaves nothing behind.
    """
    found, adapter, identity = read_checkpoint(source), None, ""
    if isinstance(found, Adapter):
        adapter, found = found, None
        if base is not None:
            found = read_model(base, "which --base must be")
            identity = adapters.check_base(adapter, found)
    elif base is not None:
        raise ConvertError(f"--base {base}: {source} is no adapter; leave --base out")
    if vqgan is not None:
        if found is None:
            raise ConvertError(f"--vqgan {vqgan}: {source} is an adapter; give --base too")
        found = with_vqgan(found, vqgan)
    goal = Target(
        path=target, layout=layout, quant=quant, decoder=decoder, say=say,
        data_sources=data_sources,
        merges=layout in ("hf", "meta") or merge_native,
    )  # fmt: skip
    if merge_native and (layout != "native" or adapter is None):
        raise ConvertError("--merge: only for an adapter with --format native")
    if adapter and not (goal.merges and found):
        return _write_adapter(adapter, found, identity, goal)
    if layout == "peft":
        raise ConvertError(f"{source}: a whole model; --format peft is for adapters and runs")
    if adapter:
        found = adapters.merged(found, adapter)
    return _write_model(found, adapter, identity, goal)


def _write_model(found: Checkpoint, adapter: Adapter | None, identity: str, target: Target) -> None:
    layout, quant = target.layout, target.quant
    if found.quant != "none":
        raise ConvertError(
            f"{found.path}: its matrices are {found.quant}, which lost digits; convert the weights "
            "that it was made from"
        )
    if quant != "none":
        if layout != "native" or found.model is None:
            raise ConvertError(f"--quant {quant}: only for a model with --format native")
        found = dataclasses.replace(found, model=dataclasses.replace(found.model, quant=quant))
        native.check_quant(found)
    if layout == "meta" and found.vqgan and not found.has_decoder:
        raise vqgan_layout.missing_decoder_message(found.path)
    for warning in _warnings(found, layout):
        target.say(f"WARNING: {warning}")
    if found.model and not adapter:
        identity = found.fingerprint
    card_text = model_card.render_model_card(
        f"{target.name}, {layout} layout", found, adapter, identity, target.data_sources
    ).encode()
    progress = ByteProgress(found.nbytes, target.say)
    needed = int(found.nbytes * SHARE[quant]) + SLACK
    with atomic_folder(target.path, bytes_needed=needed, seal=SEALS[layout]) as out:
        if layout == "native":
            native.write(out, found, progress=progress)
        elif layout == "hf":
            shard = REMOTE_SHARD_BYTES if out.remote else SHARD_BYTES
            hf.write(out, found, shard_bytes=shard, decoder=target.decoder, progress=progress)
        else:
            meta.write(out, found, progress=progress)
        out.write("README.md", [card_text])
    progress.done(f"{target.path}: written, {layout}")


def _write_adapter(
    adapter: Adapter, base: Checkpoint | None, identity: str, target: Target
) -> None:
    if target.merges:
        raise ConvertError(
            f"{adapter.path}: an adapter; give --base, the weights it was trained on, to merge it"
        )
    layers = 1 + max(int(name.split(".")[2]) for name in adapter.matrices)
    if identity and not adapter.facts.get("base"):
        adapter = dataclasses.replace(adapter, facts=adapter.facts | {"base": identity})
    if target.layout == "native" and not adapter.facts.get("base"):
        raise ConvertError(
            f"{adapter.path}: does not say which weights it was trained on; give them as --base"
        )
    count = sum(t.nbytes for pair in adapter.matrices.values() for t in pair)
    card_text = model_card.render_model_card(
        f"{target.name}, LoRA adapter", None, adapter, identity, target.data_sources
    ).encode()
    with atomic_folder(target.path, bytes_needed=2 * count + SLACK, seal=SEALS["peft"]) as out:
        out.write("README.md", [card_text])
        if target.layout == "peft":
            adapters.write_peft(out, adapter, base_name=base.path if base else "")
        else:
            adapters.write_native(out, adapter, layers=layers)
    target.say(f"{target.path}: written, {target.layout} adapter")


def _warnings(found: Checkpoint, layout: str) -> list[str]:
    lines = []
    if not found.tokenizer and found.model:
        lines.append(f"{found.path} has no tokenizer; the target will have none")
    if layout == "native" and found.model and not found.vqgan:
        lines.append(f"{found.path} has no VQGAN; give one with --vqgan to read or write images")
    elif layout == "native" and found.vqgan and not found.has_decoder:
        lines.append(str(vqgan_layout.missing_decoder_message(found.path)))
    if layout != "native" and found.vq and found.vq.norm_groups != vqgan_layout.TAMING_GROUPS:
        lines.append(
            f"its VQGAN normalises in {found.vq.norm_groups} groups, other programs in "
            f"{vqgan_layout.TAMING_GROUPS}: there its codes and pictures will be wrong"
        )
    return lines


# ---- The layout of a path, and the checkpoint or adapter in it ----

ERRORS = (  # all errors of a conversion that a user can fix
    ConvertError, StorageError, PthError, WeightsError, CheckpointError, ConfigError,
    TokenizerError,
)  # fmt: skip
SUPPORTED_LAYOUTS = (
    "a folder of Meta's (consolidated*.pth), of Hugging Face's or of this project's (config.json), "
    "a PEFT adapter (adapter_config.json), a training run, or a vqgan.ckpt with its vqgan.yaml"
)


def read_checkpoint(path: str | os.PathLike) -> Checkpoint | Adapter:
    """Return the checkpoint or adapter at a path or gs:// prefix; only headers are read."""
    path = str(path)
    if path.endswith(".ckpt"):
        return _vqgan(*os.path.split(path))
    folder = Folder(path)
    if found := adapters.find(folder):
        return adapters.read_adapter(found)
    if folder.has("config.json"):
        config = folder.json("config.json")
        if hf.is_layout(config):
            return hf.read_checkpoint(folder)
        if native.is_layout(config):
            return native.read_checkpoint(folder)
    if folder.has("model/config.json"):  # a run that trained a complete model
        return native.read_checkpoint(Folder(f"{path.rstrip('/')}/model"))
    names = folder.names()
    if any(name.startswith("checkpoints/") for name in names):
        return adapters.read_checkpoint(folder)
    if meta.find(folder):
        return meta.read_checkpoint(folder)
    for prefix in ("", "tokenizer/"):
        if folder.has(prefix + vqgan_layout.CKPT):
            return _vqgan(f"{path.rstrip('/')}/{prefix}".rstrip("/"), vqgan_layout.CKPT)
    what = "is empty or not there" if not names else f"has {', '.join(names[:4])}"
    raise ConvertError(f"{path}: {what}; it must be {SUPPORTED_LAYOUTS}")


def read_model(path: str | os.PathLike, why: str) -> Checkpoint:
    """Return a checkpoint with a language model; the error for anything else states `why`."""
    found = read_checkpoint(path)
    if not isinstance(found, Checkpoint) or found.model is None:
        raise ConvertError(f"{path}: not a model, {why}")
    return found


def with_vqgan(checkpoint: Checkpoint, path: str | os.PathLike) -> Checkpoint:
    """Return the model with the VQGAN of another path; raise ConvertError unless they fit."""
    given = read_checkpoint(path)
    if not isinstance(given, Checkpoint) or not given.vqgan:
        raise ConvertError(f"--vqgan {path}: no VQGAN; name a vqgan.ckpt, or a model that has one")
    if checkpoint.vq and checkpoint.vq != given.vq:
        raise ConvertError(
            f"--vqgan {path}: {given.vq}, but {checkpoint.path} has {checkpoint.vq}; "
            "use the VQGAN that the model was trained with"
        )
    return dataclasses.replace(checkpoint, vqgan=given.vqgan, vq=given.vq)


def _vqgan(folder: str, name: str) -> Checkpoint:
    if name != vqgan_layout.CKPT:
        raise ConvertError(
            f"{folder}/{name}: call it {vqgan_layout.CKPT}, with {vqgan_layout.YAML} beside"
        )
    pictures, vq = vqgan_layout.read_vqgan(Folder(folder or "."), "")
    if not pictures:
        raise ConvertError(f"{folder}/{name}: no such file; check the path")
    return Checkpoint(
        layout="meta", path=f"{folder}/{name}", model=None, vocab=None, vq=vq,
        language={}, vqgan=pictures, tokenizer=None, facts={},
    )  # fmt: skip
