"""python benchmarks/convert_matrix.py [--torch_python PY]: which conversions are exact, as a table.

Random models in every dtype are converted from every layout to every other and back; a cell has
the number of tensors with unchanged bits. With a Python that has torch, transformers and peft the
files are also opened there, and the logits compared.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: libtpu logs a lot
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

import convert_setup as setup  # noqa: E402
from parity import meta_reference  # noqa: E402

from medmax_jax import arguments
from medmax_jax.convert import convert as conversion

MODELS = {"7B-like": setup.BASE, "30B-like, 4 shards": setup.SWIN}
DTYPES = {"F32": ("F32",), "BF16": ("BF16",), "mixed": ("F32", "BF16", "BF16", "F16")}
ROUTES = (
    ("meta", "native"), ("meta", "hf"), ("hf", "native"), ("hf", "meta"), ("native", "hf"),
    ("native", "meta"),
)  # fmt: skip
IDS = np.random.default_rng(0).integers(0, setup.BASE.vocab, (2, 24))

TORCH = """
import json, pathlib, sys, numpy as np, torch, transformers
folder = pathlib.Path(sys.argv[1])
for name in sorted(p.name for p in folder.glob("*_torch")):
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(
        folder / name / "hf", dtype=torch.float32)
    ids = torch.tensor(np.load(folder / "ids.npy"))
    with torch.no_grad():
        logits = model.lm_head(model.model(ids).last_hidden_state).numpy()
    np.save(folder / name / "logits.npy", logits)
    count = 0
    for path in sorted((folder / name / "meta").glob("models/*/*.pth")):
        ours = torch.load(path, weights_only=True)
        theirs = torch.load(folder / name / path.name, weights_only=True)
        count += sum(bool(torch.equal(ours[k], v)) and ours[k].dtype == v.dtype
                     for k, v in theirs.items() if k in ours)
    (folder / name / "pth.json").write_text(json.dumps(count))
"""


def tensors(path: pathlib.Path) -> dict[str, bytes]:
    """Return name -> dtype and bits of every tensor, read through the layout's own table."""
    checkpoint = conversion.read_checkpoint(path)
    arrays = {**checkpoint.language, **{f"vqgan.{n}": t for n, t in checkpoint.vqgan.items()}}
    return {n: t.dtype.encode() + t.read().tobytes() for n, t in arrays.items()}


def convert(source: pathlib.Path, target: pathlib.Path, layout: str) -> pathlib.Path:
    """Run one conversion; return its target."""
    conversion.convert(str(source), str(target), layout=layout, say=lambda _: None)
    return target


def main() -> None:
    """Run the program."""
    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch_python")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        table(pathlib.Path(scratch), args.torch_python)


def table(folder: pathlib.Path, python: str | None) -> None:
    """Print one row per model and dtype."""
    routes = [f"{a} -> {b} -> {a}" for a, b in ROUTES]
    heads = ["model", "dtype", *routes, "one fingerprint", "HF logits", "torch.load"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads), flush=True)
    np.save(folder / "ids.npy", IDS)
    rows = []
    for number, (model, sizes) in enumerate(MODELS.items()):
        for dtype, dtypes in DTYPES.items():
            scratch = folder / f"{number}_{dtype}_torch"
            states = setup.shards(sizes, dtypes=dtypes, seed=number)
            models = {"meta": setup.write_meta(scratch / "start", sizes, states, vqgan=True)}
            models["native"] = convert(models["meta"], scratch / "native", "native")
            models["hf"] = convert(models["native"], scratch / "hf", "hf")
            convert(models["hf"], scratch / "meta", "meta")
            for path in (scratch / "start").glob("models/*/*.pth"):
                (scratch / path.name).write_bytes(path.read_bytes())
            cells = [_round_trip(models, scratch, a, b) for a, b in ROUTES]
            names = {conversion.read_checkpoint(p).fingerprint for p in models.values()}
            cells.append("yes" if len(names) == 1 else "NO")
            rows.append(([model, dtype, *cells], scratch, sizes, states))
    if python:
        subprocess.run([python, "-c", TORCH, str(folder)], check=True, stderr=subprocess.DEVNULL)
    for cells, scratch, sizes, states in rows:
        cells += _in_torch(scratch, sizes, states) if python else ["not run", "not run"]
        print("| " + " | ".join(cells) + " |", flush=True)


def _round_trip(models: dict[str, pathlib.Path], scratch: pathlib.Path, a: str, b: str) -> str:
    target = convert(models[a], scratch / f"{a}_{b}", b)
    back = convert(target, scratch / f"{a}_{b}_{a}", a)
    expected, converted = tensors(models[a]), tensors(back)
    same = sum(converted.get(name) == bits for name, bits in expected.items())
    return f"{same}/{len(expected)}" + ("" if len(converted) == len(expected) else " NAMES DIFFER")


def _in_torch(scratch: pathlib.Path, sizes: setup.Sizes, states: list) -> list[str]:
    reference = meta_reference.logits(states, setup.params(sizes), IDS)
    error = np.abs(np.load(scratch / "logits.npy") - reference).max() / max(1.0, reference.std())
    count = sum(len(state) for state in states)
    return [f"{error:.1e}", f"{json.loads((scratch / 'pth.json').read_text())}/{count}"]


if __name__ == "__main__":
    main()
