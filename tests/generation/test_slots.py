"""The slot table: the prefixes that it reports are in the cache, after any sequence of requests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_jax.generation.slots import MIN_SHARED_PREFIX, SlotTable

CACHE_LENGTH = 64


def make_table(shards=1, slots_per_shard=4, primary_slots=2):
    return SlotTable(
        shards=shards,
        slots_per_shard=slots_per_shard,
        cache_length=CACHE_LENGTH,
        primary_slots=primary_slots,
    )


def tokens(*parts):
    return np.concatenate([np.full(n, value) for value, n in parts]).astype(np.int32)


def test_worked_example():
    table, image = make_table(), (7, 30)
    first = table.acquire(tokens(image, (1, 3)), guide=False)
    assert (first.slot, first.prefix_length, first.copy_from) == (0, 0, None)
    assert table.acquire(tokens(image, (2, 3)), guide=False) is None  # wait: it is being computed
    table.commit()
    second = table.acquire(tokens(image, (2, 3)), guide=False)
    assert (second.slot, second.prefix_length, second.copy_from) == (1, 30, 0)
    table.release(0, tokens(image, (1, 3), (9, 4)))
    next_turn = table.acquire(tokens(image, (1, 3), (9, 4), (3, 2)), guide=False)  # the next turn
    assert (next_turn.slot, next_turn.prefix_length, next_turn.copy_from) == (0, 37, None)


def test_short_common_prefix_is_recomputed_unless_it_is_everything():
    table = make_table()
    table.acquire(tokens((7, MIN_SHARED_PREFIX - 1), (1, 9)), guide=False)
    table.commit()
    other = table.acquire(tokens((7, MIN_SHARED_PREFIX - 1), (2, 9)), guide=False)
    assert (other.prefix_length, other.copy_from) == (0, None)
    table.commit()
    start = table.acquire(tokens((7, 1)), guide=True)
    assert (start.prefix_length, start.copy_from) == (1, 0)


def test_guidance_uses_slots_after_the_primary_ones():
    table = make_table(slots_per_shard=6, primary_slots=2)
    slots = [
        table.acquire(tokens((i, 5)), guide=bool(g)).slot for i, g in enumerate([1, 0, 1, 0, 0])
    ]
    assert slots == [2, 0, 3, 1, 4]


def test_no_free_slot_raises():
    table = make_table(slots_per_shard=1, primary_slots=1)
    table.acquire(tokens((1, 2)), guide=False)
    with pytest.raises(IndexError, match="no KV-cache slot is free"):
        table.acquire(tokens((2, 2)), guide=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 9)), min_size=1))
def test_reported_prefixes_are_in_the_cache(requests):
    """In a cache that the test fills itself, each slot holds the tokens after copy and prefill."""
    table, cache, busy = make_table(shards=2, slots_per_shard=3), np.full((6, CACHE_LENGTH), -1), []
    for family, shared, tail in requests:
        expected = tokens((100 + family, shared), (tail, 5))
        if not table.free.any():
            slot, content = busy.pop(0)
            table.release(slot, content)
        assignment = table.acquire(expected, guide=bool(tail % 2))
        assert assignment is not None  # everything is committed
        if assignment.copy_from is not None:
            assert assignment.copy_from // 3 == assignment.slot // 3  # the same device
            cache[assignment.slot, : assignment.prefix_length] = cache[
                assignment.copy_from, : assignment.prefix_length
            ]
        assert (
            cache[assignment.slot, : assignment.prefix_length]
            == expected[: assignment.prefix_length]
        ).all()
        cache[assignment.slot, assignment.prefix_length : len(expected)] = expected[
            assignment.prefix_length :
        ]
        table.commit()
        busy.append((assignment.slot, expected))
    assert len({slot for slot, _ in busy}) == len(busy)
