"""One conversion from a path to a path: read, merge, quantise, write; whole or not at all."""

import dataclasses
import time
from collections.abc import Callable

from medmax_jax.convert import card, hf, merge, meta, native, peft, sources, vq_names
from medmax_jax.convert.common import Adapter, Checkpoint, ConvertError, fingerprint
from medmax_jax.storage import new_folder

FORMATS = ("native", "hf", "meta", "peft")
SEALS = dict(native="config.json", hf="config.json", meta="README.md", peft="adapter_config.json")
SHARD_BYTES = 5 * 10**9  # of a safetensors file, as transformers cuts them
REMOTE_SHARD_BYTES = 10**9  # an upload is held in memory
SHARE = {"none": 1.02, "int8": 0.6, "nf4": 0.45}  # of the source's bytes that a target needs
SLACK = 64 * 2**20  # bytes, for tokenizer and settings
SECONDS = 5.0  # between two lines of progress


def convert(
    source: str,
    target: str,
    *,
    layout: str,
    base: str | None = None,
    vqgan: str | None = None,
    quant: str = "none",
    decoder: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Writes `target`, a new folder. layout: one of FORMATS. base: what an adapter merges into.

    vqgan: take the VQGAN from this path. quant: of a native base, none | int8 | nf4. decoder False:
    an hf target without the VQGAN's decoder. Raises one of sources.ERRORS and then leaves nothing.
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
    if adapter and (layout == "peft" or found is None):
        _write_adapter(adapter, found, target, layout, identity, say)
        return
    if layout == "peft":
        raise ConvertError(f"{source}: a whole model; --format peft is for adapters and runs")
    if adapter:
        found = merge.merged(found, adapter)
    _write_model(found, adapter, target, layout, identity, quant, decoder, say)


def _write_model(
    found: Checkpoint, adapter: Adapter | None, target: str, layout: str, identity: str,
    quant: str, decoder: bool, say: Callable[[str], None],
) -> None:  # fmt: skip
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
        say(f"WARNING: {warning}")
    progress = Progress(found.nbytes, say)
    needed = int(found.nbytes * SHARE[quant]) + SLACK
    with new_folder(target, bytes_needed=needed, seal=SEALS[layout]) as out:
        title = f"{_name(target)}, {layout} layout"
        if found.model and not adapter:
            identity = fingerprint(found)
        text = card.text(title, found, adapter, identity).encode()
        if layout == "native":
            out.write("README.md", [text])
            native.write(out, found, progress=progress)
        elif layout == "hf":
            out.write("README.md", [text])
            shard = REMOTE_SHARD_BYTES if out.remote else SHARD_BYTES
            hf.write(out, found, shard_bytes=shard, decoder=decoder, progress=progress)
        else:
            meta.write(out, found, progress=progress)
            out.write("README.md", [text])
    progress.done(f"{target}: written, {layout}")


def _write_adapter(
    adapter: Adapter, base: Checkpoint | None, target: str, layout: str, identity: str,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    if layout not in ("native", "peft"):
        raise ConvertError(
            f"{adapter.path}: an adapter; give --base, the weights it was trained on, to merge "
            f"both into --format {layout}"
        )
    layers = 1 + max(int(name.split(".")[2]) for name in adapter.matrices)
    if identity and not adapter.facts.get("base"):
        adapter = dataclasses.replace(adapter, facts=adapter.facts | {"base": identity})
    if layout == "native" and not adapter.facts.get("base"):
        raise ConvertError(
            f"{adapter.path}: does not say which weights it was trained on; give them as --base"
        )
    count = sum(t.nbytes for pair in adapter.matrices.values() for t in pair)
    with new_folder(target, bytes_needed=2 * count + SLACK, seal="adapter_config.json") as out:
        text = card.text(f"{_name(target)}, LoRA adapter", None, adapter, identity)
        out.write("README.md", [text.encode()])
        if layout == "peft":
            peft.write_peft(out, adapter, base_name=base.path if base else "")
        else:
            peft.write_native(out, adapter, layers=layers)
    say(f"{target}: written, {layout} adapter")


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


def _name(target: str) -> str:
    return target.rstrip("/").rpartition("/")[2]


class Progress:
    """A line every few seconds: how much, how fast, how long still."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self._total, self._say = total, say
        self._start = self._last = time.monotonic()
        self._done = 0

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._last >= SECONDS:
            self._last = now
            rate = self._done / (now - self._start)
            left = max(self._total - self._done, 0) / rate
            self._say(
                f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:,.0f} MB/s, "
                f"{int(left) // 60}:{int(left) % 60:02} left"
            )

    def done(self, what: str) -> None:
        """The last line."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._say(
            f"{what}: {self._done / 1e9:.3f} GB in {seconds:.1f} s, "
            f"{self._done / seconds / 1e6:,.0f} MB/s"
        )
