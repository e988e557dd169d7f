"""A model with a KV cache: prefill with reuse of common prefixes, and scoring of options.

    prefill_prompts   BOS [image] "Is it a CT?"     slot 9: first 1,027 tokens copied, five computed
    score_options     options after a prompt        the prompt is computed once

An engine keeps the contents of its KV-cache slots from one call to the next: the next question
about an image, the next turn of a chat. scheduler.py generates answers with it. A user of the slots
runs inside `exclusive_use`: an error or an interruption, including out of memory, leaves an engine
that is empty and can be used again.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from medmax_jax.config import Vocab
from medmax_jax.generation import buckets, decode_loop, requests
from medmax_jax.generation.requests import GenerateError, Request
from medmax_jax.generation.slots import SlotAssignment, SlotTable
from medmax_jax.models import kv_cache
from medmax_jax.models import vocab as ids
from medmax_jax.models.chameleon import Chameleon

SIDE_BY_SIDE = 8  # prompts of a block that are computed in one call
COPIES = 4  # copies per block in one call


@dataclasses.dataclass(kw_only=True, eq=False)
class Engine:
    """A model and a cache of slots with `cache_length` tokens; `batch_size` answers at once."""

    model: Chameleon
    layers: kv_cache.UnstackedLayers | None
    vocab: Vocab
    codes: int  # per image
    mesh: jax.sharding.Mesh
    batch_size: int
    cache_length: int
    cache_dtype: str  # "model" or "int8"
    slot_table: SlotTable
    cache: kv_cache.Cache | None  # None: it was lost by a failure
    seen: jax.Array | None
    programs: set[tuple[Any, ...]]  # programs requested so far: name and static arguments
    busy: bool = False  # the slots are in use
    tokens_prefilled: int = 0  # prompt tokens that the model had to compute; the others were copied
    barred: tuple[int, ...] = ()  # ids that text never contains


def make_engine(
    model: Chameleon,
    vocab: Vocab,
    mesh: jax.sharding.Mesh,
    *,
    codes: int,
    rows: int,
    lanes: int,
    slots: int,
    kind: str,
    barred: tuple[int, ...] = (),
) -> Engine:
    """Create an empty engine.

    Args:
        model: the model; its mesh is `mesh`.
        codes: VQ codes per image.
        rows: batch size.
        lanes: number of KV-cache slots, at least `rows`; two more where images are guided.
        slots: cache length in tokens.
        kind: KV-cache dtype, see kv_cache.py.
        barred: ids that are never generated as text, `Tokenizer.barred` of the model's tokenizer.
    """
    blocks = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows < 1:
        raise GenerateError(f"rows is {rows}; at least one answer is written at once")
    if slots > model.config.context_length:
        raise GenerateError(f"slots is {slots}; the model holds {model.config.context_length}")
    depth, near = -(-lanes // blocks), -(-rows // blocks)
    with _room(model, rows=rows, lanes=depth * blocks, slots=slots, kind=kind):
        engine = Engine(
            model=model,
            layers=kv_cache.unstack_layers(model, mesh),
            vocab=vocab,
            codes=codes,
            mesh=mesh,
            batch_size=rows,
            cache_length=slots,
            cache_dtype=kind,
            slot_table=SlotTable(blocks=blocks, depth=depth, slots=slots, near=near),
            cache=None,
            seen=None,
            programs=set(),
            barred=barred,
        )
        _reset_cache(engine)
    return engine


@contextlib.contextmanager
def exclusive_use(engine: Engine) -> Iterator[None]:
    """Give the block exclusive use of the slots; all of them are free afterwards.

    A caller that leaves between two chunks releases its slots itself. Any other exit during the
    work discards the contents of the slots: a failed program has consumed the cache, and on some
    devices reports this only when its results are read. The next user gets a fresh cache.
    """
    if engine.busy:
        raise GenerateError(
            "the engine is in the middle of other answers; finish or close their iterator first"
        )
    e, lanes = engine, engine.slot_table.blocks * engine.slot_table.depth
    engine.busy = True
    try:
        with _room(
            e.model, rows=e.batch_size, lanes=lanes, slots=e.cache_length, kind=e.cache_dtype
        ):
            if engine.cache is None:
                _reset_cache(engine)
            yield
    except GeneratorExit:
        raise
    except BaseException:
        for array in jax.tree.leaves((engine.cache, engine.seen)):
            array.delete()  # now, not when the traceback that refers to it is gone
        engine.cache = engine.seen = None
        engine.slot_table.clear()
        raise
    finally:
        engine.busy = False


def prefill_prompts(
    engine: Engine, wanted: Sequence[Int[np.ndarray, "_"]], *, guide: bool
) -> list[int]:
    """Return slots that now hold these tokens; the same number of slots must be free.

    A prefix that some slot holds is copied. A prefix that two prompts share is computed once: the
    second prompt waits.
    """
    lanes, todo = [-1] * len(wanted), list(range(len(wanted)))
    while todo:
        wave = [(i, engine.slot_table.acquire(wanted[i], guide=guide)) for i in todo]
        todo = [i for i, place in wave if place is None]
        placed = [(i, place) for i, place in wave if place is not None]
        _copy(engine, [place for _, place in placed])
        _read(engine, [(place, wanted[i]) for i, place in placed])
        engine.slot_table.commit()
        for i, place in placed:
            lanes[i] = place.slot
    return lanes


def score_options(
    engine: Engine,
    prompts: Sequence[Int[np.ndarray, "_"]],
    options: Sequence[Sequence[Int[np.ndarray, "_"]]],
) -> list[list[tuple[Float[np.ndarray, "_"], Bool[np.ndarray, "_"]]]]:
    """Return the log-likelihood of each token of each option, and whether it is the best token.

    A prompt is computed once, and its options one after another in the same slot behind it.
    """
    found: list[list[Any]] = [[None] * len(each) for each in options]
    most = min(engine.batch_size, SIDE_BY_SIDE * engine.slot_table.blocks)
    order = requests.group_by_shared_image([Request(p, 0, 0) for p in prompts])
    with exclusive_use(engine):
        for start in range(0, len(order), most):
            _likelihoods(engine, prompts, options, order[start : start + most], found)
    return found


def _likelihoods(engine: Engine, prompts, options, part: list[int], found) -> None:
    """Compute the likelihoods for the prompts `part` in one batch and write them to `found`."""
    lanes = prefill_prompts(engine, [prompts[i][:-1] for i in part], guide=False)
    for turn in range(max(len(options[i]) for i in part)):
        jobs = [
            (lane, len(prompts[i]) - 1, np.append(prompts[i][-1:], options[i][turn]), i)
            for lane, i in zip(lanes, part, strict=True)
            if turn < len(options[i])
        ]
        for (*_, i), answer in zip(jobs, _score(engine, jobs), strict=True):
            found[i][turn] = answer
    for lane, i in zip(lanes, part, strict=True):
        engine.slot_table.release(lane, prompts[i][:-1])


def _reset_cache(engine: Engine) -> None:
    """Allocate an empty cache, and rows that have seen no tokens."""
    lanes = engine.slot_table.blocks * engine.slot_table.depth
    with jax.set_mesh(engine.mesh):
        made = (
            kv_cache.init_cache(
                engine.model.config, lanes=lanes, slots=engine.cache_length, kind=engine.cache_dtype
            ),
            jnp.zeros((engine.batch_size, engine.vocab.size), bool),
        )
    engine.cache, engine.seen = jax.block_until_ready(made)


def _room(
    model: Chameleon, *, rows: int, lanes: int, slots: int, kind: str
) -> contextlib.AbstractContextManager[None]:
    """Explain an out-of-memory error: the allocation and the settings that reduce it."""
    size = kv_cache.cache_bytes(model.config, lanes=lanes, slots=slots, kind=kind)
    mends = [
        "take fewer rows (--rows; --config.rows of an evaluation)",
        "a shorter context (shorter prompts, a smaller sample.max_gen_len)",
        'a cache in bytes (--cache=int8, kind="int8")',
    ]
    return buckets.explain_out_of_memory(
        f"{rows} rows of {slots} slots have a cache of {lanes} lanes, "
        f"{buckets.format_mib(size)}, beside "
        f"the model's {buckets.format_mib(buckets.tree_bytes(model))}",
        " or ".join(mends[: 2 if kind == "int8" else 3]),
    )


def _copy(engine: Engine, places: Sequence[SlotAssignment]) -> None:
    depth, blocks = engine.slot_table.depth, engine.slot_table.blocks
    pairs = [(p.copy_from, p.slot, p.prefix_length) for p in places if p.copy_from is not None]
    if not pairs:
        return
    span = buckets.kv_length_bucket(max(kept for *_, kept in pairs), engine.cache_length)
    each = [[(s % depth, t % depth) for s, t, _ in pairs if t // depth == b] for b in range(blocks)]
    for start in range(0, max(map(len, each)), COPIES):
        moves = np.zeros((2, blocks, COPIES), np.int32)  # copying slot 0 to slot 0 does nothing
        for block, some in enumerate(each):
            for i, move in enumerate(some[start : start + COPIES]):
                moves[:, block, i] = move
        engine.programs.add(("copy", span))
        with jax.set_mesh(engine.mesh):
            engine.cache = decode_loop.copy_slots(engine.cache, *moves.reshape(2, -1), span=span)


def _read(engine: Engine, jobs: Sequence[tuple[SlotAssignment, Int[np.ndarray, "_"]]]) -> None:
    """Compute the tokens that no slot holds."""
    left = [
        (p.slot, p.prefix_length, tokens[p.prefix_length :])
        for p, tokens in jobs
        if p.prefix_length < len(tokens)
    ]
    engine.tokens_prefilled += sum(len(tokens) for *_, tokens in left)
    for (tokens, positions, lanes), _ in _prefill_batches(engine, left):
        span = buckets.kv_length_bucket(int(positions.max()) + 1, engine.cache_length)
        engine.programs.add(("prefill", tokens.shape, span))
        with jax.set_mesh(engine.mesh):
            engine.cache = decode_loop.prefill(
                engine.model, engine.layers, engine.cache, tokens, positions, lanes, span=span
            )


def _score(engine: Engine, jobs: Sequence[tuple[int, int, np.ndarray, int]]) -> list[Any]:
    """Score jobs: each feeds a prompt's last token and all tokens of an option but the last."""
    fed = [(lane, start, tokens[:-1]) for lane, start, tokens, _ in jobs]
    found = [([], []) for _ in jobs]
    for (tokens, positions, lanes), rows in _prefill_batches(engine, fed):
        targets = np.zeros_like(tokens)
        for row, job, offset, count in rows:
            targets[row, :count] = jobs[job][2][offset + 1 : offset + 1 + count]
        span = buckets.kv_length_bucket(int(positions.max()) + 1, engine.cache_length)
        engine.programs.add(("score", tokens.shape, span))
        with jax.set_mesh(engine.mesh):
            engine.cache, *answers = decode_loop.score_tokens(
                engine.model,
                engine.layers,
                engine.cache,
                tokens,
                positions,
                lanes,
                targets,
                span=span,
            )
        likely, best = jax.device_get(answers)
        for row, job, _, count in rows:
            found[job][0].append(likely[row, :count])
            found[job][1].append(best[row, :count])
    return [(np.concatenate(likely), np.concatenate(best)) for likely, best in found]


def _prefill_batches(engine: Engine, jobs: Sequence[tuple[int, int, Int[np.ndarray, "_"]]]):
    """Yield jobs (slot, first position, tokens) as device arrays, with (row, job, offset, count).

    One job per call, or `side` jobs of each block; tokens in chunks of few sizes.
    """
    depth, blocks = engine.slot_table.depth, engine.slot_table.blocks
    by_block = [[i for i, job in enumerate(jobs) if job[0] // depth == b] for b in range(blocks)]
    most = max(map(len, by_block))
    side = 1 if most <= 1 else min(SIDE_BY_SIDE, 1 << (depth - 1).bit_length())
    for start in range(0, most, side):
        group = [some[start : start + side] for some in by_block]
        longest = max(len(jobs[i][2]) for some in group for i in some)
        size = buckets.prefill_bucket(longest)
        for offset in range(0, longest, size):
            tokens = np.full((blocks * side, size), ids.PAD, np.int32)
            positions = np.full((blocks * side, size), -1, np.int32)
            lanes, rows = np.zeros(blocks * side, np.int32), []
            chosen = [(b * side + n, i) for b, some in enumerate(group) for n, i in enumerate(some)]
            for row, i in chosen:
                lane, first, held = jobs[i]
                part = held[offset : offset + size]
                lanes[row] = lane % depth
                if len(part):
                    tokens[row, : len(part)] = part
                    positions[row, : len(part)] = first + offset + np.arange(len(part))
                    rows.append((row, i, offset, len(part)))
            yield (tokens, positions, lanes), rows
