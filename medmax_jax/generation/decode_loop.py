"""The compiled half of generation: five programs over one cache of keys and values.

    prefill   pieces of prompts into lanes              copy    the start of a lane into another
    run       up to `chunk` tokens for every row        score   how likely given tokens are
    mark      which ids a row has seen

A row is one answer in the making; a lane is a row of the cache. Each row has up to three streams:

    stream 0  full            every token of the row
    stream 1  unconditional   BOS, and the open image: BOI c c c ...       while it is in an image
    stream 2  image-only      BOS, and every image: BOI c c ... EOI BOI c ...   if any came before

A sampled token goes to all streams that hold its kind; the others stand idle for the step. So text,
images and text after an image are one loop, and rows may be in different states. A row that opens
an image waits, and the loop returns, until the host has given it lanes for stream 1 and 2: guidance
costs nothing where no image is written. Without stream 2 it equals stream 1, without both the full
one: the formula of guidance then needs no case of its own.

`run` is compiled for a `Plan`, a number of lanes (`width`), of slots that are read (`span`), and
for what is drawn: text alone while no row is in an image.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from medmax_jax.config import Vocab
from medmax_jax.generation import grammar, sampling
from medmax_jax.generation.sampling_params import (
    FULL,
    IMAGE_ONLY,
    UNCONDITIONAL,
    DecodeConfig,
    SamplingParams,
)
from medmax_jax.models import kv_cache
from medmax_jax.models import vocab as ids
from medmax_jax.models.chameleon import Chameleon
from medmax_jax.sharding import BATCH, ROWS, with_shardings


class SequenceState(NamedTuple):
    """[N] answers in the making; small, so it goes to the device and back with each chunk."""

    token: Int[Array, "N"]  # sampled, or the prompt's last; not fed yet
    lanes: Int[Array, "N 3"]  # of each stream; -1: none
    positions: Int[Array, "N 3"]  # the next free slot of each
    image_tokens_left: Int[Array, "N"]  # the grammar's state
    budget: Int[Array, "N"]  # tokens of text, with BOI and EOS, without codes and EOI
    text_tokens_used: Int[Array, "N"]
    count: Int[Array, "N"]  # tokens written
    sample_seed: Int[Array, "N"]  # of the sample; its random numbers come from here
    done: Bool[Array, "N"]  # or nobody sits here
    needs_guidance_slots: Bool[Array, "N"]  # for lanes, to write an image


class LoopState(NamedTuple):
    """Inside `run`, between two steps."""

    step: Int[Array, ""]
    rows: SequenceState
    seen: Bool[Array, "N V"]
    out: Int[Array, "N C"]
    opened: Bool[Array, ""]
    cache: kv_cache.Cache


@functools.partial(jax.jit, static_argnames="span", donate_argnames="cache")
def prefill(
    model: Chameleon,
    layers: kv_cache.UnstackedLayers | None,
    cache: kv_cache.Cache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    lanes: Int[Array, "B"],
    *,
    span: int,
) -> kv_cache.Cache:
    """Pieces of prompts into lanes of the device's own block; -1 are idle tokens."""
    placed = _split(tokens, positions, lanes)
    fixed = dict(lanes=placed[2], span=span, layers=layers)
    return kv_cache.decode(model, placed[0], cache, placed[1], **fixed)[1]


@functools.partial(jax.jit, static_argnames="span", donate_argnames="cache")
def copy_slots(
    cache: kv_cache.Cache, sources: Int[Array, "M"], targets: Int[Array, "M"], *, span: int
) -> kv_cache.Cache:
    """The start of lanes into others of the same block."""
    sources, targets = (jax.sharding.reshard(x, P(ROWS)) for x in (sources, targets))
    return kv_cache.copy_slots(cache, sources, targets, span=span)


@functools.partial(jax.jit, donate_argnames="seen")
def set_seen_tokens(
    seen: Bool[Array, "N V"], row: Int[Array, ""], tokens: Int[Array, "S"]
) -> Bool[Array, "N V"]:
    """Row `row` has seen these ids and no others."""
    fresh = jnp.zeros(seen.shape[1], bool).at[tokens].set(True)
    return jax.lax.dynamic_update_slice(seen, fresh[None], (row, 0))


@functools.partial(jax.jit, static_argnames="span", donate_argnames="cache")
def score_tokens(
    model: Chameleon,
    layers: kv_cache.UnstackedLayers | None,
    cache: kv_cache.Cache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    lanes: Int[Array, "B"],
    targets: Int[Array, "B T"],
    *,
    span: int,
) -> tuple[kv_cache.Cache, Float[Array, "B T"], Bool[Array, "B T"]]:
    """Log-likelihood of each target after its token, over the whole vocabulary; is it the best?"""
    placed = _split(tokens, positions, lanes)
    fixed = dict(lanes=placed[2], span=span, layers=layers)
    hidden, cache = kv_cache.decode(model, placed[0], cache, placed[1], **fixed)
    logits = jax.sharding.reshard(model.logits(hidden), P(None, None, None))
    held = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return cache, held - jax.nn.logsumexp(logits, axis=-1), held >= logits.max(-1)


@functools.partial(
    jax.jit, static_argnames=("plan", "width", "span", "draws"), donate_argnames=("cache", "seen")
)
def decode_chunk(
    model: Chameleon,
    layers: kv_cache.UnstackedLayers | None,
    cache: kv_cache.Cache,
    rows: SequenceState,
    seen: Bool[Array, "N V"],
    knobs: SamplingParams,
    key: Key[Array, ""],
    *,
    plan: DecodeConfig,
    width: int,
    span: int,
    draws: str,
) -> tuple[kv_cache.Cache, SequenceState, Bool[Array, "N V"], Int[Array, "N C"]]:
    """Up to plan.chunk more tokens of each row; `out` has those that it wrote, from the left.

    width: lanes of each block that run, the first ones. draws: "text", "codes" or "both".
    """
    keys = sampling.sequence_keys(key, rows.sample_seed)
    state = LoopState(
        step=jnp.int32(0),
        rows=rows,
        seen=seen,
        out=jnp.full((len(rows.token), plan.chunk), ids.PAD, jnp.int32),
        opened=jnp.bool_(False),
        cache=cache,
    )
    state = jax.lax.while_loop(
        lambda s: (s.step < plan.chunk) & ~s.opened & _active(s.rows).any(),
        lambda s: _step(model, layers, s, knobs, keys, plan, width, span, draws),
        state,
    )
    return state.cache, state.rows, state.seen, state.out


def lower_decode(
    like: Chameleon, plan: DecodeConfig, *, rows: int, slots: int, kind: str, draws: str
) -> jax.stages.Lowered:
    """`run` for shapes alone, with every lane and slot in use; under the mesh of `like`.

    What a compiler for another machine wants: nothing is allocated.
    """
    shape = lambda *sizes, kind=jnp.int32: jax.ShapeDtypeStruct(sizes, kind)  # noqa: E731
    row, three, flag = shape(rows), shape(rows, 3), shape(rows, kind=jnp.bool_)
    asked = SequenceState(row, three, three, row, row, row, row, row, flag, flag)
    knobs = SamplingParams(*[shape(kind=jnp.float32)] * len(SamplingParams._fields))
    lanes = plan.blocks * plan.depth
    cache = jax.eval_shape(
        lambda: kv_cache.init_cache(like.config, lanes=lanes, slots=slots, kind=kind)
    )
    given = (cache, asked, shape(rows, plan.vocab.size, kind=jnp.bool_), knobs)
    key = jax.eval_shape(lambda: jax.random.key(0))
    cache, asked, seen, knobs, key = with_shardings((*given, key))
    fixed = dict(plan=plan, width=plan.depth, span=slots, draws=draws)
    return decode_chunk.lower(like, None, cache, asked, seen, knobs, key, **fixed)


def stream_positions(
    token: Int[Array, "N"], at: Int[Array, "N 3"], lanes: Int[Array, "N 3"], vocab: Vocab
) -> Int[Array, "N 3"]:
    """Where each stream stores the token; -1 where there is none, or it does not hold its kind.

    Of slots (9, 4, 7), a word takes (9, -1, -1), BOI and a code (9, 4, 7), EOI (9, -1, -1).
    """
    pictorial = ids.is_image(token, vocab) | (token == ids.BOI)
    held = jnp.stack([jnp.ones_like(pictorial), pictorial, pictorial], axis=1)
    return jnp.where(held & (lanes >= 0), at, -1)


def _active(rows: SequenceState) -> Bool[Array, "N"]:
    return ~(rows.done | rows.needs_guidance_slots)


def _split(*arrays: Array) -> list[Array]:
    return [jax.sharding.reshard(x, BATCH if x.ndim == 2 else P(ROWS)) for x in arrays]


def _step(
    model: Chameleon,
    layers: kv_cache.UnstackedLayers | None,
    state: LoopState,
    knobs: SamplingParams,
    keys: Key[Array, "N"],
    plan: DecodeConfig,
    width: int,
    span: int,
    draws: str,
) -> LoopState:
    rows, active = state.rows, _active(state.rows)
    places = stream_positions(rows.token, rows.positions, rows.lanes, plan.vocab)
    places = jnp.where(active[:, None], places, -1)
    at = jnp.where(places >= 0, places + 1, rows.positions)
    lanes = _lane_rows(rows.lanes, plan, width)
    logits, cache = _logits(
        model, layers, rows.token, places, lanes, state.cache, plan, width, span
    )
    token = _next(logits, lanes, at[:, FULL], state, knobs, keys, plan, draws)

    in_text = rows.image_tokens_left == 0
    left = grammar.advance(rows.image_tokens_left, token, codes=plan.codes)
    spent = rows.text_tokens_used + in_text
    over, spent = _over(rows, token, left, spent, at[:, FULL], plan)
    opens = active & in_text & (token == ids.BOI) & ~over
    keep = lambda new, old: jnp.where(active, new, old)  # noqa: E731
    return LoopState(
        step=state.step + 1,
        rows=rows._replace(
            token=keep(token, rows.token),
            positions=at,
            image_tokens_left=keep(left, rows.image_tokens_left),
            text_tokens_used=keep(spent, rows.text_tokens_used),
            count=rows.count + active,
            done=rows.done | (active & over),
            needs_guidance_slots=rows.needs_guidance_slots | opens,
        ),
        seen=state.seen | (active[:, None] & (token[:, None] == jnp.arange(plan.vocab.size))),
        out=state.out.at[:, state.step].set(jnp.where(active, token, ids.PAD)),
        opened=state.opened | opens.any(),
        cache=cache,
    )


def _over(
    rows: SequenceState, token, left, spent, length, plan: DecodeConfig
) -> tuple[Array, Array]:
    """Which rows are at their end, and what they have spent of their budget."""
    if plan.mode == "image":
        return left == 1, spent  # the codes are there; EOI is not written
    if plan.per_segment:
        spent = jnp.where(rows.image_tokens_left == 1, 0, spent)  # EOI: a new segment
    out_of_room = (spent >= rows.budget) | (length + 1 >= plan.context)
    over = (left == 0) & ((token == ids.EOS) | out_of_room)
    return over | (plan.stop_at_boi & (rows.image_tokens_left == 0) & (token == ids.BOI)), spent


def _lane_rows(lanes: Int[Array, "N 3"], plan: DecodeConfig, width: int) -> Int[Array, "N 3"]:
    """Where a lane's logits stand among blocks * width rows; past their end for no lane."""
    block, depth = lanes // plan.depth, lanes % plan.depth
    return jnp.where(lanes >= 0, block * width + depth, plan.blocks * width)


def _logits(
    model: Chameleon, layers, token, places, lanes, cache, plan: DecodeConfig, width: int, span: int
) -> tuple[Float[Array, "B V"], kv_cache.Cache]:
    """Feeds one token to every stream. Each device gets all logits, and samples alike."""
    count = plan.blocks * width
    every = jnp.broadcast_to(token[:, None], lanes.shape)
    fed = jnp.zeros(count, jnp.int32).at[lanes].set(every, mode="drop")
    at = jnp.full(count, -1, jnp.int32).at[lanes].set(places, mode="drop")
    fed, at = _split(fed[:, None], at[:, None])
    hidden, cache = kv_cache.decode(model, fed, cache, at, lanes=None, span=span, layers=layers)
    return jax.sharding.reshard(model.logits(hidden), P(None, None, None))[:, 0], cache


def _next(
    logits: Float[Array, "B V"],
    lanes: Int[Array, "N 3"],
    length: Int[Array, "N"],
    state: LoopState,
    knobs: SamplingParams,
    keys: Key[Array, "N"],
    plan: DecodeConfig,
    draws: str,
) -> Int[Array, "N"]:
    """A word, a code or EOI, as the grammar's state of the row says."""
    rows = state.rows
    text = image = jnp.full_like(rows.token, ids.EOI)
    if draws != "codes":
        text = _text(logits.at[lanes[:, FULL]].get(mode="clip"), length, state, knobs, keys, plan)
    if draws != "text":
        image = _code(logits, lanes, rows, knobs, keys, plan)
    return jnp.where(
        rows.image_tokens_left == 0, text, jnp.where(rows.image_tokens_left == 1, ids.EOI, image)
    )


def _text(
    logits: Float[Array, "N V"],
    length: Int[Array, "N"],
    state: LoopState,
    knobs: SamplingParams,
    keys,
    plan,
) -> Int[Array, "N"]:
    fixed = dict(vocab=plan.vocab, mode=plan.mode, codes=plan.codes, context=plan.context)
    allowed = grammar.allowed(jnp.zeros_like(length), length, barred=plan.barred, **fixed)
    logits = sampling.allow_only(logits, allowed)
    logits = sampling.apply_repetition_penalty(logits, state.seen, knobs.repetition_penalty)
    if not plan.text_greedy:
        logits = sampling.apply_temperature(logits, knobs.text_temperature)
        logits = sampling.top_p(logits, knobs.text_top_p)
    return sampling.sample_tokens(logits, keys, state.rows.count, greedy=plan.text_greedy)


def _code(
    logits: Float[Array, "B V"],
    lanes: Int[Array, "N 3"],
    rows: SequenceState,
    knobs: SamplingParams,
    keys,
    plan,
) -> Int[Array, "N"]:
    """One code for all streams, from their guided logits; top_p sorts the image ids alone."""
    logits = logits[:, ids.IMAGE_START : ids.IMAGE_START + plan.vocab.image_codes]
    full, unconditional, image_only = (
        logits.at[lanes[:, stream]].get(mode="clip") for stream in (FULL, UNCONDITIONAL, IMAGE_ONLY)
    )
    held = (rows.lanes >= 0)[:, :, None]
    unconditional = jnp.where(held[:, UNCONDITIONAL], unconditional, full)
    image_only = jnp.where(held[:, IMAGE_ONLY], image_only, unconditional)
    guided = sampling.apply_guidance(
        full,
        unconditional,
        image_only,
        scale_text=knobs.scale_text,
        scale_image=knobs.scale_image,
    )
    if not plan.image_greedy:
        guided = sampling.apply_temperature(guided, knobs.image_temperature)
        guided = sampling.top_p(guided, knobs.image_top_p)
    return ids.IMAGE_START + sampling.sample_tokens(
        guided, keys, rows.count, greedy=plan.image_greedy
    )
