"""The grammar against its table, random walks that must parse, processors on worked examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmax_jax.config import Vocab
from medmax_jax.generation import grammar, sampling
from medmax_jax.models import vocab as ids

VOCAB = Vocab(size=8_720, image_codes=6, text_start=8_712)
TEXT, CODE = VOCAB.text_start, ids.IMAGE_START
INF = np.inf


def state(left, length, mode, codes=3, context=20):
    mask = grammar.allowed(
        jnp.array([left]),
        jnp.array([length]),
        jnp.array([mode == "mixed"]),
        vocab=VOCAB,
        codes=codes,
        context=context,
    )
    return set(np.flatnonzero(np.asarray(mask[0])).tolist())


def test_allowed_by_state_and_mode():
    text = set(range(8_712, 8_720)) | {2}
    image = set(range(4, 10))
    assert state(0, 1, "text") == text
    assert state(0, 1, "mixed") == text | {8197}
    assert state(4, 1, "mixed") == state(2, 1, "image") == image
    assert state(1, 1, "mixed") == {8196}


def test_image_starts_only_where_it_fits():
    # context 20, 3 codes: BOI from length 15 on is blocked, as 3,070 = 4,096 - 1,026 in the release
    assert 8197 in state(0, 14, "mixed")
    assert 8197 not in state(0, 15, "mixed")
    fits = grammar.image_fits(jnp.array([3_069, 3_070]), codes=1_024, context=4_096)
    assert fits.tolist() == [True, False]


def test_worked_example_of_the_states():
    left, states = jnp.zeros(1, jnp.int32), []
    for token in [TEXT, ids.BOI, CODE, CODE, ids.EOI, TEXT, ids.EOS]:
        left = grammar.advance(left, jnp.array([token]), codes=2)
        states.append(int(left[0]))
    assert states == [0, 3, 2, 1, 0, 0, 0]
    assert grammar.start(jnp.array([ids.BOI, TEXT]), codes=2).tolist() == [3, 0]


@pytest.mark.parametrize("mode", ["text", "mixed"])
def test_random_walks_parse(mode):
    """For all draws from `allowed`, text and complete images alternate up to the end."""
    rng, context, codes, rows = np.random.default_rng(0), 40, 3, 16

    @jax.jit
    def rule(left, length):
        opens = jnp.full(rows, mode == "mixed")
        return grammar.allowed(left, length, opens, vocab=VOCAB, codes=codes, context=context)

    left, walks = jnp.zeros(rows, jnp.int32), [[] for _ in range(rows)]
    for length in range(1, context):
        masks = np.asarray(rule(left, jnp.full(rows, length)))
        weights = masks * np.where(np.arange(VOCAB.size) == ids.BOI, 8.0, 1.0)  # many images
        tokens = [rng.choice(VOCAB.size, p=w / w.sum()) for w in weights]
        for walk, token in zip(walks, tokens, strict=True):
            walk.append(int(token))
        left = grammar.advance(left, jnp.array(tokens), codes=codes)
    assert all(grammar.parses(np.array(w), VOCAB, codes=codes) for w in walks)
    assert any(ids.BOI in w for w in walks) == (mode == "mixed")


def test_parses_rejects_truncated_and_misplaced_images():
    complete = [TEXT, ids.BOI, CODE, CODE, CODE, ids.EOI, TEXT]
    assert grammar.parses(np.array(complete), VOCAB, codes=3)
    for invalid in (
        complete[:4],
        complete[:5],
        [TEXT, CODE],
        [ids.EOI],
        [ids.SEP],
        complete[:3] + complete[4:],
    ):
        assert not grammar.parses(np.array(invalid), VOCAB, codes=3), invalid


def test_unknown_mode_raises():
    with pytest.raises(ValueError, match="mode is 'video'; it must be one of text, image, mixed"):
        grammar.text_ids(VOCAB, mode="video")


# Processors, with values computed by hand.


def test_allow_only():
    logits = sampling.allow_only(jnp.array([[1.0, 2, 3]]), jnp.array([[True, False, True]]))
    np.testing.assert_array_equal(logits, [[1, -INF, 3]])


def test_penalty_divides_above_zero_and_multiplies_below():
    logits = jnp.array([[3.0, -3.0, 3.0, -3.0, -jnp.inf]])
    seen = jnp.array([[True, True, False, False, True]])
    np.testing.assert_allclose(
        sampling.apply_repetition_penalty(logits, seen, 1.2),
        [[2.5, -3.6, 3.0, -3.0, -INF]],
        rtol=1e-6,
    )


def test_temperature():
    np.testing.assert_allclose(
        sampling.apply_temperature(jnp.array([[1.4, -0.7]]), 0.7), [[2, -1]], rtol=1e-6
    )


@pytest.mark.parametrize(
    "p, kept", [(0.0, 1), (1e-9, 1), (0.45, 1), (0.75, 2), (0.9, 3), (0.97, 4), (1.0, 4)]
)
def test_top_p_keeps_the_fewest_that_reach_p(p, kept):
    probabilities = np.array([[0.05, 0.5, 0.15, 0.3]])
    order = [1, 3, 2, 0]
    logits = np.asarray(sampling.top_p(jnp.log(probabilities), p))[0]
    assert set(np.flatnonzero(np.isfinite(logits))) == set(order[:kept])
    np.testing.assert_allclose(
        logits[order[:kept]], np.log(probabilities[0][order[:kept]]), rtol=1e-6
    )


def test_guidance_is_the_formula():
    full, none, image = (jnp.array([[x, 1.0]]) for x in (5.0, 1.0, 2.0))
    # 1 + 1.2 (2 - 1) + 3 (5 - 2) = 11.2;  two streams: 1 + 3 (5 - 1) = 13
    three = sampling.apply_guidance(full, none, image, scale_text=3.0, scale_image=1.2)
    two = none + 3.0 * (full - none)  # no image came before
    np.testing.assert_allclose(three, [[11.2, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(two, [[13.0, 1.0]], rtol=1e-6)
    same = sampling.apply_guidance(full, none, none, scale_text=3.0, scale_image=1.2)
    np.testing.assert_allclose(same, two)


def test_sample_of_a_row_does_not_depend_on_the_batch():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 50)), jnp.float32)
    seeds = jnp.array([7, 11, 7, 3, 5, 2])

    def draw(rows):
        keys = sampling.sequence_keys(jnp.ones(len(rows), jnp.uint32), seeds[rows])
        return sampling.sample_tokens(logits[rows], keys, jnp.full(len(rows), 4))

    batch = draw(jnp.arange(6))
    for row in range(6):
        assert draw(jnp.array([row]))[0] == batch[row]
    repeated = sampling.sample_tokens(
        jnp.tile(logits[:1], (6, 1)),
        sampling.sequence_keys(jnp.ones(6, jnp.uint32), seeds),
        jnp.full(6, 4),
    )
    assert repeated[0] == repeated[2] and len(set(repeated.tolist())) > 1


def test_draws_follow_the_distribution():
    probabilities = np.array([0.5, 0.3, 0.2])
    rows = 4_000
    logits = jnp.tile(jnp.log(probabilities), (rows, 1))
    keys = sampling.sequence_keys(jnp.zeros(rows, jnp.uint32), jnp.arange(rows))
    drawn = np.asarray(sampling.sample_tokens(logits, keys, jnp.zeros(len(keys), int)))
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / rows, probabilities, atol=0.03)
