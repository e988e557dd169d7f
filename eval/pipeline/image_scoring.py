"""Scores images and captions with an encoder; caches embeddings and writes image_scores.jsonl.

    biomedclip:FOLDER           BiomedCLIP's published files: images and texts, BiomedCLIPScore
    efficientnet_lite0:WHEEL    ImageNet features of images only; never called BiomedCLIPScore

    records -> inputs to embed -> embeddings.jsonl (keyed by content, written batch by batch)
            -> one line per record: cosines and the rank of its own image; one per task: KID,
               diversity

After an interruption the same command embeds only what is missing and rewrites image_scores.jsonl.
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
from medmax_jax.eval.records import EvalRecord, is_credentialed
from medmax_jax.eval.stats import intervals
from medmax_jax.io import journal as io_journal
from medmax_jax.io.journal import Journal, open_journal
from medmax_jax.io.progress import report_waiting
from medmax_jax.models import image_headers, images
from medmax_jax.storage import image_paths
from medmax_jax.storage.folder import file_sha256

STORE = "embeddings.jsonl"
BLANK = "blank"  # a gray image: the score of an answer that draws nothing
GAMMA, SUBSETS = 1.0, 100  # of KID on unit rows, see eval/metrics/embeddings.py:kid
SET_SIZE = 1_000  # rows of a subset, or half of the rows that exist


def score_images(
    records: Sequence[EvalRecord],
    scorers: Sequence[Scorer],
    workdir: str | Path,
    *,
    images_folder: str | Path,
    resampling: intervals.Resampling,
    progress: Callable[[str], None],
    out: str = per_record.IMAGE_SCORES,
) -> list[dict[str, Any]]:
    """Write WORKDIR/out; return {task, scorer, metric, ...} of complete image sets."""
    workdir = Path(workdir)
    families = per_record.IMAGE_METRICS
    scored = [r for r in records if r.family in families and not r.error]
    lines, sets = [], []
    for scorer in scorers:
        with open_journal(workdir / STORE) as journal:
            job = _EmbeddingJob(scorer, journal, workdir, Path(images_folder))
            job.embed(scored, progress)
        for task in dict.fromkeys(record.task for record in scored):
            problems = {r.id: job.problem(r) for r in scored if r.task == task}
            embeddable = [r for r in scored if r.id in problems and not problems[r.id]]
            lines += [
                _line(job, name) | {"problem": problem}
                for name, problem in problems.items()
                if problem
            ]
            if not embeddable:
                continue
            lines += _lines(job, embeddable)
            sets += [
                dict(task=task, scorer=scorer.name, fingerprint=scorer.fingerprint) | row
                for row in _sets(job, embeddable, resampling)
            ]
    io_journal.write_text(workdir / out, "".join(json.dumps(line) + "\n" for line in lines))
    return sets


@dataclasses.dataclass(frozen=True)
class _EmbeddingRequest:
    """Describes one input to embed. `key`: a hash of its content, "" where it cannot be read."""

    key: str
    content: Path | str
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
        self.embeds_text = scorer.name not in per_record.IMAGE_ONLY_SCORERS

    def embed(self, records: Sequence[EvalRecord], progress: Callable[[str], None]) -> None:
        requests = {w.key: w for r in records if not self._missing(r) for w in self._requests(r)}
        todo = [request for key, request in requests.items() if key not in self._rows]
        progress(f"{self.scorer.name}: {len(todo)} images and texts to embed")
        image_requests = [request for request in todo if isinstance(request.content, Path)]
        for released in (False, True):
            same = [request for request in image_requests if request.released == released]
            for part in _parts(same, self.scorer.batch):
                opened = {request: self._open(request) for request in part}
                loaded = {request: image for request, image in opened.items() if image is not None}
                if loaded:
                    with report_waiting(f"{self.scorer.name}: embedding images", progress):
                        rows = self.scorer.embed_images(list(loaded.values()), released=released)
                    self._put(list(loaded), rows)
        text_requests = [request for request in todo if isinstance(request.content, str)]
        for part in _parts(text_requests, self.scorer.batch):
            self._put(part, self.scorer.embed_texts([request.content for request in part]))

    def problem(self, record: EvalRecord) -> str:
        """Return why a record has no scores, or "" where it has scores."""
        if missing := self._missing(record):
            return missing
        return next(
            (self._problems[w.key] for w in self._requests(record) if w.key in self._problems), ""
        )

    def generated(self, record: EvalRecord) -> list[np.ndarray]:
        return [self._rows[self._key(path)] for path in self._generated(record)]

    def released(self, record: EvalRecord) -> list[np.ndarray]:
        """Return the embeddings of images that are prepared as in the MedMax release."""
        return [self._rows[self._key(path, released=True)] for path in self.paths(record)]

    def reference(self, record: EvalRecord) -> np.ndarray | None:
        """Return the image of the item: the one shown, or the reference of an image to generate."""
        path = self._reference(record)
        return None if path is None else self._rows[self._key(path)]

    def text(self, text: str) -> np.ndarray:
        return self._rows[_text_key(text)]

    def blank(self) -> np.ndarray:
        return self._rows[BLANK]

    def paths(self, record: EvalRecord) -> list[Path]:
        """Return the images to compare with the text: the image shown, or the generated ones."""
        if record.family == "captioning":
            return [self._resolved(self._folder, record, record.image)]
        return self._generated(record)

    def _generated(self, record: EvalRecord) -> list[Path]:
        return [self._resolved(self._workdir, record, name) for name in record.generated]

    def _reference(self, record: EvalRecord) -> Path | None:
        """Return the file of the item's image; None where there is none."""
        if not record.image:
            return None
        path = self._resolved(self._folder, record, record.image)
        return path if path.is_file() else None

    def _resolved(self, folder: Path, record: EvalRecord, name: str) -> Path:
        label = "an image of a credentialed item" if is_credentialed(record) else ""
        return image_paths.resolve(folder, name, label=label)

    def _requests(self, record: EvalRecord) -> Iterator[_EmbeddingRequest]:
        reference = self._reference(record)
        for path in self._generated(record) + ([reference] if reference else []):
            yield _EmbeddingRequest(self._key(path), path)
        if self.embeds_text:
            for path in self.paths(record):
                yield _EmbeddingRequest(self._key(path, released=True), path, released=True)
            answer = per_record.answer_text(record)
            for text in dict.fromkeys((answer, record.text, record.answer, record.prompt)):
                yield _EmbeddingRequest(_text_key(text), text)
        if record.family != "captioning":
            yield _EmbeddingRequest(BLANK, _blank(self._workdir))

    def _missing(self, record: EvalRecord) -> str:
        paths = self.paths(record) + self._generated(record)
        return next((f"{path} does not exist" for path in paths if not path.is_file()), "")

    def _key(self, path: Path, *, released: bool = False) -> str:
        """Return a key of the file's bytes.

        The preparation of the release has a key of its own where it resizes before it converts.
        """
        if path not in self._keys:
            self._keys[path] = file_sha256(path), _mode(path) in SAME
        digest, same = self._keys[path]
        return digest + (" released" if released and not same else "")

    def _open(self, request: _EmbeddingRequest) -> PIL.Image.Image | None:
        try:
            if not request.released:
                return images.load(request.content, max_pixels=images.MAX_PIXELS)
            with images.open_image(request.content, max_pixels=images.MAX_PIXELS) as image:
                return image.copy()
        except image_headers.ImageError as error:
            self._problems[request.key] = str(error)
            return None

    def _put(self, part: Sequence[_EmbeddingRequest], rows: Rows) -> None:
        lines = []
        for request, row in zip(part, np.asarray(rows, np.float32), strict=True):
            self._rows[request.key] = row
            unit = base64.b64encode(row.tobytes()).decode()
            lines.append(dict(scorer=self.scorer.fingerprint, key=request.key, unit=unit))
        self._journal.append(*lines)


def _lines(job: _EmbeddingJob, records: Sequence[EvalRecord]) -> Iterator[dict[str, Any]]:
    ranks = _ranks(job, records)
    for record in records:
        line = _line(job, record.id) | _cosines(job, record)
        if record.id in ranks:
            line |= dict(rank=ranks[record.id], of=len(records))
        yield line


def _line(job: _EmbeddingJob, name: str) -> dict[str, Any]:
    return dict(id=name, scorer=job.scorer.name, fingerprint=job.scorer.fingerprint)


def _cosines(job: _EmbeddingJob, record: EvalRecord) -> dict[str, Any]:
    family, reference = record.family, job.reference(record)
    cosines: dict[str, Any] = {}
    if family == "captioning":
        if not job.embeds_text:
            return {}
        answer, expected = job.text(per_record.answer_text(record)), job.text(record.answer)
        (prepared,), released = job.released(record), job.text(record.text)
        (combined,) = embeddings.combined_clip_score(
            reference[None], answer[None], [expected[None]]
        )
        return dict(
            image_text=[_dot(reference, answer)],
            image_text_released=[_dot(prepared, released)],
            text_text=_dot(answer, expected),
            combined=float(combined),
        )
    generated, blank = job.generated(record), job.blank()
    if job.embeds_text and family == "image_generation":
        prompt = job.text(record.prompt)
        prepared = job.released(record)
        cosines["image_text"] = [_dot(vector, prompt) for vector in generated]
        cosines["image_text_released"] = [_dot(vector, prompt) for vector in prepared]
        cosines["blank_image_text"] = _dot(blank, prompt)
    if reference is not None:
        cosines["image_image"] = [_dot(vector, reference) for vector in generated]
        cosines["blank_image_image"] = _dot(blank, reference)
    return cosines


def _ranks(job: _EmbeddingJob, records: Sequence[EvalRecord]) -> dict[str, float]:
    """Return the rank of each item's own image or prompt in its task; no image ranks last."""
    if not job.embeds_text or len(records) < 2:
        return {}
    family = records[0].family
    if family == "captioning":
        answers = np.stack([job.text(per_record.answer_text(record)) for record in records])
        ranks = embeddings.retrieval_ranks(
            answers, np.stack([job.reference(record) for record in records])
        )
    elif family == "image_generation":
        generated = [job.generated(record) for record in records]
        first = np.stack([vectors[0] if vectors else job.blank() for vectors in generated])
        prompts = np.stack([job.text(record.prompt) for record in records])
        ranks = embeddings.retrieval_ranks(first, prompts)
        ranks = np.where([bool(vectors) for vectors in generated], ranks, float(len(records)))
    else:
        return {}
    return {r.id: float(rank) for r, rank in zip(records, ranks, strict=True)}


def _sets(
    job: _EmbeddingJob, records: Sequence[EvalRecord], resampling: intervals.Resampling
) -> Iterator[dict[str, Any]]:
    """Yield KID against the references, and the diversity of generated and reference images.

    KID's value and interval are over groups; `subsets_mean` and `subsets_std` are of subsets of
    `size`, as KID is published.
    """
    if records[0].family == "captioning":
        return
    first = ((record.group, job.generated(record)[:1]) for record in records)
    generated, generated_groups = _grouped(first)
    references = ((record.group, job.reference(record)) for record in records)
    real, real_groups = _grouped((group, [] if row is None else [row]) for group, row in references)
    if len(set(generated_groups)) >= 2:
        interval = image_sets.diversity(
            np.stack(generated), groups=generated_groups, resampling=resampling
        )
        row = dict(metric="diversity") | interval.row()
        if len(set(real_groups)) >= 2:
            of_references = image_sets.diversity(
                np.stack(real), groups=real_groups, resampling=resampling
            )
            ends = dict(
                references_low=intervals.finite(of_references.low),
                references_high=intervals.finite(of_references.high),
            )
            row |= dict(references=of_references.mean) | ends
        yield row
    size = min(SET_SIZE, len(generated) // 2, len(real) // 2)
    if size >= 2 and min(len(set(generated_groups)), len(set(real_groups))) >= 2:
        real, generated = np.stack(real), np.stack(generated)
        interval = image_sets.kid(
            real,
            generated,
            real_groups=real_groups,
            generated_groups=generated_groups,
            gamma=GAMMA,
            resampling=resampling,
        )
        kid = embeddings.kid(
            real, generated, gamma=GAMMA, subsets=SUBSETS, size=size, seed=resampling.seed
        )
        subsets = dict(subsets_mean=kid.mean, subsets_std=kid.std, size=size)
        yield dict(metric="kid") | interval.row() | subsets


def _grouped(
    vectors_by_group: Iterable[tuple[str, Sequence[np.ndarray]]],
) -> tuple[list[np.ndarray], list[str]]:
    """Return the rows and the group of each row."""
    pairs = [(row, group) for group, rows in vectors_by_group for row in rows]
    return [row for row, _ in pairs], [group for _, group in pairs]


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(embeddings.cosine(a[None], b[None])[0])


def _mode(path: Path) -> str:
    try:
        with images.open_image(path, max_pixels=images.MAX_PIXELS) as image:
            return image.mode
    except image_headers.ImageError:
        return ""  # reported when it is opened


def _blank(workdir: Path) -> Path:
    path = workdir / "blank.png"
    if not path.exists():
        PIL.Image.new("RGB", (256, 256), (128, 128, 128)).save(path)
    return path


def _text_key(text: str) -> str:
    return "text " + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _parts(
    requests: Sequence[_EmbeddingRequest], size: int
) -> Iterable[Sequence[_EmbeddingRequest]]:
    return (requests[start : start + size] for start in range(0, len(requests), size))
