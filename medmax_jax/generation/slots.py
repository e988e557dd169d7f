"""Bookkeeping for KV-cache slots: contents, use, and prefixes that can be reused.

    request       BOS [image] "Is it a CT?"            32 slots, slot 4: BOS [image] "Which organ?"
    acquire       slot 9, first 1,027 tokens from slot 4; the model computes the rest

A slot (`lane` in the code) keeps its tokens when it is released, so a second question about an
image, the next turn of a chat and the guidance streams reuse what has been computed before. This
module uses only numpy: the arrays of the cache are elsewhere (kv_cache.py), and the module returns
where to write and what to copy.

Slots are grouped in blocks, one for each device that splits the batch; a copy stays inside its
block.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

# tokens in common that justify a copy, and waiting for another request to compute them
SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class SlotAssignment:
    """Slot `slot` for the tokens; the first `prefix_length` are copied from `copy_from`."""

    slot: int
    prefix_length: int
    copy_from: int | None  # None: they are in the slot itself


class SlotTable:
    """KV-cache slots 0 .. blocks * depth - 1; block b has the slots from b * depth on."""

    def __init__(self, *, blocks: int, depth: int, slots: int, near: int):
        """Create the table; `near` slots per block are used first, but last by guidance."""
        count = blocks * depth
        self.blocks, self.depth = blocks, depth
        self.free = np.ones(count, bool)
        self._tokens = np.zeros((count, slots), np.int32)
        self._length = np.zeros(count, np.int64)
        self._settled = np.ones(count, bool)  # its tokens are in the cache, not only announced
        self._touched = np.zeros(count, np.int64)
        self._clock = 0
        self._far = np.arange(count) % depth // near

    def acquire(self, tokens: Int[np.ndarray, "T"], *, guide: bool) -> SlotAssignment | None:
        """Return a free slot for the tokens, or None if a slot will hold them after `commit`.

        Raises IndexError when no slot is free.
        """
        if not self.free.any():
            raise IndexError("no lane is free")
        common = self._common(tokens)
        # A free slot may be overwritten where little is lost; a copy must be worth its cost.
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
        """Mark all announced tokens as present in the cache."""
        self._settled[:] = True

    def release(self, lane: int, tokens: Int[np.ndarray, "T"]) -> None:
        """Release the slot, which holds these tokens."""
        self.free[lane] = True
        self._note(lane, tokens, settled=True)

    def clear(self) -> None:
        """Release every slot and forget its contents."""
        self.free[:], self._settled[:], self._length[:] = True, True, 0

    def _common(self, tokens: Int[np.ndarray, "T"]) -> Int[np.ndarray, "B"]:
        """Return how many leading tokens each slot has in common with these."""
        count = len(tokens)
        same = self._tokens[:, :count] == tokens
        same &= np.arange(count) < self._length[:, None]
        return np.where(same.all(1), count, np.argmin(same, axis=1)) if count else self._length * 0

    def _beside(self, have: Int[np.ndarray, "B"], best: int, guide: bool) -> SlotAssignment:
        """Return a free slot to copy into, the least useful one, in a block that has the tokens."""
        options = np.flatnonzero(self.free)
        block = np.arange(len(self.free)) // self.depth
        if best:
            blocks = set(block[have == best].tolist())
            near = options[np.isin(block[options], list(blocks))]
            if not near.size:
                best = 0  # the tokens are on other devices: compute them again
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
