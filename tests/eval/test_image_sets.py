"""Sets of images: values by hand; coverage of intervals where the true value is known."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_jax.eval.metrics import embeddings, image_sets
from medmax_jax.eval.metrics.embeddings import kernel, mmd2
from medmax_jax.eval.stats.intervals import Resampling

RESAMPLING = Resampling(0, 2_000)
seeds, counts = st.integers(0, 2**32 - 1), st.integers(2, 12)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def distance(real, generated, groups, **changes):
    fields = dict(real_groups=groups, generated_groups=groups, gamma=1.0, resampling=RESAMPLING)
    return image_sets.kid(real, generated, **(fields | changes))


# ---- values


def test_diversity_by_hand():
    def of(rows):
        return image_sets.diversity(np.array(rows), groups=range(len(rows)), resampling=RESAMPLING)

    assert of([[1.0, 0.0]] * 3).mean == pytest.approx(0, abs=1e-12)
    assert of(np.eye(4)).mean == pytest.approx(1)
    assert of([[1.0, 0.0], [-1.0, 0.0]]).mean == pytest.approx(2)
    half = [[1.0, 0.0], [0.5, 0.75**0.5], [-0.5, 0.75**0.5]]
    spread = of(half)
    assert spread.mean == pytest.approx((0.5 + 0.5 + 1.5) / 3)
    # three groups: Student's t of two degrees of freedom is wider than all they hold
    assert (spread.low, spread.high) == (0.0, 2.0)
    equal = of([[1.0, 0.0]] * 30)  # no variation: the groups that could differ are bounded
    assert equal.low == 0 and equal.high == pytest.approx(2 * (1 - 0.025 ** (1 / 30)))
    # the first two are of one patient: their pair is left out
    pair = image_sets.diversity(np.array(half), groups=["a", "a", "b"], resampling=RESAMPLING)
    assert pair.mean == pytest.approx((0.5 + 1.5) / 2) and (pair.n, pair.groups) == (3, 2)
    with pytest.raises(ValueError, match="1 groups; pairs are of two groups and require 2"):
        image_sets.diversity(np.array(half), groups=["a"] * 3, resampling=RESAMPLING)


@settings(deadline=None, max_examples=25)
@given(seeds, counts)
def test_sums_are_over_pairs_of_two_groups(seed, n):
    rng = np.random.default_rng(seed)
    real, generated = (unit(rng.standard_normal((n, 5))) for _ in range(2))
    groups = [0, *(int(g) for g in rng.integers(1, 4, size=n - 1))]
    pairs = [(i, j) for i, j in itertools.product(range(n), repeat=2) if groups[i] != groups[j]]

    def mean(a, b):
        return np.mean([kernel(a, b, 1.0)[i, j] for i, j in pairs])

    wanted = mean(real, real) + mean(generated, generated) - 2 * mean(real, generated)
    assert distance(real, generated, groups).mean == pytest.approx(wanted, abs=1e-9)
    spread = np.mean([1 - generated[i] @ generated[j] for i, j in pairs])
    result = image_sets.diversity(generated, groups=groups, resampling=RESAMPLING)
    assert result.mean == pytest.approx(spread, abs=1e-9)


def test_disjoint_groups_give_the_published_estimate():
    rng = np.random.default_rng(0)
    real, generated = unit(rng.standard_normal((9, 4))), unit(rng.standard_normal((7, 4)) + 0.5)
    result = distance(real, generated, range(9), generated_groups=range(9, 16))
    assert result.mean == pytest.approx(mmd2(real, generated, gamma=1.0), abs=1e-12)
    assert (result.n, result.groups) == (7, 16) and result.low < result.mean < result.high


def test_block_sizes_do_not_change_the_value(monkeypatch):
    rng = np.random.default_rng(0)
    real, generated = (unit(rng.standard_normal((60, 4))) for _ in range(2))
    whole = distance(real, generated, range(60))
    monkeypatch.setattr(image_sets, "ROWS", 7)
    again = distance(real, generated, range(60))
    assert (again.mean, again.low) == (pytest.approx(whole.mean), pytest.approx(whole.low))
    monkeypatch.setattr(image_sets, "BLOCKS", 20)  # groups in threes: a few pairs more are out
    fewer = distance(real, generated, range(60))
    assert fewer.groups == 60 and fewer.mean == pytest.approx(whole.mean, abs=0.05)
    width = (fewer.high - fewer.low) / (whole.high - whole.low)
    assert 0.6 < width < 1.6


def test_a_side_of_one_group_is_refused():
    rows = np.eye(4)
    with pytest.raises(ValueError, match="one side has rows of fewer than 2"):
        distance(rows, rows, range(4), generated_groups=["a"] * 4)
    with pytest.raises(ValueError, match="4 rows but 3 groups"):
        distance(rows, rows, range(3))


# ---- intervals


class Population:
    """300 patients with 1 to 3 images each: references, and a model's generated images."""

    def __init__(self, shift):
        rng = np.random.default_rng(7)
        sizes = rng.integers(1, 4, size=300)
        patient = np.repeat(rng.standard_normal((300, 6)), sizes, axis=0)
        item = patient + rng.standard_normal(patient.shape)
        self.real, noise = unit(item + 0.3), rng.standard_normal(item.shape)
        self.generated = unit(item + 0.3 + shift + noise) if shift else self.real
        self.rows = np.split(np.arange(len(item)), np.cumsum(sizes)[:-1])
        # Patients are drawn with replacement, so two drawn rows are any two of all.
        x, y = self.real, self.generated
        ends = kernel(x, x, 1.0).mean() + kernel(y, y, 1.0).mean()
        self.distance = ends - 2 * kernel(x, y, 1.0).mean()
        self.spread = 1 - (y @ y.T).mean()

    def drawn(self, rng, patients=40):
        parts = [self.rows[g] for g in rng.integers(300, size=patients)]
        groups = np.repeat(np.arange(patients), [len(part) for part in parts])
        return np.concatenate(parts), [int(g) for g in groups]


def test_intervals_hold_over_patients():
    """200 draws of 40 patients: a 95 % interval holds in 180 to 199 of them but once in 800."""
    world, covered, spread, naive, values = Population(shift=0.6), 0, 0, [], []
    assert world.distance > 0.2
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, groups = world.drawn(rng)
        result = distance(world.real[rows], world.generated[rows], groups)
        covered += result.low <= world.distance <= result.high
        diversity = image_sets.diversity(
            world.generated[rows], groups=groups, resampling=RESAMPLING
        )
        spread += diversity.low <= world.spread <= diversity.high
        naive.append(mmd2(world.real[rows], world.generated[rows], gamma=1.0))
        values.append(result.mean)
    assert 180 <= covered <= 199 and 180 <= spread <= 199, (covered, spread)
    error = np.std(values) / 200**0.5
    assert abs(np.mean(values) - world.distance) < 4 * error  # unbiased
    assert abs(np.mean(naive) - world.distance) > 8 * error  # the mean over all pairs is biased


@pytest.mark.slow
def test_equal_sources_are_rarely_separated():
    """Where the true value is 0 the interval is wider than necessary: coverage is higher."""
    world, covered = Population(shift=0.0), 0
    rng = np.random.default_rng(1)
    for _ in range(200):
        (rows, of), (others, to) = world.drawn(rng), world.drawn(rng)
        result = distance(
            world.real[rows],
            world.real[others],
            of,
            generated_groups=[100 + group for group in to],
        )
        covered += result.low <= 0 <= result.high
    assert covered >= 190, covered


def test_thousands_of_groups_take_seconds():
    rng = np.random.default_rng(0)
    rows = [unit(rng.standard_normal((3_000, 64))).astype(np.float32) for _ in range(2)]
    start = time.monotonic()
    result = distance(*rows, range(3_000))
    assert result.low < 0 < result.high and time.monotonic() - start < 60
    kid = embeddings.kid(*rows, gamma=1.0, subsets=5, size=1_000, seed=0)
    assert result.mean == pytest.approx(kid.mean, abs=0.01)
