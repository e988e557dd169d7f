"""python benchmarks/guidance.py --scratch D [--seeds 3] [--steps 120] [--out FOLDER]

Measures guided image generation with and without condition dropout on the embedded images.

    train    LoRA on medmax_jax/tiny, as configs/tiny.py: the documents of the training split whose
             answer is an image, each arm of a seed for the same steps of the same rows of tokens;
             the arm with dropout has the rates of configs/medmax_7b_images.py
    sample   each prompt "Generate ..." that two images of the manifest or more share, at each
             guidance scale, with the released temperature 0.7 and top-p 0.9
    measure  match      share of images whose nearest centroid is the requested modality
             KID        unbiased MMD^2 between the real and the generated images of a prompt
             diversity  mean of 1 - cosine over pairs of images of a prompt
             NLL        of the codes of held-out images, in nats per code, in the complete stream
                        and in the unconditional one

Features are those of eval/encoders/modality.py (code histogram and an 8 x 8 grid of pixels), as
unit rows for KID and diversity; real images pass through the VQGAN as generated ones do. A rerun
continues where it was stopped. The last line is one JSON object; --out writes it to embedded.json,
with the charts embedded.png and samples.png.
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import guidance_results as results

from medmax_jax import arguments, cli, config
from medmax_jax import train as train_program
from medmax_jax.configs import medmax_7b_images, tiny
from medmax_jax.configs.sampling import SETS
from medmax_jax.data import prepare
from medmax_jax.data.sample.documents import image_phrase, with_article
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.environment import environment
from medmax_jax.eval.encoders import modality
from medmax_jax.eval.metrics import embeddings
from medmax_jax.generation import engine, generate_tokens, model_bundle, prompt_tokens
from medmax_jax.io import charts
from medmax_jax.models.images import load as load_image
from medmax_jax.models.vocab import BOI, BOS, IMAGE_START

MODEL = "medmax_jax/tiny"
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
# Tasks of which all answers, or half of them, are text.
OTHER_TASKS = "VQA, Image Captioning, Visual Chat, Report Understanding"
SHOWN = ("axial CT of the chest", "H&E histology", "fundus")  # prompts of samples.png
STREAMS = ("complete", "unconditional")


# ---- training ----


def run_of(scratch: pathlib.Path, *, dropout: bool, seed: int, steps: int) -> config.Run:
    """Return the run of an arm."""
    c = tiny.get_config()
    c.data.update(train=str(scratch / "records"), validation="", batch_size=4, seed=seed)
    if dropout:
        c.data.condition_dropout = medmax_7b_images.get_config().data.condition_dropout
    c.mixing.update(by="task", leave_out=OTHER_TASKS)
    c.train.update(
        steps=steps, seed=seed, samples=0, log_every=steps, eval_every=0, checkpoint_every=steps,
        keep=1,
    )  # fmt: skip
    return config.from_config_dict(c)


def train(scratch: pathlib.Path, *, dropout: bool, seed: int, steps: int) -> tuple[str, dict]:
    """Train an arm unless it is complete; return its workdir and what it trained."""
    if not (scratch / "records" / "dataset.json").exists():
        prepare.prepare_sample(scratch / "records", views=4, rounds=4)  # crops and wordings
    workdir = scratch / f"dropout-{dropout}-{seed}"
    train_program.run(run_of(scratch, dropout=dropout, seed=seed, steps=steps), workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["kind"] == "train" and row["step"] == steps)
    return str(workdir), dict(tokens=round(row["tokens"] * steps), epoch=row["epoch"])


# ---- images ----


def real_images(scratch: pathlib.Path, g: model_bundle.ModelBundle) -> list[dict[str, Any]]:
    """Return the rows of the manifest with prompt, codes and features of each image."""
    rows, file = read_manifest(prepare.SAMPLE / "manifest.jsonl"), scratch / "real.npz"
    if not file.exists():
        codes = model_bundle.encode(g, [prepare.SAMPLE / row["file"] for row in rows])
        np.savez(file, codes=np.stack(codes), features=features(g, np.stack(codes)))
    stored = np.load(file)
    return [
        row | dict(prompt=f"Generate {with_article(image_phrase(row))}.", codes=code, features=x)
        for row, code, x in zip(rows, stored["codes"], stored["features"], strict=True)
    ]


def features(g: model_bundle.ModelBundle, codes: np.ndarray) -> np.ndarray:
    """Return the features of images that the VQGAN decodes from codes [n, K]."""
    decoded = model_bundle.decode(g, list(codes))
    return np.stack([
        modality.features(code, np.asarray(image), num_codes=g.vocab.image_codes)
        for code, image in zip(codes, decoded, strict=True)
    ])  # fmt: skip


def sample(
    g: model_bundle.ModelBundle, prompts: list[str], *, scale: float, count: int, seed: int
) -> np.ndarray:
    """Return the codes of `count` images of each prompt, [prompts, count, K]."""
    settings = config.Sample(
        **SETS["medmax"] | dict(guidance_scale_text=scale, guidance_scale_image=scale)
    )
    tokens = prompt_tokens(g, [[p] for p in prompts for _ in range(count)], end_of_turn=True)
    codes = np.zeros((len(tokens), g.vq_config.codes_per_image), np.int32)
    for batch, answers in generate_tokens(
        g, tokens, settings, mode="image", seed=seed, names=None, batch_size=32
    ):
        for index, answer in zip(batch, answers, strict=True):
            codes[index] = answer - IMAGE_START
    return codes.reshape(len(prompts), count, -1)


def nll(g: model_bundle.ModelBundle, rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the mean NLL of the codes of each patient, volume or slide, by stream."""
    sizes = engine.EngineSizes(batch_size=8, num_slots=8, cache_length=256, cache_dtype="model")
    e = engine.make_engine(g.model, g.vocab, g.mesh, sizes, codes=g.vq_config.codes_per_image)
    full = prompt_tokens(g, [[row["prompt"]] for row in rows], end_of_turn=True)
    prompts = dict(
        complete=[np.append(prompt, BOI).astype(np.int32) for prompt in full],
        unconditional=[np.array([BOS, BOI], np.int32)] * len(rows),
    )
    codes = [[(row["codes"] + IMAGE_START).astype(np.int32)] for row in rows]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    found = {}
    for stream in STREAMS:
        scores = engine.score_options(e, prompts[stream], codes)
        values = [-float(likelihoods.mean()) for ((likelihoods, _),) in scores]
        found[stream] = [
            float(np.mean([v for v, row in zip(values, rows, strict=True) if row["group"] == name]))
            for name in groups
        ]
    return found


# ---- measures ----


def unit(x: np.ndarray) -> np.ndarray:
    """Return features as unit rows."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def measures(
    generated: np.ndarray, prompts: list[str], real: list[dict[str, Any]], by: modality.Centroids
) -> dict[str, list[float]]:
    """Return each measure by prompt; generated: features [prompts, count, F]."""
    found: dict[str, list[float]] = dict(match=[], kid=[], diversity=[])
    for prompt, of_prompt in zip(prompts, generated, strict=True):
        rows = [row for row in real if row["prompt"] == prompt]
        nearest = [modality.nearest_centroid(by, x) for x in of_prompt]
        found["match"].append(float(np.mean([n == rows[0]["modality"] for n in nearest])))
        cosines = unit(of_prompt) @ unit(of_prompt).T
        found["diversity"].append(float(1 - cosines[np.triu_indices(len(cosines), 1)].mean()))
        theirs = unit(np.stack([row["features"] for row in rows]))
        found["kid"].append(embeddings.mmd2(theirs, unit(of_prompt), gamma=1.0))
    return found


def shared_prompts(real: list[dict[str, Any]]) -> list[str]:
    """Return the prompts of two images or more, in alphabetical order."""
    counts = collections.Counter(row["prompt"] for row in real)
    return sorted(prompt for prompt, count in counts.items() if count > 1)


def centroids(real: list[dict[str, Any]]) -> modality.Centroids:
    """Return the centroids of the training images."""
    trained = [row for row in real if row["split"] == "train"]
    return modality.fit_centroids(
        [row["features"] for row in trained], [row["modality"] for row in trained]
    )


def real_match(real: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of real images with the right centroid by split, means over prompts."""
    by, shares = centroids(real), {}
    for row in real:
        hit = modality.nearest_centroid(by, row["features"]) == row["modality"]
        of_split = shares.setdefault("train" if row["split"] == "train" else "held out", {})
        of_split.setdefault(row["prompt"], []).append(hit)
    return {
        split: float(np.mean([np.mean(hits) for hits in prompts.values()]))
        for split, prompts in shares.items()
    }


def measure(
    scratch: pathlib.Path, arm: str, seed: int, real: list[dict[str, Any]], args: Any
) -> dict[str, Any]:
    """Train an arm of a seed, sample its images and return all measures."""
    dropout = arm == results.ARMS[1]
    workdir, found = train(scratch, dropout=dropout, seed=seed, steps=args.steps)
    g = model_bundle.load(MODEL, adapter=workdir, merge=True)
    by, prompts = centroids(real), shared_prompts(real)
    found |= dict(seed=seed, scales=[], nll=nll(g, [r for r in real if r["split"] != "train"]))
    for scale in SCALES:
        file = pathlib.Path(workdir) / f"images-{scale:g}.npz"
        if not file.exists():
            codes = sample(g, prompts, scale=scale, count=args.images, seed=seed)
            flat = features(g, codes.reshape(-1, codes.shape[-1]))
            np.savez(file, codes=codes, features=flat.reshape(*codes.shape[:2], -1))
        found["scales"].append(measures(np.load(file)["features"], prompts, real, by))
    print(arm, seed, {k: np.round([np.mean(s[k]) for s in found["scales"]], 3).tolist()
                      for k in found["scales"][0]},
          {k: round(float(np.mean(v)), 3) for k, v in found["nll"].items()},
          file=sys.stderr, flush=True)  # fmt: skip
    return found


def summary(arms: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return the intervals of the arms and their difference: measures by scale, NLL by stream."""
    found = {
        name: [
            dict(scale=scale)
            | results.compare({
                arm: [of_seed["scales"][number][name] for of_seed in seeds]
                for arm, seeds in arms.items()
            })
            for number, scale in enumerate(SCALES)
        ]
        for name in ("match", "kid", "diversity")
    }  # fmt: skip
    found["nll"] = [
        dict(stream=stream)
        | results.compare({
            arm: [of_seed["nll"][stream] for of_seed in seeds] for arm, seeds in arms.items()
        })
        for stream in STREAMS
    ]  # fmt: skip
    return found


# ---- the program ----


@charts.page_style()
def draw_samples(scratch: pathlib.Path, g: model_bundle.ModelBundle, real, path) -> None:
    """Draw the first image of some prompts for each arm and scale, of seed 0."""
    prompts = shared_prompts(real)
    shown = [next(i for i, p in enumerate(prompts) if part in p) for part in SHOWN]
    figure, axes = charts.subplots(
        len(shown) * 2, 1 + len(SCALES), size=(7.2, 1.15 * 2 * len(shown) + 0.4)
    )
    for row, (index, dropout) in enumerate(itertools.product(shown, (False, True))):
        one = next(r for r in real if r["prompt"] == prompts[index])["codes"]
        files = [scratch / f"dropout-{dropout}-0" / f"images-{scale:g}.npz" for scale in SCALES]
        images = model_bundle.decode(g, [one, *(np.load(f)["codes"][index, 0] for f in files)])
        for column, image in enumerate(images):
            axes[row][column].imshow(image)
            axes[row][column].set(xticks=[], yticks=[])
            if not row:
                title = f"scale {SCALES[column - 1]:g}" if column else "real"
                axes[row][column].set_title(title, fontsize=9)
        axes[row][0].set_ylabel(results.ARMS[dropout].replace(" ", "\n"))
    charts.save(figure, path)
    few_colors = load_image(path).convert("RGB").quantize(128)  # a fifth of the bytes
    few_colors.save(path, optimize=True)


def write(out: pathlib.Path, scratch: pathlib.Path, found: dict[str, Any], g, real) -> None:
    """Write embedded.json and its charts."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "embedded.json").write_text(json.dumps(found, indent=1) + "\n")
    names = dict(match="modality match", kid="KID within a prompt", diversity="diversity")
    panels = [(title, found["summary"][name]) for name, title in names.items()]
    results.chart(panels, out / "embedded.png", size=(9.6, 3.3))
    draw_samples(scratch, g, real, out / "samples.png")


def main() -> None:
    """Run the program."""
    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=pathlib.Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each arm")
    parser.add_argument("--steps", type=int, default=120, help="of each training")
    parser.add_argument("--images", type=int, default=3, help="of each prompt and scale")
    parser.add_argument("--out", type=pathlib.Path, help="folder of embedded.json and the charts")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    cli.use_compile_cache(str(args.scratch / "compiled"))
    begin, load = time.perf_counter(), os.getloadavg()
    g = model_bundle.load(MODEL)
    real = real_images(args.scratch, g)
    arms: dict[str, list[dict[str, Any]]] = {arm: [] for arm in results.ARMS}
    for seed, arm in itertools.product(range(args.seeds), results.ARMS):
        arms[arm].append(measure(args.scratch, arm, seed, real, args))
    held_out = [row for row in real if row["split"] != "train"]
    base = {stream: float(np.mean(v)) for stream, v in nll(g, held_out).items()}
    found = dict(
        summary=summary(arms), base_nll=base, real_match=real_match(real), arms=arms,
        prompts=shared_prompts(real), steps=args.steps, images=args.images,
        seconds=round(time.perf_counter() - begin), load_average=[load, os.getloadavg()],
        environment=environment(devices=jax.devices()),
    )  # fmt: skip
    if args.out:
        write(args.out, args.scratch, found, g, real)
    for name in ("match", "kid", "diversity"):
        print(results.table(found["summary"][name], name, digits=3), file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
