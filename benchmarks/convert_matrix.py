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
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import convert_setup as setup  # noqa: E402
from parity import meta_reference  # noqa: E402

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
    found = conversion.read_checkpoint(path)
    each = {**found.language, **{f"vqgan.{n}": t for n, t in found.vqgan.items()}}
    return {n: t.dtype.encode() + t.all().tobytes() for n, t in each.items()}


def convert(source: pathlib.Path, target: pathlib.Path, layout: str) -> pathlib.Path:
    """Run one conversion; return its target."""
    conversion.convert(str(source), str(target), layout=layout, say=lambda _: None)
    return target


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch_python")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        table(pathlib.Path(scratch), given.torch_python)


def table(folder: pathlib.Path, python: str | None) -> None:
    """Print one row per model and dtype."""
    routes = [f"{a} -> {b} -> {a}" for a, b in ROUTES]
    heads = ["model", "dtype", *routes, "one fingerprint", "HF logits", "torch.load"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads), flush=True)
    np.save(folder / "ids.npy", IDS)
    rows = []
    for number, (model, sizes) in enumerate(MODELS.items()):
        for dtype, dtypes in DTYPES.items():
            place = folder / f"{number}_{dtype}_torch"
            states = setup.shards(sizes, dtypes=dtypes, seed=number)
            at = {"meta": setup.write_meta(place / "start", sizes, states, vqgan=True)}
            at["native"] = convert(at["meta"], place / "native", "native")
            at["hf"] = convert(at["native"], place / "hf", "hf")
            convert(at["hf"], place / "meta", "meta")
            for path in (place / "start").glob("models/*/*.pth"):
                (place / path.name).write_bytes(path.read_bytes())
            cells = [_round_trip(at, place, a, b) for a, b in ROUTES]
            names = {conversion.read_checkpoint(p).fingerprint for p in at.values()}
            cells.append("yes" if len(names) == 1 else "NO")
            rows.append(([model, dtype, *cells], place, sizes, states))
    if python:
        subprocess.run([python, "-c", TORCH, str(folder)], check=True, stderr=subprocess.DEVNULL)
    for cells, place, sizes, states in rows:
        cells += _in_torch(place, sizes, states) if python else ["not run", "not run"]
        print("| " + " | ".join(cells) + " |", flush=True)


def _round_trip(at: dict[str, pathlib.Path], place: pathlib.Path, a: str, b: str) -> str:
    there = convert(at[a], place / f"{a}_{b}", b)
    back = convert(there, place / f"{a}_{b}_{a}", a)
    wanted, found = tensors(at[a]), tensors(back)
    same = sum(found.get(name) == bits for name, bits in wanted.items())
    return f"{same}/{len(wanted)}" + ("" if len(found) == len(wanted) else " NAMES DIFFER")


def _in_torch(place: pathlib.Path, sizes: setup.Sizes, states: list) -> list[str]:
    wanted = meta_reference.logits(states, setup.params(sizes), IDS)
    off = np.abs(np.load(place / "logits.npy") - wanted).max() / max(1.0, wanted.std())
    count = sum(len(state) for state in states)
    return [f"{off:.1e}", f"{json.loads((place / 'pth.json').read_text())}/{count}"]


if __name__ == "__main__":
    main()
