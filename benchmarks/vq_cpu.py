"""python benchmarks/vq_cpu.py [--torch_python PY] [--sizes tiny full] [--rounds 3] [--threads 1]

Measures images per second of the image tokenizer on a CPU, against the torch reference (Hugging
Face's ChameleonVQVAE and ChameleonImageProcessor, in the Python that --torch_python names):

    encoder         the same float32 pixels to codes, with the same random weights on both sides
    preprocessing   JPEG files of 1,024 x 768 to pixels of 512 x 512, one thread on both sides
    ratio           ours / theirs of the encoder at the last of --sizes: above 1, ours is faster

Each measurement is a separate process, theirs and ours in turn, bound to the same --threads
cores; the first batch, with compilation, is reported separately. On a machine with other work,
`encoder_per_cpu_second` (images by the process's CPU time) is more reliable than rates. The codes
of both sides are compared: the sums are equal but in another order, so a latent that is
between two rows of the codebook may take the other one; where more than --differ of the codes
differ, the run is void. The two preprocessings are timed and not compared: Hugging Face scales by
0.0078, the MedMax release and ours by 2 / 255. The tiny size is that of configs/tiny.py with the 32
groups that are fixed in the reference. The last line is one JSON object.
"""

import argparse
import functools
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import zlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORES = [int(n) for n in os.environ.get("BENCHMARK_CORES", "").split(",") if n]
if CORES:  # before a library counts them
    os.sched_setaffinity(0, CORES)
sys.path.insert(0, str(ROOT))
SIZES = {  # config, its image_size or another, images per batch, batches
    "tiny": ("medmax_jax.configs.tiny", 64, 16, 8),
    "half": ("medmax_jax.configs.base", 256, 2, 3),
    "full": ("medmax_jax.configs.base", 512, 1, 2),
}
IMAGES = 24  # of preprocessing
MAX_PIXELS = 10**8


# ---- inputs of both sides


def tensor(name: str, shape: tuple[int, ...]):
    """Return random values by a tensor's name: every layer's output deviates by about one."""
    import numpy as np

    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("bias"):
        values *= 0.1
    elif len(shape) == 4:  # a convolution
        values *= np.prod(shape[1:]) ** -0.5
    elif len(shape) == 1:  # a norm's gain
        values = 1 + 0.1 * values
    return values.astype(np.float32)


def make(folder: pathlib.Path, sizes: list[str]) -> None:
    """Write weights by their published names, pixels, and images to preprocess."""
    import numpy as np

    from medmax_jax.config import VQ, build
    from medmax_jax.convert import vqgan
    from medmax_jax.models import images

    files = sorted((ROOT / "data" / "sample" / "images").iterdir())
    load = lambda i: images.load(files[i * 7 % len(files)], max_pixels=MAX_PIXELS)  # noqa: E731
    for size in sizes:
        module, side, batch, batches = SIZES[size]
        config = importlib.import_module(module).get_config().vq
        config.update(image_size=side, norm_groups=32)
        shapes = vqgan.shapes(build(VQ, config.to_dict()), decoder=False)
        np.savez(folder / f"{size}.npz", **{n: tensor(n, s) for n, s in shapes.items()})
        pixels = np.stack([images.preprocess(load(i), side) for i in range(batch * batches)])
        np.save(folder / f"{size}.npy", pixels.reshape(batches, batch, side, side, 3))
        (folder / f"{size}.json").write_text(config.to_json())
    for i in range(IMAGES):
        load(i).resize((1_024, 768)).save(folder / f"{i}.jpg", quality=92)


# ---- programs of each process


def ours(folder: pathlib.Path, size: str) -> dict:
    """Return the numbers of this project."""
    import jax
    import numpy as np

    from medmax_jax.checkpoints import safetensors_file
    from medmax_jax.config import VQ, build
    from medmax_jax.convert import vqgan
    from medmax_jax.models import images
    from medmax_jax.models import vqgan as vqgan_model

    config = build(VQ, json.loads((folder / f"{size}.json").read_text()))
    stored, by_name = np.load(folder / f"{size}.npz"), {}
    for name, location in vqgan.key_map(config).items():
        value = stored[name] if name in stored else np.zeros(location.shape, np.float32)  # decoder
        transposed = value.ndim == 4 and name in stored
        by_name[location.name] = value.transpose(2, 3, 1, 0) if transposed else value
    like = vqgan_model.abstract(config)
    vq = jax.tree.unflatten(
        jax.tree.structure(like), [by_name[n] for n in safetensors_file.flatten_named(like)]
    )
    vq = jax.device_put(vq)
    encode = lambda pixels: np.asarray(vqgan_model.encode(vq, pixels))  # noqa: E731
    load = lambda path: images.load(path, max_pixels=MAX_PIXELS)  # noqa: E731
    seconds = time_preprocessing(folder, lambda path: images.preprocess(load(path), 512))
    versions = dict(jax=jax.__version__, python=sys.version.split()[0])
    return time_encoder(folder, size, encode, "ours") | dict(preprocessing=seconds) | versions


def theirs(folder: pathlib.Path, size: str, threads: int) -> dict:
    """Return the numbers of the torch reference."""
    import numpy as np
    import torch
    import transformers
    from transformers.image_utils import load_image
    from transformers.models.chameleon import configuration_chameleon, modeling_chameleon

    torch.set_num_threads(threads)
    settings = json.loads((folder / f"{size}.json").read_text())
    config = configuration_chameleon.ChameleonVQVAEConfig(
        base_channels=settings["channels"], latent_channels=settings["z_channels"],
        channel_multiplier=list(settings["channel_mult"]),
        num_res_blocks=settings["num_res_blocks"],
        embed_dim=settings["embed_dim"], num_embeddings=settings["num_codes"],
        resolution=settings["image_size"], attn_resolutions=None, dropout=0.0,
    )  # fmt: skip
    vq, stored = modeling_chameleon.ChameleonVQVAE(config).eval(), np.load(folder / f"{size}.npz")
    vq.load_state_dict({name: torch.from_numpy(stored[name]) for name in vq.state_dict()})
    processor = transformers.ChameleonImageProcessor()
    seconds = time_preprocessing(
        folder, lambda path: processor(load_image(str(path)), return_tensors="np")
    )

    @torch.no_grad()
    def encode(pixels):
        encoded = vq.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
        return encoded.image_tokens.numpy()

    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    return time_encoder(folder, size, encode, "theirs") | dict(preprocessing=seconds) | versions


def time_preprocessing(folder: pathlib.Path, prepare) -> float:
    """Return the images per second of preprocessing."""
    paths = [folder / f"{i}.jpg" for i in range(IMAGES)]
    prepare(paths[0])
    start = time.perf_counter()
    for path in paths:
        prepare(path)
    return round(IMAGES / (time.perf_counter() - start), 2)


def time_encoder(folder: pathlib.Path, size: str, encode, side: str) -> dict:
    """Return the images per second of the encoder's median batch; write its codes to a file."""
    import numpy as np

    pixels, seconds, cpu, codes = np.load(folder / f"{size}.npy"), [], [], []
    for batch in (pixels[0], *pixels):
        start, cpu_start = time.perf_counter(), time.process_time()
        codes.append(encode(batch).reshape(len(batch), -1))
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    np.save(folder / f"{size}_{side}.npy", np.concatenate(codes[1:]))
    per_cpu, rate = (pixels.shape[1] / statistics.median(t[1:]) for t in (cpu, seconds))
    return dict(
        encoder=round(rate, 4),
        encoder_per_cpu_second=round(per_cpu, 4),
        first_batch_seconds=round(seconds[0], 2),
    )


# ---- measurements


def child(python: str, cores: list[int], *arguments: str) -> dict:
    """Run one measurement; return its output."""
    count = str(len(cores))
    environment = os.environ | {"BENCHMARK_CORES": ",".join(map(str, cores))}
    environment |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    command = [python, __file__, "--child", count, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result = json.loads(done.stdout.splitlines()[-1])
    print(*arguments[:2], result, flush=True)
    return result


def medians(runs: list[dict]) -> dict:
    """Return the median of each number; texts are unchanged."""
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    return {n: v[0] if isinstance(v[0], str) else statistics.median(v) for n, v in columns.items()}


def compare(args: argparse.Namespace, folder: pathlib.Path, size: str, cores: list[int]) -> dict:
    """Measure both sides of a size in turn."""
    import numpy as np

    mine, other = [], []
    for _ in range(args.rounds):
        if args.torch_python:
            other.append(child(args.torch_python, cores, "theirs", size, str(folder)))
        mine.append(child(sys.executable, cores, "ours", size, str(folder)))
    if not other:
        print(f"{size}: theirs is skipped: no --torch_python", flush=True)
        return dict(ours=medians(mine), theirs=None, ratio=None, agreement=None)
    codes = [np.load(folder / f"{size}_{side}.npy") for side in ("ours", "theirs")]
    agreement = round(float((codes[0] == codes[1]).mean()), 6)
    if 1 - agreement > args.differ:
        raise SystemExit(f"{size}: only {agreement} of the codes agree; the run is not valid")
    result = dict(ours=medians(mine), theirs=medians(other), agreement=agreement)
    names = ("encoder", "encoder_per_cpu_second", "preprocessing")
    result["ratio"] = {n: round(result["ours"][n] / result["theirs"][n], 2) for n in names}
    return result | dict(codes=codes[0].size, different_codes=len(np.unique(codes[0])))


def main() -> None:
    """Run the program."""
    if sys.argv[1:2] == ["--child"]:
        threads, side, size, folder = sys.argv[2:]
        measure = ours if side == "ours" else functools.partial(theirs, threads=int(threads))
        print(json.dumps(measure(pathlib.Path(folder), size)))
        return
    from medmax_jax import arguments  # not in a child, which may run in another Python

    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch_python", help="Python with torch, transformers and pillow")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["tiny", "full"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--differ", type=float, default=0.005, help="share of codes that may differ"
    )
    args = parser.parse_args()
    load, cores = os.getloadavg(), sorted(os.sched_getaffinity(0))[: args.threads]
    with tempfile.TemporaryDirectory() as name:
        make(pathlib.Path(name), args.sizes)
        sizes = {size: compare(args, pathlib.Path(name), size, cores) for size in args.sizes}
    last = sizes[args.sizes[-1]]
    result = dict(
        ours=last["ours"]["encoder"],
        theirs=last["theirs"] and last["theirs"]["encoder"],
        ratio=last["ratio"] and last["ratio"]["encoder"],
        sizes=sizes,
        threads=len(cores),
        load_average=[load, os.getloadavg()],
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
