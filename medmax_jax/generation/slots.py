"""Bookkeeping for KV-cache slots: contents, use, and prefixes that can be reused.

    request       BOS [image] "Is it a CT?"            32 slots, slot 4: BOS [image] "Which organ?"
    acquire       slot 9, first 1,027 tokens from slot 4; the model computes the rest

A slot keeps its tokens when it is released, so a second question about an image, the next turn of a
chat and the guidance streams reuse what has been computed before. This module uses only numpy: the
arrays of the cache are elsewhere (kv_cache.py), and the module returns where to write and what to
copy.

Slots are grouped in shards, one for each device that splits the batch; a copy stays inside its
shard.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

# tokens in common that justify a copy, and waiting for another request to compute them
MIN_SHARED_PREFIX = 16


@dataclasses.dataclass(frozen=True)
class SlotAssignment:
    """Slot `slot` for the tokens; the first `prefix_length` are copied from `copy_from`."""

    slot: int
    prefix_length: int
    copy_from: int | None  # None: they are in the slot itself


class SlotTable:
    """KV-cache slots 0 .. shards * slots_per_shard - 1, numbered shard by shard."""

    def __init__(self, *, shards: int, slots_per_shard: int, cache_length: int, primary_slots: int):
        """Create the table; `primary_slots` per shard are used first, but last by guidance."""
        count = shards * slots_per_shard
        self.shards, self.slots_per_shard = shards, slots_per_shard
        self.free = np.ones(count, bool)
        self._tokens = np.zeros((count, cache_length), np.int32)
        self._length = np.zeros(count, np.int64)
        self._committed = np.ones(count, bool)  # its tokens are in the cache, not only announced
        self._last_used = np.zeros(count, np.int64)
        self._clock = 0
        self._tier = np.arange(count) % slots_per_shard // primary_slots  # 0: primary

    def acquire(self, tokens: Int[np.ndarray, "T"], *, guide: bool) -> SlotAssignment | None:
        """Return a free slot for the tokens, or None if a slot will hold them after `commit`.

        Raises IndexError when no slot is free.
        """
        if not self.free.any():
            raise IndexError("no KV-cache slot is free")
        common = self._common(tokens)
        # A free slot may be overwritten where little is lost; a copy must be worth its cost.
        own = np.where(self.free & self._committed & (2 * common >= self._length), common, 0)
        worth = np.where((common == len(tokens)) | (common >= MIN_SHARED_PREFIX), common, 0)
        present, announced = (np.where(self._committed == c, worth, 0) for c in (True, False))
        if announced.max() > max(own.max(), present.max()):
            return None
        if own.max() > 0 and own.max() >= present.max():
            best = np.flatnonzero(own == own.max())
            slot = int(best[np.argmax(self._last_used[best])])
            assignment = SlotAssignment(slot, int(own.max()), None)
        else:
            assignment = self._copy_target(present, int(present.max()), guide)
        self.free[assignment.slot] = False
        self._record(assignment.slot, tokens, committed=assignment.prefix_length == len(tokens))
        return assignment

    def commit(self) -> None:
        """Mark all announced tokens as present in the cache."""
        self._committed[:] = True

    def release(self, slot: int, tokens: Int[np.ndarray, "T"]) -> None:
        """Release the slot, which holds these tokens."""
        self.free[slot] = True
        self._record(slot, tokens, committed=True)

    def clear(self) -> None:
        """Release every slot and forget its contents."""
        self.free[:], self._committed[:], self._length[:] = True, True, 0

    def _common(self, tokens: Int[np.ndarray, "T"]) -> Int[np.ndarray, "B"]:
        """Return how many leading tokens each slot has in common with these."""
        count = len(tokens)
        same = self._tokens[:, :count] == tokens
        same &= np.arange(count) < self._length[:, None]
        return np.where(same.all(1), count, np.argmin(same, axis=1)) if count else self._length * 0

    def _copy_target(
        self, present: Int[np.ndarray, "B"], length: int, guide: bool
    ) -> SlotAssignment:
        """Return a free slot to copy into, the least useful one, in a shard that has the tokens."""
        options = np.flatnonzero(self.free)
        shard = np.arange(len(self.free)) // self.slots_per_shard
        if length:
            shards = set(shard[present == length].tolist())
            local = options[np.isin(shard[options], list(shards))]
            if not local.size:
                length = 0  # the tokens are on other devices: compute them again
            options = local if local.size else options
        tier = self._tier[options]
        order = np.lexsort(
            (
                options % self.slots_per_shard,
                self._last_used[options],
                (tier == 0) if guide else tier,
            )
        )
        slot = int(options[order[0]])
        if not length:
            return SlotAssignment(slot, 0, None)
        source = np.flatnonzero((present == length) & (shard == shard[slot]))[0]
        return SlotAssignment(slot, length, int(source))

    def _record(self, slot: int, tokens: Int[np.ndarray, "T"], *, committed: bool) -> None:
        self._clock += 1
        self._tokens[slot, : len(tokens)] = tokens
        self._length[slot] = len(tokens)
        self._committed[slot], self._last_used[slot] = committed, self._clock
