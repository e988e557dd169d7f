"""The book of a cache's lanes: which tokens each holds, who uses it, and what can be taken over.

    wanted        BOS [image] "Is it a CT?"            32 lanes, lane 4: BOS [image] "Which organ?"
    acquire       lane 9, first 1,027 tokens from lane 4; the rest is read by the model

A lane keeps its tokens when its user leaves, so a second question on an image, the next turn of a
chat and the streams of guidance find what has been computed before. Numpy only: the arrays of the
cache are elsewhere (kv_cache.py), and this says where to write and what to copy.

Lanes stand in blocks, one for each device that splits the batch; a copy stays inside its block.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

SHORTEST = 16  # tokens in common that are worth a copy, and a wait for whoever computes them


@dataclasses.dataclass(frozen=True)
class SlotAssignment:
    """Lane `lane` is for the tokens; the first `kept` are there, once copied from `source`."""

    slot: int
    prefix_length: int
    copy_from: int | None  # None: they lie in the lane itself


class SlotTable:
    """Lanes 0 .. blocks * depth - 1; block b has lanes b * depth on."""

    def __init__(self, *, blocks: int, depth: int, slots: int, near: int):
        """`near`: lanes of each block that are taken first, or last by streams of guidance."""
        count = blocks * depth
        self.blocks, self.depth = blocks, depth
        self.free = np.ones(count, bool)
        self._tokens = np.zeros((count, slots), np.int32)
        self._length = np.zeros(count, np.int64)
        self._settled = np.ones(count, bool)  # its tokens are in the cache, not only promised
        self._touched = np.zeros(count, np.int64)
        self._clock = 0
        self._far = np.arange(count) % depth // near

    def acquire(self, tokens: Int[np.ndarray, "T"], *, guide: bool) -> SlotAssignment | None:
        """A free lane for the tokens; None: wait until `settle`, a lane will hold them by then.

        Raises IndexError when no lane is free.
        """
        if not self.free.any():
            raise IndexError("no lane is free")
        common = self._common(tokens)
        # A free lane may be taken over where that costs it little; a copy must be worth its while.
        own = np.where(self.free & self._settled & (2 * common >= self._length), common, 0)
        worth = np.where((common == len(tokens)) | (common >= SHORTEST), common, 0)
        have, promised = (np.where(self._settled == s, worth, 0) for s in (True, False))
        if promised.max() > max(own.max(), have.max()):
            return None
        if own.max() > 0 and own.max() >= have.max():
            here = np.flatnonzero(own == own.max())
            place = SlotAssignment(int(here[np.argmax(self._touched[here])]), int(own.max()), None)
        else:
            place = self._beside(have, int(have.max()), guide)
        self.free[place.slot] = False
        self._note(place.slot, tokens, settled=place.prefix_length == len(tokens))
        return place

    def commit(self) -> None:
        """All that was promised is in the cache now."""
        self._settled[:] = True

    def release(self, lane: int, tokens: Int[np.ndarray, "T"]) -> None:
        """The lane has no user any more and holds these tokens."""
        self.free[lane] = True
        self._note(lane, tokens, settled=True)

    def clear(self) -> None:
        """No lane has a user, or holds anything."""
        self.free[:], self._settled[:], self._length[:] = True, True, 0

    def _common(self, tokens: Int[np.ndarray, "T"]) -> Int[np.ndarray, "B"]:
        """How many leading tokens each lane has in common with these."""
        count = len(tokens)
        same = self._tokens[:, :count] == tokens
        same &= np.arange(count) < self._length[:, None]
        return np.where(same.all(1), count, np.argmin(same, axis=1)) if count else self._length * 0

    def _beside(self, have: Int[np.ndarray, "B"], best: int, guide: bool) -> SlotAssignment:
        """A free lane to copy into, in a block that has the tokens; the least useful one."""
        options = np.flatnonzero(self.free)
        block = np.arange(len(self.free)) // self.depth
        if best:
            blocks = set(block[have == best].tolist())
            near = options[np.isin(block[options], list(blocks))]
            if not near.size:
                best = 0  # what is held lies on other devices: compute it again
            options = near if near.size else options
        far = self._far[options]
        order = np.lexsort(
            (options % self.depth, self._touched[options], (far == 0) if guide else far)
        )
        lane = int(options[order[0]])
        if not best:
            return SlotAssignment(lane, 0, None)
        source = np.flatnonzero((have == best) & (block == block[lane]))[0]
        return SlotAssignment(lane, best, int(source))

    def _note(self, lane: int, tokens: Int[np.ndarray, "T"], *, settled: bool) -> None:
        self._clock += 1
        self._tokens[lane, : len(tokens)] = tokens
        self._length[lane] = len(tokens)
        self._settled[lane], self._touched[lane] = settled, self._clock
