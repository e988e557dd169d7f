"""Scores of embeddings: values computed by hand, and properties of all embeddings."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_jax.eval.metrics import embeddings


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def random_units(seed, n, width):
    return unit(np.random.default_rng(seed).standard_normal((n, width)))


def angle(*degrees):
    """Unit rows of the plane: cosines between them are of the differences."""
    return np.array([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


seeds, counts = st.integers(0, 2**32 - 1), st.integers(2, 12)


# ---- cosine and combined


def test_cosine_is_neither_scaled_nor_clamped():
    result = embeddings.cosine(angle(0, 0, 0), angle(0, 60, 180))
    np.testing.assert_allclose(result, [1, 0.5, -1], atol=1e-12)  # not x 100, not clamped


def test_cosine_refuses_rows_that_are_not_embeddings():
    with pytest.raises(ValueError, match=r"b has shape \(1, 2\) and rows of length 2 to 2"):
        embeddings.cosine(angle(0), 2 * angle(0))
    with pytest.raises(ValueError, match="a has shape"):
        embeddings.cosine(np.full((1, 2), np.nan), angle(0))
    with pytest.raises(ValueError, match="pass one row of b per row of a"):
        embeddings.cosine(angle(0, 1), angle(0))


def test_combined_is_a_harmonic_mean_with_the_best_reference():
    image, text = angle(0, 0, 0), angle(60, 60, 120)
    references = [angle(60, 240), angle(150, 120), angle(120)]
    result = embeddings.combined_clip_score(image, text, references)
    # 0.5 with 1; 0.5 with the better of 0 and 0.5; -0.5, which counts as 0
    np.testing.assert_allclose(result, [2 / 3, 0.5, 0], atol=1e-12)
    with pytest.raises(ValueError, match="pass one or more references per text"):
        embeddings.combined_clip_score(image, text, [*references[:2], angle()[:0].reshape(0, 2)])


@given(seeds, counts)
def test_combined_score_is_between_its_parts(seed, n):
    image, text, reference = (random_units(seed + i, n, 5) for i in range(3))
    parts = np.stack([embeddings.cosine(image, text), embeddings.cosine(text, reference)]).clip(0)
    result = embeddings.combined_clip_score(image, text, list(reference[:, None]))
    assert (parts.min(0) - 1e-9 <= result).all() and (result <= parts.max(0) + 1e-9).all()


# ---- ranks


def test_ranks_by_hand():
    queries, targets = angle(0, 10, 90), angle(20, 0, 180)
    # cosines grow as angles fall: query 0 -> 20 0 180, query 1 -> 10 10 170, query 2 -> 70 90 90
    np.testing.assert_array_equal(embeddings.retrieval_ranks(queries, targets), [2, 1.5, 2.5])


def test_the_same_text_for_everything_is_chance():
    targets = random_units(0, 101, 16)
    same = np.repeat(random_units(1, 1, 16), 101, axis=0)
    result = embeddings.retrieval(embeddings.retrieval_ranks(same, targets), at=(1, 5))
    assert result.median_rank == result.chance_median == 51
    assert result.recall == pytest.approx({1: 1 / 101, 5: 5 / 101})
    assert result.recall == pytest.approx(result.chance_recall)
    # and where all targets are one: every rank is the middle
    np.testing.assert_array_equal(embeddings.retrieval_ranks(targets, same), np.full(101, 51.0))


def test_targets_that_differ_only_by_rounding_tie():
    targets = np.repeat(random_units(0, 1, 16), 5, axis=0).astype(np.float32)
    targets += np.linspace(-1e-8, 1e-8, 5, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(
        embeddings.retrieval_ranks(random_units(1, 5, 16), targets), np.full(5, 3.0)
    )


@settings(deadline=None)
@given(seeds, counts)
def test_ranks_follow_the_rows_and_are_in_bounds(seed, n):
    queries, targets = random_units(seed, n, 4), random_units(seed + 1, n, 4)
    result = embeddings.retrieval_ranks(queries, targets)
    order = np.random.default_rng(seed).permutation(n)
    np.testing.assert_array_equal(
        embeddings.retrieval_ranks(queries[order], targets[order]), result[order]
    )
    assert ((result >= 1) & (result <= n)).all()
    np.testing.assert_array_equal(embeddings.retrieval_ranks(targets, targets), np.ones(n))


def test_blocks_of_queries_change_nothing(monkeypatch):
    queries, targets = random_units(0, 23, 8), random_units(1, 23, 8)
    whole = embeddings.retrieval_ranks(queries, targets)
    monkeypatch.setattr(embeddings, "RANK_BLOCK", 5)
    np.testing.assert_array_equal(embeddings.retrieval_ranks(queries, targets), whole)
    brute = [1 + sum(t @ q > targets[i] @ q for t in targets) for i, q in enumerate(queries)]
    np.testing.assert_array_equal(whole, brute)


def test_retrieval_by_hand():
    result = embeddings.retrieval(np.array([1, 2, 4, 10.0]), at=(1, 3, 10))
    assert (result.n, result.median_rank) == (4, 3)
    assert result.recall == {1: 0.25, 3: 0.5, 10: 1.0}
    assert result.mean_reciprocal_rank == pytest.approx((1 + 0.5 + 0.25 + 0.1) / 4)
    assert result.chance_recall == {1: 0.25, 3: 0.75, 10: 1.0}
    with pytest.raises(ValueError, match="0 ranks"):
        embeddings.retrieval(np.array([]), at=(1,))


# ---- KID


def test_mmd_by_hand():
    x, y = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    assert embeddings.mmd2(x, y, gamma=1.0) == 297.5
    # halved: kernels 1 and 4^3; 1, 1, 2^3 and 2.5^3
    assert embeddings.mmd2(x, y, gamma=0.5) == 1 + 64 - 2 * (1 + 1 + 8 + 15.625) / 4


@settings(deadline=None)
@given(seeds, st.integers(2, 6), st.integers(2, 6))
def test_mmd_is_the_sum_over_pairs(seed, m, n):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((m, 3)), rng.standard_normal((n, 3))

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    same = [np.mean([kernel(a, b) for a, b in itertools.permutations(rows, 2)]) for rows in (x, y)]
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert embeddings.mmd2(x, y, gamma=1 / 3) == pytest.approx(sum(same) - 2 * across, abs=1e-9)
    assert embeddings.mmd2(y[::-1], x, gamma=1 / 3) == pytest.approx(
        embeddings.mmd2(x, y, gamma=1 / 3), abs=1e-9
    )


def test_mmd_is_unbiased_over_subsets():
    """The mean over all subsets is the value of the complete set, whatever the subset size."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 2)), rng.standard_normal((6, 2)) + 0.3
    parts = [
        embeddings.mmd2(x[list(a)], y[list(b)], gamma=0.5)
        for a in itertools.combinations(range(5), 3)
        for b in itertools.combinations(range(6), 3)
    ]
    assert np.mean(parts) == pytest.approx(embeddings.mmd2(x, y, gamma=0.5), abs=1e-12)
    assert min(parts) < 0  # so it may be, and is not clamped


def test_kid_separates_sources_and_depends_on_its_seed():
    settings_ = dict(gamma=1.0, subsets=20, size=50, seed=0)
    one, two = random_units(0, 300, 8), random_units(1, 300, 8)
    far = unit(random_units(2, 300, 8) + 0.5)
    same, other = embeddings.kid(one, two, **settings_), embeddings.kid(one, far, **settings_)
    assert abs(same.mean) < 3 * same.std and other.mean > 10 * abs(same.mean)
    assert embeddings.kid(one, two, **settings_) == same
    assert embeddings.kid(one, two, **settings_ | {"seed": 1}) != same
    assert (same.subsets, same.size) == (20, 50)
    whole = embeddings.kid(one, two, gamma=1.0, subsets=3, size=300, seed=5)
    assert whole.mean == pytest.approx(embeddings.mmd2(one, two, gamma=1.0)) and whole.std < 1e-12


@pytest.mark.parametrize(("subsets", "size"), [(1, 1), (1, 5), (0, 2)])
def test_kid_refuses_invalid_sizes(subsets, size):
    rows = random_units(0, 4, 3)
    with pytest.raises(ValueError, match=r"size must be in 2\.\.4 and subsets at least 1"):
        embeddings.kid(rows, rows, gamma=1.0, subsets=subsets, size=size, seed=0)


# ---- images


def test_image_similarity_by_hand():
    result = embeddings.per_answer_similarity([[0.8, 0.9], []], missing_score=0.1)
    assert (result.coverage, result.released) == (0.5, 0.8)
    assert result.with_missing == pytest.approx(0.45) and result.best_of_all == pytest.approx(0.5)


def test_one_good_image_wins_only_in_the_release():
    once, always = [[0.9]] + [[]] * 9, [[0.7]] * 10
    once_score, always_score = (
        embeddings.per_answer_similarity(result, missing_score=0.2) for result in (once, always)
    )
    assert once_score.released > always_score.released
    assert once_score.with_missing == pytest.approx(
        0.27
    ) and always_score.with_missing == pytest.approx(0.7)
    assert embeddings.per_answer_similarity([[], []], missing_score=0.2).released is None
    with pytest.raises(ValueError, match="similarities is empty"):
        embeddings.per_answer_similarity([], missing_score=0.0)
