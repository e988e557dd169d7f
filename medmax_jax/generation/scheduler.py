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

from medmax_jax.generation import buckets, decode_loop, engine, sampling_params
from medmax_jax.generation import requests as prompt_requests
from medmax_jax.generation.decode_loop import SequenceState
from medmax_jax.generation.engine import Engine
from medmax_jax.generation.requests import GenerateError, Request
from medmax_jax.generation.sampling_params import DecodeSettings
from medmax_jax.models import vocab as ids
from medmax_jax.models.guidance_streams import IMAGE_ONLY, UNCONDITIONAL, guidance_stream


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
    slots: list[int]  # KV-cache slots of the three streams; -1: none
    opened: int = 0  # start of the image that the guidance slots serve

    def sequence(self) -> np.ndarray:
        """Return the tokens of the prompt and of the output so far."""
        return np.append(self.request.tokens, self.out).astype(np.int32)


def run_requests(
    e: Engine, requests: Sequence[Request], settings: DecodeSettings, seed: int
) -> Iterator[list[RequestOutput]]:
    """Yield the outputs that changed after each chunk, until all requests are done.

    Args:
        e: an engine that no other iterator uses.
        requests: the requests, in any number.
        settings: the sampling options of all requests.
        seed: the seed of all samples.
    """
    _check_sizes(e, requests, settings)
    queue = collections.deque(
        (i, requests[i]) for i in prompt_requests.group_by_shared_image(requests)
    )
    running: list[RunningRequest | None] = [None] * e.sizes.batch_size
    rows = _empty_state(e.sizes.batch_size)
    with engine.exclusive_use(e):
        try:
            while queue or any(running):
                _admit(e, queue, running, rows)
                _start_guidance(e, running, rows, settings.guidance)
                rows, out = _run(e, rows, settings, seed)
                yield _collect_outputs(e, running, rows, out)
        except GeneratorExit:  # the caller closed the iterator
            for request, positions in zip(running, rows.positions, strict=True):
                if request:
                    _release_slots(e, request, positions, range(3))
            raise


def _check_sizes(e: Engine, requests: Sequence[Request], settings: DecodeSettings) -> None:
    """Raise GenerateError where the engine has too few slots or positions for the requests."""
    spare = e.sizes.num_slots - e.sizes.batch_size
    need = sampling_params.guidance_streams_needed(requests, settings)
    if spare < need:
        raise GenerateError(
            f"the engine has {e.sizes.num_slots} cache slots for a batch of {e.sizes.batch_size}; "
            f"guidance needs {need} more, not {spare}: increase num_slots"
        )
    for request in requests:
        answer = e.codes if settings.config.mode == "image" else 1
        if len(request.tokens) + answer > e.sizes.cache_length:
            raise GenerateError(
                f"a prompt has {len(request.tokens)} tokens and its answer needs {answer}, but a "
                f"cache slot holds {e.sizes.cache_length}; increase cache_length of the engine"
            )


def _empty_state(batch_size: int) -> SequenceState:
    zero, none = np.zeros(batch_size, np.int32), np.full((batch_size, 3), -1, np.int32)
    return SequenceState(
        token=zero.copy(),
        slots=none.copy(),
        positions=none.copy(),
        image_tokens_left=zero.copy(),
        budget=zero.copy(),
        text_tokens_used=zero.copy(),
        count=zero.copy(),
        sample_seed=zero.copy(),
        done=np.ones(batch_size, bool),
        needs_guidance_slots=np.zeros(batch_size, bool),
    )


def _admit(e: Engine, queue, running: list[RunningRequest | None], rows: SequenceState) -> None:
    """Assign requests to free rows and prefill their prompts without the last token."""
    free = [row for row, request in enumerate(running) if request is None]
    admitted = [(row, *queue.popleft()) for row in free[: len(queue)]]
    prompts = [request.tokens[:-1] for *_, request in admitted]
    slots = engine.prefill_prompts(e, prompts, guide=False)
    for (row, index, request), slot in zip(admitted, slots, strict=True):
        running[row] = RunningRequest(index=index, request=request, out=[], slots=[slot, -1, -1])
        rows.token[row], rows.sample_seed[row] = request.tokens[-1], request.sample_seed
        rows.budget[row], rows.text_tokens_used[row], rows.count[row] = request.budget, 0, 0
        rows.slots[row], rows.positions[row] = running[row].slots, (len(request.tokens) - 1, 0, 0)
        opens = request.tokens[-1] == ids.BOI
        rows.image_tokens_left[row] = e.codes + 1 if opens else 0
        rows.done[row], rows.needs_guidance_slots[row] = False, opens
        padded = np.full(e.sizes.cache_length, request.tokens[0], np.int32)
        padded[: len(request.tokens)] = request.tokens
        with jax.set_mesh(e.mesh):
            e.seen = decode_loop.set_seen_tokens(e.seen, np.int32(row), padded)
        e.programs.add(("set_seen_tokens",))


def _start_guidance(
    e: Engine,
    running: list[RunningRequest | None],
    rows: SequenceState,
    guidance: tuple[bool, bool],
) -> None:
    """Assign guidance slots to rows that wait to generate an image, as far as slots are free."""
    free, chosen, prompts = int(e.slot_table.free.sum()), [], []
    for row in np.flatnonzero(rows.needs_guidance_slots & ~rows.done):
        before = running[row].sequence()[:-1]
        needed = []  # the longer one first: more of it may be cached
        if guidance[1] and ids.is_image(before, e.vocab).any():
            needed.append(IMAGE_ONLY)
        if guidance[0]:
            needed.append(UNCONDITIONAL)
        streams = {s: guidance_stream(before, len(before), s, e.vocab) for s in needed}
        if len(streams) > free:
            break  # the other rows continue, and one of them will release its slots
        free -= len(streams)
        rows.needs_guidance_slots[row] = False
        running[row].opened = len(before)
        chosen += [(row, stream) for stream in streams]
        prompts += list(streams.values())
    slots = engine.prefill_prompts(e, prompts, guide=True)
    for (row, stream), tokens, slot in zip(chosen, prompts, slots, strict=True):
        running[row].slots[stream] = rows.slots[row, stream] = slot
        rows.positions[row, stream] = len(tokens)


def _run(
    e: Engine, rows: SequenceState, settings: DecodeSettings, seed: int
) -> tuple[SequenceState, Int[np.ndarray, "N C"]]:
    """Decode one chunk on the device."""
    config, table = settings.config, e.slot_table
    busy = ~(rows.done | rows.needs_guidance_slots)
    in_image = (rows.image_tokens_left[busy] > 0).any()
    kinds = {"text": "text", "image": "codes", "mixed": "both" if in_image else "text"}
    draws = kinds[config.mode]
    used = rows.slots[~rows.done]
    highest = int((used[used >= 0] % table.slots_per_shard).max()) + 1
    primary_slots = -(-e.sizes.batch_size // table.shards)
    width = _active_slots_bucket(highest, primary_slots, table.slots_per_shard)
    longest = int(rows.positions[busy].max()) + config.chunk
    span = buckets.kv_length_bucket(longest, e.sizes.cache_length)
    e.programs.add(("decode_chunk", config, width, span, draws))
    with jax.set_mesh(e.mesh):
        e.cache, rows, e.seen, out = decode_loop.decode_chunk(
            e.model, e.layers, e.cache, rows, e.seen, settings.params, jax.random.key(seed),
            config=config, width=width, span=span, draws=draws,
        )  # fmt: skip
    rows, out = jax.device_get((rows, out))
    return jax.tree.map(np.array, rows), out


def _collect_outputs(
    e: Engine, running: list[RunningRequest | None], rows: SequenceState, out: np.ndarray
) -> list[RequestOutput]:
    """Return the new tokens per row; free the slots of finished answers and of closed images."""
    outputs = []
    for row, request in enumerate(running):
        if request is None:
            continue
        new = out[row, : rows.count[row] - len(request.out)].tolist()
        request.out += new
        if new:
            tokens = np.array(request.out, np.int32)
            outputs.append(RequestOutput(request.index, tokens, bool(rows.done[row])))
        if rows.done[row]:
            _release_slots(e, request, rows.positions[row], range(3))
            running[row], rows.slots[row] = None, -1
        elif rows.image_tokens_left[row] == 0 or rows.needs_guidance_slots[row]:
            _release_slots(e, request, rows.positions[row], (UNCONDITIONAL, IMAGE_ONLY))
            rows.slots[row] = request.slots
    return outputs


def _release_slots(
    e: Engine, request: RunningRequest, positions: Int[np.ndarray, "3"], streams
) -> None:
    """Release slots and record which tokens they hold."""
    sequence = request.sequence()
    for stream in streams:
        if (slot := request.slots[stream]) < 0:
            continue
        tokens = guidance_stream(sequence, request.opened, stream, e.vocab)
        e.slot_table.release(slot, tokens[: positions[stream]])
        request.slots[stream] = -1


def _active_slots_bucket(highest: int, primary_slots: int, slots_per_shard: int) -> int:
    """Return the number of slots per shard that run: few sizes, at least the highest in use."""
    sizes = (primary_slots, 2 * primary_slots, slots_per_shard)
    return next(size for size in sizes if highest <= size <= slots_per_shard)
