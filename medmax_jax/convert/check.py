"""Check whether a checkpoint is what was published, and computes the same here as in torch.

python -m medmax_jax.convert check P [--torch_python PY] [--scratch D]

    files       MD5 of the tokenizer's files against Meta's, which Anole and MedMax share; all files
                against checklist.chk and what the hub stated
    ids         every name of the vocabulary at its id; how separators tokenize inside a text
    weights     every number is finite (reads all of them)
    torch       with a Python that has torch and transformers: compares logits and image codes;
                writes P in two layouts under --scratch, so it needs twice its size there

Each line ends in ok, NOT OK or a finding; the exit code is 1 when one is not ok. The ten checks of
`--full` are in full_check.py.
"""

import dataclasses
import hashlib
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from medmax_jax import sharding
from medmax_jax.checkpoints import export, safetensors_file
from medmax_jax.config import Mesh, Vocab
from medmax_jax.convert import convert, inspect_checkpoint, torch_reference
from medmax_jax.convert import hf as hf_layout
from medmax_jax.convert.state_dict import Checkpoint, ConvertError, check_finite
from medmax_jax.io.progress import ByteProgress
from medmax_jax.models import chameleon, vqgan
from medmax_jax.models.tokenizer import Tokenizer, TokenizerError
from medmax_jax.storage import hub
from medmax_jax.storage.folder import Folder

PUBLISHED = {  # tokenizer/checklist.chk of Meta's, Anole's and MedMax's downloads
    "text_tokenizer.json": "170a932b687671a4e676f3bf69147295",
    "vqgan.ckpt": "1a559fb5dab4d351d19496ae89da1db1",
    "vqgan.yaml": "25724c8110d6adabc9130a123b4b922e",
}
MAX_CHECKLIST = 100_000  # bytes of a checklist.chk; the published ones have 155
TEXTS = ("Is it a CT?<reserved08706>yes", "an image <image> here")
FP32_TOLERANCE, BF16_TOLERANCE = 2e-5, 0.1  # x max(1, std of the logits); bfloat16 keeps 8 bits


class Report:
    """Logs lines and counts those that are not ok."""

    def __init__(self, log: Callable[[str], None]):
        self._log, self.bad = log, 0

    def line(self, what: str, result: Any, ok: bool | None = None) -> None:
        """Log a line; ok None: a finding that is neither ok nor not ok."""
        self.bad += ok is False
        self._log(f"{what}: {result}{'' if ok is None else ' ok' if ok else ' NOT OK'}")


def check(path: str, *, torch_python: str | None, scratch: str, say: Callable[[str], None]) -> int:
    """Run all checks and return 1 when a line is not ok, else 0; see the module's docstring."""
    checkpoint = convert.read_checkpoint(path)
    if not isinstance(checkpoint, Checkpoint):
        raise ConvertError(f"{path}: an adapter; check its base model instead")
    report = Report(say)
    for name, value in inspect_checkpoint.describe(checkpoint).items():
        if name in ("layout", "model", "dtypes", "vqgan", "image_rows", "fingerprint"):
            report.line(name, value)
    _files(checkpoint, report)
    if checkpoint.tokenizer and checkpoint.vocab:
        tokenizer_ids(checkpoint.tokenizer, checkpoint.vocab, report)
    progress = ByteProgress(checkpoint.nbytes, say)
    for tensor in (*checkpoint.language.values(), *checkpoint.vqgan.values()):
        check_finite(tensor.read(), tensor.where)
        progress(tensor.nbytes)
    report.line("weights", "all values are finite", True)
    if torch_python:
        against_torch(checkpoint, torch_python, scratch, report)
    return min(report.bad, 1)


class Digest(NamedTuple):
    """A file and its digest; `kind` is md5, or hub for what the hub stated; "" where none is known.

    `found` is empty where the file is missing.
    """

    name: str
    kind: str
    published: str
    found: str


def digests(path: str, md5: Mapping[str, str]) -> Iterator[Digest]:
    """Compare every file below a path with the digests that its publisher stated.

    They are in checklist.chk next to Meta's files, in the cache of huggingface_hub, and in `md5`,
    by file name.
    """
    roots = [Folder(path)]
    tokenizer = pathlib.Path(path) / "../../tokenizer"
    if (pathlib.Path(path) / "params.json").exists() and tokenizer.is_dir():
        roots.append(Folder(tokenizer))  # the path is models/7b
    for root in roots:
        stated = {} if root.remote else hub.digests(root.path)
        listed = _checklists(root)
        names = {name for name in root.names() if not name.startswith(".")}
        for name in sorted(names | set(listed)):
            expected = listed.get(name) or md5.get(name.rpartition("/")[2])
            if expected:
                found = root.file(name).digest("md5") if name in names else ""
                yield Digest(name, "md5", expected, found)
            if name in stated:
                found = hub.file_digest(f"{root.path}/{name}", stated[name])
                yield Digest(name, "hub", stated[name], found)
            elif not expected:
                yield Digest(name, "", "", "")


def _checklists(folder: Folder) -> dict[str, str]:
    """Return name -> MD5 of the files that all checklist.chk files list."""
    listed = {}
    for name in folder.names():
        prefix, _, last = name.rpartition("/")
        if last == "checklist.chk":
            text = bytes(folder.read(name)[:MAX_CHECKLIST]).decode(errors="replace")
            for digest, file in re.findall(r"^([0-9a-fA-F]{32})[ *]+(\S+)$", text, re.M):
                listed[f"{prefix}/{file}".lstrip("/")] = digest.lower()
    return listed


def _files(checkpoint: Checkpoint, report: Report) -> None:
    path = checkpoint.path
    root = path.rpartition("/")[0] if path.endswith(".ckpt") else path
    for file in digests(root, PUBLISHED):
        if file.kind:
            found = file.found or "file not found"
            report.line(f"{file.kind} of {file.name}", found, file.found == file.published)
    if checkpoint.layout == "native" and checkpoint.tokenizer:
        digest = hashlib.md5(checkpoint.tokenizer, usedforsecurity=False).hexdigest()
        same = digest == PUBLISHED["text_tokenizer.json"]
        report.line("tokenizer.json", "Meta's file" if same else f"not Meta's file (md5 {digest})")


def load_tokenizer(tokenizer: bytes, vocab: Vocab) -> Tokenizer:
    """Return the tokenizer of a file's bytes; raise TokenizerError unless it fits."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(tokenizer)
        file.flush()
        return Tokenizer.from_file(file.name, vocab)


def tokenizer_ids(tokenizer: bytes, vocab: Vocab, report: Report) -> None:
    """Report whether the names of a tokenizer have their ids, and how separators tokenize."""
    try:
        ours = load_tokenizer(tokenizer, vocab)
    except TokenizerError as error:
        report.line("vocabulary ids", error, False)
        return
    report.line("vocabulary ids", f"text from {vocab.text_start}, {vocab.size} rows", True)
    raw = tokenizers.Tokenizer.from_str(tokenizer.decode())
    renamed = tokenizers.Tokenizer.from_str(hf_layout.to_medmax_tokenizer(tokenizer).decode())
    for text in TEXTS:
        for name, variant in (("as stored", raw), ("with <image> renamed", renamed)):
            tokens = variant.encode(text, add_special_tokens=False).tokens
            report.line(f"{text!r} {name}", " ".join(tokens))
        special = [i for i in ours.encode(text) if i < vocab.text_start]
        report.line(f"{text!r} with medmax_jax", f"special ids {special}", len(special) == 1)


def against_torch(checkpoint: Checkpoint, python: str, scratch: str, report: Report) -> None:
    """Report how far logits and image codes are from those of torch in another Python."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        hf, native, out, script = (
            f"{folder}/{name}" for name in ("hf", "native", "out.npz", "torch_side.py")
        )
        # in a folder where nothing shadows a package
        shutil.copyfile(torch_reference.__file__, script)
        silent = lambda _: None  # noqa: E731
        convert.convert(checkpoint.path, hf, layout="hf", say=silent)
        is_float32 = {t.dtype for t in checkpoint.language.values()} == {"F32"}
        dtype = "float32" if is_float32 else "bfloat16"
        completed = subprocess.run([python, script, hf, out, dtype], capture_output=True, text=True)
        if completed.returncode:
            raise ConvertError(
                f"{python}: {completed.stderr.strip().splitlines()[-1:]}; check its packages"
            )
        theirs = np.load(out)
        convert.convert(hf, native, layout="native", say=silent)
        ours = _ours(checkpoint, native, theirs)
    scale = max(1.0, float(theirs["logits"].std()))
    max_error = float(np.abs(ours["logits"] - theirs["logits"]).max()) / scale
    report.line(
        f"logits against torch, {dtype}", f"{max_error:.2e} x max(1, std) at most",
        max_error <= (FP32_TOLERANCE if is_float32 else BF16_TOLERANCE),
    )  # fmt: skip
    if "codes" in ours:
        agreement = float((ours["codes"] == theirs["codes"]).mean())
        report.line("image codes against torch", f"{agreement:.2%} equal", agreement == 1)


def _ours(checkpoint: Checkpoint, native: str, reference: Any) -> dict[str, np.ndarray]:
    """Return the logits of the same ids and the codes of the same pixels, by this project."""
    ids = reference["ids"].astype(np.int32)
    model = dataclasses.replace(checkpoint.model, remat="none")
    outputs = {}
    with jax.set_mesh(sharding.make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        net = export.load(
            native, chameleon.abstract_model(model, checkpoint.vocab, chameleon.NO_LORA)
        )
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        rows = (jnp.asarray(ids), jnp.ones_like(ids), jnp.asarray(positions))
        logits = sharding.jit(lambda net, rows: net.logits(net.hidden(*rows, key=None)))
        outputs["logits"] = np.asarray(logits(net, rows))
        if checkpoint.vqgan and checkpoint.has_decoder:
            path = pathlib.Path(native) / "vqgan.safetensors"
            encoder = safetensors_file.load(path, vqgan.abstract(checkpoint.vq))
            codes = vqgan.encode(encoder, jnp.asarray(reference["pixels"].transpose(0, 2, 3, 1)))
            outputs["codes"] = np.asarray(codes).reshape(len(ids[:1]), -1)
    return outputs
