"""Format the findings of the check of records, and make the comparisons that they come from.

A line is level, kind, where, what, separated by tabs; check.py has the table of kinds. A document
of a credentialed folder is named by its number and a hash, never by id or path.
"""

import collections
from typing import IO, Any

import numpy as np
from jaxtyping import Int, UInt32, UInt64

from medmax_jax.data.analysis import eval_set, near_duplicates, scan
from medmax_jax.data.records.reader import Records
from medmax_jax.data.records.writer import has_credentialed
from medmax_jax.io.errors import printable_text

# Verbatim: part of the data.
NEAR_IMAGES = "near_pictures"
NOTES = (
    *("same_document", "same_codes", "same_bytes", NEAR_IMAGES, "changed_file", "unread_file"),
    *("shared_look", "shared_text"),
)
SHOWN = 10  # members of a group in its line


class Findings:
    """Prints one line for each finding and counts the findings."""

    def __init__(self, strict: bool, out: IO[str]):
        self._notes = set(NOTES) - ({"shared_look", "shared_text"} if strict else set())
        self._out = out
        self.count: collections.Counter[str] = collections.Counter()

    def __call__(self, kind: str, where: str, what: str) -> None:
        self.count[kind] += 1
        clean = (printable_text(" ".join(text.split())) for text in (where, what))
        print(self.level(kind), kind, *clean, sep="\t", file=self._out)

    def level(self, kind: str) -> str:
        return "note" if kind in self._notes else "error"

    def totals(self) -> dict[str, Any]:
        """Return the number of findings of each level and kind."""
        levels = collections.Counter()
        for kind, n in self.count.items():
            levels[self.level(kind)] += n
        return dict(errors=levels["error"], notes=levels["note"], findings=dict(self.count))


class DocumentNamer:
    """Names documents: by number, id and path; if credentialed, by hashes only."""

    def __init__(self, records: Records, columns: scan.Columns):
        self._records, self._columns = records, columns

    def __call__(self, number: int) -> str:
        if has_credentialed(self._records):
            codes = self._columns.codes[self._columns.owner == number]
            name = f" (codes {int(codes[0]):016x})" if len(codes) else ""
            return f"document {number}{name}"
        d = self._records[number]
        return f"document {number} ({d.id}{', ' * bool(d.image_path)}{d.image_path})"

    def group(self, members: Int[np.ndarray, "_"]) -> str:
        rest = f", and {len(members) - SHOWN} more" if len(members) > SHOWN else ""
        return "; ".join(self(int(n)) for n in members[:SHOWN]) + rest


def find_duplicates(
    columns: scan.Columns, sha: UInt64[np.ndarray, "n"], namer: DocumentNamer, report: Findings
) -> None:
    """Report documents, codes and files that occur more than once."""
    numbers = np.arange(len(columns.name), dtype=np.uint64)
    for group in near_duplicates.duplicate_groups(columns.name, numbers):
        what = f"the id occurs twice, also in document {group[0]}"
        report("written", namer(int(group[1])), what)
    for group in near_duplicates.duplicate_groups(columns.document, numbers):
        report("same_document", namer(int(group[0])), f"{len(group)} equal: {namer.group(group)}")
    of_image = columns.path[columns.owner]
    for group in near_duplicates.duplicate_groups(columns.codes, of_image):
        _report_copies("same_codes", columns.owner[group], columns.path, namer, report)
    for group in near_duplicates.duplicate_groups(sha, columns.path):
        _report_copies("same_bytes", group, columns.path, namer, report)


def _report_copies(
    kind: str,
    group: Int[np.ndarray, "_"],
    path: UInt64[np.ndarray, "n"],
    namer: DocumentNamer,
    report: Findings,
) -> None:
    """Report documents that show the same image in one line; of each path, one is named."""
    first = group[np.sort(np.unique(path[group], return_index=True)[1])]
    report(kind, namer(int(first[0])), f"{len(first)} paths: {namer.group(first)}")


def find_near_duplicates(
    hashes: UInt32[np.ndarray, "k 8"],
    owners: Int[np.ndarray, "k"],
    path: UInt64[np.ndarray, "n"],
    namer: DocumentNamer,
    report: Findings,
) -> None:
    """Report groups of images linked by small distances; equal hashes are first counted as one."""
    if not len(hashes):
        return
    distinct, inverse = np.unique(hashes, axis=0, return_inverse=True)
    pairs = [
        (i, j)
        for i, j, _ in near_duplicates.near_duplicate_pairs(
            distinct, distinct, near_duplicates.NEAR_DUPLICATE_BITS
        )
        if len(i)
    ]
    group = near_duplicates.connected_components(len(distinct), pairs)[inverse.reshape(-1)]
    for members in near_duplicates.duplicate_groups(
        group.astype(np.uint64) + np.uint64(1), path[owners]
    ):
        _report_copies(NEAR_IMAGES, owners[members], path, namer, report)


def find_shared_images(
    hashed: tuple,
    columns: scan.Columns,
    sha: UInt64[np.ndarray, "n"],
    ours: tuple[UInt32[np.ndarray, "k 8"], Int[np.ndarray, "k"]],
    namer: DocumentNamer,
    report: Findings,
) -> None:
    """Report images that are in both sets: by codes, by bytes, by perceptual hash."""
    items, hashes, owner, _ = hashed
    first_codes = _Table(columns.codes, columns.owner)
    first_sha = _Table(sha, np.arange(len(sha)))
    for item in items:
        for codes in item.codes:
            name = near_duplicates.hash64(np.asarray(codes).astype("<u2").tobytes())
            if name in first_codes:
                report("shared_codes", item.name, f"same codes as {namer(first_codes[name])}")
        if item.sha and (name := near_duplicates.hash64(item.sha)) in first_sha:
            report("shared_bytes", item.name, f"same file as {namer(first_sha[name])}")
    best: dict[int, tuple[int, int]] = {}
    for i, j, distance in near_duplicates.near_duplicate_pairs(
        hashes, ours[0], near_duplicates.NEAR_DUPLICATE_BITS
    ):
        for a, b, bits in zip(owner[i].tolist(), j.tolist(), distance.tolist(), strict=True):
            best[a] = min(best.get(a, (bits, b)), (bits, b))
    for a, (bits, b) in sorted(best.items()):
        what = f"hash differs in {bits} of 256 bits from {namer(int(ours[1][b]))}"
        report("shared_look", items[a].name, what)


class _Table:
    """Maps name -> the first document that has it, by bisection: no dictionary of millions."""

    def __init__(self, names: UInt64[np.ndarray, "m"], owner: Int[np.ndarray, "m"]):
        self._order = np.argsort(names, kind="stable")
        self._names, self._owner = names[self._order], owner

    def _position(self, name: int) -> int:
        return int(np.searchsorted(self._names, np.uint64(name)))

    def __contains__(self, name: int) -> bool:
        position = self._position(name)
        return name != 0 and position < len(self._names) and int(self._names[position]) == name

    def __getitem__(self, name: int) -> int:
        return int(self._owner[self._order[self._position(name)]])


def find_shared_text(
    ngrams: near_duplicates.NgramIndex,
    items: list[eval_set.EvalItem],
    namer: DocumentNamer,
    report: Findings,
) -> None:
    """Report items that share text with training data."""
    for n, (count, document) in ngrams.overlaps().items():
        what = (
            f"{count} of {ngrams.sizes[n]} n-grams of {near_duplicates.NGRAM_SIZE} words occur in "
            f"training text, one of them in {namer(document)}"
        )
        report("shared_text", items[n].name, what)
