"""Asks a model every item once and keeps each answer on disk: interrupted, it goes on where it was.

    items -> by task, in batches -> answers -> records.jsonl, one line an item, flushed each batch
                                               records_images/*.png

A record holds the item, the answer, and for pictures their codes and what they look like.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval import score_image, stats, tasks
from medmax_jax import generate
from medmax_jax.config import Sample
from medmax_jax.progress import Items

Progress = Callable[[str], None]


class EvalError(ValueError):
    """An evaluation that cannot go on; the message names the file or item and the mend."""


def evaluate(
    generator: generate.Generator,
    items: Sequence[tasks.Item],
    *,
    images_folder: str | Path,
    sample: Sample,
    out: str | Path,
    progress: Progress,
    centroids: score_image.Centroids | None = None,
    rows: int = 32,
) -> list[dict[str, Any]]:
    """One record an item, in their order. `out`: JSONL that is appended to; what it has is kept.

    progress: called with a line of text after each batch, when its records are on disk; it may
    raise to stop. centroids: what pictures are held against; None leaves `looks_like` open.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    known = {record["id"]: record for record in read(out)}
    for item in items:
        _check_same(item, known.get(item.id), out)
    todo = [item for item in items if item.id not in known]
    pictures = _encoded(generator, todo, Path(images_folder), progress)
    clock = Items(len(todo), "items", progress, every=0.0)
    with open(out, "a", encoding="utf-8") as file:
        for name in tasks.TASKS:
            part = [item for item in todo if item.task == name]
            for batch in _asked(generator, part, pictures, sample, rows):
                records = [_record(generator, *one, out, centroids) for one in batch]
                lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
                file.write("".join(lines))
                file.flush()
                known |= {record["id"]: record for record in records}
                clock.tick(name, len(batch))
    return [known[item.id] for item in items]


def read(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file; a last line that a crash cut short is taken off it."""
    path = Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        with open(path, "r+b") as file:
            file.truncate(whole)
    records = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise EvalError(f"{path} line {number}: not JSON; delete that line") from error
    return records


def centroids(
    generator: generate.Generator,
    pictures: Sequence[tuple[str, str]],
    *,
    images_folder: str | Path,
) -> score_image.Centroids:
    """Of training pictures (path, modality), each through the VQGAN as generated ones are."""
    found = looks(generator, [path for path, _ in pictures], images_folder=images_folder)
    return score_image.fit(found, [kind for _, kind in pictures])


def looks(
    generator: generate.Generator, paths: Sequence[str], *, images_folder: str | Path
) -> list[np.ndarray]:
    """Features of picture files."""
    codes = generate.encode(generator, [Path(images_folder) / path for path in paths])
    return [
        _features(generator, code, np.asarray(picture))
        for code, picture in zip(codes, generate.decode(generator, codes), strict=True)
    ]


def ceiling(
    generator: generate.Generator,
    items: Sequence[tasks.Item],
    centroids: score_image.Centroids,
    *,
    images_folder: str | Path,
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    """How often real pictures of the items match their own modality: the most that drawing can."""
    real = {item.image: item for item in items if item.kind}
    found = looks(generator, list(real), images_folder=images_folder)
    interval = stats.mean_interval(
        [
            float(score_image.nearest(centroids, one) == item.kind)
            for one, item in zip(found, real.values(), strict=True)
        ],
        [item.group for item in real.values()],
        seed=seed,
        resamples=resamples,
    )
    return dict(
        n=interval.n,
        groups=interval.groups,
        value=interval.mean,
        ci_low=interval.low,
        ci_high=interval.high,
    )


def _asked(generator, items, pictures, sample: Sample, rows: int):
    """Batches of (item, answer)."""
    if not items:
        return
    task = tasks.TASKS[items[0].task]
    sample = dataclasses.replace(sample, max_gen_len=min(sample.max_gen_len, task.tokens))
    prompts = [tasks.prompt(item, pictures.get(item.image)) for item in items]
    batch = []
    answers = generate.stream(
        generator,
        prompts,
        sample,
        mode=task.mode,
        seed=sample.seed,
        names=[item.id for item in items],
        rows=rows,
    )
    for index, answer in answers:
        batch.append((items[index], answer))
        if len(batch) == rows:
            yield batch
            batch = []
    if batch:
        yield batch


def _record(generator, item: tasks.Item, answer, out: Path, centroids) -> dict[str, Any]:
    texts = [part.text for part in answer if isinstance(part, generate.Text)]
    drawn = [part for part in answer if isinstance(part, generate.Image)]
    folder = out.with_name(f"{out.stem}_images")
    names = []
    for number, part in enumerate(drawn):
        folder.mkdir(exist_ok=True)
        safe = re.sub(r"[^\w.-]+", "_", item.id)
        path = folder / f"{safe}_{number}.png"
        part.image.save(path)
        names.append(f"{folder.name}/{path.name}")
    looks_like = None
    if centroids is not None and tasks.TASKS[item.task].mode != "text":
        looks_like = ""  # nothing drawn looks like nothing
        if drawn:
            found = _features(generator, drawn[0].codes, np.asarray(drawn[0].image))
            looks_like = score_image.nearest(centroids, found)
    return _asked_of(item) | dict(
        text=" ".join(text.strip() for text in texts).strip(),
        images=names,
        codes=[part.codes.tolist() for part in drawn],
        looks_like=looks_like,
    )


def _asked_of(item: tasks.Item) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(item)))


def _check_same(item: tasks.Item, record: dict[str, Any] | None, out: Path) -> None:
    asked = _asked_of(item)
    if record is not None and {name: record.get(name) for name in asked} != asked:
        raise EvalError(
            f"{out}: item {item.id} was another question when it was answered; "
            "use a fresh workdir for other items"
        )


def _features(generator, codes: np.ndarray, picture: np.ndarray) -> np.ndarray:
    return score_image.features(codes, picture, num_codes=generator.vocab.image_codes)


def _encoded(generator, items, folder: Path, progress: Progress) -> dict[str, np.ndarray]:
    """Path -> codes of every picture that an item shows."""
    shown = [item.image for item in items if tasks.TASKS[item.task].shows_image]
    paths = list(dict.fromkeys(shown))
    codes = generate.encode(generator, [folder / path for path in paths])
    if paths:
        progress(f"encoded {len(paths)} pictures")
    return dict(zip(paths, codes, strict=True))
