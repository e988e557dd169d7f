"""Continuous batching: run a queue of requests through the rows of an engine.

    queue -> row: full stream into a KV-cache slot; a prefix that a slot holds is not recomputed
                  |
          decode a chunk of tokens on the device  <-------------------------+
                  |                                                         |
          rows that opened an image get slots for guidance; rows that       |
          closed one release them; finished rows are replaced from the -----+
          queue

The host decides between chunks only; the tokens of a row depend on its prompt, its sample number
and the settings, not on the other rows.
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
from medmax_jax.generation.sampling_params import (
    IMAGE_ONLY,
    UNCONDITIONAL,
    DecodeConfig,
    SamplingParams,
)
from medmax_jax.models import vocab as ids


@dataclasses.dataclass(frozen=True, eq=False)
class RequestOutput:
    """The output of one request so far."""

    index: int
    tokens: np.ndarray  # all tokens, EOS included; image mode: only the codes
    done: bool


@dataclasses.dataclass(kw_only=True, eq=False)
class RunningRequest:
    """A request that occupies a row, with its output and its KV-cache slots."""

    index: int
    request: Request
    out: list[int]
    lanes: list[int]  # KV-cache slots of the three streams; -1: none
    opened: int = 0  # start of the image that the slots serve

    def sequence(self) -> np.ndarray:
        """Return the tokens of the prompt and of the output so far."""
        return np.append(self.request.tokens, self.out).astype(np.int32)


def run_requests(
    e: Engine, requests: Sequence[Request], sample: Sample, *, mode: str, seed: int
) -> Iterator[list[RequestOutput]]:
    """Yield the outputs that changed after each chunk, until all requests are done."""
    sampling_params.check_seed(seed)
    knobs = sampling_params.sampling_params(sample)
    sizes = dict(blocks=e.slot_table.blocks, depth=e.slot_table.depth, barred=e.barred)
    compiled = sampling_params.decode_config(
        sample, e.vocab, mode=mode, codes=e.codes, slots=e.cache_length, **sizes
    )
    spare = e.slot_table.blocks * e.slot_table.depth - e.batch_size
    need = sampling_params.guidance_streams_needed(requests, sample, e.vocab, mode=mode)
    if spare < need:
        raise GenerateError(f"{spare} lanes beside {e.batch_size} rows; guidance needs {need} more")
    for request in requests:
        room = e.codes if mode == "image" else 1
        if len(request.tokens) + room > e.cache_length:
            raise GenerateError(
                f"a prompt has {len(request.tokens)} tokens, its answer needs {room}, a lane "
                f"holds {e.cache_length}; make the engine with more slots"
            )
    queue = collections.deque(
        (i, requests[i]) for i in prompt_requests.group_by_shared_image(requests)
    )
    seats: list[RunningRequest | None] = [None] * e.batch_size
    rows = _empty_state(e.batch_size)
    with engine.exclusive_use(e):
        try:
            while queue or any(seats):
                _admit(e, queue, seats, rows)
                _start_guidance(e, seats, rows, sampling_params.guidance_scales_active(sample))
                rows, out = _run(e, rows, knobs, seed, compiled)
                yield _collect_outputs(e, seats, rows, out)
        except GeneratorExit:  # the caller closed the iterator
            for seat, at in zip(seats, rows.positions, strict=True):
                if seat:
                    _release_slots(e, seat, at, range(3))
            raise


def _empty_state(rows: int) -> decode_loop.SequenceState:
    zero, none = np.zeros(rows, np.int32), np.full((rows, 3), -1, np.int32)
    return decode_loop.SequenceState(
        token=zero.copy(),
        lanes=none.copy(),
        positions=none.copy(),
        image_tokens_left=zero.copy(),
        budget=zero.copy(),
        text_tokens_used=zero.copy(),
        count=zero.copy(),
        sample_seed=zero.copy(),
        done=np.ones(rows, bool),
        needs_guidance_slots=np.zeros(rows, bool),
    )


def _admit(
    e: Engine, queue, seats: list[RunningRequest | None], rows: decode_loop.SequenceState
) -> None:
    """Assign requests to free rows and prefill their prompts without the last token."""
    vacant = [row for row, seat in enumerate(seats) if seat is None]
    taken = [(row, *queue.popleft()) for row in vacant[: len(queue)]]
    lanes = engine.prefill_prompts(e, [request.tokens[:-1] for *_, request in taken], guide=False)
    for (row, index, request), lane in zip(taken, lanes, strict=True):
        seats[row] = RunningRequest(index=index, request=request, out=[], lanes=[lane, -1, -1])
        rows.token[row], rows.sample_seed[row] = request.tokens[-1], request.number
        rows.budget[row], rows.text_tokens_used[row], rows.count[row] = request.budget, 0, 0
        rows.lanes[row], rows.positions[row] = seats[row].lanes, (len(request.tokens) - 1, 0, 0)
        opens = request.tokens[-1] == ids.BOI
        rows.image_tokens_left[row] = e.codes + 1 if opens else 0
        rows.done[row], rows.needs_guidance_slots[row] = False, opens
        padded = np.full(e.cache_length, request.tokens[0], np.int32)
        padded[: len(request.tokens)] = request.tokens
        with jax.set_mesh(e.mesh):
            e.seen = decode_loop.set_seen_tokens(e.seen, np.int32(row), padded)
        e.programs.add(("mark",))


def _start_guidance(
    e: Engine,
    seats: list[RunningRequest | None],
    rows: decode_loop.SequenceState,
    guided: tuple[bool, bool],
) -> None:
    """Assign guidance slots to rows that wait to generate an image, as far as slots are free."""
    room, chosen, wanted = int(e.slot_table.free.sum()), [], []
    for row in np.flatnonzero(rows.needs_guidance_slots & ~rows.done):
        before = seats[row].sequence()[:-1]
        streams = {}  # the longer one first: more of it may be cached
        if guided[1] and ids.is_image(before, e.vocab).any():
            streams[IMAGE_ONLY] = prompt_requests.image_only_tokens(before, e.vocab)
        if guided[0]:
            streams[UNCONDITIONAL] = before[:1]
        if len(streams) > room:
            break  # the other rows continue, and one of them will release its slots
        room -= len(streams)
        rows.needs_guidance_slots[row] = False
        seats[row].opened = len(before)
        chosen += [(row, stream) for stream in streams]
        wanted += list(streams.values())
    for (row, stream), tokens, lane in zip(
        chosen, wanted, engine.prefill_prompts(e, wanted, guide=True), strict=True
    ):
        seats[row].lanes[stream] = rows.lanes[row, stream] = lane
        rows.positions[row, stream] = len(tokens)


def _run(
    e: Engine, rows: decode_loop.SequenceState, knobs: SamplingParams, seed: int, plan: DecodeConfig
) -> tuple[decode_loop.SequenceState, Int[np.ndarray, "N C"]]:
    """Decode one chunk on the device."""
    busy = ~(rows.done | rows.needs_guidance_slots)
    in_image = (rows.image_tokens_left[busy] > 0).any()
    draws = {"text": "text", "image": "codes", "mixed": "both" if in_image else "text"}[plan.mode]
    held = rows.lanes[~rows.done]
    deepest = int((held[held >= 0] % e.slot_table.depth).max()) + 1
    fixed = dict(
        plan=plan,
        width=_active_slots_bucket(
            deepest, -(-e.batch_size // e.slot_table.blocks), e.slot_table.depth
        ),
        span=buckets.kv_length_bucket(int(rows.positions[busy].max()) + plan.chunk, e.cache_length),
        draws=draws,
    )
    e.programs.add(("run", *fixed.values()))
    with jax.set_mesh(e.mesh):
        e.cache, rows, e.seen, out = decode_loop.decode_chunk(
            e.model, e.layers, e.cache, rows, e.seen, knobs, jax.random.key(seed), **fixed
        )
    rows, out = jax.device_get((rows, out))
    return jax.tree.map(np.array, rows), out


def _collect_outputs(
    e: Engine, seats: list[RunningRequest | None], rows: decode_loop.SequenceState, out: np.ndarray
) -> list[RequestOutput]:
    """Return the new tokens per row; free the slots of finished answers and of closed images."""
    news = []
    for row, seat in enumerate(seats):
        if seat is None:
            continue
        fresh = out[row, : rows.count[row] - len(seat.out)].tolist()
        seat.out += fresh
        if fresh:
            tokens = np.array(seat.out, np.int32)
            news.append(RequestOutput(seat.index, tokens, bool(rows.done[row])))
        if rows.done[row]:
            _release_slots(e, seat, rows.positions[row], range(3))
            seats[row], rows.lanes[row] = None, -1
        elif rows.image_tokens_left[row] == 0 or rows.needs_guidance_slots[row]:
            _release_slots(e, seat, rows.positions[row], (UNCONDITIONAL, IMAGE_ONLY))
            rows.lanes[row] = seat.lanes
    return news


def _release_slots(e: Engine, seat: RunningRequest, at: Int[np.ndarray, "3"], streams) -> None:
    """Release slots and record which tokens they hold."""
    tokens = seat.sequence()
    for stream in streams:
        if (lane := seat.lanes[stream]) < 0:
            continue
        held = tokens
        if stream == UNCONDITIONAL:
            held = np.append(tokens[:1], tokens[seat.opened :])
        elif stream == IMAGE_ONLY:
            held = prompt_requests.image_only_tokens(tokens, e.vocab)
        e.slot_table.release(lane, held[: at[stream]])
        seat.lanes[stream] = -1


def _active_slots_bucket(deepest: int, near: int, depth: int) -> int:
    """Return the number of slots per block that run: few sizes, at least the deepest in use."""
    sizes = (near, 2 * near, depth)
    return next(size for size in sizes if deepest <= size <= depth)
