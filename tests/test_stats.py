"""Intervals on cases with known answers, and their coverage by simulation."""

import numpy as np
import pytest

from eval import stats


def test_every_item_its_own_group_is_the_plain_bootstrap():
    values = [0.0, 1.0] * 50
    found = stats.mean_interval(values, range(100), seed=0, resamples=4_000)
    assert (found.mean, found.n, found.groups) == (0.5, 100, 100)
    # the mean of 100 fair coins has sd 0.05
    np.testing.assert_allclose([found.low, found.high], [0.5 - 0.098, 0.5 + 0.098], atol=0.015)


def test_copies_in_a_group_add_nothing():
    """Ten copies of each of 20 values are worth 20 values, not 200."""
    values = np.repeat([0.0, 1.0] * 10, 10)
    groups = np.repeat(np.arange(20), 10).tolist()
    clustered = stats.mean_interval(values, groups, seed=0, resamples=4_000)
    plain = stats.mean_interval([0.0, 1.0] * 10, range(20), seed=0, resamples=4_000)
    assert (clustered.low, clustered.high) == (plain.low, plain.high)
    naive = stats.mean_interval(values, range(200), seed=0, resamples=4_000)
    assert clustered.high - clustered.low > 2.5 * (naive.high - naive.low)


def test_groups_of_different_size_weigh_by_their_items():
    found = stats.mean_interval([1.0, 1.0, 1.0, 0.0], list("aaab"), seed=0, resamples=2_000)
    assert found.mean == 0.75
    assert (found.low, found.high) == (0.0, 1.0)  # two groups: draws aa, ab, bb


def test_a_paired_difference_cancels_what_is_hard_for_both():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 5, 200)
    found = stats.paired_interval(before, before + 0.1, range(200), seed=0, resamples=2_000)
    np.testing.assert_allclose([found.mean, found.low, found.high], 0.1, atol=1e-9)


def test_one_seed_one_interval():
    values = np.linspace(0, 1, 40)
    a, b, c = (stats.mean_interval(values, range(40), seed=s, resamples=2_000) for s in (1, 1, 2))
    assert a == b and a != c


def test_wilson():
    np.testing.assert_allclose(stats.wilson(8, 10), (0.49016, 0.94332), atol=1e-5)
    np.testing.assert_allclose(stats.wilson(0, 10), (0.0, 0.27754), atol=1e-5)


@pytest.mark.parametrize("clusters", [30, 80])
def test_coverage(clusters):
    """95 % intervals hold the truth in nearly 95 % of worlds with clusters of unequal size."""
    rng, held, worlds = np.random.default_rng(3), 0, 300
    for world in range(worlds):
        sizes = rng.integers(1, 8, clusters)
        ease = rng.normal(0, 1, clusters)  # mean 0 whatever the size
        groups = np.repeat(np.arange(clusters), sizes).tolist()
        values = np.repeat(ease, sizes) + rng.normal(0, 0.5, sizes.sum())
        found = stats.mean_interval(values, groups, seed=world, resamples=2_000)
        held += found.low <= 0 <= found.high
    assert 0.90 <= held / worlds <= 0.98


def test_errors_name_the_number():
    with pytest.raises(ValueError, match="2 values but 1 groups"):
        stats.mean_interval([1, 2], "a", seed=0, resamples=2_000)
    with pytest.raises(ValueError, match="no values"):
        stats.mean_interval([], [], seed=0, resamples=2_000)
    with pytest.raises(ValueError, match="resamples is 10"):
        stats.mean_interval([1], "a", seed=0, resamples=10)
    with pytest.raises(ValueError, match="1 scores before but 2 after"):
        stats.paired_interval([1], [1, 2], "ab", seed=0, resamples=2_000)
    with pytest.raises(ValueError, match="3 successes of 2"):
        stats.wilson(3, 2)
