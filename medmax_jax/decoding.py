"""The compiled half of generation: prompts into a key-value cache, then one token a row and step.

    stream 0  full            every token of the row
    stream 1  unconditional   BOS, and the open image: BOI c c c ...            (guided modes)
    stream 2  image-only      BOS, and every image: BOI c c ... EOI BOI c ...   (if any came before)

The streams of a row are rows b * G + g of one cache, each with positions of its own. A sampled
token goes to all streams that hold its kind; the others stand idle for the step (position -1). So
text, images and text after an image are one loop, and rows of a batch may be in different states.
BOI takes the unconditional stream back to slot 1: all that it costs to open another image.

One program is compiled for each `Plan` and number of rows; prompts of any length share it.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from medmax_jax import chameleon, grammar, sampling
from medmax_jax import vocab as ids
from medmax_jax.config import Vocab
from medmax_jax.mesh import BATCH

FULL, UNCONDITIONAL, IMAGE_ONLY = range(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a compiled program depends on, besides the number of rows."""

    mode: str
    streams: int  # 1 text; 2 images after prompts without one; 3 otherwise
    slots: int  # of the cache: prompt and output
    chunk: int  # tokens of the prompt read at once
    codes: int  # of one image
    context: int  # tokens the model can hold
    vocab: Vocab
    text_greedy: bool
    image_greedy: bool


class Prompt(NamedTuple):
    """A batch of prompts without their last tokens, which the loop feeds first."""

    ids: Int[Array, "B G S"]
    positions: Int[Array, "B G S"]  # -1: nothing here
    last: Int[Array, "B"]
    slots: Int[Array, "B G"]  # the next free slot of each stream
    seen: Bool[Array, "B V"]  # ids of the whole prompt, for the repetition penalty
    real: Bool[Array, "B"]  # False: a row that fills the batch
    numbers: Int[Array, "B"]  # of the samples; the row's random numbers come from here
    chunks: Int[Array, ""]


class Knobs(NamedTuple):
    """Sampling numbers; changing them compiles nothing."""

    text_temperature: Float[Array, ""]
    text_top_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]
    image_temperature: Float[Array, ""]
    image_top_p: Float[Array, ""]
    scale_text: Float[Array, ""]
    scale_image: Float[Array, ""]
    budget: Int[Array, ""]  # tokens of text a row, with BOI and EOS, without codes and EOI


class State(NamedTuple):
    """Between two steps. `token` was sampled and is not fed yet."""

    step: Int[Array, ""]
    token: Int[Array, "B"]
    slots: Int[Array, "B G"]
    left: Int[Array, "B"]  # the grammar's state
    spent: Int[Array, "B"]  # of the budget
    done: Bool[Array, "B"]
    seen: Bool[Array, "B V"]
    count: Int[Array, "B"]  # tokens written
    out: Int[Array, "B S"]
    cache: chameleon.Cache


@functools.partial(jax.jit, static_argnames="plan")
def write(
    model: chameleon.Chameleon, prompt: Prompt, knobs: Knobs, key: Key[Array, ""], *, plan: Plan
) -> tuple[Int[Array, "B S"], Int[Array, "B"]]:
    """The tokens each row writes, with EOS, and how many they are. Image mode: the codes alone."""
    keys = sampling.row_keys(key, prompt.numbers)
    state = State(
        step=jnp.int32(0),
        token=prompt.last,
        slots=prompt.slots,
        left=grammar.start(prompt.last, codes=plan.codes),
        spent=jnp.zeros_like(prompt.last),
        done=~prompt.real,
        seen=prompt.seen,
        count=jnp.zeros_like(prompt.last),
        out=jnp.zeros((len(prompt.last), plan.slots), jnp.int32),
        cache=_prefill(model, prompt, plan),
    )
    state = jax.lax.while_loop(
        lambda state: ~state.done.all() & (state.step < plan.slots),
        lambda state: _step(model, state, knobs, keys, plan),
        state,
    )
    return state.out, state.count


def stream_slots(
    token: Int[Array, "B"], slots: Int[Array, "B G"], vocab: Vocab
) -> Int[Array, "B G"]:
    """Where each stream stores the token; -1 where the stream does not hold its kind.

    Of slots (9, 4, 7), a word takes (9, -1, -1), BOI (9, 1, 7), a code (9, 4, 7), EOI (9, -1, 7).
    """
    code, opens = ids.is_image(token, vocab), token == ids.BOI
    full = slots[:, FULL]
    unconditional = jnp.where(opens, 1, jnp.where(code, slots[:, 1 % slots.shape[1]], -1))
    pictorial = code | opens | (token == ids.EOI) | (token == ids.BOS)
    image_only = jnp.where(pictorial, slots[:, -1], -1)
    return jnp.stack([full, unconditional, image_only][: slots.shape[1]], axis=1)


def _prefill(model: chameleon.Chameleon, prompt: Prompt, plan: Plan) -> chameleon.Cache:
    rows, streams, width = prompt.ids.shape
    tokens, places = (
        x.reshape(rows * streams, width) for x in (prompt.ids, prompt.positions)
    )  # [B * G, S]
    cache = chameleon.init_cache(model.config, batch=rows * streams, length=plan.slots)

    def read(i, cache):
        pieces = (
            jax.lax.dynamic_slice_in_dim(x, i * plan.chunk, plan.chunk, axis=1)
            for x in (tokens, places)
        )
        fed, at = (jax.sharding.reshard(x, BATCH) for x in pieces)
        return model.decode(fed, cache, at)[1]

    return jax.lax.fori_loop(0, prompt.chunks, read, cache)


def _step(
    model: chameleon.Chameleon, state: State, knobs: Knobs, keys: Key[Array, "B"], plan: Plan
) -> State:
    places = stream_slots(state.token, state.slots, plan.vocab)
    places = jnp.where(state.done[:, None], -1, places)
    # An unconditional stream that goes back to slot 1 goes on from there.
    slots = jnp.where(places >= 0, places + 1, state.slots)
    logits, cache = _logits(model, state.token, places, state.cache)
    length = slots[:, FULL]
    token = _next(logits, length, state, knobs, keys, plan)

    spent = state.spent + (state.left == 0)
    left = grammar.advance(state.left, token, codes=plan.codes)
    if plan.mode == "image":
        ended = left == 1  # the codes are there; EOI is not written
    else:
        out_of_room = (spent >= knobs.budget) | (length + 1 >= plan.context)
        ended = (left == 0) & ((token == ids.EOS) | out_of_room)
    written = jnp.where(state.done, ids.PAD, token)
    return State(
        step=state.step + 1,
        token=token,
        slots=slots,
        left=left,
        spent=spent,
        done=state.done | ended,
        seen=state.seen | (token[:, None] == jnp.arange(plan.vocab.size)),
        count=state.count + ~state.done,
        out=jax.lax.dynamic_update_slice_in_dim(state.out, written[:, None], state.step, axis=1),
        cache=cache,
    )


def _logits(
    model: chameleon.Chameleon, token: Int[Array, "B"], places: Int[Array, "B G"], cache
) -> tuple[Float[Array, "B G V"], chameleon.Cache]:
    """Feeds one token to all streams. Every device gets the whole logits, and samples alike."""
    rows, streams = places.shape
    fed = jnp.broadcast_to(token[:, None], places.shape).reshape(rows * streams, 1)
    places = places.reshape(rows * streams, 1)
    fed, places = (jax.sharding.reshard(x, BATCH) for x in (fed, places))
    hidden, cache = model.decode(fed, cache, places)
    logits = jax.sharding.reshard(model.logits(hidden), P(None, None, None))
    return logits.reshape(rows, streams, -1), cache


def _next(
    logits: Float[Array, "B G V"],
    length: Int[Array, "B"],
    state: State,
    knobs: Knobs,
    keys: Key[Array, "B"],
    plan: Plan,
) -> Int[Array, "B"]:
    """A word, a code or EOI, as the grammar's state of the row says."""
    text = image = jnp.full_like(state.token, ids.EOI)
    if plan.mode != "image":
        text = _text(logits[:, FULL], length, state, knobs, keys, plan)
    if plan.mode != "text":
        image = _code(logits, knobs, keys, state.step, plan)
    return jnp.where(state.left == 0, text, jnp.where(state.left == 1, ids.EOI, image))


def _text(logits, length, state: State, knobs: Knobs, keys, plan: Plan) -> Int[Array, "B"]:
    in_text = jnp.zeros_like(state.left)
    allowed = grammar.allowed(
        in_text,
        length,
        vocab=plan.vocab,
        mode=plan.mode,
        codes=plan.codes,
        context=plan.context,
    )
    logits = sampling.allow_only(logits, allowed)
    logits = sampling.penalise(logits, state.seen, knobs.repetition_penalty)
    if not plan.text_greedy:
        logits = sampling.temper(logits, knobs.text_temperature)
        logits = sampling.top_p(logits, knobs.text_top_p)
    return sampling.pick(logits, keys, state.step, greedy=plan.text_greedy)


def _code(logits, knobs: Knobs, keys, step, plan: Plan) -> Int[Array, "B"]:
    """One code for all streams, from their guided logits; top_p sorts the image ids alone."""
    here = slice(ids.IMAGE_START, ids.IMAGE_START + plan.vocab.image_codes)
    logits = logits[:, :, here]
    guided = sampling.guide(
        logits[:, FULL],
        logits[:, UNCONDITIONAL],
        logits[:, IMAGE_ONLY] if plan.streams == 3 else None,
        scale_text=knobs.scale_text,
        scale_image=knobs.scale_image,
    )
    if not plan.image_greedy:
        guided = sampling.temper(guided, knobs.image_temperature)
        guided = sampling.top_p(guided, knobs.image_top_p)
    return ids.IMAGE_START + sampling.pick(guided, keys, step, greedy=plan.image_greedy)
