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

from medmax_jax.checkpoints import export, safetensors_file
from medmax_jax.config import Mesh, Vocab
from medmax_jax.convert import convert, inspect_checkpoint, torch_reference
from medmax_jax.convert import hf as hf_layout
from medmax_jax.convert.state_dict import Checkpoint, ConvertError, check_finite
from medmax_jax.io.progress import ByteProgress
from medmax_jax.io.storage import Folder
from medmax_jax.models import chameleon, vqgan
from medmax_jax.models.tokenizer import Tokenizer, TokenizerError
from medmax_jax.sharding import make_mesh

PUBLISHED = {  # tokenizer/checklist.chk of Meta's, Anole's and MedMax's downloads
    "text_tokenizer.json": "170a932b687671a4e676f3bf69147295",
    "vqgan.ckpt": "1a559fb5dab4d351d19496ae89da1db1",
    "vqgan.yaml": "25724c8110d6adabc9130a123b4b922e",
}
TEXTS = ("Is it a CT?<reserved08706>yes", "an image <image> here")
FP32_TOLERANCE, BF16_TOLERANCE = 2e-5, 0.1  # x max(1, std of the logits); bfloat16 keeps 8 bits


class Report:
    """Logs lines and counts those that are not ok."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self.bad = say, 0

    def line(self, what: str, found: Any, ok: bool | None = None) -> None:
        """Log a line; ok None: a finding that is neither ok nor not ok."""
        self.bad += ok is False
        self._say(f"{what}: {found}{'' if ok is None else ' ok' if ok else ' NOT OK'}")


def main(argv: Sequence[str]) -> int:
    """Run the program; return 1 when a check fails."""
    parser = argparse.ArgumentParser(
        prog="python -m medmax_jax.convert check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="P")
    parser.add_argument("--torch_python", metavar="PY")
    parser.add_argument("--scratch", metavar="D", default=tempfile.gettempdir())
    given = parser.parse_args(argv)
    return check(
        given.path, torch_python=given.torch_python, scratch=given.scratch,
        say=lambda s: print(s, flush=True),
    )  # fmt: skip


def check(path: str, *, torch_python: str | None, scratch: str, say: Callable[[str], None]) -> int:
    """Run all checks and return 1 when a line is not ok, else 0; see the module's docstring."""
    found = convert.read_checkpoint(path)
    if not isinstance(found, Checkpoint):
        raise ConvertError(f"{path}: an adapter; check the model that it belongs to")
    report = Report(say)
    for name, value in inspect_checkpoint.describe(found).items():
        if name in ("layout", "model", "dtypes", "vqgan", "image_rows", "fingerprint"):
            report.line(name, value)
    _files(found, report)
    if found.tokenizer and found.vocab:
        _ids(found.tokenizer, found.vocab, report)
    progress = ByteProgress(found.nbytes, say)
    for tensor in (*found.language.values(), *found.vqgan.values()):
        check_finite(tensor.read(), tensor.where)
        progress(tensor.nbytes)
    report.line("weights", "every number is finite", True)
    if torch_python:
        _torch(found, torch_python, scratch, report)
    return min(report.bad, 1)


def _files(found: Checkpoint, report: Report) -> None:
    root = Folder(found.path if not found.path.endswith(".ckpt") else found.path.rpartition("/")[0])
    places = (
        [root, Folder(f"{root.path.rstrip('/')}/../../tokenizer")] if not root.remote else [root]
    )
    for folder in places:
        for name in folder.names():
            wanted = PUBLISHED.get(name.rpartition("/")[2])
            if wanted is None:
                continue
            digest = folder.file(name).digest("md5")
            report.line(f"md5 of {name}", digest, digest == wanted)
    if found.layout == "native" and found.tokenizer:
        digest = hashlib.md5(found.tokenizer, usedforsecurity=False).hexdigest()
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
    changed = tokenizers.Tokenizer.from_str(hf_layout.to_medmax_tokenizer(tokenizer).decode())
    for text in TEXTS:
        for name, each in (("as it lies there", raw), ("with <image> renamed", changed)):
            tokens = each.encode(text, add_special_tokens=False).tokens
            report.line(f"{text!r} {name}", " ".join(tokens))
        special = [i for i in ours.encode(text) if i < vocab.text_start]
        report.line(f"{text!r} in this project", f"special ids {special}", len(special) == 1)


def _torch(found: Checkpoint, python: str, scratch: str, report: Report) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        hf, native, out, script = (
            f"{folder}/{name}" for name in ("hf", "native", "out.npz", "torch_side.py")
        )
        # in a folder where nothing shadows a package
        shutil.copyfile(torch_reference.__file__, script)
        quiet = lambda _: None  # noqa: E731
        convert.convert(found.path, hf, layout="hf", say=quiet)
        exact = {t.dtype for t in found.language.values()} == {"F32"}
        dtype = "float32" if exact else "bfloat16"
        done = subprocess.run([python, script, hf, out, dtype], capture_output=True, text=True)
        if done.returncode:
            raise ConvertError(
                f"{python}: {done.stderr.strip().splitlines()[-1:]}; see its packages"
            )
        theirs = np.load(out)
        convert.convert(hf, native, layout="native", say=quiet)
        ours = _ours(found, native, theirs)
    wide = max(1.0, float(theirs["logits"].std()))
    off = float(np.abs(ours["logits"] - theirs["logits"]).max()) / wide
    report.line(
        f"logits against torch, {dtype}", f"{off:.2e} x max(1, std) at most",
        off <= (FP32_TOLERANCE if exact else BF16_TOLERANCE),
    )  # fmt: skip
    if "codes" in ours:
        same = float((ours["codes"] == theirs["codes"]).mean())
        report.line("image codes against torch", f"{same:.2%} the same", same == 1)


def _ours(found: Checkpoint, native: str, theirs: Any) -> dict[str, np.ndarray]:
    """Return the logits of the same ids and the codes of the same pixels, by this project."""
    ids = theirs["ids"].astype(np.int32)
    model = dataclasses.replace(found.model, remat="none")
    answer = {}
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        net = export.load(native, chameleon.abstract_model(model, found.vocab, chameleon.NO_LORA))
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        rows = (jnp.asarray(ids), jnp.ones_like(ids), jnp.asarray(positions))
        logits = jax.jit(lambda net, rows: net.logits(net.hidden(*rows, key=None)))
        answer["logits"] = np.asarray(logits(net, rows))
        if found.vqgan and found.has_decoder:
            path = pathlib.Path(native) / "vqgan.safetensors"
            pictures = safetensors_file.load(path, vqgan.abstract(found.vq))
            codes = vqgan.encode(pictures, jnp.asarray(theirs["pixels"].transpose(0, 2, 3, 1)))
            answer["codes"] = np.asarray(codes).reshape(len(ids[:1]), -1)
    return answer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
