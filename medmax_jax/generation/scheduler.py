"""Continuous batching: a queue of requests through the rows of an engine.

    queue -> row: full stream into a lane, what a lane already holds is not read again
                  |
          run a chunk of tokens on the device  <----------------------------+
                  |                                                         |
          rows that opened an image get lanes for guidance; rows that       |
          closed one give them back; finished rows give way to the queue ---+

The host decides between chunks only; what a row writes depends on its prompt, its number and the
settings, not on who sits beside it.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from medmax_jax.config import Sample
from medmax_jax.generation import buckets, decode_loop, engine, sampling_params
from medmax_jax.generation import requests as prompt_requests
from medmax_jax.generation.engine import Engine
from medmax_jax.generation.requests import GenerateError, Request
from medmax_jax.generation.sampling_params import IMAGE_ONLY, UNCONDITIONAL, Knobs, Plan
from medmax_jax.models import vocab as ids


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """What one request has so far."""

    index: int
    tokens: np.ndarray  # all of it, EOS included; image mode: the codes alone
    done: bool


@dataclasses.dataclass(kw_only=True, eq=False)
class _Seat:
    index: int
    request: Request
    out: list[int]
    lanes: list[int]  # of the three streams; -1: none
    opened: int = 0  # where the image that they are for begins

    def sequence(self) -> np.ndarray:
        return np.append(self.request.tokens, self.out).astype(np.int32)


def serve(
    e: Engine, requests: Sequence[Request], sample: Sample, *, mode: str, seed: int
) -> Iterator[list[Written]]:
    """What has changed after each chunk, until all requests are done."""
    sampling_params.check_seed(seed)
    knobs = sampling_params.knobs(sample)
    sizes = dict(blocks=e.book.blocks, depth=e.book.depth, barred=e.barred)
    compiled = sampling_params.plan(
        sample, e.vocab, mode=mode, codes=e.codes, slots=e.slots, **sizes
    )
    spare = e.book.blocks * e.book.depth - e.rows
    need = sampling_params.guidance(requests, sample, e.vocab, mode=mode)
    if spare < need:
        raise GenerateError(f"{spare} lanes beside {e.rows} rows; guidance needs {need} more")
    for request in requests:
        room = e.codes if mode == "image" else 1
        if len(request.tokens) + room > e.slots:
            raise GenerateError(
                f"a prompt has {len(request.tokens)} tokens, its answer needs {room}, a lane "
                f"holds {e.slots}; make the engine with more slots"
            )
    queue = collections.deque((i, requests[i]) for i in prompt_requests.order(requests))
    seats: list[_Seat | None] = [None] * e.rows
    rows = _nobody(e.rows)
    with engine.alone(e):
        try:
            while queue or any(seats):
                _admit(e, queue, seats, rows)
                _open(e, seats, rows, sampling_params.guided(sample))
                rows, out = _run(e, rows, knobs, seed, compiled)
                yield _take(e, seats, rows, out)
        except GeneratorExit:  # the caller left in the middle
            for seat, at in zip(seats, rows.at, strict=True):
                if seat:
                    _leave(e, seat, at, range(3))
            raise


def _nobody(rows: int) -> decode_loop.Rows:
    zero, none = np.zeros(rows, np.int32), np.full((rows, 3), -1, np.int32)
    return decode_loop.Rows(
        token=zero.copy(),
        lanes=none.copy(),
        at=none.copy(),
        left=zero.copy(),
        budget=zero.copy(),
        spent=zero.copy(),
        count=zero.copy(),
        number=zero.copy(),
        done=np.ones(rows, bool),
        waiting=np.zeros(rows, bool),
    )


def _admit(e: Engine, queue, seats: list[_Seat | None], rows: decode_loop.Rows) -> None:
    """Requests to free rows, their prompts without the last token to lanes."""
    vacant = [row for row, seat in enumerate(seats) if seat is None]
    taken = [(row, *queue.popleft()) for row in vacant[: len(queue)]]
    lanes = engine.hold(e, [request.tokens[:-1] for *_, request in taken], guide=False)
    for (row, index, request), lane in zip(taken, lanes, strict=True):
        seats[row] = _Seat(index=index, request=request, out=[], lanes=[lane, -1, -1])
        rows.token[row], rows.number[row] = request.tokens[-1], request.number
        rows.budget[row], rows.spent[row], rows.count[row] = request.budget, 0, 0
        rows.lanes[row], rows.at[row] = seats[row].lanes, (len(request.tokens) - 1, 0, 0)
        opens = request.tokens[-1] == ids.BOI
        rows.left[row] = e.codes + 1 if opens else 0
        rows.done[row], rows.waiting[row] = False, opens
        padded = np.full(e.slots, request.tokens[0], np.int32)
        padded[: len(request.tokens)] = request.tokens
        with jax.set_mesh(e.mesh):
            e.seen = decode_loop.mark(e.seen, np.int32(row), padded)
        e.programs.add(("mark",))


def _open(
    e: Engine, seats: list[_Seat | None], rows: decode_loop.Rows, guided: tuple[bool, bool]
) -> None:
    """Lanes of guidance for rows that wait to write an image, as far as lanes are free."""
    room, chosen, wanted = int(e.book.free.sum()), [], []
    for row in np.flatnonzero(rows.waiting & ~rows.done):
        before = seats[row].sequence()[:-1]
        streams = {}  # the longer one first: it has more to find
        if guided[1] and ids.is_image(before, e.vocab).any():
            streams[IMAGE_ONLY] = prompt_requests.pictorial(before, e.vocab)
        if guided[0]:
            streams[UNCONDITIONAL] = before[:1]
        if len(streams) > room:
            break  # the others go on, and one of them will give its lanes back
        room -= len(streams)
        rows.waiting[row] = False
        seats[row].opened = len(before)
        chosen += [(row, stream) for stream in streams]
        wanted += list(streams.values())
    for (row, stream), tokens, lane in zip(
        chosen, wanted, engine.hold(e, wanted, guide=True), strict=True
    ):
        seats[row].lanes[stream] = rows.lanes[row, stream] = lane
        rows.at[row, stream] = len(tokens)


def _run(
    e: Engine, rows: decode_loop.Rows, knobs: Knobs, seed: int, plan: Plan
) -> tuple[decode_loop.Rows, Int[np.ndarray, "N C"]]:
    """A chunk on the device."""
    busy = ~(rows.done | rows.waiting)
    in_image = (rows.left[busy] > 0).any()
    draws = {"text": "text", "image": "codes", "mixed": "both" if in_image else "text"}[plan.mode]
    held = rows.lanes[~rows.done]
    deepest = int((held[held >= 0] % e.book.depth).max()) + 1
    fixed = dict(
        plan=plan,
        width=_width(deepest, -(-e.rows // e.book.blocks), e.book.depth),
        span=buckets.span(int(rows.at[busy].max()) + plan.chunk, e.slots),
        draws=draws,
    )
    e.programs.add(("run", *fixed.values()))
    with jax.set_mesh(e.mesh):
        e.cache, rows, e.seen, out = decode_loop.run(
            e.model, e.layers, e.cache, rows, e.seen, knobs, jax.random.key(seed), **fixed
        )
    rows, out = jax.device_get((rows, out))
    return jax.tree.map(np.array, rows), out


def _take(
    e: Engine, seats: list[_Seat | None], rows: decode_loop.Rows, out: np.ndarray
) -> list[Written]:
    """What each row wrote; lanes of finished answers and of closed images are free again."""
    news = []
    for row, seat in enumerate(seats):
        if seat is None:
            continue
        fresh = out[row, : rows.count[row] - len(seat.out)].tolist()
        seat.out += fresh
        if fresh:
            tokens = np.array(seat.out, np.int32)
            news.append(Written(seat.index, tokens, bool(rows.done[row])))
        if rows.done[row]:
            _leave(e, seat, rows.at[row], range(3))
            seats[row], rows.lanes[row] = None, -1
        elif rows.left[row] == 0 or rows.waiting[row]:
            _leave(e, seat, rows.at[row], (UNCONDITIONAL, IMAGE_ONLY))
            rows.lanes[row] = seat.lanes
    return news


def _leave(e: Engine, seat: _Seat, at: Int[np.ndarray, "3"], streams) -> None:
    """Gives lanes back, and says what they hold."""
    tokens = seat.sequence()
    for stream in streams:
        if (lane := seat.lanes[stream]) < 0:
            continue
        held = tokens
        if stream == UNCONDITIONAL:
            held = np.append(tokens[:1], tokens[seat.opened :])
        elif stream == IMAGE_ONLY:
            held = prompt_requests.pictorial(tokens, e.vocab)
        e.book.release(lane, held[: at[stream]])
        seat.lanes[stream] = -1


def _width(deepest: int, near: int, depth: int) -> int:
    """Lanes of a block that run: few sizes, at least the deepest one in use."""
    sizes = (near, 2 * near, depth)
    return next(size for size in sizes if deepest <= size <= depth)
