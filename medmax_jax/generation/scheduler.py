"""Continuous batching: run a queue of requests through the rows of an engine.

    queue -> row: full stream into a KV-cache slot; a prefix that a slot holds is not recomputed
                  |
          decode a chunk of tokens on the device  <-------------------------+
                  |                                                         |
          rows that opened an image get slots for guidance; rows that       |
          closed one release them; finished rows are replaced from the -----+
          queue

The host decides between chunks only, and there requests can be added and cancelled. The tokens of a
row depend on its prompt, its settings, its seed and its sample number, not on the other rows.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from medmax_jax.generation import buckets, decode_loop, engine, jacobi, sampling_params
from medmax_jax.generation import requests as prompt_requests
from medmax_jax.generation.decode_loop import SequenceState
from medmax_jax.generation.engine import Engine, EngineSizes
from medmax_jax.generation.requests import GenerateError, Request
from medmax_jax.generation.sampling_params import DecodeConfig, DecodeSettings, SamplingParams
from medmax_jax.models import vocab as ids
from medmax_jax.models.guidance_streams import IMAGE_ONLY, UNCONDITIONAL, guidance_stream


@dataclasses.dataclass(frozen=True, eq=False)
class RequestOutput:
    """The output of one request so far."""

    index: int
    tokens: np.ndarray  # all tokens, EOS included; image mode: only the codes
    done: bool
    steps: int  # passes of the model so far, without the prompt


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QueuedRequest:
    """A request with its settings; `index` identifies its outputs."""

    index: int
    request: Request
    settings: DecodeSettings
    seed: int


@dataclasses.dataclass(kw_only=True, eq=False)
class RunningRequest:
    """A request that occupies a row, with its output and its KV-cache slots."""

    index: int
    request: Request
    settings: DecodeSettings
    out: list[int]
    slots: list[int]  # KV-cache slots of the three streams; -1: none
    opened: int = 0  # start of the image that the guidance slots serve

    def sequence(self) -> np.ndarray:
        """Return the tokens of the prompt and of the output so far."""
        return np.append(self.request.tokens, self.out).astype(np.int32)


@dataclasses.dataclass(kw_only=True, eq=False)
class RequestBatch:
    """The rows of an engine, and the queue before them."""

    engine: Engine
    queue: collections.deque[QueuedRequest]
    running: list[RunningRequest | None]  # by row
    rows: SequenceState
    params: SamplingParams  # by row
    drafts: jacobi.Drafts | None  # by row, on the device; None until they are needed


def open_batch(e: Engine) -> RequestBatch:
    """Return free rows and an empty queue."""
    count = e.sizes.batch_size
    return RequestBatch(
        engine=e,
        queue=collections.deque(),
        running=[None] * count,
        rows=decode_loop.empty_rows(count),
        params=sampling_params.empty_params(count),
        drafts=None,
    )


def add(batch: RequestBatch, queued: QueuedRequest) -> None:
    """Add a request to the queue; raise GenerateError where the engine is too small for it."""
    check_sizes(batch.engine.sizes, queued.request, queued.settings)
    own, other = queued.settings.config.jacobi, next(_present(batch), None)
    if other is None:
        batch.drafts = None
    elif own != other.settings.config.jacobi:
        raise GenerateError(
            f"sample.jacobi_* of a request are {own}, but {other.settings.config.jacobi} in the "
            "requests before it; all requests that run together need the same"
        )
    batch.queue.append(queued)


def _present(batch: RequestBatch) -> Iterator[QueuedRequest | RunningRequest]:
    """Yield the requests in the queue and in the rows."""
    yield from batch.queue
    yield from filter(None, batch.running)


def cancel(batch: RequestBatch, index: int) -> None:
    """Remove a request from the queue or from its row, whose slots are released."""
    batch.queue = collections.deque(queued for queued in batch.queue if queued.index != index)
    for row, request in enumerate(batch.running):
        if request is not None and request.index == index:
            _release_slots(batch.engine, request, batch.rows.positions[row], range(3))
            batch.running[row], batch.rows.slots[row], batch.rows.done[row] = None, -1, True


def step(batch: RequestBatch, *, admit: bool = True) -> list[RequestOutput]:
    """Fill free rows from the queue and decode one chunk; return the outputs that changed.

    It runs inside `engine.exclusive_use`, with at least one request in the batch. admit: False
    leaves the queue as it is, with at least one request in a row.
    """
    if admit:
        _admit(batch)
    _start_guidance(batch)
    return _collect_outputs(batch, _run(batch))


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
    batch = open_batch(e)
    for i in prompt_requests.group_by_shared_image(requests):
        add(batch, QueuedRequest(index=i, request=requests[i], settings=settings, seed=seed))
    with engine.exclusive_use(e):
        try:
            while batch.queue or any(batch.running):
                yield step(batch)
        except GeneratorExit:  # the caller closed the iterator
            for request in filter(None, batch.running):
                cancel(batch, request.index)
            raise


def check_sizes(sizes: EngineSizes, request: Request, settings: DecodeSettings) -> None:
    """Raise GenerateError where an engine has too few slots or positions for the request."""
    spare = sizes.num_slots - sizes.batch_size
    need = sampling_params.guidance_streams_needed([request], settings)
    if spare < need:
        raise GenerateError(
            f"the engine has {sizes.num_slots} cache slots for a batch of {sizes.batch_size}; "
            f"guidance needs {need} more, not {spare}: increase num_slots"
        )
    answer = settings.config.codes if settings.mode == "image" else 1
    if len(request.tokens) + answer > sizes.cache_length:
        raise GenerateError(
            f"a prompt has {len(request.tokens)} tokens and its answer needs {answer}, but a "
            f"cache slot holds {sizes.cache_length}; increase cache_length of the engine"
        )


def _admit(batch: RequestBatch) -> None:
    """Assign requests to free rows and prefill their prompts without the last token."""
    e, rows = batch.engine, batch.rows
    free = [row for row, request in enumerate(batch.running) if request is None]
    admitted = [(row, batch.queue.popleft()) for row in free[: len(batch.queue)]]
    prompts = [queued.request.tokens[:-1] for _, queued in admitted]
    slots = engine.prefill_prompts(e, prompts, guide=False)
    for (row, queued), slot in zip(admitted, slots, strict=True):
        request, slots_of_row = queued.request, [slot, -1, -1]
        batch.running[row] = RunningRequest(
            index=queued.index, request=request, settings=queued.settings, out=[],
            slots=slots_of_row,
        )  # fmt: skip
        for of_rows, option in zip(batch.params, queued.settings.params, strict=True):
            of_rows[row] = option
        rows.token[row], rows.seed[row] = request.tokens[-1], queued.seed
        rows.sample_seed[row], rows.count[row], rows.steps[row] = request.sample_seed, 0, 0
        rows.budget[row], rows.text_tokens_used[row] = request.budget, 0
        rows.slots[row], rows.positions[row] = slots_of_row, (len(request.tokens) - 1, 0, 0)
        opens = request.tokens[-1] == ids.BOI
        rows.image_tokens_left[row] = e.codes + 1 if opens else 0
        rows.done[row], rows.needs_guidance_slots[row] = False, opens
        padded = np.full(e.sizes.cache_length, request.tokens[0], np.int32)
        padded[: len(request.tokens)] = request.tokens
        with jax.set_mesh(e.mesh):
            e.seen = decode_loop.set_seen_tokens(e.seen, np.int32(row), padded)
        e.programs.add(("set_seen_tokens",))


def _start_guidance(batch: RequestBatch) -> None:
    """Assign guidance slots to rows that wait to generate an image, as far as slots are free."""
    e, rows, running = batch.engine, batch.rows, batch.running
    free, chosen, prompts = int(e.slot_table.free.sum()), [], []
    for row in np.flatnonzero(rows.needs_guidance_slots & ~rows.done):
        before, guidance = running[row].sequence()[:-1], running[row].settings.guidance
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


def _run(batch: RequestBatch) -> Int[np.ndarray, "N C"]:
    """Decode one chunk on the device; return the new tokens of each row."""
    e, rows, table = batch.engine, batch.rows, batch.engine.slot_table
    busy = ~(rows.done | rows.needs_guidance_slots)
    config, draws = _program(batch, busy)
    used = rows.slots[~rows.done]
    highest = int((used[used >= 0] % table.slots_per_shard).max()) + 1
    primary_slots = -(-e.sizes.batch_size // table.shards)
    width = _active_slots_bucket(highest, primary_slots, table.slots_per_shard)
    window = config.jacobi.window if config.jacobi else 1
    fed = decode_loop.tokens_fed(rows.image_tokens_left, window)
    longest = rows.positions + np.maximum(fed, config.chunk)[:, None]
    span = buckets.kv_length_bucket(int(longest[busy].max()), e.sizes.cache_length)
    e.programs.add(("decode_chunk", config, width, span, draws))
    with jax.set_mesh(e.mesh):
        drafts = None
        if config.jacobi:
            drafts = batch.drafts or decode_loop.empty_drafts(e.sizes.batch_size, config)
        e.cache, rows, e.seen, drafts, out = decode_loop.decode_chunk(
            e.model, e.layers, e.cache, rows, e.seen, drafts, batch.params,
            config=config, width=width, span=span, draws=draws,
        )  # fmt: skip
        batch.drafts = drafts or batch.drafts
    rows, out = jax.device_get((rows, out))
    batch.rows = jax.tree.map(np.array, rows)
    return out


def _program(batch: RequestBatch, busy: Bool[np.ndarray, "N"]) -> tuple[DecodeConfig, str]:
    """Return the static options of a chunk, and the kinds of tokens that it samples."""
    params, in_image = batch.params, busy & (batch.rows.image_tokens_left > 0)
    only_codes = params.ends_with_codes[busy].all()
    draws = "text" if not in_image.any() else "codes" if only_codes else "both"
    config = next(filter(None, batch.running)).settings.config
    return dataclasses.replace(
        config,
        jacobi=None if draws == "text" else config.jacobi,
        text_greedy=bool(params.text_greedy[busy & ~params.ends_with_codes].all()),
        image_greedy=bool(params.image_greedy[in_image].all()),
    ), draws


def _collect_outputs(batch: RequestBatch, out: Int[np.ndarray, "N C"]) -> list[RequestOutput]:
    """Return the new tokens per row; free the slots of finished answers and of closed images."""
    e, rows, running, outputs = batch.engine, batch.rows, batch.running, []
    for row, request in enumerate(running):
        if request is None:
            continue
        new = out[row, : rows.count[row] - len(request.out)].tolist()
        request.out += new
        if new:
            tokens = np.array(request.out, np.int32)
            outputs.append(
                RequestOutput(request.index, tokens, bool(rows.done[row]), int(rows.steps[row]))
            )
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
