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

NOTES = (
    *("same_document", "same_codes", "same_bytes", "near_pictures", "changed_file", "unread_file"),
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

    def __init__(self, found: Records, columns: scan.Columns):
        self._found, self._columns = found, columns

    def __call__(self, number: int) -> str:
        if has_credentialed(self._found):
            codes = self._columns.codes[self._columns.owner == number]
            return (
                f"document {number} (codes {int(codes[0]):016x})"
                if len(codes)
                else (f"document {number}")
            )
        d = self._found[number]
        return f"document {number} ({d.id}{', ' * bool(d.image_path)}{d.image_path})"

    def group(self, members: Int[np.ndarray, "_"]) -> str:
        more = f", and {len(members) - SHOWN} more" if len(members) > SHOWN else ""
        return "; ".join(self(int(n)) for n in members[:SHOWN]) + more


def find_duplicates(
    columns: scan.Columns, sha: UInt64[np.ndarray, "n"], told: DocumentNamer, tell: Findings
) -> None:
    """Report documents, codes and files that occur more than once."""
    numbers = np.arange(len(columns.name), dtype=np.uint64)
    for group in near_duplicates.duplicate_groups(columns.name, numbers):
        tell("written", told(int(group[1])), f"its id comes twice, also in document {group[0]}")
    for group in near_duplicates.duplicate_groups(columns.document, numbers):
        tell("same_document", told(int(group[0])), f"{len(group)} alike: {told.group(group)}")
    of_image = columns.path[columns.owner]
    for group in near_duplicates.duplicate_groups(columns.codes, of_image):
        _several("same_codes", columns.owner[group], columns.path, told, tell)
    for group in near_duplicates.duplicate_groups(sha, columns.path):
        _several("same_bytes", group, columns.path, told, tell)


def _several(
    kind: str,
    group: Int[np.ndarray, "_"],
    path: UInt64[np.ndarray, "n"],
    told: DocumentNamer,
    tell: Findings,
) -> None:
    """Report documents that show the same image in one line; of each path, one is named."""
    first = group[np.sort(np.unique(path[group], return_index=True)[1])]
    tell(kind, told(int(first[0])), f"{len(first)} paths: {told.group(first)}")


def find_near_duplicates(
    looks_of: UInt32[np.ndarray, "k 8"],
    shown: Int[np.ndarray, "k"],
    path: UInt64[np.ndarray, "n"],
    told: DocumentNamer,
    tell: Findings,
) -> None:
    """Report groups of images linked by small distances; equal hashes are first counted as one."""
    if not len(looks_of):
        return
    different, place = np.unique(looks_of, axis=0, return_inverse=True)
    pairs = [
        (i, j)
        for i, j, _ in near_duplicates.near_duplicate_pairs(
            different, different, near_duplicates.NEAR_DUPLICATE_BITS
        )
        if len(i)
    ]
    group = near_duplicates.connected_components(len(different), pairs)[place.reshape(-1)]
    for members in near_duplicates.duplicate_groups(
        group.astype(np.uint64) + np.uint64(1), path[shown]
    ):
        _several("near_pictures", shown[members], path, told, tell)


def find_shared_images(
    held: tuple,
    columns: scan.Columns,
    sha: UInt64[np.ndarray, "n"],
    ours: tuple[UInt32[np.ndarray, "k 8"], Int[np.ndarray, "k"]],
    told: DocumentNamer,
    tell: Findings,
) -> None:
    """Report images that are in both sets: by codes, by bytes, by perceptual hash."""
    items, looks_of, owner, _ = held
    first_codes = _Table(columns.codes, columns.owner)
    first_sha = _Table(sha, np.arange(len(sha)))
    for item in items:
        for codes in item.codes:
            name = near_duplicates.hash64(np.asarray(codes).astype("<u2").tobytes())
            if name in first_codes:
                tell("shared_codes", item.name, f"codes of {told(first_codes[name])}")
        if item.sha and near_duplicates.hash64(item.sha) in first_sha:
            tell(
                "shared_bytes",
                item.name,
                f"file of {told(first_sha[near_duplicates.hash64(item.sha)])}",
            )
    best: dict[int, tuple[int, int]] = {}
    for i, j, apart in near_duplicates.near_duplicate_pairs(
        looks_of, ours[0], near_duplicates.NEAR_DUPLICATE_BITS
    ):
        for a, b, bits in zip(owner[i].tolist(), j.tolist(), apart.tolist(), strict=True):
            best[a] = min(best.get(a, (bits, b)), (bits, b))
    for a, (bits, b) in sorted(best.items()):
        what = f"{bits} of 256 bits from {told(int(ours[1][b]))}"
        tell("shared_look", items[a].name, what)


class _Table:
    """Maps name -> the first document that has it, by bisection: no dictionary of millions."""

    def __init__(self, names: UInt64[np.ndarray, "m"], owner: Int[np.ndarray, "m"]):
        self._order = np.argsort(names, kind="stable")
        self._names, self._owner = names[self._order], owner

    def _place(self, name: int) -> int:
        return int(np.searchsorted(self._names, np.uint64(name)))

    def __contains__(self, name: int) -> bool:
        place = self._place(name)
        return name != 0 and place < len(self._names) and int(self._names[place]) == name

    def __getitem__(self, name: int) -> int:
        return int(self._owner[self._order[self._place(name)]])


def find_shared_text(
    grams: near_duplicates.NgramIndex,
    items: list[eval_set.EvalItem],
    told: DocumentNamer,
    tell: Findings,
) -> None:
    """Report items that share text with training data."""
    for n, (many, document) in grams.overlaps().items():
        stretches = f"stretches of {near_duplicates.NGRAM_SIZE} words"
        what = f"{many} of its {grams.sizes[n]} {stretches} stand in training"
        tell("shared_text", items[n].name, f"{what} text, one in {told(document)}")
