"""The book of lanes against its promise: what it says is kept lies there, whatever came before."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_jax.generation.slots import SHORTEST, SlotTable

SLOTS = 64


def book(blocks=1, depth=4, near=2):
    return SlotTable(blocks=blocks, depth=depth, slots=SLOTS, near=near)


def tokens(*parts):
    return np.concatenate([np.full(n, value) for value, n in parts]).astype(np.int32)


def test_the_table_of_the_docstring():
    b, image = book(), (7, 30)
    first = b.acquire(tokens(image, (1, 3)), guide=False)
    assert (first.slot, first.prefix_length, first.copy_from) == (0, 0, None)
    assert b.acquire(tokens(image, (2, 3)), guide=False) is None  # wait: it is being computed
    b.commit()
    second = b.acquire(tokens(image, (2, 3)), guide=False)
    assert (second.slot, second.prefix_length, second.copy_from) == (1, 30, 0)
    b.release(0, tokens(image, (1, 3), (9, 4)))
    again = b.acquire(tokens(image, (1, 3), (9, 4), (3, 2)), guide=False)  # the next turn
    assert (again.slot, again.prefix_length, again.copy_from) == (0, 37, None)


def test_little_in_common_is_computed_again_unless_it_is_all():
    b = book()
    b.acquire(tokens((7, SHORTEST - 1), (1, 9)), guide=False)
    b.commit()
    other = b.acquire(tokens((7, SHORTEST - 1), (2, 9)), guide=False)
    assert (other.prefix_length, other.copy_from) == (0, None)
    b.commit()
    start = b.acquire(tokens((7, 1)), guide=True)
    assert (start.prefix_length, start.copy_from) == (1, 0)


def test_streams_of_guidance_stand_behind_the_rows():
    b = book(depth=6, near=2)
    lanes = [b.acquire(tokens((i, 5)), guide=bool(g)).slot for i, g in enumerate([1, 0, 1, 0, 0])]
    assert lanes == [2, 0, 3, 1, 4]


def test_no_lane_is_free():
    b = book(depth=1, near=1)
    b.acquire(tokens((1, 2)), guide=False)
    with pytest.raises(IndexError, match="no lane is free"):
        b.acquire(tokens((2, 2)), guide=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 9)), min_size=1))
def test_what_is_kept_lies_there(asked):
    """A cache of tokens kept by hand: after copies and reads every lane holds what was wanted."""
    b, cache, busy = book(blocks=2, depth=3), np.full((6, SLOTS), -1), []
    for family, shared, tail in asked:
        want = tokens((100 + family, shared), (tail, 5))
        if not b.free.any():
            lane, held = busy.pop(0)
            b.release(lane, held)
        place = b.acquire(want, guide=bool(tail % 2))
        assert place is not None  # all is settled
        if place.copy_from is not None:
            assert place.copy_from // 3 == place.slot // 3  # the same device
            cache[place.slot, : place.prefix_length] = cache[place.copy_from, : place.prefix_length]
        assert (cache[place.slot, : place.prefix_length] == want[: place.prefix_length]).all()
        cache[place.slot, place.prefix_length : len(want)] = want[place.prefix_length :]
        b.commit()
        busy.append((place.slot, want))
    assert len({lane for lane, _ in busy}) == len(busy)
