"""Scores images and captions with an encoder; caches embeddings and writes pictures.jsonl.

    biomedclip:FOLDER           BiomedCLIP's published files: images and texts, BiomedCLIPScore
    efficientnet_lite0:WHEEL    ImageNet features of images only; never called BiomedCLIPScore

    records -> inputs to embed -> embeddings.jsonl (keyed by content, written batch by batch)
            -> one line per record: cosines and the rank of its own image; one per task: KID,
               diversity

After an interruption the same command embeds only what is missing and rewrites pictures.jsonl.
"""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from medmax_jax.eval.encoders.scorer import SAME, Rows, Scorer
from medmax_jax.eval.metrics import embeddings, image_sets, per_record
from medmax_jax.eval.metrics.per_record import Record
from medmax_jax.eval.stats import intervals
from medmax_jax.io import image_paths
from medmax_jax.io import journal as io_journal
from medmax_jax.io.journal import Journal, open_journal
from medmax_jax.io.storage import file_sha256
from medmax_jax.models import image_headers, images

STORE = "embeddings.jsonl"
BLANK = "blank"  # a gray image: the score of an answer that draws nothing
GAMMA, SUBSETS = 1.0, 100  # of KID on unit rows, see eval/metrics/embeddings.py:kid
SET_SIZE = 1_000  # rows of a subset, or half of the rows that exist


def score_images(
    records: Sequence[Record],
    scorers: Sequence[Scorer],
    workdir: str | Path,
    *,
    images_folder: str | Path,
    seed: int,
    resamples: int,
    progress: Callable[[str], None],
    out: str = per_record.PICTURES,
) -> list[dict[str, Any]]:
    """Write WORKDIR/out; return {task, scorer, metric, ...} of complete image sets."""
    workdir = Path(workdir)
    some = [r for r in records if r["family"] in per_record.IMAGE_METRICS and not r.get("error")]
    lines, sets = [], []
    for scorer in scorers:
        with open_journal(workdir / STORE) as journal:
            view = _EmbeddingJob(scorer, journal, workdir, Path(images_folder))
            view.embed(some, progress)
        for task in dict.fromkeys(record["task"] for record in some):
            told = {r["id"]: view.problem(r) for r in some if r["task"] == task}
            part = [r for r in some if r["id"] in told and not told[r["id"]]]
            lines += [_line(view, {"id": i}) | {"problem": why} for i, why in told.items() if why]
            if not part:
                continue
            lines += _lines(view, part)
            sets += [
                dict(task=task, scorer=scorer.name, fingerprint=scorer.fingerprint) | one
                for one in _sets(view, part, seed, resamples)
            ]
    io_journal.write_text(workdir / out, "".join(json.dumps(line) + "\n" for line in lines))
    return sets


@dataclasses.dataclass(frozen=True)
class _EmbeddingRequest:
    """Describes one input to embed. `key`: a hash of its content, "" where it cannot be read."""

    key: str
    what: Path | str
    released: bool = False


class _EmbeddingJob:
    """Holds the embeddings of one scorer for a workdir, keyed by content."""

    def __init__(self, scorer: Scorer, journal: Journal, workdir: Path, folder: Path):
        self.scorer, self._journal, self._workdir, self._folder = scorer, journal, workdir, folder
        self._rows: dict[str, np.ndarray] = {
            row["key"]: np.frombuffer(base64.b64decode(row["unit"]), np.float32)
            for row in journal.rows
            if row["scorer"] == scorer.fingerprint
        }
        self._keys: dict[Path, tuple[str, bool]] = {}
        self._problems: dict[str, str] = {}
        self.reads = scorer.name not in per_record.PICTURES_ONLY

    def embed(self, records: Sequence[Record], progress: Callable[[str], None]) -> None:
        wanted = {w.key: w for r in records if not self._missing(r) for w in self._wanted(r)}
        todo = [want for key, want in wanted.items() if key not in self._rows]
        progress(f"{self.scorer.name}: {len(todo)} pictures and texts to embed")
        for released in (False, True):
            pictures = [w for w in todo if isinstance(w.what, Path) and w.released == released]
            for part in _parts(pictures, self.scorer.batch):
                loaded = [(want, one) for want in part if (one := self._open(want)) is not None]
                if loaded:
                    rows = self.scorer.pictures([one for _, one in loaded], released=released)
                    self._put([want for want, _ in loaded], rows)
        words = [want for want in todo if isinstance(want.what, str)]
        for part in _parts(words, self.scorer.batch):
            self._put(part, self.scorer.texts([want.what for want in part]))

    def problem(self, record: Record) -> str:
        """Return why a record has no scores, or "" where it has scores."""
        if missing := self._missing(record):
            return missing
        return next(
            (self._problems[w.key] for w in self._wanted(record) if w.key in self._problems), ""
        )

    def drawn(self, record: Record) -> list[np.ndarray]:
        return [self._rows[self._key(path)] for path in self._generated(record)]

    def released(self, record: Record) -> list[np.ndarray]:
        """Return the embeddings of images that are prepared as in the MedMax release."""
        return [self._rows[self._key(path, released=True)] for path in self.paths(record)]

    def shown(self, record: Record) -> np.ndarray | None:
        """Return the image of the item: the one shown, or the reference of an image to generate."""
        path = self._reference(record)
        return None if path is None else self._rows[self._key(path)]

    def text(self, words: str) -> np.ndarray:
        return self._rows[_text_key(words)]

    def blank(self) -> np.ndarray:
        return self._rows[BLANK]

    def paths(self, record: Record) -> list[Path]:
        """Return the images to compare with the text: the image shown, or the generated ones."""
        if record["family"] == "captioning":
            return [self._resolved(self._folder, record, record["image"])]
        return self._generated(record)

    def _generated(self, record: Record) -> list[Path]:
        return [self._resolved(self._workdir, record, name) for name in record["images"]]

    def _reference(self, record: Record) -> Path | None:
        """Return the file of the item's image; None where there is none."""
        if not record["image"]:
            return None
        path = self._resolved(self._folder, record, record["image"])
        return path if path.is_file() else None

    def _resolved(self, folder: Path, record: Record, name: str) -> Path:
        label = "an image of a credentialed item" if per_record.is_credentialed(record) else ""
        return image_paths.resolve(folder, name, label=label)

    def _wanted(self, record: Record) -> Iterator[_EmbeddingRequest]:
        reference = self._reference(record)
        for path in self._generated(record) + ([reference] if reference else []):
            yield _EmbeddingRequest(self._key(path), path)
        if self.reads:
            for path in self.paths(record):
                yield _EmbeddingRequest(self._key(path, released=True), path, released=True)
            said = per_record.answer_text(record)
            for words in dict.fromkeys((said, record["text"], record["answer"], record["prompt"])):
                yield _EmbeddingRequest(_text_key(words), words)
        if record["family"] != "captioning":
            yield _EmbeddingRequest(BLANK, _blank(self._workdir))

    def _missing(self, record: Record) -> str:
        paths = self.paths(record) + self._generated(record)
        return next((f"{path}: no such file" for path in paths if not path.is_file()), "")

    def _key(self, path: Path, *, released: bool = False) -> str:
        """Return a key of the file's bytes.

        The preparation of the release has a key of its own where it resizes before it converts.
        """
        if path not in self._keys:
            self._keys[path] = file_sha256(path), _mode(path) in SAME
        digest, same = self._keys[path]
        return digest + (" released" if released and not same else "")

    def _open(self, want: _EmbeddingRequest) -> PIL.Image.Image | None:
        try:
            if not want.released:
                return images.load(want.what, max_pixels=images.MAX_PIXELS)
            with images.open_image(want.what, max_pixels=images.MAX_PIXELS) as picture:
                return picture.copy()
        except image_headers.ImageError as error:
            self._problems[want.key] = str(error)
            return None

    def _put(self, part: Sequence[_EmbeddingRequest], rows: Rows) -> None:
        lines = []
        for want, row in zip(part, np.asarray(rows, np.float32), strict=True):
            self._rows[want.key] = row
            unit = base64.b64encode(row.tobytes()).decode()
            lines.append(dict(scorer=self.scorer.fingerprint, key=want.key, unit=unit))
        self._journal.append(*lines)


def _lines(view: _EmbeddingJob, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    ranks = _ranks(view, records)
    for record in records:
        line = _line(view, record) | _cosines(view, record)
        if record["id"] in ranks:
            line |= dict(rank=ranks[record["id"]], of=len(records))
        yield line


def _line(view: _EmbeddingJob, record: Record) -> dict[str, Any]:
    return dict(id=record["id"], scorer=view.scorer.name, fingerprint=view.scorer.fingerprint)


def _cosines(view: _EmbeddingJob, record: Record) -> dict[str, Any]:
    family, shown = record["family"], view.shown(record)
    found: dict[str, Any] = {}
    if family == "captioning":
        if not view.reads:
            return {}
        said, wanted = view.text(per_record.answer_text(record)), view.text(record["answer"])
        (prepared,), released = view.released(record), view.text(record["text"])
        found = dict(image_text=[_dot(shown, said)], image_text_released=[_dot(prepared, released)])
        found["text_text"] = _dot(said, wanted)
        both = embeddings.combined_clip_score(shown[None], said[None], [wanted[None]])
        return found | {"combined": float(both[0])}
    drawn, blank = view.drawn(record), view.blank()
    if view.reads and family == "image_generation":
        asked = view.text(record["prompt"])
        prepared = view.released(record)
        found["image_text"] = [_dot(one, asked) for one in drawn]
        found["image_text_released"] = [_dot(one, asked) for one in prepared]
        found["blank_image_text"] = _dot(blank, asked)
    if shown is not None:
        found["image_image"] = [_dot(one, shown) for one in drawn]
        found["blank_image_image"] = _dot(blank, shown)
    return found


def _ranks(view: _EmbeddingJob, records: Sequence[Record]) -> dict[str, float]:
    """Return the rank of each item's own image or prompt in its task; no image ranks last."""
    if not view.reads or len(records) < 2:
        return {}
    family = records[0]["family"]
    if family == "captioning":
        said = np.stack([view.text(per_record.answer_text(record)) for record in records])
        places = embeddings.retrieval_ranks(
            said, np.stack([view.shown(record) for record in records])
        )
    elif family == "image_generation":
        drawn = [view.drawn(record) for record in records]
        first = np.stack([some[0] if some else view.blank() for some in drawn])
        asked = np.stack([view.text(record["prompt"]) for record in records])
        places = embeddings.retrieval_ranks(first, asked)
        places = np.where([bool(some) for some in drawn], places, float(len(records)))
    else:
        return {}
    return {r["id"]: float(place) for r, place in zip(records, places, strict=True)}


def _sets(
    view: _EmbeddingJob, records: Sequence[Record], seed: int, resamples: int
) -> Iterator[dict[str, Any]]:
    """Yield KID against the references, and the diversity of generated and reference images.

    KID's value and interval are over groups; `subsets_mean` and `subsets_std` are of subsets of
    `size`, as KID is published.
    """
    if records[0]["family"] == "captioning":
        return
    made, of = _grouped((record["group"], view.drawn(record)[:1]) for record in records)
    shown = ((record["group"], view.shown(record)) for record in records)
    real, known = _grouped((group, [] if row is None else [row]) for group, row in shown)
    numbers = dict(seed=seed, resamples=resamples)
    if len(set(of)) >= 2:
        found = image_sets.diversity(np.stack(made), groups=of, **numbers)
        row = dict(metric="diversity") | found.row()
        if len(set(known)) >= 2:
            theirs = image_sets.diversity(np.stack(real), groups=known, **numbers)
            ends = dict(
                references_low=intervals.finite(theirs.low),
                references_high=intervals.finite(theirs.high),
            )
            row |= dict(references=theirs.mean) | ends
        yield row
    size = min(SET_SIZE, len(made) // 2, len(real) // 2)
    if size >= 2 and min(len(set(of)), len(set(known))) >= 2:
        real, made = np.stack(real), np.stack(made)
        groups = dict(real_groups=known, made_groups=of)
        found = image_sets.kid(real, made, gamma=GAMMA, **groups, **numbers)
        kid = embeddings.kid(real, made, gamma=GAMMA, subsets=SUBSETS, size=size, seed=seed)
        subsets = dict(subsets_mean=kid.mean, subsets_std=kid.std, size=size)
        yield dict(metric="kid") | found.row() | subsets


def _grouped(
    some: Iterable[tuple[str, Sequence[np.ndarray]]],
) -> tuple[list[np.ndarray], list[str]]:
    """Return the rows and the group of each row."""
    pairs = [(row, group) for group, rows in some for row in rows]
    return [row for row, _ in pairs], [group for _, group in pairs]


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(embeddings.cosine(a[None], b[None])[0])


def _mode(path: Path) -> str:
    try:
        with images.open_image(path, max_pixels=images.MAX_PIXELS) as picture:
            return picture.mode
    except image_headers.ImageError:
        return ""  # reported when it is opened


def _blank(workdir: Path) -> Path:
    path = workdir / "blank.png"
    if not path.exists():
        PIL.Image.new("RGB", (256, 256), (128, 128, 128)).save(path)
    return path


def _text_key(words: str) -> str:
    return "text " + hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()


def _parts(some: Sequence[_EmbeddingRequest], size: int) -> Iterable[Sequence[_EmbeddingRequest]]:
    return (some[start : start + size] for start in range(0, len(some), size))
