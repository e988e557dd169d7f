"""Convert from a path to a path atomically: read, merge, quantize, write."""

import dataclasses
import os
import types
from collections.abc import Callable, Mapping

from medmax_jax.checkpoints import export
from medmax_jax.checkpoints.manager import CheckpointError
from medmax_jax.checkpoints.safetensors_file import WeightsError
from medmax_jax.checkpoints.torch_unpickler import PthError
from medmax_jax.config import VQ, ConfigError, view_text, with_views_of
from medmax_jax.convert import adapters, hf, meta, model_card, native
from medmax_jax.convert import vqgan as vqgan_layout
from medmax_jax.convert.state_dict import Adapter, Checkpoint, ConvertError
from medmax_jax.io.progress import ByteProgress
from medmax_jax.models import vqgan as vqgan_network
from medmax_jax.models.tokenizer import TokenizerError
from medmax_jax.storage.atomic_folder import atomic_folder
from medmax_jax.storage.folder import Folder, StorageError

FORMATS = ("native", "hf", "meta", "peft")
SEALS = dict(native="config.json", hf="config.json", meta="README.md", peft="adapter_config.json")
SHARD_BYTES = 5 * 10**9  # per safetensors file, the size that transformers uses
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


MIN_KEPT = 0.9  # of the change that an adapter makes; less is reported


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
        source: a checkpoint, adapter or run; a path, a gs:// prefix or hf://ORG/NAME.
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
    checkpoint, adapter, identity = read_checkpoint(source), None, ""
    if isinstance(checkpoint, Adapter):
        adapter, checkpoint = checkpoint, None
        if base is not None:
            checkpoint = read_model(base, "as --base requires")
            identity = adapters.check_base(adapter, checkpoint)
    elif base is not None:
        raise ConvertError(f"--base {base}: {source} is not an adapter; omit --base")
    if vqgan is not None:
        if checkpoint is None:
            raise ConvertError(f"--vqgan {vqgan}: {source} is an adapter; set --base too")
        checkpoint = with_vqgan(checkpoint, vqgan)
    destination = Target(
        path=target, layout=layout, quant=quant, decoder=decoder, say=say,
        data_sources=data_sources,
        merges=layout in ("hf", "meta") or merge_native,
    )  # fmt: skip
    if merge_native and (layout != "native" or adapter is None):
        raise ConvertError("--merge: only for an adapter with --format native")
    if adapter and not (destination.merges and checkpoint):
        return _write_adapter(adapter, checkpoint, identity, destination)
    if layout == "peft":
        raise ConvertError(f"{source}: a complete model; --format peft is for adapters and runs")
    if adapter:
        if (share := adapters.kept_share(checkpoint, adapter)) < MIN_KEPT:
            say(
                f"WARNING: rounding to the dtype of the base keeps about {share:.0%} of the "
                "adapter's change; keep the adapter separate (--format peft or native)"
            )
        checkpoint = adapters.merged(checkpoint, adapter)
    return _write_model(checkpoint, adapter, identity, destination)


def _write_model(
    checkpoint: Checkpoint, adapter: Adapter | None, identity: str, target: Target
) -> None:
    layout, quant = target.layout, target.quant
    if checkpoint.quant != "none":
        raise ConvertError(
            f"{checkpoint.path}: its matrices are quantized to {checkpoint.quant}; convert the "
            "original weights"
        )
    if quant != "none":
        if layout != "native" or checkpoint.model is None:
            raise ConvertError(f"--quant {quant}: only for a model with --format native")
        checkpoint = dataclasses.replace(
            checkpoint, model=dataclasses.replace(checkpoint.model, quant=quant)
        )
        native.check_quant(checkpoint)
    if layout == "meta" and checkpoint.vqgan and not checkpoint.has_decoder:
        raise vqgan_layout.missing_decoder_message(checkpoint.path)
    for warning in _warnings(checkpoint, layout):
        target.say(f"WARNING: {warning}")
    if checkpoint.model and not adapter:
        identity = checkpoint.fingerprint
    card_text = model_card.render_model_card(
        f"{target.name}, {layout} layout", checkpoint, adapter, identity, target.data_sources
    ).encode()
    progress = ByteProgress(checkpoint.nbytes, target.say)
    needed = int(checkpoint.nbytes * SHARE[quant]) + SLACK
    with atomic_folder(target.path, bytes_needed=needed, seal=SEALS[layout]) as out:
        if layout == "native":
            native.write(out, checkpoint, progress=progress)
        elif layout == "hf":
            hf.write(
                out, checkpoint, shard_bytes=SHARD_BYTES, decoder=target.decoder, progress=progress
            )
        else:
            meta.write(out, checkpoint, progress=progress)
        out.write("README.md", [card_text])
    progress.done(f"wrote {target.path} ({layout})")


def _write_adapter(
    adapter: Adapter, base: Checkpoint | None, identity: str, target: Target
) -> None:
    if target.merges:
        raise ConvertError(
            f"{adapter.path}: an adapter; to merge it, set --base to the weights it was trained on"
        )
    layers = 1 + max(int(name.split(".")[2]) for name in adapter.matrices)
    if identity and not adapter.facts.get("base"):
        adapter = dataclasses.replace(adapter, facts=adapter.facts | {"base": identity})
    if target.layout == "native" and not adapter.facts.get("base"):
        raise ConvertError(
            f"{adapter.path}: does not state the weights it was trained on; set --base to them"
        )
    if target.layout == "peft":
        vq = with_views_of(vqgan_network.RELEASED, adapter.facts.get("config"))
        for warning in _view_warnings(vq):
            target.say(f"WARNING: {warning}")
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
    target.say(f"wrote {target.path} ({target.layout} adapter)")


def _warnings(checkpoint: Checkpoint, layout: str) -> list[str]:
    lines = []
    if not checkpoint.tokenizer and checkpoint.model:
        lines.append(f"{checkpoint.path} has no tokenizer; the target will have none")
    if layout == "native" and checkpoint.model and not checkpoint.vqgan:
        lines.append(f"{checkpoint.path} has no VQGAN; set --vqgan to read or write images")
    elif layout == "native" and checkpoint.vqgan and not checkpoint.has_decoder:
        lines.append(str(vqgan_layout.missing_decoder_message(checkpoint.path)))
    if (
        layout != "native"
        and checkpoint.vq
        and checkpoint.vq.norm_groups != vqgan_layout.TAMING_GROUPS
    ):
        lines.append(
            f"its VQGAN normalizes in {checkpoint.vq.norm_groups} groups, but other programs use "
            f"{vqgan_layout.TAMING_GROUPS}: their codes and images will be wrong"
        )
    if layout != "native" and checkpoint.vq:
        lines += _view_warnings(checkpoint.vq)
    return lines


def _view_warnings(vq: VQ) -> list[str]:
    if (vq.view, vq.answer_view) == ("released", "released"):
        return []
    return [
        f"it was trained on images with {view_text(vq)}, but other programs crop every image to "
        "its center square (view released); pad images to white squares before they read them"
    ]


# ---- The layout of a path, and the checkpoint or adapter in it ----

ERRORS = (  # all errors of a conversion that a user can fix
    ConvertError, StorageError, PthError, WeightsError, CheckpointError, ConfigError,
    TokenizerError,
)  # fmt: skip
SUPPORTED_LAYOUTS = (
    "a folder of Meta (consolidated*.pth), Hugging Face or medmax_jax (config.json), a PEFT "
    "adapter (adapter_config.json), a training run, or a vqgan.ckpt with its vqgan.yaml"
)


def read_checkpoint(path: str | os.PathLike) -> Checkpoint | Adapter:
    """Return the checkpoint or adapter at a path, gs:// prefix or hf:// address.

    Only headers are read, but what is on the hub is downloaded first.
    """
    path = export.locate(path)
    if path.endswith(".ckpt"):
        return _vqgan(*os.path.split(path))
    folder = Folder(path)
    if adapter_folder := adapters.find(folder):
        return adapters.read_adapter(adapter_folder)
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
    problem = "is empty or does not exist" if not names else f"contains {', '.join(names[:4])}"
    raise ConvertError(f"{path}: {problem}; it must be {SUPPORTED_LAYOUTS}")


def read_model(path: str | os.PathLike, reason: str) -> Checkpoint:
    """Return a checkpoint with a language model; the error for anything else states `reason`."""
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, Checkpoint) or checkpoint.model is None:
        raise ConvertError(f"{path}: not a complete model, {reason}")
    return checkpoint


def with_vqgan(checkpoint: Checkpoint, path: str | os.PathLike) -> Checkpoint:
    """Return the model with the VQGAN of another path; raise ConvertError unless they fit."""
    source = read_checkpoint(path)
    if not isinstance(source, Checkpoint) or not source.vqgan:
        raise ConvertError(f"--vqgan {path}: no VQGAN; use a vqgan.ckpt, or a model that has one")
    views = checkpoint.vq or source.vq  # how images are shown to the model, not a VQGAN's part
    vq = dataclasses.replace(source.vq, view=views.view, answer_view=views.answer_view)
    if checkpoint.vq and checkpoint.vq != vq:
        raise ConvertError(
            f"--vqgan {path}: {source.vq}, but {checkpoint.path} has {checkpoint.vq}; "
            "use the VQGAN that the model was trained with"
        )
    return dataclasses.replace(checkpoint, vqgan=source.vqgan, vq=vq)


def _vqgan(folder: str, name: str) -> Checkpoint:
    if name != vqgan_layout.CKPT:
        raise ConvertError(
            f"{folder}/{name}: rename it {vqgan_layout.CKPT}, with {vqgan_layout.YAML} next to it"
        )
    tensors, vq = vqgan_layout.read_vqgan(Folder(folder or "."), "")
    if not tensors:
        raise ConvertError(f"{folder}/{name}: file not found; check the path")
    return Checkpoint(
        layout="meta", path=f"{folder}/{name}", model=None, vocab=None, vq=vq,
        language={}, vqgan=tensors, tokenizer=None, facts={},
    )  # fmt: skip
