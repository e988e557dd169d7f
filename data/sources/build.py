"""Build one of the thirteen sources as a folder of records; `data.prepare build` is its program.

    published files -> rows -> (a seeded sample) -> images to codes -> token ids -> records
                         \\-> malformed, or left out by a rule: counted by reason

The rows are read twice, once to count and draw, once to write, so that memory holds a few images
whatever the source's size. A sample has the rows whose hash of seed and id is smallest: it does not
depend on their order. The output is a rebuild and is marked as one: which rows MedMax chose is not
published. A credentialed source gets a folder of its own that only its owner may read, and neither
its paths nor its ids are written or logged.
"""

import argparse
import collections
import contextlib
import hashlib
import heapq
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from medmax_jax import arguments
from medmax_jax.config import VIEWS
from medmax_jax.data.image_tokens import dicom, document_codes
from medmax_jax.data.image_tokens.batch_encoder import PRECISIONS
from medmax_jax.data.image_tokens.document_codes import Files, key, of_document
from medmax_jax.data.image_tokens.encoder import (
    LOG_SECONDS,
    Encoder,
    ImageView,
    PrepareError,
    load_encoder,
    log,
    open_image,
)
from medmax_jax.data.image_tokens.store_reader import digest_of
from medmax_jax.data.mixture import BY_NAME, CAPTION_SHARE, CREDENTIALED, Source, compare
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Document, Layout
from medmax_jax.data.sources import captions, conversations, reports, vqa
from medmax_jax.data.sources.row import SPLITS, Plan, RejectedRow, Row
from medmax_jax.io.progress import ItemProgress
from medmax_jax.models import images
from medmax_jax.models.tokenizer import Tokenizer, TokenizerError, document_ids
from medmax_jax.storage import hub, image_paths
from medmax_jax.storage.atomic_folder import private_folder

LABEL = "not the released subset"
SHARD_SIZE = 4_096  # documents, as in the sample
CodeKey = tuple[str, int, str]
Coded = tuple[np.ndarray, str]  # codes of an image, SHA-256 of its file
CHUNK = 64  # rows read ahead, with their images
CACHE = 4_096  # images whose codes are kept: questions about one image are adjacent
MAX_BAD = 0.01  # share of malformed rows and unreadable images; more indicates a wrong folder
FIRST = 20  # bad rows named in dataset.json
READERS: dict[str, Callable[[Path, Plan], Iterator[Row | RejectedRow]]] = {
    "PMC-OA": captions.read_pmc_oa,
    "LLaVA-Med-PMC": conversations.read,
    "Quilt-1M": captions.read_quilt,
    "PubMedVision-Alignment": conversations.read,
    "LLaVA-Med-IT": conversations.read,
    "PubMedVision-IT": conversations.read,
    "Quilt-Instruct": conversations.read,
    "VQA-RAD": vqa.read_vqa_rad_of_either_form,
    "SLAKE": vqa.read_slake,
    "PathVQA": vqa.read,
    "PMC-VQA": vqa.read_pmc_vqa,
    "OmniMedVQA": vqa.read_omnimedvqa,
    "MIMIC-CXR": reports.read,
}


def build_source(
    out: str | Path,
    *,
    source: str,
    folder: str | Path,
    model_folder: str | Path,
    split: str,
    seed: int,
    sample: int | None = None,
    caption_share: float = CAPTION_SHARE,
    max_bad: float = MAX_BAD,
    burned_in: bool = False,
    codes: Sequence[Path] = (),
    precision: str = "highest",
    view: str = "",
    answer_view: str = "",
    vq: Any = None,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Write a split of `source`, as published in `folder`, as records; return dataset.json.

    `sample`: the number of documents, drawn by `seed`; None: all. `codes`: folders of `tokenize`
    with the images' codes, one of each view; without any, they are encoded here, at `precision`.
    `view`, `answer_view`: of images in prompts and in answers; empty: the model's. If more than the
    share `max_bad` of rows is malformed or of images is unreadable, the work stops before anything
    is written.
    """
    if source not in BY_NAME:
        raise PrepareError(f"source is {source!r}; use one of {', '.join(READERS)}")
    for name, share in (("caption_share", caption_share), ("max_bad", max_bad)):
        if not 0 <= share <= 1:
            raise PrepareError(f"{name} is {share}; use a share from 0 to 1")
    if sample is not None and sample < 1:
        raise PrepareError(f"sample is {sample}; use 1 or more documents")
    if not Path(folder).is_dir():
        raise PrepareError(
            f"--from is {folder}: no such folder; set it to the unpacked folder of {source}"
        )
    plan = Plan(source=source, split=split, seed=seed, caption_share=caption_share)
    work = _Work(plan, Path(folder), BY_NAME[source], max_bad, burned_in)
    encoder = load_encoder(
        model_folder, vq=vq, tokenizer=tokenizer, view=view, answer_view=answer_view
    )
    code_source = document_codes.open_code_source(codes, encoder, precision)
    if codes and work.secret:
        code_source.check_credentialed(burned_in=burned_in)
    chosen = work.survey(sample)
    notes = dict(maker="build", source=source, subset=LABEL, split=split, seed=seed, sample=sample)
    notes |= dict(licence=work.facts.licence, data_class=work.facts.data_class)
    notes |= dict(caption_share=caption_share) | hub.source_note(folder)
    documents = work.documents(chosen, encoder, code_source, notes)
    with contextlib.ExitStack() as stack:
        if work.secret:
            stack.enter_context(_private(Path(out)))
            stack.enter_context(dicom.silence())  # around the decoding threads
        meta = writer.write(
            out, documents, shard_size=SHARD_SIZE, layout=encoder.layout, notes=notes
        )
    log.info("%s. %s: %s", compare(source, meta["documents"]), LABEL[0].upper() + LABEL[1:], out)
    return meta


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `python -m data.prepare build`."""
    parser.add_argument(
        "--source", choices=tuple(READERS), required=True, help="name of the source"
    )
    parser.add_argument(
        "--from", type=Path, required=True, dest="folder", help="folder of the published files"
    )
    parser.add_argument("--out", type=arguments.folder, required=True, help="folder to write")
    parser.add_argument("--model", type=arguments.folder, required=True, help="model folder")
    parser.add_argument("--split", choices=SPLITS, default="train", help="split of the source")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="number of documents to draw; default: all"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample and the wordings")
    parser.add_argument(
        "--max_bad", type=float, default=MAX_BAD, metavar="SHARE",
        help="stop if more than this share of rows is malformed or has an unreadable image",
    )  # fmt: skip
    parser.add_argument(
        "--caption_share",
        type=float,
        default=CAPTION_SHARE,
        metavar="SHARE",
        help="share of captioning among captioning and generation: 0.843 in MedMax's chart, 0.5 in "
        "its notes",
    )
    parser.add_argument(
        "--burned_in", action="store_true",
        help="accept DICOM files whose header states that text is burned into the pixels",
    )  # fmt: skip
    add_code_flags(parser)
    parser.set_defaults(run=_run)


def add_code_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that select the source of image codes, and the view of the images."""
    parser.add_argument(
        "--codes", type=Path, nargs="+", default=[], metavar="FOLDER",
        help="folders written by `tokenize`, one of each view; default: images are encoded here",
    )  # fmt: skip
    for name, where in (("--view", "prompts"), ("--answer_view", "answers")):
        parser.add_argument(
            name, choices=VIEWS, default="",
            help=f"view of the images in {where}; default: the model's",
        )  # fmt: skip
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="highest", help="precision of the image encoder"
    )


def code_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of these flags."""
    return {n: getattr(args, n) for n in ("codes", "precision", "view", "answer_view")}


def _run(args: argparse.Namespace) -> dict[str, Any]:
    return build_source(
        args.out,
        source=args.source,
        folder=args.folder,
        model_folder=args.model,
        split=args.split,
        seed=args.seed,
        sample=args.sample,
        caption_share=args.caption_share,
        max_bad=args.max_bad,
        burned_in=args.burned_in,
        **code_options(args),
    )


class _Work:
    """One build: what is read, and what had to be left out."""

    def __init__(self, plan: Plan, folder: Path, facts: Source, max_bad: float, burned_in: bool):
        self.plan, self.folder, self.facts = plan, folder, facts
        self.max_bad, self.burned_in = max_bad, burned_in
        self.secret = facts.data_class == CREDENTIALED
        self.total = self.rows = 0  # of the split; including malformed ones
        self.bad: collections.Counter[str] = collections.Counter()
        self.excluded: collections.Counter[str] = collections.Counter()
        self.first: list[str] = []

    def survey(self, sample: int | None) -> set[str] | None:
        """Count the rows; return the ids of the sample, or None for all."""
        heap: list[tuple[int, str]] = []
        last_log = time.monotonic()
        for row in READERS[self.plan.source](self.folder, self.plan):
            if isinstance(row, RejectedRow):
                (self.excluded if row.by_rule else self.bad)[row.reason] += 1
                if not row.by_rule and len(self.first) < FIRST:
                    self.first.append(f"{row.where}: {row.reason}")
            elif row.split != self.plan.split:
                self.excluded["of another split"] += 1
            else:
                self.total += 1
                if sample is not None:
                    _keep(heap, (-_rank(self.plan.seed, row.id), row.id), sample)
            if time.monotonic() - last_log >= LOG_SECONDS:
                last_log = time.monotonic()
                log.info("%d rows read, %d malformed", self.total, self.bad.total())
        self.rows = self.total + self.bad.total()
        log.info("%d rows, %d malformed", self.rows, self.bad.total())
        log.info("%d rows excluded by rule", self.excluded.total())
        self._check()
        if not self.total:
            raise PrepareError(
                f"{self.plan.source} has no row of split {self.plan.split}; use another --split"
            )
        return None if sample is None else {row_id for _, row_id in heap}

    def documents(
        self,
        chosen: set[str] | None,
        encoder: Encoder,
        code_source: document_codes.OnlineEncoder | document_codes.StoredCodes,
        notes: dict[str, Any],
    ) -> Iterator[Document]:
        """Yield the documents, and record in `notes` what was left out."""
        cache: collections.OrderedDict[CodeKey, Coded] = collections.OrderedDict()
        count = self.total if chosen is None else len(chosen)
        clock = ItemProgress(count, "documents", log.info, every=LOG_SECONDS)
        for rows in _chunks(self._rows(chosen), CHUNK):
            codes, unreadable = self._codes(rows, encoder.layout, code_source, cache)
            for row in rows:
                try:
                    if row.image_path in unreadable:
                        self._reject(row, "image: " + unreadable[row.image_path])
                    else:
                        yield self._document(row, codes, encoder)
                except TokenizerError:
                    self._reject(row, "text: contains the name of a control token")
            clock.tick(self.plan.source, len(rows))
        notes |= dict(codes=code_source.notes())
        notes |= dict(malformed=dict(self.bad), first_malformed=self.first)
        notes["left_out"] = dict(self.excluded)

    def _rows(self, chosen: set[str] | None) -> Iterator[Row]:
        for row in READERS[self.plan.source](self.folder, self.plan):
            if isinstance(row, Row) and row.split == self.plan.split:
                if chosen is None or row.id in chosen:
                    yield row

    def _codes(
        self,
        rows: list[Row],
        layout: Layout,
        code_source: document_codes.OnlineEncoder | document_codes.StoredCodes,
        cache: collections.OrderedDict[CodeKey, Coded],
    ) -> tuple[dict[CodeKey, Coded], dict[str, str]]:
        """Return codes and SHA-256 of the rows' images, and the problems of the unreadable ones."""
        row_of = {r.image_path: r for r in rows if r.image is not None}
        shown = {key(v): v for r in rows if r.image is not None for v in _shown(r, layout)}
        cached = {k: cache[k] for k in shown if k in cache}
        views = [v for k, v in shown.items() if k not in cached]
        files = Files(
            lambda path: self._open(row_of[path]), lambda path: self._content(row_of[path])
        )
        encoded, unreadable = code_source(views, files, log_progress=False)
        fresh = {k: (code, digest_of(files.content(k[0])).hex()) for k, code in encoded.items()}
        cache.update(fresh)
        while len(cache) > CACHE:
            cache.popitem(last=False)
        return cached | fresh, {path: _reason(text, path) for path, text in unreadable.items()}

    def _content(self, row: Row) -> Path | bytes:
        if isinstance(row.image, bytes):
            return row.image
        label = f"the image of {row.id}" if self.secret else ""
        try:
            return image_paths.resolve(self.folder, row.image, label=label)
        except image_paths.ImagePathError as error:
            raise PrepareError(str(error)) from error

    def _open(self, row: Row) -> PIL.Image.Image:
        """Open the image of a row; errors contain its name in the records, not its location."""
        if isinstance(row.image, bytes):
            return images.load(row.image, max_pixels=images.MAX_PIXELS, name=row.image_path)
        return open_image(
            self._content(row), name=row.image_path, burned_in=self.burned_in,
            secret=self.secret,
        )  # fmt: skip

    def _document(self, row: Row, codes: dict[CodeKey, Coded], encoder: Encoder) -> Document:
        layout = encoder.layout
        coded = None if row.image is None else [codes[key(v)] for v in _shown(row, layout)]
        image = coded and [code for code, _ in coded]
        tokens = document_ids(encoder.tokenizer, row.text, image, layout.vocab)
        return Document(
            tokens=tokens,
            image_path=row.image_path,
            task=row.task,
            source=row.source,
            credential="yes" if self.secret else "no",
            turns=row.turns,
            group=row.group,
            id=row.id,
            image_sha256=coded[0][1] if coded else "",
            view=layout.view,
            answer_view=layout.answer_view,
        )

    def _reject(self, row: Row, reason: str) -> None:
        self.bad[reason] += 1
        if len(self.first) < FIRST:
            self.first.append(f"{row.id}: {reason}")
        self._check()

    def _check(self) -> None:
        if self.bad.total() > self.max_bad * self.rows:
            raise PrepareError(
                f"{self.bad.total()} of {self.rows} rows of {self.plan.source} are malformed, but "
                f"--max_bad allows only the share {self.max_bad}; the first: {self.first[0]}"
            )


def _shown(row: Row, layout: Layout) -> list[ImageView]:
    return of_document(ImageView(row.image_path, 0, "", False), row.text, row.turns, layout)


def _reason(text: str, path: str) -> str:
    """Return a countable reason: without the image's name, and without Pillow's details."""
    return text.removeprefix(f"{path}: ").split("(")[0].strip()


def _rank(seed: int, row_id: str) -> int:
    digest = hashlib.sha256(f"{seed}/{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _keep(heap: list[tuple[int, str]], item: tuple[int, str], size: int) -> None:
    """Keep the `size` largest items; ranks are negative, so these have the smallest hashes."""
    if len(heap) < size:
        heapq.heappush(heap, item)
    else:
        heapq.heappushpop(heap, item)


def _chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


@contextlib.contextmanager
def _private(out: Path) -> Iterator[None]:
    """Create a folder that is new or empty and whose files only their owner may read."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PrepareError(
            f"--out is {out}: not empty; credentialed records require a folder of their own"
        )
    with private_folder(out):  # for the shards too, which a library writes
        yield
