"""Intervals on cases with known answers, and their coverage by simulation."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from benchmarks import intervals
from medmax_jax.eval.stats import intervals as stats_intervals
from medmax_jax.eval.stats.intervals import Resampling

RESAMPLING = Resampling(0, 2_000)


def test_one_item_per_group_is_the_plain_bootstrap():
    values = [0.0, 1.0] * 50
    result = stats_intervals.mean_interval(values, range(100), resampling=Resampling(0, 4_000))
    assert (result.mean, result.n, result.groups) == (0.5, 100, 100)
    # the mean of 100 fair coins has sd 0.05
    np.testing.assert_allclose([result.low, result.high], [0.5 - 0.098, 0.5 + 0.098], atol=0.015)


def test_copies_in_a_group_add_nothing():
    """Ten copies of each of 20 values are worth 20 values, not 200."""
    values = np.repeat([0.0, 1.0] * 10, 10)
    groups = np.repeat(np.arange(20), 10).tolist()
    clustered = stats_intervals.mean_interval(values, groups, resampling=Resampling(0, 4_000))
    plain = stats_intervals.mean_interval(
        [0.0, 1.0] * 10, range(20), resampling=Resampling(0, 4_000)
    )
    assert (clustered.low, clustered.high) == (plain.low, plain.high)
    naive = stats_intervals.mean_interval(values, range(200), resampling=Resampling(0, 4_000))
    assert clustered.high - clustered.low > 2.5 * (naive.high - naive.low)


def test_groups_are_weighted_by_their_items():
    result = stats_intervals.mean_interval(
        [1.0, 1.0, 1.0, 0.0], list("aaab"), resampling=Resampling(0, 2_000)
    )
    assert result.mean == 0.75
    # two groups, the items of one of them mostly: nearly nothing is known of others
    assert 0 <= result.low < 0.05 and 0.95 < result.high <= 1


def test_a_paired_difference_cancels_the_difficulty_of_items():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 5, 200)
    after = before + rng.normal(0.1, 0.01, 200)
    result = stats_intervals.paired_interval(
        before, after, range(200), span=None, resampling=RESAMPLING
    )
    np.testing.assert_allclose([result.mean, result.low, result.high], 0.1, atol=0.005)


def test_the_interval_depends_on_the_seed_only():
    values = np.linspace(0, 1, 40)
    a, b, c = (
        stats_intervals.mean_interval(values, range(40), resampling=Resampling(s, 2_000))
        for s in (1, 1, 2)
    )
    assert a == b and a != c


def test_wilson():
    np.testing.assert_allclose(stats_intervals.wilson(8, 10), (0.49016, 0.94332), atol=1e-5)
    np.testing.assert_allclose(stats_intervals.wilson(0, 10), (0.0, 0.27754), atol=1e-5)


@pytest.mark.parametrize("clusters", [30, 80])
def test_coverage(clusters):
    """95 % intervals contain the true value in nearly 95 % of samples with unequal clusters."""
    rng, covered, worlds = np.random.default_rng(3), 0, 300
    for world in range(worlds):
        sizes = rng.integers(1, 8, clusters)
        ease = rng.normal(0, 1, clusters)  # mean 0 whatever the size
        groups = np.repeat(np.arange(clusters), sizes).tolist()
        values = np.repeat(ease, sizes) + rng.normal(0, 0.5, sizes.sum())
        result = stats_intervals.mean_interval(
            values, groups, resampling=Resampling(world, 2_000), span=None
        )
        covered += result.low <= 0 <= result.high
    assert 0.90 <= covered / worlds <= 0.98


FEW_GROUPS = (
    intervals.Design(5, 20, 0.5, 0.3),
    intervals.Design(19, 5, 0.9, 0.2),
    intervals.Design(10, 1, 0.9, 0.0),
)


@pytest.mark.parametrize("design", FEW_GROUPS, ids=lambda design: design.name)
def test_coverage_with_few_groups(design):
    """Near 95 %, where bootstrap percentiles contain the true value in 65 to 87 % of samples."""
    shares = intervals.coverage(design, draws=400, seed=0)
    assert 0.92 <= shares["ours"] and shares["percentile"] < 0.90 < shares["ours"], shares
    assert shares["width"] < 0.7, shares


def test_many_designs_have_intervals_that_are_drawn():
    drawn = [design for design in intervals.DESIGNS if design.drawn]
    assert len(drawn) >= 20 and any(design.paired for design in drawn)
    assert any(not design.group_size for design in drawn)
    assert {2, 3, 5, 19} <= {design.groups for design in intervals.DESIGNS if not design.drawn}


@pytest.mark.slow
@pytest.mark.parametrize("design", intervals.DESIGNS, ids=lambda design: design.name)
def test_coverage_over_all_designs(design):
    """From 93 to 98 % where the interval is drawn; at least 85 % where it is marked."""
    share = intervals.coverage(design, draws=1_000, seed=0)["ours"]
    assert 0.93 <= share <= 0.98 if design.drawn else share >= 0.85


def test_groups_of_very_different_sizes_have_wider_intervals():
    """The bootstrap alone: 0.082; the largest group draws every resample towards its own mean."""
    sizes = [1] * 30 + [60]
    groups = np.repeat(np.arange(31), sizes).tolist()
    values = [float(n % 2) for n in range(30)] + [1.0] * 60
    result = stats_intervals.mean_interval(values, groups, resampling=RESAMPLING)
    even = stats_intervals.mean_interval(values, range(90), resampling=RESAMPLING)
    assert result.high - result.low > 2 * (even.high - even.low)


def test_items_of_one_group_each_have_wilson_s_interval_with_student_s_t():
    values = [1.0] * 8 + [0.0] * 2
    result = stats_intervals.mean_interval(values, range(10), resampling=Resampling(0, 20_000))
    t2 = special.stdtrit(9, 0.975) ** 2 / 9  # the error of 10 items, with 9 in its denominator
    middle, half = 0.8 + t2 / 2, np.sqrt(t2 * (0.16 + t2 / 4))
    want = [(middle - half) / (1 + t2), (middle + half) / (1 + t2)]
    np.testing.assert_allclose([result.low, result.high], want, atol=0.004)


def test_no_variation_bounds_the_groups_that_could_differ():
    """255 wrong answers of 19 patients are those of 19: Clopper and Pearson's bound for 0 of 19."""
    groups, most = [n % 19 for n in range(255)], 1 - 0.025 ** (1 / 19)
    wrong = stats_intervals.mean_interval([0.0] * 255, groups, resampling=RESAMPLING)
    assert (wrong.low, wrong.high) == (0.0, pytest.approx(most)) and most == pytest.approx(
        0.1765, abs=1e-4
    )
    right = stats_intervals.mean_interval([1.0] * 255, groups, resampling=RESAMPLING)
    assert (right.low, right.high) == (pytest.approx(1 - most), 1.0)
    same = stats_intervals.paired_interval([1.0] * 255, [1.0] * 255, groups, resampling=RESAMPLING)
    assert (same.low, same.high) == (pytest.approx(-most), pytest.approx(most))
    third = stats_intervals.mean_interval([0.3] * 255, groups, resampling=RESAMPLING)
    assert (third.low, third.high) == (
        pytest.approx(0.3 * (1 - most)),
        pytest.approx(0.3 + 0.7 * most),
    )
    pointwise = stats_intervals.pointwise_intervals(
        lambda indices: np.zeros(1), groups, spans=[stats_intervals.SHARE], resampling=RESAMPLING
    )
    assert (pointwise[0].low, pointwise[0].high) == (0.0, pytest.approx(most))
    for paired in (False, True):
        assert (
            0.1
            < stats_intervals.minimum_detectable_effect([0.0] * 255, groups, paired=paired)
            < 0.3
        )
    nearly = stats_intervals.mean_interval(
        [0.0, 1e-8] * 19, range(38), resampling=RESAMPLING
    )  # but for rounding
    assert nearly.high == pytest.approx(1 - 0.025 ** (1 / 38), rel=1e-4)
    # groups whose means agree while their items do not are no more certain than their items
    even = stats_intervals.mean_interval(
        [0.0, 1.0] * 20, np.repeat(range(20), 2).tolist(), resampling=RESAMPLING
    )
    assert even.high - even.low > 0.25


def test_one_group_has_no_interval():
    interval = stats_intervals.mean_interval([1.0, 0.0] * 20, ["one"] * 40, resampling=RESAMPLING)
    assert (interval.low, interval.high) == (-np.inf, np.inf)
    row = interval.row()
    assert (row["ci_low"], row["ci_high"], row["few_groups"]) == (None, None, True)
    assert row["value"] == 0.5 and json.dumps(row, allow_nan=False)
    suite = stats_intervals.suite_interval([([1.0, 0.0], "aa")], resampling=RESAMPLING)
    pointwise = stats_intervals.pointwise_intervals(
        lambda indices: np.ones(1), "aa", spans=[None], resampling=RESAMPLING
    )
    assert suite.low == pointwise[0].low == -np.inf
    assert not stats_intervals.mean_interval(
        [1.0, 0.0] * 10, range(20), resampling=RESAMPLING
    ).row()["few_groups"]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6)), min_size=2, max_size=30).filter(
        lambda items: len({group for _, group in items}) > 1
    )
)
def test_an_interval_has_width_and_stays_in_its_span(items):
    values, groups = zip(*items, strict=True)
    for result, least in (
        (stats_intervals.mean_interval(values, groups, resampling=RESAMPLING), 0.0),
        (
            stats_intervals.paired_interval(
                values, [1.0] * len(values), groups, resampling=RESAMPLING
            ),
            -1.0,
        ),
        (
            stats_intervals.suite_interval([(values, groups), ([1.0], [9])], resampling=RESAMPLING),
            0.0,
        ),
    ):
        assert least <= result.low <= result.mean + 1e-12 and result.mean <= result.high + 1e-12
        assert result.high <= 1 + 1e-12 and result.high > result.low


def test_errors_name_the_number():
    with pytest.raises(ValueError, match="values from 0 to 3 are outside the span 0 to 1"):
        stats_intervals.mean_interval([0, 3], "ab", resampling=Resampling(0, 2_000))
    with pytest.raises(ValueError, match="2 values but 1 groups"):
        stats_intervals.mean_interval([1, 2], "a", resampling=Resampling(0, 2_000))
    with pytest.raises(ValueError, match="no values"):
        stats_intervals.mean_interval([], [], resampling=Resampling(0, 2_000))
    with pytest.raises(ValueError, match="resamples is 10"):
        stats_intervals.mean_interval([1], "a", resampling=Resampling(0, 10))
    with pytest.raises(ValueError, match="before has 1 scores and after has 2"):
        stats_intervals.paired_interval([1], [1, 2], "ab", resampling=Resampling(0, 2_000))
    with pytest.raises(ValueError, match="successes is 3 and n is 2"):
        stats_intervals.wilson(3, 2)
