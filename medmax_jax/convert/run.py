"""One conversion from a path to a path: read, merge, quantise, write; whole or not at all."""

import dataclasses
from collections.abc import Callable

from medmax_jax.convert import card, hf, merge, meta, native, peft, sources, vq_names
from medmax_jax.convert.form import Adapter, Checkpoint, ConvertError
from medmax_jax.new_folder import new_folder
from medmax_jax.progress import Progress

FORMATS = ("native", "hf", "meta", "peft")
SEALS = dict(native="config.json", hf="config.json", meta="README.md", peft="adapter_config.json")
SHARD_BYTES = 5 * 10**9  # of a safetensors file, as transformers cuts them
REMOTE_SHARD_BYTES = 10**9  # an upload is held in memory
SHARE = {
    "none": 1.02,
    "int8": 0.6,
    "int4": 0.45,
    "nf4": 0.45,
}  # of the source's bytes that a target needs
SLACK = 64 * 2**20  # bytes, for tokenizer and settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Where a conversion goes, and how."""

    path: str
    layout: str  # one of FORMATS
    quant: str  # of a native base: none | int8 | int4 | nf4
    decoder: bool  # hf: with the VQGAN's decoder
    merges: bool  # an adapter goes into its base, not beside it
    say: Callable[[str], None]

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
) -> None:
    """Writes `target`, a new folder. layout: one of FORMATS. base: what an adapter merges into.

    merge_native: into a native model too, where an adapter else stays one. vqgan: take the VQGAN
    from this path. quant: of a native base, none | int8 | int4 | nf4. decoder False: an hf target
    without the VQGAN's decoder. Raises one of sources.ERRORS and then leaves nothing.
    """
    found, adapter, identity = sources.read(source), None, ""
    if isinstance(found, Adapter):
        adapter, found = found, None
        if base is not None:
            found = sources.read_model(base, "which --base must be")
            identity = merge.check_base(adapter, found)
    elif base is not None:
        raise ConvertError(f"--base {base}: {source} is no adapter; leave --base out")
    if vqgan is not None:
        if found is None:
            raise ConvertError(f"--vqgan {vqgan}: {source} is an adapter; give --base too")
        found = sources.with_vqgan(found, vqgan)
    goal = Target(
        path=target, layout=layout, quant=quant, decoder=decoder, say=say,
        merges=layout in ("hf", "meta") or merge_native,
    )  # fmt: skip
    if merge_native and (layout != "native" or adapter is None):
        raise ConvertError("--merge: only for an adapter with --format native")
    if adapter and not (goal.merges and found):
        return _write_adapter(adapter, found, identity, goal)
    if layout == "peft":
        raise ConvertError(f"{source}: a whole model; --format peft is for adapters and runs")
    if adapter:
        found = merge.merged(found, adapter)
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
        raise vq_names.no_decoder(found.path)
    for warning in _warnings(found, layout):
        target.say(f"WARNING: {warning}")
    if found.model and not adapter:
        identity = found.fingerprint
    card_text = card.text(f"{target.name}, {layout} layout", found, adapter, identity).encode()
    progress = Progress(found.nbytes, target.say)
    needed = int(found.nbytes * SHARE[quant]) + SLACK
    with new_folder(target.path, bytes_needed=needed, seal=SEALS[layout]) as out:
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
    card_text = card.text(f"{target.name}, LoRA adapter", None, adapter, identity).encode()
    with new_folder(target.path, bytes_needed=2 * count + SLACK, seal=SEALS["peft"]) as out:
        out.write("README.md", [card_text])
        if target.layout == "peft":
            peft.write_peft(out, adapter, base_name=base.path if base else "")
        else:
            peft.write_native(out, adapter, layers=layers)
    target.say(f"{target.path}: written, {target.layout} adapter")


def _warnings(found: Checkpoint, layout: str) -> list[str]:
    lines = []
    if not found.tokenizer and found.model:
        lines.append(f"{found.path} has no tokenizer; the target will have none")
    if layout == "native" and found.model and not found.vqgan:
        lines.append(f"{found.path} has no VQGAN; give one with --vqgan to read or write images")
    elif layout == "native" and found.vqgan and not found.has_decoder:
        lines.append(str(vq_names.no_decoder(found.path)))
    if layout != "native" and found.vq and found.vq.norm_groups != vq_names.TAMING_GROUPS:
        lines.append(
            f"its VQGAN normalises in {found.vq.norm_groups} groups, other programs in "
            f"{vq_names.TAMING_GROUPS}: there its codes and pictures will be wrong"
        )
    return lines
