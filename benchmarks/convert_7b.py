"""python benchmarks/convert_7b.py --scratch D [--rounds 2] [--layers 32] [--keep]

Converts a random 7B from Meta's layout to this project's and to HF's, and back, on this machine:

    ours     seconds to convert meta -> native, the median of the rounds
    theirs   seconds to write the input's bytes twice, by cp and fsync, alternating with ours
    ratio    theirs / ours: above 1 means that a conversion costs less than two copies

In addition, for each conversion: seconds, and the peaks of RssAnon (memory private to the process)
and of VmRSS (with the pages of files that it reads), sampled 50 times a second. Then two processes
of four devices each load the native base onto a mesh together: the bytes read, by the
kernel's count, over the bytes of the checkpoint. Needs 70 GB of disk, 24 GB of memory. The last
line is one JSON object.
"""

import argparse
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from typing import IO

import jax
import ml_dtypes
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from medmax_jax import arguments
from medmax_jax.checkpoints import torch_file

DIM, FFN, HEADS, VOCAB = 4_096, 11_008, 32, 65_536  # Chameleon-7B
POOL = 1 << 26  # random numbers of which all weights are windows; drawing 7e9 takes minutes
MESHES = ((1, 8, 1), (1, 2, 4), (1, 4, 2))  # data, fsdp, tp; a data axis would hold copies


def make(folder: pathlib.Path, layers: int) -> int:
    """Write a random 7B in Meta's layout; return its bytes."""
    models = folder / "models" / "7b"
    models.mkdir(parents=True)
    settings = dict(
        dim=DIM, n_layers=layers, n_heads=HEADS, n_kv_heads=HEADS, vocab_size=VOCAB,
        norm_eps=1e-5, rope_theta=1e4, qk_normalization=True, swin_norm=False, multiple_of=256,
    )  # fmt: skip
    (models / "params.json").write_text(json.dumps({"model": settings}))
    (models / "consolidate_params.json").write_text('{"model_parallel_size": 1}')
    rng = np.random.default_rng(0)
    pool = (0.02 * rng.standard_normal(POOL, np.float32)).astype(ml_dtypes.bfloat16)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        start, size = int(rng.integers(POOL)), int(np.prod(shape))
        return np.resize(np.roll(pool, start), size).reshape(shape)

    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (VOCAB, DIM)}
    for i in range(layers):
        prefix = f"layers.{i}."
        for name in ("wq", "wk", "wv", "wo"):
            shapes[f"{prefix}attention.{name}.weight"] = (DIM, DIM)
        for name in ("q", "k"):
            for leaf in ("weight", "bias"):
                shapes[f"{prefix}attention.{name}_normalization.{leaf}"] = (DIM // HEADS,)
        shapes |= {f"{prefix}attention_norm.weight": (DIM,), f"{prefix}ffn_norm.weight": (DIM,)}
        shapes |= {f"{prefix}feed_forward.w{n}.weight": (FFN, DIM) for n in (1, 3)}
        shapes[f"{prefix}feed_forward.w2.weight"] = (DIM, FFN)
    shapes |= {"norm.weight": (DIM,), "output.weight": (VOCAB, DIM)}
    tensors = ((name, shape, "BF16", lambda s=shape: draw(s)) for name, shape in shapes.items())
    with open(models / "consolidated.pth", "wb") as out:
        torch_file.write(out, tensors, wrap=None)
        out.flush()
        os.fsync(out.fileno())
    return (models / "consolidated.pth").stat().st_size


def run_measured(command: list[str], log: pathlib.Path | None = None) -> dict[str, float]:
    """Return seconds and peak memory in GB of a command; raises when it fails.

    `log`: a file for its output; then also the longest time without a line of it.
    """
    start, peaks, quiet = time.monotonic(), {"RssAnon": 0, "VmRSS": 0}, 0.0
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE if log else subprocess.DEVNULL,
        stderr=subprocess.STDOUT if log else None,
    )  # fmt: skip

    def watch() -> None:
        while process.poll() is None:
            try:
                status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if log:
        quiet = _copy_output(process.stdout, log)
    code = process.wait()
    seconds = time.monotonic() - start
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)}: exit code {code}")
    result = {"seconds": round(seconds, 1)} | ({"quiet_seconds": round(quiet, 1)} if log else {})
    in_gb = {f"peak_{name}_gb": round(value * 1024 / 1e9, 2) for name, value in peaks.items()}
    return result | in_gb


def _copy_output(lines: IO[bytes], log: pathlib.Path) -> float:
    """Copy lines to a file as they come; return the longest time between two of them."""
    last, longest = time.monotonic(), 0.0
    with open(log, "ab") as file:
        for line in lines:
            now = time.monotonic()
            last, longest = now, max(longest, now - last)
            file.write(line)
            file.flush()
    return max(longest, time.monotonic() - last)


def convert(source: pathlib.Path, target: pathlib.Path, layout: str, *flags: str) -> dict:
    """Run one conversion in a separate process."""
    shutil.rmtree(target, ignore_errors=True)
    program = [sys.executable, "-m", "medmax_jax.convert", "--from", str(source), "--to"]
    result = run_measured([*program, str(target), "--format", layout, *flags])
    print(f"{source.name} -> {target.name}: {result}", flush=True)
    return result


def copy_twice(source: pathlib.Path, scratch: pathlib.Path) -> float:
    """Return the seconds to write the file's bytes twice, each copy synced to disk."""
    start = time.monotonic()
    for i in range(2):
        target = scratch / f"copy{i}"
        subprocess.run(["cp", str(source), str(target)], check=True)
        with open(target, "rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - start
    for i in range(2):
        (scratch / f"copy{i}").unlink()
    print(f"cp and fsync, twice: {seconds:.1f} s", flush=True)
    return seconds


def load(folder: str, address: str, process: int, mesh: tuple[int, int, int]) -> None:
    """Run one of the two processes: load its half and print the number of bytes read."""
    from medmax_jax.checkpoints import export
    from medmax_jax.config import Mesh
    from medmax_jax.convert import native as native_layout
    from medmax_jax.models import chameleon
    from medmax_jax.sharding import make_mesh
    from medmax_jax.storage.folder import Folder

    jax.distributed.initialize(address, num_processes=2, process_id=process)
    sections = native_layout.settings(Folder(folder))
    read = lambda: int(pathlib.Path("/proc/self/io").read_text().split()[1])  # noqa: E731  rchar
    with jax.set_mesh(make_mesh(Mesh(data=mesh[0], fsdp=mesh[1], tp=mesh[2]))):
        like = chameleon.abstract_model(sections["model"], sections["vocab"], chameleon.NO_LORA)
        before, start = read(), time.monotonic()
        tree = export.load(folder, like)
        jax.block_until_ready(tree)
        result = dict(bytes_read=read() - before, seconds=time.monotonic() - start)
        result["sums"] = [int(_sum(x)) for x in jax.tree.leaves(tree)]
    print(json.dumps(result), flush=True)


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
    """Return a sum of the bits, so that a change of any number changes it."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype("uint32")
    weight = jax.lax.broadcasted_iota("uint32", x.shape, x.ndim - 1) * 2 + 1
    return (bits * jax.reshard(weight, jax.typeof(bits).sharding)).sum()


def load_in_two(folder: pathlib.Path, size: int, mesh: tuple[int, int, int]) -> dict:
    """Load the base in two processes of four devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    mesh_text = ",".join(map(str, mesh))
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, "--load", str(folder), address, str(i), mesh_text],
            env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [json.loads(run.communicate()[0].splitlines()[-1]) for run in runs]
    result = dict(
        mesh=mesh_text,
        read_over_size=round(sum(s["bytes_read"] for s in outputs) / size, 3),
        seconds=round(max(s["seconds"] for s in outputs), 1),
        sums=outputs[0]["sums"],
    )
    print({k: v for k, v in result.items() if k != "sums"}, flush=True)
    return result


def size_of(folder: pathlib.Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def main() -> None:
    """Run the program."""
    if sys.argv[1:2] == ["--load"]:
        folder, address, process, mesh = sys.argv[2:]
        load(folder, address, int(process), tuple(map(int, mesh.split(","))))
        return
    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scratch", type=pathlib.Path, required=True, help="folder on the disk to measure"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    args = parser.parse_args()
    scratch = args.scratch / "convert_7b"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    meta, native, hf = scratch / "meta", scratch / "native", scratch / "hf"
    load_at_start = os.getloadavg()
    size = make(meta, args.layers)
    print(f"wrote {size / 1e9:.2f} GB", flush=True)
    ours, theirs, runs = [], [], {}
    for _ in range(args.rounds):
        theirs.append(copy_twice(meta / "models/7b/consolidated.pth", scratch))
        runs["meta -> native"] = convert(meta, native, "native")
        ours.append(runs["meta -> native"]["seconds"])
    base = size_of(native)
    meshes = [load_in_two(native, base, mesh) for mesh in MESHES]
    runs["meta -> hf"] = convert(meta, hf, "hf")
    shutil.rmtree(meta)
    runs["hf -> native"] = convert(hf, native, "native")
    runs["native -> meta"] = convert(native, meta, "meta")
    shutil.rmtree(native)
    for quant in ("int8", "nf4"):
        runs[f"hf -> native {quant}"] = convert(hf, native, "native", "--quant", quant)
        runs[f"hf -> native {quant}"]["gb"] = round(size_of(native) / 1e9, 2)
    if not args.keep:
        shutil.rmtree(scratch)
    result = dict(
        ours=statistics.median(ours),
        theirs=round(statistics.median(theirs), 1),
        ratio=round(statistics.median(theirs) / statistics.median(ours), 3),
        input_gb=round(size / 1e9, 2),
        runs=runs,
        meshes=[{k: v for k, v in m.items() if k != "sums"} for m in meshes],
        meshes_agree=all(m["sums"] == meshes[0]["sums"] for m in meshes),
        load_average=[load_at_start, os.getloadavg()],
        versions={
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": sys.version.split()[0],
        },
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
