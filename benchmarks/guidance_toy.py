"""python benchmarks/guidance_toy.py --scratch D [--seeds 3] [--steps 500] [--out FOLDER]

Trains a toy Chameleon with and without condition dropout where the guided distribution is known.

    condition c    one of 3 text tokens, with probabilities .5 .3 .2
    image x        2 x 2 codes of 6, a Markov chain whose start and transitions depend on c
    document       BOS c SEP BOI x x x x EOI EOS
    p(x | <x)      the mixture of p(x | <x, c) by the posterior of c after the codes so far
    guided         p(x | <x)^(1-s) p(x | <x, c)^s, normalized at each code, as decoding does

The run is that of `medmax_jax.train`: records, packing, data.condition_dropout, training step. Both
arms of a seed train on the same documents for the same number of steps, and no document twice.
The logits of all prefixes give the model's guided distribution over all 1,296 images without
sampling; KL(model || exact) is its mean over the conditions, in nats. `decoded` estimates the same
number from images of the decode loop, so it checks that decoding samples from this distribution.
The last line is one JSON object; --out writes it to toy.json, with the chart toy.png.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import guidance_results as results

from medmax_jax import arguments, cli, config
from medmax_jax import train as train_program
from medmax_jax.configs import base
from medmax_jax.configs.sampling import SETS
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Document, Layout
from medmax_jax.environment import environment
from medmax_jax.generation import engine, requests, sampling, sampling_params, scheduler
from medmax_jax.models import chameleon
from medmax_jax.models.vocab import BOI, BOS, EOI, EOS, IMAGE_START, SEP
from medmax_jax.sharding import make_mesh
from medmax_jax.training import setup, step

PRIOR = np.array([0.5, 0.3, 0.2])
CODES, IMAGE = 6, 4  # values of a code; codes of an image
TEXT_START = 8_712
SCALES = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0)  # 0: the unconditional stream by itself
DROPOUT = 0.1  # of the documents, what 5 % `text` and 5 % `all` are without images in the prompt
ROWS, ROW = 8, 64  # rows of a step, tokens of a row
LENGTH = 4 + IMAGE + 2  # tokens of a document


# ---- the exact distributions ----


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """Markov chains over codes, one for each condition."""

    start: np.ndarray  # [conditions, CODES]
    move: np.ndarray  # [conditions, CODES, CODES]


def make_chain(seed: int) -> Chain:
    """Return chains whose probabilities are drawn from a flat Dirichlet distribution."""
    rng = np.random.default_rng(seed)
    start = rng.dirichlet(np.ones(CODES), size=len(PRIOR))
    return Chain(start, rng.dirichlet(np.ones(CODES), size=(len(PRIOR), CODES)))


def draw(chain: Chain, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return conditions [count] and images [count, IMAGE]."""
    rng = np.random.default_rng(seed)
    conditions = rng.choice(len(PRIOR), size=count, p=PRIOR)
    images, rows = np.zeros((count, IMAGE), np.int64), chain.start[conditions]
    for place in range(IMAGE):
        images[:, place] = (rows.cumsum(1) < rng.random((count, 1))).sum(1).clip(0, CODES - 1)
        rows = chain.move[conditions, images[:, place]]
    return conditions, images


def all_images() -> np.ndarray:
    """Return every image, [CODES ** IMAGE, IMAGE]; the last code changes fastest."""
    return np.stack(np.unravel_index(np.arange(CODES**IMAGE), (CODES,) * IMAGE), axis=1)


def exact_streams(chain: Chain) -> np.ndarray:
    """Return log p(code | codes before) of every image: of each condition, then unconditional.

    [conditions + 1, images, IMAGE, CODES]
    """
    images = all_images()
    rows = [np.repeat(chain.start[:, None], len(images), axis=1)]
    rows += [chain.move[:, images[:, place]] for place in range(IMAGE - 1)]
    given = np.stack(rows, axis=2)  # [conditions, images, IMAGE, CODES]
    taken = np.take_along_axis(given, images[None, :, :, None], axis=3)[..., 0]
    before = np.concatenate([np.ones_like(taken[..., :1]), taken.cumprod(2)[..., :-1]], axis=2)
    posterior = PRIOR[:, None, None] * before
    posterior /= posterior.sum(0)
    return np.log(np.concatenate([given, (posterior[..., None] * given).sum(0)[None]]))


def guided(streams: np.ndarray, scale: float) -> np.ndarray:
    """Return the log-probability of every image under guidance, [conditions, images].

    streams: logits or log-probabilities, as `exact_streams` returns them.
    """
    full, other = (jnp.asarray(np.broadcast_to(x, streams[:-1].shape).reshape(-1, CODES))
                   for x in (streams[:-1], streams[-1]))  # fmt: skip
    logits = sampling.apply_guidance(full, other, other, scale_text=scale, scale_image=scale)
    of_codes = np.asarray(jax.nn.log_softmax(logits), np.float64).reshape(streams[:-1].shape)
    return np.take_along_axis(of_codes, all_images()[None, :, :, None], axis=3)[..., 0].sum(2)


def guided_as_a_whole(chain: Chain, scale: float) -> np.ndarray:
    """Return log p(x)^(1-s) p(x | c)^s, normalized once over all images, [conditions, images]."""
    unconditional, full = (guided(exact_streams(chain), s) for s in (0.0, 1.0))
    logits = (1 - scale) * unconditional + scale * full
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def kl(first: np.ndarray, second: np.ndarray) -> float:
    """Return KL(first || second) in nats, the mean over the conditions by their probabilities."""
    return float(PRIOR @ (np.exp(first) * (first - second)).sum(1))


# ---- training ----


def run_of(folder: pathlib.Path, *, dropout: float, seed: int, steps: int) -> config.Run:
    """Return the run of an arm: two layers of width 64, all weights from scratch."""
    c = base.get_config()
    c.vocab.update(size=TEXT_START + 8, image_codes=CODES, text_start=TEXT_START)
    c.model.update(
        hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16,
        intermediate_size=128, context_length=64, param_dtype="float32", compute_dtype="float32",
        remat="none",
    )  # fmt: skip
    c.vq.update(image_size=4, channels=32, channel_mult=(1, 1), num_codes=CODES)  # 2 x 2 codes
    c.lora.update(rank=0, alpha=0.0, dropout=0.0)
    c.data.update(
        train=str(folder),
        validation="",
        document_limit=ROW,
        seq_len=ROW,
        batch_size=ROWS,
        seed=seed,
    )
    c.data.condition_dropout.update(text=dropout / 2, all=dropout / 2)
    c.optim.update(peak_lr=5e-3, warmup_ratio=0.05, b2=0.99)
    c.train.update(
        trains="full", init_from="", steps=steps, seed=seed, log_every=steps, eval_every=0,
        checkpoint_every=steps, keep=1,
    )  # fmt: skip
    return config.from_config_dict(c)


def documents(chain: Chain, count: int, seed: int) -> Iterator[Document]:
    """Yield documents that are drawn from the chains."""
    for number, (condition, image) in enumerate(zip(*draw(chain, count, seed), strict=True)):
        codes = image + IMAGE_START
        tokens = [BOS, TEXT_START + condition, SEP, BOI, *codes, EOI, EOS]
        yield Document(
            tokens=np.array(tokens, np.int32), image_path="", task="Image Generation",
            source="toy", credential="no", turns=1, group=str(number), id=str(number),
        )  # fmt: skip


def train(scratch: pathlib.Path, chain: Chain, *, dropout: float, seed: int, steps: int) -> Any:
    """Train an arm unless it is complete; return (run, model, tokens) on the ambient mesh."""
    records, workdir = scratch / f"records-{seed}", scratch / f"dropout-{dropout}-{seed}"
    run = run_of(records, dropout=dropout, seed=seed, steps=steps)
    if not (records / "dataset.json").exists():
        layout = Layout(vocab=run.vocab, codes_per_image=IMAGE, tokenizer="", vqgan="")
        # The arm with dropout has shorter documents, so it needs more of them for as many tokens.
        count = round(1.1 * steps * ROWS * ROW / LENGTH)
        writer.write(
            records, documents(chain, count, seed + 1), shard_size=1 << 15, layout=layout, notes={}
        )
    train_program.run(run, workdir)
    trained = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in trained if row["kind"] == "train" and row["step"] == steps)
    if row["epoch"] > 1:
        raise ValueError(f"{workdir} has trained documents twice; make more of them")
    with jax.set_mesh(make_mesh(run.mesh)):
        abstract = chameleon.abstract_model(run.model, run.vocab, run.lora)
        loaded = dataclasses.replace(
            run, train=dataclasses.replace(run.train, init_from=str(workdir / "model"))
        )
        parts = setup.load_or_init_weights(loaded, abstract, jax.random.key(0), restoring=False)
        graph = step.split_trainable(abstract, "full")[0]
        return run, nnx.merge(graph, *parts), row


# ---- the model's distributions ----


def model_streams(run: config.Run, model: chameleon.Chameleon) -> np.ndarray:
    """Return the logits of the codes of every image, as `exact_streams` orders them."""
    images = all_images().reshape(-1, CODES, IMAGE)[:, 0, :-1]  # the last code is not an input
    prefixes = [[BOS, TEXT_START + c, SEP, BOI] for c in range(len(PRIOR))] + [[BOS, BOI]]
    return np.stack([
        np.repeat(_code_logits(model, np.array(prefix), images, run.mesh), CODES, axis=0)
        for prefix in prefixes
    ])  # fmt: skip


def _code_logits(
    model: chameleon.Chameleon, prefix: np.ndarray, images: np.ndarray, mesh: config.Mesh
) -> np.ndarray:
    """Return the logits of all codes that follow a prefix and some images, [n, IMAGE, CODES]."""
    before = np.repeat(prefix[None], len(images), axis=0)
    tokens = np.concatenate([before, images + IMAGE_START], axis=1).astype(np.int32)
    with jax.set_mesh(make_mesh(mesh)):
        logits = _forward(model, jnp.asarray(tokens))
    return np.asarray(logits, np.float64)


@jax.jit
def _forward(model: chameleon.Chameleon, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden(tokens, jnp.ones_like(tokens), positions, key=None)[:, -IMAGE:]
    return model.logits(hidden)[..., IMAGE_START : IMAGE_START + CODES]


def decoded(
    run: config.Run, model: chameleon.Chameleon, *, scale: float, count: int, seed: int
) -> np.ndarray:
    """Return the numbers of images of the decode loop, [conditions, count]: rows of all_images."""
    sample = config.Sample(
        **SETS["medmax"] | dict(image_temperature=1.0, image_top_p=1.0)
        | dict(guidance_scale_text=scale, guidance_scale_image=scale)
    )  # fmt: skip
    settings = sampling_params.resolve(sample, run.vocab, mode="image", codes=IMAGE)
    prompts = [
        np.array([BOS, TEXT_START + c, SEP], np.int32)
        for c in range(len(PRIOR))
        for _ in range(count)
    ]
    mesh = make_mesh(run.mesh)
    sizes = engine.EngineSizes(batch_size=64, num_slots=128, cache_length=32, cache_dtype="model")
    e = engine.make_engine(model, run.vocab, mesh, sizes, codes=IMAGE)
    queue = requests.make_requests(
        prompts, sample, run.vocab, mode="image", names=None, codes=IMAGE, context=64
    )
    codes = np.zeros((len(prompts), IMAGE), np.int64)
    for outputs in scheduler.run_requests(e, queue, settings, seed):
        for output in outputs:
            if output.done:
                codes[output.index] = output.tokens - IMAGE_START
    return np.ravel_multi_index(codes.T, (CODES,) * IMAGE).reshape(len(PRIOR), count)


# ---- the program ----


def measure(
    scratch: pathlib.Path, chain: Chain, *, dropout: float, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Return what was trained and the divergences of one arm of one seed, by scale."""
    run, model, row = train(scratch, chain, dropout=dropout, seed=seed, steps=args.steps)
    streams, exact = model_streams(run, model), exact_streams(chain)
    divergences, estimates = [], []
    for scale in SCALES:
        ours, target = guided(streams, scale), guided(exact, scale)
        divergences.append(kl(ours, target))
        images = decoded(run, model, scale=scale, count=args.images, seed=seed)
        ratios = np.take_along_axis(ours - target, images, axis=1)
        error = np.sqrt(PRIOR**2 @ ratios.var(1, ddof=1) / args.images)
        estimates.append([float(PRIOR @ ratios.mean(1)), float(error)])
    found = dict(
        seed=seed, tokens=round(row["tokens"] * args.steps), kl=divergences, decoded=estimates
    )
    print(json.dumps(dict(dropout=dropout) | found), file=sys.stderr, flush=True)
    return found


def summary(arms: dict[str, list[dict[str, Any]]], chain: Chain) -> dict[str, Any]:
    """Return means over the seeds with intervals, by scale and arm, and the paired differences."""
    rows = []
    for number, scale in enumerate(SCALES):
        values = {arm: [found["kl"][number] for found in seeds] for arm, seeds in arms.items()}
        exact = guided(exact_streams(chain), scale)
        rows.append(
            dict(scale=scale, exact_to_whole=kl(exact, guided_as_a_whole(chain, scale)))
            | results.compare(values)
        )
    z = [
        (estimate - value) / error
        for seeds in arms.values()
        for found in seeds
        for value, (estimate, error) in zip(found["kl"], found["decoded"], strict=True)
    ]
    return dict(rows=rows, decoded=dict(pairs=len(z), within=int(np.sum(np.abs(z) < 1.96))))


def chart(found: dict[str, Any], path: pathlib.Path) -> None:
    """Draw KL by scale."""
    results.chart([("KL(model || exact), nats", found["rows"])], path, size=(5.4, 3.4), log=True)


def main() -> None:
    """Run the program."""
    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=pathlib.Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each arm")
    parser.add_argument("--steps", type=int, default=500, help="of each training")
    parser.add_argument("--images", type=int, default=500, help="decoded per condition and scale")
    parser.add_argument("--out", type=pathlib.Path, help="folder of toy.json and toy.png")
    args = parser.parse_args()
    cli.use_compile_cache(str(args.scratch / "compiled"))
    begin, load = time.perf_counter(), os.getloadavg()
    chain, arms = make_chain(0), {arm: [] for arm in results.ARMS}
    for seed in range(args.seeds):
        for arm, dropout in zip(results.ARMS, (0.0, DROPOUT), strict=True):
            arms[arm].append(measure(args.scratch, chain, dropout=dropout, seed=seed, args=args))
    found = summary(arms, chain) | dict(
        arms=arms, steps=args.steps, seconds=round(time.perf_counter() - begin),
        load_average=[load, os.getloadavg()], environment=environment(devices=jax.devices()),
    )  # fmt: skip
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "toy.json").write_text(json.dumps(found, indent=1) + "\n")
        chart(found, args.out / "toy.png")
    print(results.table(found["rows"], "KL", digits=4), file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
