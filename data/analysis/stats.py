"""Write the page of `python -m data.prepare stats D --out PAGE`: the contents of a folder.

numbers    columns of the index, all documents: tokens, lengths, packing, images
examples   a few documents, drawn by a seed, task by task: images through the VQGAN's decoder,
           texts by the tokenizer, both of --model

Memory holds the columns and the few documents that are shown. Of a credentialed folder neither
images nor texts are shown unless `show` is set, and only the owner can read the page: 0600.
"""

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Int

from medmax_jax import arguments
from medmax_jax.config import view_text
from medmax_jax.data.analysis import area_lost, check, near_duplicates, stats_plots
from medmax_jax.data.analysis.scan import images_of
from medmax_jax.data.image_tokens.encoder import Encoder, PrepareError
from medmax_jax.data.packing import report
from medmax_jax.data.packing.pack import shuffle
from medmax_jax.data.records.document import PSEUDO, Document
from medmax_jax.data.records.jsonl import to_text
from medmax_jax.data.records.reader import Records, open_records
from medmax_jax.data.records.writer import has_credentialed
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.environment import environment
from medmax_jax.io import html_page
from medmax_jax.models.tokenizer import SEP_NAME, Tokenizer
from medmax_jax.storage.atomic_folder import private_umask

MAX_CHARS = 1_500  # characters of a part of a document
BATCH = 8  # the paper's, for padding to the longest
ROWS = 4  # row lengths, each twice the previous one
FITTING = 0.999  # share of the documents that fit in the first of them
DEFINITIONS = {
    "documents": "one question with its answer, a caption, a report or a conversation",
    "share": "of the documents",
    "images": "distinct images, not their views",
    "text tokens": "tokens of the questions and answers, with separators",
    "image tokens": "codes of the images; an image has the same number of codes everywhere",
    "text per document": "mean number of text tokens",
    "all tokens": "text and image tokens",
    "text": "text tokens only",
    "tokens per row": "positions of a row of a batch, which holds several documents",
    "rows per epoch": "rows that hold each document once; fewer is faster",
    "fill": "share of the positions that hold tokens; higher is better",
    "fill of best fit over all documents": "the same, if all documents were placed at once by best "
    "fit decreasing; higher is better",
}
LOST = ("prompts", "answers", "largest")  # columns of area_lost.py
_EXAMPLES = 1 << 42  # a stream of shuffles


def write(out: Path, markup: str, *, secret: bool) -> None:
    """Write the page atomically; for a credentialed folder only its owner can read it."""
    partial = out.with_name(out.name + ".partial")
    with private_umask() if secret else contextlib.nullcontext():
        partial.write_text(markup, encoding="utf-8")
    os.replace(partial, out)


def build(
    records: Records,
    counts: dict[str, Any],
    *,
    tokenizer: Tokenizer | None,
    encoder: Encoder | None,
    manifest: Path | None,
    count: int,
    show: bool,
    seed: int,
) -> str:
    """Return the page.

    `counts`: the output of report.stats; `manifest`: facts of the embedded images.
    """
    facts = {
        "data": str(records.folder), "split": records.meta["notes"].get("split"),
        "digest": records.fingerprint[:16], "seed": seed,
    }  # fmt: skip
    body = html_page.provenance(facts | environment())
    body += html_page.stat_tiles(_headline(counts))
    body += html_page.paragraph(_description(records), note=True)
    body += html_page.section("Mixture", _mixture(records))
    body += html_page.section("Lengths", _lengths(records, counts))
    body += html_page.section("Packing", _packing(records, seed))
    # Verbatim: part of the data.
    by_image = counts["by_picture"]
    if _image_count(counts):
        body += html_page.section("Images", _images(records, by_image, manifest))
        body += _area_lost(counts)
    body += html_page.section("Examples", _examples(records, tokenizer, encoder, count, show, seed))
    return html_page.document(f"Records in {records.folder.name}", body)


def tokens_by(records: Records, label: str) -> dict[str, dict[str, int]]:
    """Return name -> documents, images, text and image tokens; names are sources or tasks."""
    group, names = records.index[label], records.names(label)
    length, image = records.index["length"], records.index["image"]
    image_of = records.index["image_path"]
    pairs = np.unique(group.astype(np.int64) << 32 | image_of)
    pairs = pairs[(pairs & 0xFFFFFFFF) < 1 << 31]  # -1: none
    n = len(names)
    table = dict(
        documents=np.bincount(group, minlength=n),
        images=np.bincount(pairs >> 32, minlength=n),
        text=np.bincount(group, length, n) - np.bincount(group, image, n),
        image=np.bincount(group, image, n),
    )
    return {
        name: {key: int(column[i]) for key, column in table.items()} for i, name in enumerate(names)
    }


def row_lengths(lengths: Int[np.ndarray, "n"]) -> list[int]:
    """Return powers of two, starting from the first that holds nearly every document."""
    longest = float(np.quantile(lengths, FITTING, method="inverted_cdf"))
    first = 1 << int(np.ceil(np.log2(max(longest, 2.0))))
    return [first << k for k in range(ROWS)]


def _headline(counts: dict[str, Any]) -> list[tuple[object, str]]:
    tiles = [(_short_count(counts[n]), n) for n in ("documents", "tokens")]
    tiles += [(_short_count(_image_count(counts)), "images")]
    tiles += [(_short_count(counts["groups"]), "groups (patients, volumes, articles)")]
    share = counts["image_tokens"] / counts["tokens"]
    return [*tiles, (f"{share:.0%}", "of the tokens are image tokens")]


def _image_count(counts: dict[str, Any]) -> int:
    # Verbatim: part of the data.
    return counts["by_picture"]["pictures"]


def _description(records: Records) -> str:
    credentials = ", ".join(f"{name} ({n:,})" for name, n in records.meta["credentials"].items())
    layout = records.layout
    pseudo = records.meta.get(PSEUDO, 0)
    generated = f"A model generated the answers of {pseudo:,} documents. " if pseudo else ""
    return (
        f"{generated}Credentials of the documents: {credentials}. "
        f"{layout.codes_per_image:,} codes per image, vocabulary of {layout.vocab.size:,} tokens. "
        "The digest is the SHA-256 of the documents."
    )


def _mixture(records: Records) -> str:
    by = {label: tokens_by(records, label) for label in ("source", "task")}
    plots = [{n: (row["text"], row["image"]) for n, row in by[k].items()} for k in by]
    body = html_page.chart(stats_plots.mixture(*plots), "Text tokens and image tokens")
    head = ["documents", "share", "images", "text tokens", "image tokens", "text per document"]
    for label, table in by.items():
        rows = [
            (
                name, f"{row['documents']:,}", f"{row['documents'] / len(records):.1%}",
                f"{row['images']:,}", f"{row['text']:,}", f"{row['image']:,}",
                f"{row['text'] / max(row['documents'], 1):,.0f}",
            )
            for name, row in sorted(table.items(), key=lambda item: -item[1]["documents"])
        ]  # fmt: skip
        body += html_page.table([label, *head], rows, definitions=DEFINITIONS)
    return body


def _lengths(records: Records, counts: dict[str, Any]) -> str:
    length = np.asarray(records.index["length"])
    text = length - records.index["image"]
    task, names = records.index["task"], records.names("task")
    body = html_page.chart(
        stats_plots.lengths(length, text, task, names), "Documents by length, stacked by task"
    )
    head = ["", *counts["lengths"]]
    quantiles = [f"{int(np.percentile(text, float(q[:-1]))):,}" for q in counts["lengths"]]
    rows = [("all tokens", *(f"{n:,}" for n in counts["lengths"].values())), ("text", *quantiles)]
    return body + html_page.table(
        head,
        rows,
        caption="Quantiles of the length of documents, in tokens",
        definitions=DEFINITIONS,
    )


def _packing(records: Records, seed: int) -> str:
    length = np.asarray(records.index["length"])
    sizes = row_lengths(length)
    kept = length[length <= sizes[0]]
    fills = report.packing_efficiencies(kept, sizes, int(kept.max()), seed)
    padded = report.padding_efficiency(kept, batch_size=BATCH, seed=seed)
    body = html_page.chart(
        stats_plots.packing(fills, padded["fill"]), "Tokens divided by positions, by row length"
    )
    excluded = len(length) - len(kept)
    note = f"Epoch 0 of seed {seed}, each document once. "
    if excluded:
        note += f"{excluded:,} documents of more than {sizes[0]:,} tokens are excluded. "
    note += f"Padding gives {padded['shapes']:,} shapes, each of which is compiled."
    rows = [
        (f"{n:,}", f"{row['rows']:,}", f"{row['fill']:.1%}", f"{row['offline']:.1%}")
        for n, row in fills.items()
    ]
    head = ["tokens per row", "rows per epoch", "fill", "fill of best fit over all documents"]
    return (
        body
        + html_page.paragraph(note, note=True)
        + html_page.table(head, rows, definitions=DEFINITIONS)
    )


def _images(records: Records, by_image: dict[str, Any], manifest: Path | None) -> str:
    if manifest is not None and records.meta["notes"].get("maker") == "sample":
        counts, title = _modalities(records, manifest), "modality"
        note = "Modalities are those of the sample's manifest. "
    else:
        counts = {n: row["images"] for n, row in tokens_by(records, "source").items()}
        title = "source"
        note = "Records do not contain the modality of an image; images are counted by source. "
    body = html_page.chart(
        stats_plots.images(counts, title, by_image["of_entries"]), f"Images by {title}"
    )
    note += f"An image has {by_image['entries']:g} documents and {by_image['tasks']:g} tasks on "
    # Verbatim: part of the data.
    without = by_image["without_picture"]
    note += f"average; {without:,} documents have no image."
    per_image = by_image["by_source"] | {
        # Verbatim: part of the data.
        "all": by_image | dict(images=by_image["pictures"]),
        "IMAX (published)": dict(images="", **report.IMAX_PER_IMAGE),
    }
    head = ["source", "images", "documents per image", "tasks per image"]
    rows = [(name, row["images"], row["entries"], row["tasks"]) for name, row in per_image.items()]
    table = html_page.table(head, rows, definitions=DEFINITIONS)
    return body + html_page.paragraph(note, note=True) + table


def _area_lost(counts: dict[str, Any]) -> str:
    """Return the section about what the views do not show; "" if it was not measured."""
    tables = [(n, t) for n, t in counts.items() if n.startswith("area_lost_by_")]
    if not tables:
        return ""
    body = html_page.paragraph(
        f"{counts['views']}. Shares of the area of images that are not shown, as means over the "
        f"images in prompts and in answers, and the largest; {counts['unreadable_images']:,} files "
        "could not be read.",
        note=True,
    )
    for name, rows in tables:
        cells = [
            (label, f"{row['images']:,}", *(_percent(row[n]) for n in LOST))
            for label, row in rows.items()
        ]
        body += html_page.table([name.removeprefix("area_lost_by_"), "images", *LOST], cells)
    return html_page.section("Area lost", body)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _modalities(records: Records, manifest: Path) -> dict[str, int]:
    modality_of = {row["file"]: row["modality"] for row in read_manifest(manifest)}
    numbers, first = np.unique(records.index["image_path"], return_index=True)
    counts: dict[str, int] = {}
    for document in records.read(first[numbers >= 0]):
        modality = modality_of.get(document.image_path, "not in the manifest")
        counts[modality] = counts.get(modality, 0) + 1
    return counts


def _examples(
    records: Records,
    tokenizer: Tokenizer | None,
    encoder: Encoder | None,
    count: int,
    show: bool,
    seed: int,
) -> str:
    if has_credentialed(records) and not show:
        return html_page.paragraph(
            "The records are credentialed, so images and text are not shown. Use "
            "--show_credentialed to show them on a page that only you can read.",
        )
    examples = records.read(_example_numbers(records, count, seed))
    body = html_page.paragraph(
        f"{len(examples)} documents drawn with seed {seed}, from each task in turn. Images are "
        "decoded from the codes that the model reads.",
        note=True,
    )
    for value, what in ((tokenizer, "Text is"), (encoder, "Images are")):
        if value is None:
            body += html_page.paragraph(
                f"{what} not shown; set --model to the model folder that made these records."
            )
    return body + "".join(_cards(records, examples, tokenizer, encoder))


def _example_numbers(records: Records, count: int, seed: int) -> list[int]:
    """Return documents of each task in turn, shuffled by the seed."""
    task = np.asarray(records.index["task"])
    order = shuffle(len(records), seed, 0, _EXAMPLES)
    by_task = [order[task[order] == n][:count] for n in np.unique(task)]
    turns = [numbers[k] for k in range(count) for numbers in by_task if k < len(numbers)]
    return [int(n) for n in turns[:count]]


def _cards(
    records: Records,
    documents: list[Document],
    tokenizer: Tokenizer | None,
    encoder: Encoder | None,
) -> Iterator[str]:
    codes = [images_of(document, records) for document in documents]
    flat = [image for images in codes for image in images]
    pixels = iter(
        near_duplicates.decode_codes(encoder, flat) if encoder is not None else [None] * len(flat)
    )
    for document, images in zip(documents, codes, strict=True):
        decoded = [p for p in (next(pixels) for _ in images) if p is not None]
        name = document.image_path or "an image"
        figures = [(html_page.png(PIL.Image.fromarray(p)), name) for p in decoded]
        facts = _facts(records, document, tokenizer)
        yield html_page.columns(html_page.figures(figures), facts) if figures else facts


def _facts(records: Records, document: Document, tokenizer: Tokenizer | None) -> str:
    rows = [("task", document.task), ("source", document.source), ("id", document.id)]
    if document.pseudo:
        scores = ", ".join(f"{name} {value:.3g}" for name, value in document.scores.items())
        rows += [("generated by", document.generator[:16]), ("scores", scores or "none")]
    if tokenizer is not None:
        parts = to_text(document, records.layout, tokenizer).split(SEP_NAME)
        names = ["text"] if len(parts) == 1 else ["question", "answer"] * len(parts)
        rows += [(name, _short(part)) for name, part in zip(names, parts, strict=False)]
    return html_page.table(["", f"{len(document.tokens):,} tokens"], rows)


def _short_count(number: int) -> str:
    return f"{number:,}" if number < 10_000_000 else f"{number / 1e6:,.0f} M"


def _short(text: str) -> str:
    excess = len(text) - MAX_CHARS
    return text if excess <= 0 else f"{text[:MAX_CHARS]} … ({excess:,} more characters)"


# ---- The command line of `python -m data.prepare stats`: counts, and with --out a page ----

EXAMPLES = 12


def add(commands: Any, tiny: Path, manifest: Path) -> argparse.ArgumentParser:
    """Add `stats`. `tiny`: model folder used if it made the records; `manifest`: image facts."""
    parser = commands.add_parser(
        "stats", help="report the contents of a folder of records, optionally as an HTML page"
    )
    parser.add_argument(
        "--seq_len", type=int, default=0, help="row length; 0: length of the longest document"
    )
    parser.add_argument("--out", type=Path, help="HTML page to write, with plots and examples")
    parser.add_argument("--model", type=arguments.folder, help="model folder that made the records")
    parser.add_argument(
        "--examples", type=int, default=EXAMPLES, help="number of documents shown on the page"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the examples and of packing")
    parser.add_argument(
        "--images", type=Path, help="folder of the images: also report what their views do not show"
    )
    parser.add_argument(
        "--show_credentialed", action="store_true",
        help="show images and text of a credentialed folder, on a page that only you can read",
    )  # fmt: skip
    parser.set_defaults(run=_run, tiny=tiny, manifest=manifest)
    return parser


def _run(args: argparse.Namespace) -> dict[str, Any]:
    records = open_records(args.folder)
    if args.examples < 0:
        raise PrepareError(f"--examples is {args.examples}; it must be 0 or more")
    counts = report.stats(args.folder, seq_len=args.seq_len or records.meta["longest"])
    counts["views"] = view_text(records.layout)
    counts |= _measure_area_lost(records, args.images, args.manifest)
    if args.out is None:
        return counts
    if not args.out.parent.is_dir():
        raise PrepareError(f"--out {args.out}: no such folder; create it first")
    secret = has_credentialed(records)
    readable = args.examples > 0 and (not secret or args.show_credentialed)
    decodable = readable and check.encoder_matches(records, args.model, args.tiny)
    markup = build(
        records,
        counts,
        tokenizer=check.resolve_tokenizer(records, args.model, args.tiny) if readable else None,
        encoder=check.resolve_encoder(records, args.model or args.tiny) if decodable else None,
        manifest=args.manifest,
        count=args.examples,
        show=args.show_credentialed,
        seed=args.seed,
    )
    write(args.out, markup, secret=secret)
    return counts | dict(page=str(args.out))


def _measure_area_lost(records: Records, folder: Path | None, manifest: Path) -> dict[str, Any]:
    """Return the tables of area_lost.py; {} without a folder, except for the embedded sample."""
    sample = manifest.parent
    if folder is None and records.meta["notes"].get("maker") == "sample":
        folder = sample
    if folder is None:
        return {}
    if not folder.is_dir():
        raise PrepareError(f"--images {folder}: no such folder; set it to that of the images")
    rows = read_manifest(manifest) if folder.resolve() == sample.resolve() else []
    return area_lost.area_lost(records, folder, {row["file"]: row["modality"] for row in rows})
