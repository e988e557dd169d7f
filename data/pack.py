"""Which documents share a row: a plan per epoch, made of lengths alone.

    lengths 60 200 50 140 90, seq_len 256  ->  [200 50] [140 90] [60]        pack=True
                                               [60] [200] [50] [140] [90]    pack=False

Every document stands in exactly one row of every epoch, whole. A plan is a function of (lengths,
seq_len, pack, seed, epoch): nothing else, so a run can start at any step on any number of hosts.
"""

import bisect
import dataclasses
import threading

import numpy as np
from jaxtyping import Int

# Documents that are packed together. Large enough that best fit finds partners (fill within 1% of
# one window over all), small enough that a row's documents come from one stretch of the shuffle.
WINDOW = 4_096


class PackError(ValueError):
    """Lengths that cannot be packed; the message says which and what to change."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """One epoch. Row i holds documents[starts[i]:starts[i + 1]]."""

    documents: np.ndarray  # int32 [documents], a permutation
    starts: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, i: int) -> Int[np.ndarray, "n"]:
        """The documents of row i, in their order there."""
        return self.documents[self.starts[i] : self.starts[i + 1]]


def plan(lengths: Int[np.ndarray, "n"], *, seq_len: int, pack: bool, seed: int, epoch: int) -> Plan:
    """The rows of one epoch; raises PackError when a document is longer than a row.

    Packing is best-fit decreasing within windows of the shuffled documents: each, longest first,
    goes into the fullest row that still has room. Rows then change places within their window, so
    that a window does not begin with its long documents.
    """
    _check(lengths, seq_len)
    order = _shuffle(len(lengths), seed, epoch, 0)
    if not pack:
        return Plan(order.astype(np.int32), np.arange(len(order) + 1))
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        packed = _best_fit(window, lengths[window], seq_len)
        rows += [packed[i] for i in _shuffle(len(packed), seed, epoch, 1 + start)]
    starts = np.cumsum([0] + [len(r) for r in rows])
    return Plan(np.asarray([d for r in rows for d in r], np.int32), starts)


class Epochs:
    """The rows of epochs 0, 1, 2, ... one after the other, without end; planned when needed."""

    def __init__(self, lengths: Int[np.ndarray, "n"], *, seq_len: int, pack: bool, seed: int):
        self._lengths, self._seq_len, self._pack, self._seed = lengths, seq_len, pack, seed
        self._plans = [plan(lengths, seq_len=seq_len, pack=pack, seed=seed, epoch=0)]
        self._starts = [0, len(self._plans[0])]  # first row of each epoch, and of the next one
        self._lock = threading.Lock()  # a prefetching thread asks too

    def row(self, i: int) -> Int[np.ndarray, "n"]:
        """The documents of row i of all epochs."""
        epoch = self.epoch(i)
        return self._plans[epoch].row(i - self._starts[epoch])

    def epoch(self, i: int) -> int:
        """The epoch that row i belongs to."""
        with self._lock:
            while i >= self._starts[-1]:
                at = dict(seq_len=self._seq_len, pack=self._pack, seed=self._seed)
                self._plans.append(plan(self._lengths, **at, epoch=len(self._plans)))
                self._starts.append(self._starts[-1] + len(self._plans[-1]))
        return bisect.bisect_right(self._starts, i) - 1

    @property
    def first_epoch_rows(self) -> int:
        return self._starts[1]


def _best_fit(window: np.ndarray, lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []  # sorted; free tokens * WINDOW + row: ints compare faster than pairs
    for i in np.argsort(-lengths, kind="stable"):
        length = int(lengths[i])
        at = bisect.bisect_left(room, length * WINDOW)
        if at == len(room):
            free, row = seq_len, len(rows)
            rows.append([])
        else:
            free, row = divmod(room.pop(at), WINDOW)
        rows[row].append(int(window[i]))
        bisect.insort(room, (free - length) * WINDOW + row)
    return rows


def _shuffle(n: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    # Sorted raw draws, not Generator.permutation: numpy promises the raw stream for ever, the
    # permutation only for one version, and a resumed run must find its old order.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, stream]))
    return np.argsort(bits.random_raw(n), kind="stable")


def _check(lengths: np.ndarray, seq_len: int) -> None:
    if not len(lengths):
        raise PackError("there are no documents to pack")
    long = int((lengths > seq_len).sum())
    if long:
        raise PackError(
            f"{long} of {len(lengths)} documents are longer than data.seq_len = {seq_len} (the "
            f"longest has {lengths.max()} tokens) and none is cut; set data.seq_len to "
            f"{lengths.max()}, or make the records without the long ones"
        )
