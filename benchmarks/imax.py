"""python benchmarks/imax.py --workdir D [--seeds 3] [--steps 64] [--documents 576] [--out FOLDER]

Trains the tiny model on few images with all their tasks (IMAX-like) and on many images with one
task each (DMAX-like), at equal documents of each task and equal scored tokens, and compares the
arms on held-out patients, volumes and slides. The procedure of IMAX (arXiv 2504.09967) was not
available to us: the arms are our interpretation.

    imax           densify, 8 entries per image; windows of all documents of an image
    imax_shuffled  the same records without windows
    dmax           decentralize: one task for each image; also `plain longer` of the next three
    plain          dmax for half of the tokens: the model of stage one
    windows        dmax in three stages: plain 1/2, windows 1/3, plain 1/6 of the steps
    pseudo         the same with documents that the model of `plain` answered, in the windows alone
                   and with half the weight (configs/imax_tiny.py)
    entries_1 .. 8 densify by entries per image, N/4 documents and half of the steps, no windows

A seed decides the images, the order of documents and the adapters' initial weights. Each run is a
folder of D; run again, the program continues where it was stopped. Measured on the test split:

    nll        of the reference answer of each held-out document, at most 3 of a family and group
    accuracy   of closed and multiple-choice questions, asked as eval.run asks them
    probe      SE and rho (training/fisher.py) of the same held-out documents for all arms
    batch      SE and rho of the run's own steps, whose documents share images in windows: its
               differences mix the arrangement of the batch with the state of the model

The last line is one JSON object; --out writes it to results.json, with the chart results.png.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import imax_results as results

from medmax_jax import arguments, cli, config, sharding
from medmax_jax import train as train_program
from medmax_jax.checkpoints import export
from medmax_jax.checkpoints.manager import CheckpointManager
from medmax_jax.configs import eval_tiny, imax_tiny, tiny
from medmax_jax.data import loader, prepare
from medmax_jax.data.packing import report
from medmax_jax.data.records import writer
from medmax_jax.data.records.reader import open_records
from medmax_jax.environment import environment
from medmax_jax.eval.config import Settings
from medmax_jax.eval.metrics import aggregate
from medmax_jax.eval.models import base
from medmax_jax.eval.pipeline import inference
from medmax_jax.eval.tasks import selection
from medmax_jax.generation import model_bundle
from medmax_jax.models import chameleon
from medmax_jax.models.vocab import EOS, SEP, is_image
from medmax_jax.training import fisher, setup, step
from medmax_jax.training.cross_entropy import num_chunks, weighted_nll

ROWS, WINDOW = 8, 44  # rows of a step, and documents of a window: about two steps, as at 7B
POINTS = 3  # of training at which SE and rho are measured
KEPT = POINTS + 3  # checkpoints; the others are those of the ends of three stages
PER_CELL = 3  # held-out documents of each family and group
ASKED = 98  # items of each family; there are 98 of multiple choice
FAMILIES = ("vqa_closed", "vqa_mcq")  # their accuracy needs no judge
STAGED = {"windows": "no_pseudo", "pseudo": "imax"}  # names of configs/imax_tiny.py
ARMS = (
    "dmax",
    "imax",
    "imax_shuffled",
    *(f"entries_{n}" for n in results.ENTRIES),
    "plain",
    *STAGED,
)
MEASURED = ("nll", "accuracy", "probe", "batch")  # of a run, apart from what it trained on


# ---- records ----


def prepared(out: pathlib.Path, *words: Any) -> pathlib.Path:
    """Run a command of data.prepare that writes `out`, unless it is complete."""
    if not (out / "dataset.json").exists():
        with contextlib.redirect_stdout(sys.stderr):
            status = prepare.main([*map(str, words), "--out", str(out)])
        if status:
            raise SystemExit(f"data.prepare {words[0]} failed")
    return out


def records_of(work: pathlib.Path, arm: str, seed: int, documents: int) -> pathlib.Path:
    """Return the folder of the records of an arm and a seed."""
    pool, folder = prepared(work / "records" / "pool", "sample"), work / "records"
    dense = ("densify", pool, "--seed", seed, "--documents")
    if arm.startswith("entries_"):
        entries = int(arm.removeprefix("entries_"))
        few = (documents // 4, "--entries", entries)
        return prepared(folder / f"{arm}_{seed}", *dense, *few)
    imax = prepared(folder / f"imax_{seed}", *dense, documents, "--entries", 8)
    if arm.startswith("imax"):
        return imax
    return prepared(folder / f"dmax_{seed}", "decentralize", pool, "--like", imax, "--seed", seed)


def pseudo_records(work: pathlib.Path, seed: int, documents: int) -> pathlib.Path:
    """Return the records of dmax with documents that the model of `plain` answered."""
    dmax, generator = records_of(work, "dmax", seed, documents), work / f"plain_{seed}"
    if not (generator / "measures.json").exists():
        raise SystemExit("--arms pseudo: the model of `plain` answers; name plain before pseudo")
    folder = work / "records" / f"pseudo_{seed}"
    return prepared(folder, "pseudo", dmax, "--adapter", generator, "--seed", seed)


def held_out(work: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Return records of the test split with a family as task: for NLL, and a batch for the probe.

    No group of them is in the pool.
    """
    nll, probe = work / "records" / "held_out", work / "records" / "probe"
    if (probe / "dataset.json").exists():
        return nll, probe
    test = open_records(prepared(work / "records" / "test", "sample", "--split", "test"))
    trained = {d.group for d in open_records(prepared(work / "records" / "pool", "sample"))}
    tokenizer = model_bundle.load(prepare.TINY).tokenizer
    by_cell = collections.defaultdict(list)
    for n in np.random.default_rng(0).permutation(len(test)).tolist():
        document = test[n]
        assert document.group not in trained, document.group
        answer = document.tokens[np.flatnonzero(document.tokens == SEP)[0] + 1 :]
        text = answer[(answer != EOS) & (answer != SEP) & ~is_image(answer, test.layout.vocab)]
        plain = text[text >= test.layout.vocab.text_start]  # without BOI and EOI
        family = results.family_of(document.task, tokenizer.decode(plain))
        if len(by_cell[family, document.group]) < PER_CELL:
            by_cell[family, document.group].append(dataclasses.replace(document, task=family))
    chosen = [document for cell in sorted(by_cell) for document in by_cell[cell]]
    notes = dict(maker="benchmarks/imax.py", split="test")
    writer.write(nll, chosen, shard_size=4096, layout=test.layout, notes=notes)
    families = sorted({family for family, _ in by_cell})
    of_probe = []
    for number, family in enumerate(families):
        groups = sorted(group for name, group in by_cell if name == family)
        share = fisher.DOCUMENTS // len(families)
        places = np.linspace(0, len(groups) - 1, share).round().astype(int)
        of_probe += [by_cell[family, groups[n]][number % 2 - 1] for n in dict.fromkeys(places)]
    writer.write(probe, of_probe, shard_size=4096, layout=test.layout, notes=notes)
    return nll, probe


# ---- training ----


def settings_of(arm: str, seed: int, steps: int, planned: int, pseudo: str = "") -> Any:
    """Return the config of an arm; `planned`: steps before they are adapted to equal tokens.

    pseudo: the folder of pseudo_records, for the arm of that name.
    """
    c = tiny.get_config()
    c.data.update(train="", validation="", batch_size=ROWS, seed=seed)
    c.mixing.update(image_window=WINDOW, image_centric=arm == "imax")
    c.train.update(
        steps=steps, seed=seed, samples=0, log_every=max(steps // POINTS, 1), eval_every=0,
        fisher_every=max(steps // POINTS, 1), checkpoint_every=max(steps // POINTS, 1),
        keep=KEPT,
    )  # fmt: skip
    if arm in STAGED:
        first, second = planned // 2, planned // 3
        name, last = STAGED[arm], steps - first - second
        c.stages = imax_tiny.stages(name, first, second, last, pseudo=pseudo)
    return c


def scored_tokens(run: config.Run, folder: pathlib.Path) -> np.ndarray:
    """Return the scored tokens up to each step."""
    batches = loader.train_batches(run, str(folder))
    stats = map(batches.stats, range(run.train.steps))
    return np.cumsum([s.scored_text + s.scored_image for s in stats])


def run_of(work: pathlib.Path, arm: str, seed: int, args: Any) -> tuple[config.Run, dict[str, Any]]:
    """Return the run of an arm with the steps that score as many tokens as its reference does."""
    few = arm.startswith("entries_")
    reference = "entries_1" if few else arm if arm == "plain" else "dmax"
    steps = args.steps // 2 if few or arm == "plain" else args.steps
    folder = records_of(work, arm, seed, args.documents)
    its = config.from_config_dict(settings_of(reference, seed, steps, steps))
    target = int(scored_tokens(its, records_of(work, reference, seed, args.documents))[-1])
    pseudo = str(pseudo_records(work, seed, args.documents)) if arm == "pseudo" else ""
    more = steps + steps // 3 + 8
    longer = config.from_config_dict(settings_of(arm, seed, more, steps, pseudo))
    scored = scored_tokens(longer, folder)
    earlier = steps // 2 + steps // 3 if arm in STAGED else 0  # of all stages but the last
    nearest = earlier + int(np.argmin(np.abs(scored[earlier:] - target)))
    share = scored[nearest] / target
    assert abs(share - 1) < 1 / steps, (arm, share)  # within the tokens of a step
    tasks = open_records(folder).meta["tasks"]
    c = settings_of(arm, seed, nearest + 1, steps, pseudo)
    c.data.train = str(folder)
    facts = dict(seed=seed, steps=nearest + 1, scored=int(scored[nearest]), target=target)
    facts |= dict(tasks=tasks)
    if pseudo:
        annotated = json.loads((pathlib.Path(pseudo) / "report.json").read_text())
        facts["pseudo"] = {name: annotated[name] for name in ("outcomes", "documents", "overlap")}
    print(arm, facts, file=sys.stderr, flush=True)
    return config.from_config_dict(c), facts


# ---- measures ----


@dataclasses.dataclass(frozen=True)
class Measures:
    """Holds what all runs are measured with: the base, held-out documents, items, programs."""

    base: model_bundle.ModelBundle
    frozen: Any
    like: Any  # abstract trainable parameters
    nll: Callable[..., jax.Array]
    gram: Callable[..., jax.Array]
    held_out: loader.BatchLoader
    probe: loader.BatchLoader
    settings: Settings
    eval_set: selection.EvalSet


def measures(work: pathlib.Path) -> Measures:
    """Load the base, the held-out documents and the items."""
    nll_records, probe_records = held_out(work)
    run = config.from_config_dict(settings_of("dmax", 0, 1, 1))
    rows = dataclasses.replace(run.data, batch_size=fisher.DOCUMENTS // 2)
    bundle = model_bundle.load(prepare.TINY)
    with jax.set_mesh(bundle.mesh):
        abstract = chameleon.abstract_model(run.model, run.vocab, run.lora)
        graph, like, like_frozen = step.split_trainable(abstract, "lora")
        frozen = export.load(prepare.TINY, like_frozen)

    def nll(trainable: Any, frozen: Any, batch: Any) -> jax.Array:
        model = nnx.merge(graph, trainable, frozen)
        hidden, _ = model.hidden_and_norms(
            batch.ids, batch.segments, batch.positions, key=None, residual_dropout=0.0
        )
        targets = jax.numpy.pad(batch.ids[:, 1:], ((0, 0), (0, 1)))
        head = model.head()
        _, values = weighted_nll(
            hidden, head, targets, jax.numpy.zeros_like(hidden[..., 0]), None,
            trains_kernel=False, chunks=num_chunks(hidden, head.kernel),
        )  # fmt: skip
        return values.nll

    settings = eval_tiny.get_config()
    for family in settings.counts:
        settings.counts[family] = ASKED if family in FAMILIES else 0
    settings = config.build(Settings, settings)
    return Measures(
        bundle, frozen, like, sharding.jit(nll), fisher.make_gram(graph, run),
        loader.eval_batches(run, str(nll_records)),
        loader.eval_batches(dataclasses.replace(run, data=rows), str(probe_records)),
        settings, selection.load_eval_set(settings),
    )  # fmt: skip


def document_nll(m: Measures, trainable: Any) -> dict[str, float]:
    """Return the mean NLL of the scored tokens of each held-out document, nats per token."""
    found = {}
    for number in range(len(m.held_out)):
        batch = m.held_out.batch(number)
        values = np.asarray(m.nll(trainable, m.frozen, sharding.shard_batch(batch, m.base.mesh)))
        for row, documents in enumerate(m.held_out.documents_of_rows(number)):
            for segment, document in enumerate(documents.tolist(), start=1):
                scored = (batch.segments[row] == segment) & (batch.weights[row] > 0)
                found[document] = float(values[row, np.flatnonzero(scored) - 1].mean())
    read = m.held_out.records.read(sorted(found))
    return {d.id: found[n] for n, d in zip(sorted(found), read, strict=True)}


def states(run: config.Run, folder: pathlib.Path, m: Measures) -> Iterator[Any]:
    """Yield the adapters of the checkpoints at POINTS of a run."""
    like = sharding.with_shardings(jax.eval_shape(lambda t: step.init_state(t, run), m.like))
    with setup.open_workdir(folder) as opened:
        store = CheckpointManager(opened, keep=KEPT, log=print)
        try:
            for point in range(1, POINTS + 1):
                yield store.restore(point * run.train.checkpoint_every, like)[0].trainable
        finally:
            store.close()


def probe_statistics(m: Measures, trainable: Any) -> dict[str, float]:
    """Return SE and rho of the gradients of the probe's documents."""
    places, numbers = fisher.places(m.probe.documents_of_rows(0))
    assert len(m.probe) == 1 and len(numbers) == len(m.probe.records)
    batch = sharding.shard_batch(m.probe.batch(0), m.base.mesh)
    places = jax.device_put(places, NamedSharding(m.base.mesh, P()))
    gram = jax.device_get(m.gram(trainable, m.frozen, batch, places))
    index = m.probe.records.index
    names = m.probe.records.names("task")
    tasks = [names[n] for n in index["task"][numbers]]
    row = fisher.statistics(gram, tasks, index["image_path"][numbers])
    return {name: row[name] for name in results.STATISTICS}


def accuracy(m: Measures, folder: pathlib.Path) -> dict[str, float]:
    """Ask the items; return whether each answer is right."""
    bundle = model_bundle.load(prepare.TINY, adapter=folder, merge=True, mesh=m.base.mesh)
    model = base.NativeModel(
        bundle, m.settings.sample, rows=m.settings.rows, name=folder.name, fingerprint="released"
    )
    records = inference.run_items(
        model, m.eval_set.items, mode=m.settings.mode, images_folder=m.eval_set.folder,
        out=folder / "asked.jsonl", progress=lambda line: None,
    )  # fmt: skip
    return {r.id: float(aggregate.record_values(r)["accuracy"]) for r in records}


def measured(work: pathlib.Path, arm: str, seed: int, m: Measures, args: Any) -> dict[str, Any]:
    """Train and measure an arm of a seed, unless it is complete."""
    folder = work / f"{arm}_{seed}"
    file = folder / "measures.json"
    if file.exists():
        return json.loads(file.read_text())
    begin = time.perf_counter()
    run, found = run_of(work, arm, seed, args)
    with contextlib.redirect_stdout(sys.stderr):
        train_program.run(run, folder)
        trained = time.perf_counter()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        batch = [row for row in map(json.loads, lines) if row["kind"] == "fisher"]
        with jax.set_mesh(m.base.mesh):
            probe = []
            for trainable in states(run, folder, m):
                probe.append(probe_statistics(m, trainable))
            nll = document_nll(m, trainable)
        right = accuracy(m, folder)
    found |= dict(
        nll=nll, accuracy=right, probe=probe,
        batch=[{name: row[name] for name in results.STATISTICS} for row in batch[:POINTS]],
        seconds=[round(trained - begin), round(time.perf_counter() - trained)],
    )  # fmt: skip
    file.write_text(json.dumps(found) + "\n")
    mean = {
        name: round(float(np.mean(list(found[name].values()))), 4) for name in ("nll", "accuracy")
    }
    print(arm, seed, mean, probe[-1], found["seconds"], file=sys.stderr, flush=True)
    return found


# ---- the program ----


def density(work: pathlib.Path, arm: str, seed: int, documents: int) -> dict[str, float]:
    """Return the images of an arm's records, and the documents and tasks of an image."""
    make = pseudo_records if arm == "pseudo" else functools.partial(records_of, arm=arm)
    stats = report.image_stats(open_records(make(work=work, seed=seed, documents=documents)))
    # Verbatim: part of the data.
    return dict(images=stats["pictures"], entries=stats["entries"], tasks=stats["tasks"])


def check_same(work: pathlib.Path, sizes: dict[str, int]) -> None:
    """Stop where the folder has runs of other sizes, which would be compared with these."""
    file = work / "sizes.json"
    if not file.exists():
        file.write_text(json.dumps(sizes) + "\n")
    if (stored := json.loads(file.read_text())) != sizes:
        raise SystemExit(f"--workdir {work} has runs of {stored}, not {sizes}; use another folder")


def collect(
    m: Measures, runs: Mapping[str, list[dict[str, Any]]], work: pathlib.Path, documents: int
) -> dict[str, dict[str, Any]]:
    """Return each arm's cells, statistics, and what it trained on."""
    read = m.held_out.records.read(range(len(m.held_out.records)))
    of_document = {d.id: (d.task, d.group) for d in read}
    of_item = {item.id: (item.family, item.group) for item in m.eval_set.items}
    return {
        arm: dict(
            nll=results.cells([of_seed["nll"] for of_seed in seeds], of_document),
            accuracy=results.cells([of_seed["accuracy"] for of_seed in seeds], of_item),
            probe=[of_seed["probe"] for of_seed in seeds],
            batch=[of_seed["batch"] for of_seed in seeds],
            runs=[{name: value for name, value in of_seed.items() if name not in MEASURED}
                  | density(work, arm, of_seed["seed"], documents) for of_seed in seeds],
        )
        for arm, seeds in runs.items()
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Train and measure all arms; print the tables, then all as one JSON object."""
    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of all files")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--steps", type=int, default=64, help="training steps of dmax")
    parser.add_argument("--documents", type=int, default=576, help="of imax and dmax")
    parser.add_argument("--arms", default=",".join(ARMS), help="names, comma-separated")
    parser.add_argument("--out", type=pathlib.Path, help="folder of results.json and the chart")
    args = parser.parse_args(argv)
    arms = args.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"--arms has {unknown[0]!r}; use names from {', '.join(ARMS)}")
    work = args.workdir.absolute()
    work.mkdir(parents=True, exist_ok=True)
    check_same(work, dict(steps=args.steps, documents=args.documents))
    cli.use_compile_cache(str(work / "compiled"))
    load, m = os.getloadavg(), measures(work)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for arm in arms:
        for seed in range(args.seeds):
            runs[arm].append(measured(work, arm, seed, m, args))
    for group in (("dmax", "imax"), tuple(f"entries_{n}" for n in results.ENTRIES)):
        counts = [seed["tasks"] for arm in group for seed in runs.get(arm, [])]
        assert all(tasks == counts[0] for tasks in counts), counts  # equal documents of each task
    found = collect(m, runs, work, args.documents)
    result = dict(
        summary=results.summary(found), arms=found, seeds=args.seeds, steps=args.steps,
        documents=args.documents, held_out=len(m.held_out.records),
        groups=m.held_out.records.meta["groups"], items=len(m.eval_set.items),
        load_average=[load, os.getloadavg()], environment=environment(devices=jax.devices()),
    )  # fmt: skip
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.json").write_text(json.dumps(result) + "\n")
        results.chart(result, args.out / "results.png")
    for title, text in results.tables(result).items():
        print(f"{title}\n\n{text}\n", file=sys.stderr)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
