"""python tests/parity/export_cases.py D [--adapters]: the folders that make_convert.py reads."""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parent.parent)]

import convert_setup as setup  # noqa: E402

from medmax_jax.convert import convert


def main(folder: pathlib.Path, adapters: bool) -> None:
    """Meta -> native -> HF of both cases; or peft's adapter -> ours -> PEFT, and merged to HF."""
    if adapters:
        base, adapter = str(folder / "base_native"), str(HERE / "peft_adapter")
        ours = str(folder / "base_adapter")
        convert.convert(adapter, ours, layout="native", base=base)
        convert.convert(ours, str(folder / "base_peft"), layout="peft")
        convert.convert(ours, str(folder / "base_merged"), layout="hf", base=base)
        return
    for name, sizes in (("base", setup.BASE), ("swin", setup.SWIN)):
        states = setup.shards(sizes, dtypes=("F32",), seed=0)
        meta = setup.write_meta(folder / f"{name}_meta", sizes, states, vqgan=True)
        convert.convert(str(meta), str(folder / f"{name}_native"), layout="native")
        convert.convert(str(folder / f"{name}_native"), str(folder / f"{name}_hf"), layout="hf")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), "--adapters" in sys.argv)
