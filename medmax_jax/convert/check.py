"""Check whether a checkpoint is what was published, and computes the same here as in torch.

python -m medmax_jax.convert check P [--torch_python PY] [--scratch D]

    files       MD5 of the tokenizer's files against Meta's, which Anole and MedMax share
    ids         every name of the vocabulary at its id; how separators tokenize inside a text
    weights     every number is finite (reads all of them)
    torch       with a Python that has torch and transformers: compares logits and image codes;
                writes P in two layouts under --scratch, so it needs twice its size there

Each line ends in ok, NOT OK or a finding; the exit code is 1 when one is not ok.
"""

import argparse
import dataclasses
import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from medmax_jax import arguments, sharding
from medmax_jax.checkpoints import export, safetensors_file
from medmax_jax.config import Mesh, Vocab
from medmax_jax.convert import convert, inspect_checkpoint, torch_reference
from medmax_jax.convert import hf as hf_layout
from medmax_jax.convert.state_dict import Checkpoint, ConvertError, check_finite
from medmax_jax.io.progress import ByteProgress
from medmax_jax.io.storage import Folder
from medmax_jax.models import chameleon, vqgan
from medmax_jax.models.tokenizer import Tokenizer, TokenizerError

PUBLISHED = {  # tokenizer/checklist.chk of Meta's, Anole's and MedMax's downloads
    "text_tokenizer.json": "170a932b687671a4e676f3bf69147295",
    "vqgan.ckpt": "1a559fb5dab4d351d19496ae89da1db1",
    "vqgan.yaml": "25724c8110d6adabc9130a123b4b922e",
}
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


def main(argv: Sequence[str]) -> int:
    """Run the program; return 1 when a check fails."""
    parser = arguments.Parser(
        prog="python -m medmax_jax.convert check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="P")
    parser.add_argument(
        "--torch_python", metavar="PY", help="a Python with torch and transformers, to compare with"
    )
    parser.add_argument(
        "--scratch", metavar="D", default=tempfile.gettempdir(), help="folder for temporary copies"
    )
    args = parser.parse_args(argv)
    return check(
        args.path, torch_python=args.torch_python, scratch=args.scratch,
        say=lambda s: print(s, flush=True),
    )  # fmt: skip


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
        _ids(checkpoint.tokenizer, checkpoint.vocab, report)
    progress = ByteProgress(checkpoint.nbytes, say)
    for tensor in (*checkpoint.language.values(), *checkpoint.vqgan.values()):
        check_finite(tensor.read(), tensor.where)
        progress(tensor.nbytes)
    report.line("weights", "all values are finite", True)
    if torch_python:
        _torch(checkpoint, torch_python, scratch, report)
    return min(report.bad, 1)


def _files(checkpoint: Checkpoint, report: Report) -> None:
    root = Folder(
        checkpoint.path
        if not checkpoint.path.endswith(".ckpt")
        else checkpoint.path.rpartition("/")[0]
    )
    folders = (
        [root, Folder(f"{root.path.rstrip('/')}/../../tokenizer")] if not root.remote else [root]
    )
    for folder in folders:
        for name in folder.names():
            expected = PUBLISHED.get(name.rpartition("/")[2])
            if expected is None:
                continue
            digest = folder.file(name).digest("md5")
            report.line(f"md5 of {name}", digest, digest == expected)
    if checkpoint.layout == "native" and checkpoint.tokenizer:
        digest = hashlib.md5(checkpoint.tokenizer, usedforsecurity=False).hexdigest()
        same = digest == PUBLISHED["text_tokenizer.json"]
        report.line("tokenizer.json", "Meta's file" if same else f"not Meta's file (md5 {digest})")


def _ids(tokenizer: bytes, vocab: Vocab, report: Report) -> None:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(tokenizer)
        file.flush()
        try:
            ours = Tokenizer.from_file(file.name, vocab)
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


def _torch(checkpoint: Checkpoint, python: str, scratch: str, report: Report) -> None:
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
