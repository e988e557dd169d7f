"""Finds items that overlap with the training records, and repeats every headline without them.

    items  -- SHA-256 of the image file      --+
           -- codes of the image, by VQGAN   --+--> training records --> contamination.jsonl
           -- 13 consecutive words           --+    {id, and a flag for each of WAYS}

    headline on the clean part | on the contaminated part, each with its interval

The comparison is that of `data.prepare check --against`, on the same columns. Consecutive words
that occur in more than ten training documents are a phrase and no leak, as in GPT-3's appendix C.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from medmax_jax.data.analysis import near_duplicates, scan
from medmax_jax.data.analysis.check import encoder_matches, resolve_encoder, resolve_tokenizer
from medmax_jax.data.image_tokens.encoder import Encoder
from medmax_jax.data.records.jsonl import plain_text
from medmax_jax.data.records.reader import Records, open_records
from medmax_jax.eval.metrics import aggregate
from medmax_jax.eval.metrics.per_record import ScoringInputs
from medmax_jax.eval.records import EvalRecord, Item
from medmax_jax.eval.stats import intervals
from medmax_jax.io import journal
from medmax_jax.io.text_files import TextFileError, read_objects
from medmax_jax.models.tokenizer import Tokenizer
from medmax_jax.storage import image_paths
from medmax_jax.storage.folder import file_sha256

FILE = "contamination.jsonl"
# Verbatim: part of the data.
WAYS = ("picture", "codes", "words")


class ContaminationError(ValueError):
    """Raised for unusable training records; the message names the field and the fix."""


def find(
    items: Sequence[Item],
    train: str | Path,
    workdir: str | Path,
    *,
    model: str | Path,
    images_folder: str | Path,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Write contamination.jsonl; return what was compared. `train`: a folder of records.

    `model`: the folder that holds the tokenizer and VQGAN of the records; with another VQGAN codes
    are not compared, and another tokenizer raises, since word n-grams are compared as tokens.
    """
    train_records = open_records(train)
    tokenizer = resolve_tokenizer(train_records, Path(model), Path(model))
    if tokenizer is None:
        raise ContaminationError(
            f"config.train_model is {str(model)!r}, whose tokenizer did not write {train}; set it "
            "to the folder that did"
        )
    path = Path(workdir) / FILE
    key = _key(items, train_records)
    if compared := _read_compared(path, key):
        return compared
    can_encode = encoder_matches(train_records, Path(model), Path(model))
    encoder = resolve_encoder(train_records, Path(model)) if can_encode else None
    progress(f"contamination: {len(items)} items against {len(train_records)} training documents")
    flags, compared = _compare(items, train_records, tokenizer, encoder, Path(images_folder))
    lines = [{"compared": compared, "key": key}]
    lines += [{"id": item.id} | flag for item, flag in zip(items, flags, strict=True)]
    journal.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return compared


def read(workdir: str | Path) -> dict[str, dict[str, bool]]:
    """Return id -> {id, and a flag for each of WAYS}."""
    return {row["id"]: row for _, row in read_objects(Path(workdir) / FILE)[1:]}


def summary(
    records: Sequence[EvalRecord],
    flags: dict[str, dict[str, bool]],
    inputs: ScoringInputs,
    *,
    mode: str,
    resampling: intervals.Resampling,
) -> list[dict[str, Any]]:
    """Return headline rows {task, metric, part, n, groups, few_groups, value, ci_low, ci_high}.

    part: all, clean, contaminated, and each of WAYS. A part without items has n 0.
    """
    rows = []
    parts: dict[str, Callable[[dict], bool]] = {
        "all": lambda flag: True,
        "clean": lambda flag: not any(flag[way] for way in WAYS),
        "contaminated": lambda flag: any(flag[way] for way in WAYS),
    } | {way: lambda flag, way=way: flag[way] for way in WAYS}
    for task, task_records in aggregate.tasks_of(records).items():
        for part, selects in parts.items():
            part_records = [r for r in task_records if r.id in flags and selects(flags[r.id])]
            part_rows = aggregate.summary(part_records, inputs, mode=mode, resampling=resampling)
            heads = [row.to_json() for row in part_rows if row.headline]
            head = heads[0] if heads else dict(metric=None, n=0, groups=0)
            names = ("metric", "n", "groups", "few_groups", "value", "ci_low", "ci_high")
            rows.append(dict(task=task, part=part) | {name: head.get(name) for name in names})
    return rows


def _compare(
    items: Sequence[Item],
    train_records: Records,
    tokenizer: Tokenizer,
    encoder: Encoder | None,
    folder: Path,
) -> tuple[list[dict[str, bool]], dict[str, Any]]:
    grams = near_duplicates.NgramIndex(
        [near_duplicates.normalized_words(f"{i.prompt}\n{i.answer}") for i in items]
    )

    def add_document(document: Any, number: int) -> None:
        text = plain_text(document, train_records.layout, tokenizer)
        grams.add_document(near_duplicates.normalized_words(text), number)

    def raise_finding(kind: str, where: str, what: str) -> None:
        raise ContaminationError(
            f"{train_records.folder}: {where}: {what}; see `python -m data.prepare check`"
        )

    columns = scan.scan(train_records, raise_finding, add_document)
    names = sorted({name for item in items for name in item.images})
    files = {name: image_paths.resolve(folder, name) for name in names}
    files = {image: file for image, file in files.items() if file.is_file()}
    paths = list(files)
    byte_hashes = _hashes([file_sha256(file) for file in files.values()])
    image_codes = [] if encoder is None else near_duplicates.encode_files(encoder, files.values())
    code_hashes = [_hashes(list(map(near_duplicates.code_hash, views))) for views in image_codes]
    same_bytes = {
        path: bool(hit)
        for path, hit in zip(paths, near_duplicates.isin(byte_hashes, columns.sha), strict=True)
    }
    same_codes = {
        path: bool(near_duplicates.isin(hashes, columns.codes).any())
        for path, hashes in zip(paths, code_hashes, strict=False)
    }
    shared = grams.overlaps()
    flags = [
        dict(
            # Verbatim: part of the data.
            picture=any(same_bytes.get(image, False) for image in item.images),
            codes=bool(any(same_codes.get(image, False) for image in item.images)),
            words=number in shared,
        )
        for number, item in enumerate(items)
    ]
    compared = dict(
        train=train_records.fingerprint,
        documents=len(train_records),
        items=len(items),
        # The first two are of images that could be compared: records may have no file hashes.
        # Verbatim: part of the data.
        by_picture=sum(item.image in same_bytes for item in items) if columns.sha.any() else 0,
        by_codes=sum(item.image in same_codes for item in items),
        by_words=int((grams.sizes > 0).sum()),
    ) | {way: sum(flag[way] for flag in flags) for way in WAYS}
    return flags, compared


def _hashes(digests: Sequence[str]) -> UInt64[np.ndarray, "n"]:
    return np.array([near_duplicates.hash64(digest) for digest in digests], np.uint64)


def _key(items: Sequence[Item], train_records: Records) -> str:
    values = [list(item.item_fields().values()) for item in items]
    return hashlib.sha256(json.dumps([values, train_records.fingerprint]).encode()).hexdigest()


def _read_compared(path: Path, key: str) -> dict[str, Any] | None:
    """Return what was compared, if these exact items and records were compared before."""
    if not path.exists():
        return None
    try:
        rows = [row for _, row in read_objects(path)]
    except TextFileError:  # corrupt, so it is compared again
        return None
    flags = [type(row.get(name)) is bool for row in rows[1:] for name in WAYS]
    complete = all(flags) and all(isinstance(row.get("id"), str) for row in rows[1:])
    if not rows or not complete or not isinstance(rows[0].get("compared"), dict):
        return None
    return rows[0]["compared"] if rows[0].get("key") == key else None
