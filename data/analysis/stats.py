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

from medmax_jax.data.analysis import check, near_duplicates, stats_plots
from medmax_jax.data.analysis.scan import images_of
from medmax_jax.data.image_tokens.encoder import Encoder, PrepareError
from medmax_jax.data.packing import report
from medmax_jax.data.packing.pack import shuffle
from medmax_jax.data.records.document import Document
from medmax_jax.data.records.jsonl import to_text
from medmax_jax.data.records.reader import Records, open_records
from medmax_jax.data.records.writer import has_credentialed
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.io import html_page
from medmax_jax.io.atomic_folder import private_umask
from medmax_jax.models.tokenizer import SEP_NAME, Tokenizer

LONGEST = 1_500  # characters of a part of a document
BATCH = 8  # the paper's, for padding to the longest
ROWS = 4  # row lengths, each twice the previous one
WHOLE = 0.999  # share of the documents that fit in the first of them
_EXAMPLES = 1 << 42  # a stream of shuffles


def write(out: Path, markup: str, *, secret: bool) -> None:
    """Write the page atomically; for a credentialed folder only its owner can read it."""
    partial = out.with_name(out.name + ".partial")
    with private_umask() if secret else contextlib.nullcontext():
        partial.write_text(markup, encoding="utf-8")
    os.replace(partial, out)


def build(
    found: Records,
    told: dict[str, Any],
    *,
    tokenizer: Tokenizer | None,
    encoder: Encoder | None,
    manifest: Path | None,
    count: int,
    show: bool,
    seed: int,
) -> str:
    """Return the page. `told`: the output of report.stats; `manifest`: facts of embedded images."""
    body = html_page.stat_tiles(_headline(found, told)) + html_page.paragraph(
        _about(found), note=True
    )
    body += html_page.section("The mixture", _mixture(found))
    body += html_page.section("Lengths", _lengths(found, told))
    body += html_page.section("Packing", _packing(found, seed))
    if told["by_picture"]["pictures"]:
        body += html_page.section("Pictures", _pictures(found, told["by_picture"], manifest))
    body += html_page.section("Examples", _examples(found, tokenizer, encoder, count, show, seed))
    return html_page.document(f"Records in {found.folder.name}", body)


def tokens_by(found: Records, label: str) -> dict[str, dict[str, int]]:
    """Return name -> documents, images, text and image tokens; names are sources or tasks."""
    group, names = found.index[label], found.names(label)
    length, image = found.index["length"], found.index["image"]
    picture = found.index["picture"]
    pairs = np.unique(group.astype(np.int64) << 32 | picture)
    pairs = pairs[(pairs & 0xFFFFFFFF) < 1 << 31]  # -1: none
    n = len(names)
    table = dict(
        documents=np.bincount(group, minlength=n),
        pictures=np.bincount(pairs >> 32, minlength=n),
        text=np.bincount(group, length, n) - np.bincount(group, image, n),
        image=np.bincount(group, image, n),
    )
    return {
        name: {key: int(column[i]) for key, column in table.items()} for i, name in enumerate(names)
    }


def row_lengths(lengths: Int[np.ndarray, "n"]) -> list[int]:
    """Return powers of two, starting from the first that holds nearly every document."""
    most = float(np.quantile(lengths, WHOLE, method="inverted_cdf"))
    first = 1 << int(np.ceil(np.log2(max(most, 2.0))))
    return [first << k for k in range(ROWS)]


def _headline(found: Records, told: dict[str, Any]) -> list[tuple[object, str]]:
    pictures = told["by_picture"]["pictures"]
    numbers = [(_short_count(told[n]), n) for n in ("documents", "tokens")]
    numbers += [(_short_count(pictures), "pictures")]
    numbers += [(_short_count(told["groups"]), "patients, volumes or such")]
    share = told["image_tokens"] / told["tokens"]
    return [*numbers, (f"{share:.0%}", "of the tokens are of images")]


def _about(found: Records) -> str:
    credentials = ", ".join(f"{n:,} {name}" for name, n in found.meta["credentials"].items())
    layout = found.layout
    return (
        f"Credentialed: {credentials}. {layout.codes_per_image:,} codes an image, vocabulary of "
        f"{layout.vocab.size:,}. SHA-256 of the documents {found.fingerprint[:16]}."
    )


def _mixture(found: Records) -> str:
    by = {label: tokens_by(found, label) for label in ("source", "task")}
    plots = [{n: (row["text"], row["image"]) for n, row in by[k].items()} for k in by]
    body = html_page.figure(stats_plots.mixture(*plots), "Tokens of text and of images")
    head = ["documents", "share", "pictures", "text tokens", "image tokens", "text a document"]
    for label, table in by.items():
        rows = [
            (
                name, f"{row['documents']:,}", f"{row['documents'] / len(found):.1%}",
                f"{row['pictures']:,}", f"{row['text']:,}", f"{row['image']:,}",
                f"{row['text'] / max(row['documents'], 1):,.0f}",
            )
            for name, row in sorted(table.items(), key=lambda item: -item[1]["documents"])
        ]  # fmt: skip
        body += html_page.table([label, *head], rows)
    return body


def _lengths(found: Records, told: dict[str, Any]) -> str:
    length = np.asarray(found.index["length"])
    text = length - found.index["image"]
    task, names = found.index["task"], found.names("task")
    body = html_page.figure(
        stats_plots.lengths(length, text, task, names), "Documents by their tokens, task on task"
    )
    head = ["", *told["lengths"]]
    quantiles = [f"{int(np.percentile(text, float(q[:-1]))):,}" for q in told["lengths"]]
    rows = [("all tokens", *(f"{n:,}" for n in told["lengths"].values())), ("text", *quantiles)]
    return body + html_page.table(
        head, rows, caption="Shares of the documents that are at most so long"
    )


def _packing(found: Records, seed: int) -> str:
    length = np.asarray(found.index["length"])
    sizes = row_lengths(length)
    kept = length[length <= sizes[0]]
    fills = report.packing_efficiencies(kept, sizes, int(kept.max()), seed)
    padded = report.padding_efficiency(kept, batch_size=BATCH, seed=seed)
    body = html_page.figure(
        stats_plots.packing(fills, padded["fill"]), "Tokens over places of rows"
    )
    left = len(length) - len(kept)
    said = f"Epoch 0 of seed {seed}, each document once. "
    said += f"{left:,} documents of more than {sizes[0]:,} tokens are left out of it. " * bool(left)
    said += f"Padding makes {padded['shapes']:,} shapes, each a compilation."
    rows = [
        (f"{n:,}", f"{row['rows']:,}", f"{row['fill']:.1%}", f"{row['offline']:.1%}")
        for n, row in fills.items()
    ]
    head = ["tokens a row", "rows an epoch", "full", "best fit over all at once"]
    return body + html_page.paragraph(said, note=True) + html_page.table(head, rows)


def _pictures(found: Records, told: dict[str, Any], manifest: Path | None) -> str:
    if manifest is not None and found.meta["notes"].get("maker") == "sample":
        kinds, title = _modalities(found, manifest), "modality"
        said = "Modalities are those of the sample's manifest. "
    else:
        kinds = {n: row["pictures"] for n, row in tokens_by(found, "source").items()}
        title, said = "source", "Records do not say a picture's modality, so here are the sources. "
    body = html_page.figure(
        stats_plots.pictures(kinds, title, told["of_entries"]), f"Pictures by {title}"
    )
    said += f"A picture has {told['entries']:g} documents and {told['tasks']:g} tasks on average; "
    said += f"{told['without_picture']:,} documents name none."
    return body + html_page.paragraph(said, note=True)


def _modalities(found: Records, manifest: Path) -> dict[str, int]:
    kind_of = {row["file"]: row["modality"] for row in read_manifest(manifest)}
    picture = found.index["picture"]
    known, first = np.unique(picture, return_index=True)
    kinds: dict[str, int] = {}
    for document in found.read(first[known >= 0]):
        kind = kind_of.get(document.image_path, "not in the manifest")
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def _examples(
    found: Records,
    tokenizer: Tokenizer | None,
    encoder: Encoder | None,
    count: int,
    show: bool,
    seed: int,
) -> str:
    if has_credentialed(found) and not show:
        return html_page.paragraph(
            "Credentialed: no picture and no text is shown. --show_credentialed shows them, on a "
            "page that only you can read.",
        )
    drawn = found.read(_drawn(found, count, seed))
    body = html_page.paragraph(
        f"{len(drawn)} documents drawn by seed {seed}, task by task. Pictures are decoded from the "
        "codes that the model reads, so they show what it can see.",
        note=True,
    )
    for missing, what in ((tokenizer, "Texts"), (encoder, "Pictures")):
        if missing is None:
            body += html_page.paragraph(
                f"{what} are not shown: name the model folder that made these records by --model."
            )
    return body + "".join(_cards(found, drawn, tokenizer, encoder))


def _drawn(found: Records, count: int, seed: int) -> list[int]:
    """Return documents of each task in turn, shuffled by the seed."""
    task = np.asarray(found.index["task"])
    order = shuffle(len(found), seed, 0, _EXAMPLES)
    each = [order[task[order] == n][:count] for n in np.unique(task)]
    turns = [row[k] for k in range(count) for row in each if k < len(row)]
    return [int(n) for n in turns[:count]]


def _cards(
    found: Records, drawn: list[Document], tokenizer: Tokenizer | None, encoder: Encoder | None
) -> Iterator[str]:
    each = [images_of(d, found) for d in drawn]
    flat = [codes for images in each for codes in images]
    pixels = iter(
        near_duplicates.decode_codes(encoder, flat) if encoder is not None else [None] * len(flat)
    )
    for document, images in zip(drawn, each, strict=True):
        shown = [p for p in (next(pixels) for _ in images) if p is not None]
        name = document.image_path or "an image"
        left = (
            html_page.figures([(html_page.png(PIL.Image.fromarray(p)), name) for p in shown])
            if shown
            else ""
        )
        facts = _facts(found, document, tokenizer)
        yield html_page.columns(left, facts) if left else facts


def _facts(found: Records, document: Document, tokenizer: Tokenizer | None) -> str:
    rows = [("task", document.task), ("source", document.source), ("id", document.id)]
    if tokenizer is not None:
        parts = to_text(document, found.layout, tokenizer).split(SEP_NAME)
        names = ["text"] if len(parts) == 1 else ["question", "answer"] * len(parts)
        rows += [(name, _short(part)) for name, part in zip(names, parts, strict=False)]
    return html_page.table(["", f"{len(document.tokens):,} tokens"], rows)


def _short_count(number: int) -> str:
    return f"{number:,}" if number < 10_000_000 else f"{number / 1e6:,.0f} M"


def _short(text: str) -> str:
    more = len(text) - LONGEST
    return text if more <= 0 else f"{text[:LONGEST]} … ({more:,} characters more)"


# ---- The command line of `python -m data.prepare stats`: counts, and with --out a page ----

EXAMPLES = 12


def add(commands: Any, tiny: Path, manifest: Path) -> argparse.ArgumentParser:
    """Add `stats`. `tiny`: model folder used if it made the records; `manifest`: image facts."""
    counted = commands.add_parser("stats", help="what a folder of records holds; a page of it")
    counted.add_argument(
        "--seq_len", type=int, default=0, help="row length; 0: the longest document"
    )
    counted.add_argument("--out", type=Path, help="HTML page to write, with plots and examples")
    counted.add_argument("--model", type=Path, help="model folder that made the records")
    counted.add_argument("--examples", type=int, default=EXAMPLES, help="documents on the page")
    counted.add_argument("--seed", type=int, default=0, help="of the examples and of packing")
    counted.add_argument(
        "--show_credentialed", action="store_true",
        help="show pictures and texts of a credentialed folder, on a page that only you can read",
    )  # fmt: skip
    counted.set_defaults(run=_run, tiny=tiny, manifest=manifest)
    return counted


def _run(args: argparse.Namespace) -> dict[str, Any]:
    found = open_records(args.folder)
    if args.examples < 0:
        raise PrepareError(f"--examples is {args.examples}; it must be 0 or more")
    told = report.stats(args.folder, seq_len=args.seq_len or found.meta["longest"])
    if args.out is None:
        return told
    if not args.out.parent.is_dir():
        raise PrepareError(f"--out {args.out}: no such folder; make it first")
    secret = has_credentialed(found)
    readable = args.examples > 0 and (not secret or args.show_credentialed)
    made_here = readable and check.encoder_matches(found, args.model, args.tiny)
    markup = build(
        found,
        told,
        tokenizer=check.resolve_tokenizer(found, args.model, args.tiny) if readable else None,
        encoder=check.resolve_encoder(found, args.model or args.tiny) if made_here else None,
        manifest=args.manifest,
        count=args.examples,
        show=args.show_credentialed,
        seed=args.seed,
    )
    write(args.out, markup, secret=secret)
    return told | dict(page=str(args.out))
