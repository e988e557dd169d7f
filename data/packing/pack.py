"""Decide which documents share a row: one plan per epoch, computed from lengths alone.

    lengths 60 200 50 140 90, seq_len 256  ->  [200 50] [140 90] [60]        pack=True
                                               [60] [200] [50] [140] [90]    pack=False

Every document of a window is in exactly one row, uncut; windows are stretches of an epoch's
documents, by default of all of them shuffled, each once (mixing.py has the others). A plan is a
function of (lengths, windows, seq_len, pack, seed, epoch) only, so a run can start at any step on
any number of hosts. With data.condition_dropout the lengths are a function of the epoch
(condition_dropout.py).
"""

import bisect
import dataclasses
import hashlib
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

# Documents packed together: enough for best fit to find partners, few enough to stay shuffled.
WINDOW = 4_096


class PackError(ValueError):
    """Documents that cannot be packed or mixed; the message names them and states a fix."""


class Row(NamedTuple):
    """The documents of a row, in their order: number, tokens, and the stream of each."""

    documents: np.ndarray
    lengths: np.ndarray
    streams: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The rows of one epoch. Row i holds documents[starts[i]:starts[i + 1]]."""

    documents: np.ndarray  # int32 [documents of the epoch]
    starts: np.ndarray  # int64 [rows + 1]
    lengths: np.ndarray  # int32 [documents of the epoch], tokens as trained
    streams: np.ndarray  # uint8 [documents of the epoch], see models/guidance_streams.py

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, i: int) -> Int[np.ndarray, "n"]:
        """Return the documents of row i, in their order within the row."""
        return self.documents[self.starts[i] : self.starts[i + 1]]

    def complete_row(self, i: int) -> Row:
        """Return row i with the lengths and the streams of its documents."""
        span = slice(self.starts[i], self.starts[i + 1])
        return Row(self.documents[span], self.lengths[span], self.streams[span])

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the assignment of documents to rows, and of streams if any."""
        digest = hashlib.sha256(self.documents.astype("<i4").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        if self.streams.any():
            digest.update(self.streams.tobytes())
        return digest.hexdigest()


def plan(
    lengths: Int[np.ndarray, "n"],
    *,
    seq_len: int,
    pack: bool,
    seed: int,
    epoch: int,
    windows: list[np.ndarray] | None = None,
    streams: Int[np.ndarray, "n"] | None = None,
) -> Plan:
    """Return the rows of one epoch; raise PackError if a document is longer than a row.

    Packing is best-fit decreasing within windows: each document, longest first, goes into the
    fullest row that still has enough free tokens. Rows are then shuffled within their window, so
    that a window does not begin with its long documents. `windows` None: every document once.
    `streams` None: every document complete.
    """
    if windows is None:
        windows = shuffled(np.arange(len(lengths)), seed=seed, epoch=epoch)
    _check(lengths, windows, seq_len)
    streams = np.zeros(len(lengths), np.uint8) if streams is None else streams

    def make(documents: np.ndarray, starts: np.ndarray) -> Plan:
        tokens = lengths[documents].astype(np.int32)
        return Plan(documents, starts, tokens, streams[documents])

    if not pack:
        documents = np.concatenate(windows).astype(np.int32)
        return make(documents, np.arange(len(documents) + 1))
    placed, sizes, start = [], [], 0
    for window in windows:
        packed = _best_fit(window, lengths[window], seq_len)
        rows = [packed[i] for i in shuffle(len(packed), seed, epoch, 1 + start)]
        placed.append(np.asarray([d for row in rows for d in row], np.int32))
        sizes.append(np.asarray([len(row) for row in rows]))
        start += len(window)
    return make(np.concatenate(placed), np.cumsum(np.concatenate([[0], *sizes])))


class Epochs:
    """The rows of epochs 0, 1, 2, ... in sequence, without end; each epoch is planned on demand."""

    def __init__(self, make_plan: Callable[[int], Plan]):
        self.plan = make_plan
        self.first = self.plan(0)
        self._plans = [self.first]
        self._starts = [0, len(self.first)]  # first row of each epoch, and of the next one
        self._lock = threading.Lock()  # a prefetching thread uses it too

    def row(self, i: int) -> Row:
        """Return row i of all epochs."""
        epoch = self.epoch(i)
        return self._plans[epoch].complete_row(i - self._starts[epoch])

    def epoch(self, i: int) -> int:
        """Return the epoch that row i belongs to."""
        with self._lock:
            while i >= self._starts[-1]:
                self._plans.append(self.plan(len(self._plans)))
                self._starts.append(self._starts[-1] + len(self._plans[-1]))
        return bisect.bisect_right(self._starts, i) - 1


def shuffled(
    documents: Int[np.ndarray, "n"], *, seed: int, epoch: int
) -> list[Int[np.ndarray, "_"]]:
    """Return windows of all `documents`, each once, in the order of this epoch."""
    order = documents[shuffle(len(documents), seed, epoch, 0)]
    return [order[i : i + WINDOW] for i in range(0, len(order), WINDOW)]


def shuffle(n: int, seed: int, epoch: int, stream: int) -> Int[np.ndarray, "n"]:
    """Return a permutation of 0 .. n-1, different for each (seed, epoch, stream).

    It uses sorted raw draws, not Generator.permutation: numpy guarantees the raw stream forever,
    the permutation only within one version, and a resumed run must reproduce its old order.
    """
    return np.argsort(raw_draws(n, seed, epoch, stream), kind="stable")


def raw_draws(n: int, seed: int, epoch: int, stream: int) -> UInt64[np.ndarray, "n"]:
    """Return n numbers of 64 random bits, different for each (seed, epoch, stream)."""
    return np.random.PCG64(np.random.SeedSequence([seed, epoch, stream])).random_raw(n)


def _best_fit(window: np.ndarray, lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free_space: list[int] = []  # sorted; free tokens * base + row: ints compare faster than pairs
    base = len(window)
    for i in np.argsort(-lengths, kind="stable"):
        length = int(lengths[i])
        at = bisect.bisect_left(free_space, length * base)
        if at == len(free_space):
            free, row = seq_len, len(rows)
            rows.append([])
        else:
            free, row = divmod(free_space.pop(at), base)
        rows[row].append(int(window[i]))
        bisect.insort(free_space, (free - length) * base + row)
    return rows


def _check(lengths: np.ndarray, windows: list[np.ndarray], seq_len: int) -> None:
    if not sum(map(len, windows)):
        raise PackError("there are no documents to pack")
    longest = max(int(lengths[w].max()) for w in windows if len(w))
    if longest > seq_len:
        drawn = np.unique(np.concatenate(windows))
        raise PackError(
            f"{(lengths[drawn] > seq_len).sum()} of {len(drawn)} documents are longer than "
            f"data.seq_len = {seq_len} (the longest has {longest} tokens), and documents are never "
            f"cut; set data.seq_len to {longest}, or lower data.document_limit to exclude them"
        )
