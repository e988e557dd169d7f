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

PROMPTS_PER_CALL = 8  # prompts of a shard that are computed in one call
COPIES = 4  # copies per shard in one call


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSizes:
    """The sizes of an engine, which determine its memory and its compiled programs."""

    batch_size: int  # answers that are generated at once
    num_slots: int  # KV-cache slots, at least batch_size; two more for each image with guidance
    cache_length: int  # positions per slot
    cache_dtype: str  # "model" or "int8"


@dataclasses.dataclass(kw_only=True, eq=False)
class Engine:
    """A model and its KV cache."""

    model: Chameleon
    layers: kv_cache.UnstackedLayers | None
    vocab: Vocab
    codes: int  # per image
    mesh: jax.sharding.Mesh
    sizes: EngineSizes
    slot_table: SlotTable
    cache: kv_cache.Cache | None  # None: it was lost by a failure
    seen: jax.Array | None
    programs: set[tuple[Any, ...]]  # programs requested so far: name and static arguments
    busy: bool = False  # the slots are in use
    tokens_prefilled: int = 0  # prompt tokens that the model had to compute; the others were copied


def make_engine(
    model: Chameleon, vocab: Vocab, mesh: jax.sharding.Mesh, sizes: EngineSizes, *, codes: int
) -> Engine:
    """Create an empty engine.

    Args:
        model: the model; its mesh is `mesh`.
        vocab: the vocabulary of the model.
        mesh: the devices.
        sizes: `num_slots` is rounded up to a multiple of the devices that split the batch.
        codes: VQ codes per image.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if sizes.batch_size < 1:
        raise GenerateError(f"batch_size (--rows) is {sizes.batch_size}; it must be at least 1")
    if sizes.cache_length > model.config.context_length:
        raise GenerateError(
            f"cache_length is {sizes.cache_length}; the context of the model has "
            f"{model.config.context_length} tokens"
        )
    slots_per_shard = -(-sizes.num_slots // shards)
    sizes = dataclasses.replace(sizes, num_slots=slots_per_shard * shards)
    with _explain_out_of_memory(model, sizes):
        engine = Engine(
            model=model,
            layers=kv_cache.unstack_layers(model, mesh),
            vocab=vocab,
            codes=codes,
            mesh=mesh,
            sizes=sizes,
            slot_table=SlotTable(
                shards=shards,
                slots_per_shard=slots_per_shard,
                cache_length=sizes.cache_length,
                primary_slots=-(-sizes.batch_size // shards),
            ),
            cache=None,
            seen=None,
            programs=set(),
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
            "the engine is generating other answers; finish or close their iterator first"
        )
    engine.busy = True
    try:
        with _explain_out_of_memory(engine.model, engine.sizes):
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
    engine: Engine, prompts: Sequence[Int[np.ndarray, "_"]], *, guide: bool
) -> list[int]:
    """Return slots that now hold these tokens; the same number of slots must be free.

    A prefix that some slot holds is copied. A prefix that two prompts share is computed once: the
    second prompt waits.
    """
    slots, pending = [-1] * len(prompts), list(range(len(prompts)))
    while pending:
        wave = [(i, engine.slot_table.acquire(prompts[i], guide=guide)) for i in pending]
        pending = [i for i, assignment in wave if assignment is None]
        assigned = [(i, assignment) for i, assignment in wave if assignment is not None]
        _copy(engine, [assignment for _, assignment in assigned])
        _prefill(engine, [(assignment, prompts[i]) for i, assignment in assigned])
        engine.slot_table.commit()
        for i, assignment in assigned:
            slots[i] = assignment.slot
    return slots


def score_options(
    engine: Engine,
    prompts: Sequence[Int[np.ndarray, "_"]],
    options: Sequence[Sequence[Int[np.ndarray, "_"]]],
) -> list[list[tuple[Float[np.ndarray, "_"], Bool[np.ndarray, "_"]]]]:
    """Return the log-likelihood of each token of each option, and whether it is the best token.

    A prompt is computed once, and its options one after another in the same slot behind it. At
    least one slot must be free.
    """
    scores: list[list[Any]] = [[None] * len(of_prompt) for of_prompt in options]
    most = min(engine.sizes.batch_size, PROMPTS_PER_CALL * engine.slot_table.shards)
    count = min(most, int(engine.slot_table.free.sum()))
    order = requests.group_by_shared_image([Request(p, 0, 0) for p in prompts])
    with exclusive_use(engine):
        for start in range(0, len(order), count):
            _score_batch(engine, prompts, options, order[start : start + count], scores)
    return scores


def _score_batch(engine: Engine, prompts, options, batch: list[int], scores) -> None:
    """Score the options of the prompts with the indices `batch`; write the results to `scores`."""
    slots = prefill_prompts(engine, [prompts[i][:-1] for i in batch], guide=False)
    for number in range(max(len(options[i]) for i in batch)):
        jobs = [
            (slot, len(prompts[i]) - 1, np.append(prompts[i][-1:], options[i][number]), i)
            for slot, i in zip(slots, batch, strict=True)
            if number < len(options[i])
        ]
        for (*_, i), score in zip(jobs, _score(engine, jobs), strict=True):
            scores[i][number] = score
    for slot, i in zip(slots, batch, strict=True):
        engine.slot_table.release(slot, prompts[i][:-1])


def _reset_cache(engine: Engine) -> None:
    """Allocate an empty cache, and rows that have seen no tokens."""
    sizes = engine.sizes
    with jax.set_mesh(engine.mesh):
        cache = kv_cache.init_cache(
            engine.model.config,
            num_slots=sizes.num_slots,
            cache_length=sizes.cache_length,
            cache_dtype=sizes.cache_dtype,
        )
        seen = jnp.zeros((sizes.batch_size, engine.vocab.size), bool)
    engine.cache, engine.seen = jax.block_until_ready((cache, seen))


def _explain_out_of_memory(
    model: Chameleon, sizes: EngineSizes
) -> contextlib.AbstractContextManager[None]:
    """Explain an out-of-memory error: the allocation and the settings that reduce it."""
    cache_bytes = kv_cache.cache_bytes(
        model.config,
        num_slots=sizes.num_slots,
        cache_length=sizes.cache_length,
        cache_dtype=sizes.cache_dtype,
    )
    fixes = [
        "reduce the batch size (--rows; --config.rows of an evaluation)",
        "shorten the context (shorter prompts, a smaller sample.max_gen_len)",
    ]
    if sizes.cache_dtype != "int8":
        fixes.append('use an int8 cache (--cache=int8, cache_dtype="int8")')
    return buckets.explain_out_of_memory(
        f"batch size {sizes.batch_size} and cache length {sizes.cache_length} need "
        f"{sizes.num_slots} cache slots ({buckets.format_mib(cache_bytes)}) in addition to the "
        f"model ({buckets.format_mib(buckets.tree_bytes(model))})",
        " or ".join(fixes),
    )


def _copy(engine: Engine, assignments: Sequence[SlotAssignment]) -> None:
    slots_per_shard, shards = engine.slot_table.slots_per_shard, engine.slot_table.shards
    pairs = [(a.copy_from, a.slot, a.prefix_length) for a in assignments if a.copy_from is not None]
    if not pairs:
        return
    span = buckets.kv_length_bucket(max(length for *_, length in pairs), engine.sizes.cache_length)
    by_shard = [
        [
            (source % slots_per_shard, target % slots_per_shard)
            for source, target, _ in pairs
            if target // slots_per_shard == shard
        ]
        for shard in range(shards)
    ]
    for start in range(0, max(map(len, by_shard)), COPIES):
        moves = np.zeros((2, shards, COPIES), np.int32)  # copying slot 0 to slot 0 does nothing
        for shard, pairs_of_shard in enumerate(by_shard):
            for i, pair in enumerate(pairs_of_shard[start : start + COPIES]):
                moves[:, shard, i] = pair
        engine.programs.add(("copy", span))
        with jax.set_mesh(engine.mesh):
            engine.cache = decode_loop.copy_slots(engine.cache, *moves.reshape(2, -1), span=span)


def _prefill(
    engine: Engine, prompts: Sequence[tuple[SlotAssignment, Int[np.ndarray, "_"]]]
) -> None:
    """Compute the tokens that no slot holds."""
    jobs = [
        (assignment.slot, assignment.prefix_length, tokens[assignment.prefix_length :])
        for assignment, tokens in prompts
        if assignment.prefix_length < len(tokens)
    ]
    engine.tokens_prefilled += sum(len(tokens) for *_, tokens in jobs)
    for (tokens, positions, slots), _ in _prefill_batches(engine, jobs):
        span = buckets.kv_length_bucket(int(positions.max()) + 1, engine.sizes.cache_length)
        engine.programs.add(("prefill", tokens.shape, span))
        with jax.set_mesh(engine.mesh):
            engine.cache = decode_loop.prefill(
                engine.model, engine.layers, engine.cache, tokens, positions, slots, span=span
            )


def _score(engine: Engine, jobs: Sequence[tuple[int, int, np.ndarray, int]]) -> list[Any]:
    """Score jobs: each feeds a prompt's last token and all tokens of an option but the last."""
    inputs = [(slot, start, tokens[:-1]) for slot, start, tokens, _ in jobs]
    parts = [([], []) for _ in jobs]
    for (tokens, positions, slots), rows in _prefill_batches(engine, inputs):
        targets = np.zeros_like(tokens)
        for row, job, offset, count in rows:
            targets[row, :count] = jobs[job][2][offset + 1 : offset + 1 + count]
        span = buckets.kv_length_bucket(int(positions.max()) + 1, engine.sizes.cache_length)
        engine.programs.add(("score", tokens.shape, span))
        with jax.set_mesh(engine.mesh):
            engine.cache, *scores = decode_loop.score_tokens(
                engine.model,
                engine.layers,
                engine.cache,
                tokens,
                positions,
                slots,
                targets,
                span=span,
            )
        likelihoods, best = jax.device_get(scores)
        for row, job, _, count in rows:
            parts[job][0].append(likelihoods[row, :count])
            parts[job][1].append(best[row, :count])
    return [(np.concatenate(likelihoods), np.concatenate(best)) for likelihoods, best in parts]


def _prefill_batches(engine: Engine, jobs: Sequence[tuple[int, int, Int[np.ndarray, "_"]]]):
    """Yield jobs (slot, first position, tokens) as device arrays, with (row, job, offset, count).

    One job per call, or the same number of each shard; tokens in chunks of few sizes.
    """
    slots_per_shard, shards = engine.slot_table.slots_per_shard, engine.slot_table.shards
    by_shard = [
        [i for i, job in enumerate(jobs) if job[0] // slots_per_shard == shard]
        for shard in range(shards)
    ]
    most = max(map(len, by_shard))
    width = 1 if most <= 1 else min(PROMPTS_PER_CALL, 1 << (slots_per_shard - 1).bit_length())
    for start in range(0, most, width):
        group = [of_shard[start : start + width] for of_shard in by_shard]
        chosen = [
            (shard * width + n, i) for shard, of_shard in enumerate(group)
            for n, i in enumerate(of_shard)
        ]  # fmt: skip
        longest = max(len(jobs[i][2]) for _, i in chosen)
        size = buckets.prefill_bucket(longest)
        for offset in range(0, longest, size):
            tokens = np.full((shards * width, size), ids.PAD, np.int32)
            positions = np.full((shards * width, size), -1, np.int32)
            slots, rows = np.zeros(shards * width, np.int32), []
            for row, i in chosen:
                slot, first, of_job = jobs[i]
                part = of_job[offset : offset + size]
                slots[row] = slot % slots_per_shard
                if len(part):
                    tokens[row, : len(part)] = part
                    positions[row, : len(part)] = first + offset + np.arange(len(part))
                    rows.append((row, i, offset, len(part)))
            yield (tokens, positions, slots), rows
