"""Tests whether two models differ: paired scores, over groups and over a suite.

    mcnemar     0/1 scores, items independent: exact, of the items that only one side got right
    sign_flip   any scores, groups independent: were the signs of the groups' differences chance?
    holm        p values of a suite, so that all conclusions hold together
    letters     groups of models without a significant difference, for a table

Several questions about one image are not independent, so conclusions use `sign_flip`; `mcnemar`
is reported in addition for comparison with other tables.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy import special

from medmax_jax.eval.stats.intervals import Resampling

EXACT_GROUPS = 12  # up to this number, all 2^groups signs are tried
ALPHA = 0.05
SLACK = 1e-9  # sums that differ only by rounding are equal


@dataclasses.dataclass(frozen=True)
class McNemar:
    only_first: int
    only_second: int
    p: float


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """Return McNemar's exact two-sided test: 1 and 9 of 10 discordant items give p 0.0215."""
    _check_paired(first, second)
    if wrong := {x for x in (*first, *second)} - {0, 1}:
        raise ValueError(
            f"score {min(wrong)}: McNemar's test requires scores of 0 and 1; use sign_flip"
        )
    b = sum(x > y for x, y in zip(first, second, strict=True))
    c = sum(x < y for x, y in zip(first, second, strict=True))
    # The binomial tail is computed by its incomplete beta function: a sum of binomials in integers
    # is the same number, in a time that grows with the square of the discordant items.
    return McNemar(b, c, min(1.0, 2 * float(special.bdtr(min(b, c), b + c, 0.5))))


def sign_flip(
    differences: Sequence[float], groups: Sequence[Hashable], *, resampling: Resampling
) -> float:
    """Return the two-sided p of the hypothesis that each group's sign is random.

    Exact up to EXACT_GROUPS groups (three that agree cannot go below 2/8); else of `resamples`
    draws, where p cannot be below 1 / (resamples + 1).
    """
    sums = group_sums(differences, groups)
    least = abs(sums.sum()) - SLACK * max(1.0, np.abs(sums).sum())
    if len(sums) <= EXACT_GROUPS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(sums))))
        return float(np.mean(np.abs(signs @ sums) >= least))
    rng, extreme = np.random.default_rng(resampling.seed), 0
    for start in range(0, resampling.resamples, 500):  # 500 rows at a time bound the memory
        size = (min(500, resampling.resamples - start), len(sums))
        signs = rng.integers(0, 2, size=size) * 2.0 - 1.0
        extreme += int(np.sum(np.abs(signs @ sums) >= least))
    return (extreme + 1) / (resampling.resamples + 1)


def holm(p_values: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """Return adjusted p values: {a: 0.01, b: 0.04, c: 0.03} -> {a: 0.03, b: 0.06, c: 0.06}."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def letters(order: Sequence[str], different: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the letters of each name: two names share one if and only if they are not different.

    order: names, the best first, which has the letter a. The compact letter display of Piepho
    (2004): every difference splits the sets that contain both names.

        letters(["x", "y", "z"], [("x", "z")])  ->  {"x": "a", "y": "ab", "z": "b"}
    """
    sets = [frozenset(order)]
    for first, second in different:
        split = []
        for names in sets:
            if first in names and second in names:
                split += [names - {first}, names - {second}]
            else:
                split.append(names)
        unique = dict.fromkeys(split)
        sets = [names for names in unique if not any(names < other for other in unique)]
    ranks = {name: number for number, name in enumerate(order)}
    sets.sort(key=lambda names: sorted(ranks[name] for name in names))
    return {
        name: "".join(_letter(number) for number, names in enumerate(sets) if name in names)
        for name in order
    }


def _letter(number: int) -> str:
    """Return a to z, then a1 to z1, and so on."""
    return f"{chr(ord('a') + number % 26)}{number // 26 or ''}"


def group_sums(values: Sequence[float], groups: Sequence[Hashable]) -> Float[np.ndarray, "g"]:
    """Return the sum of each group's values, groups in their order."""
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} values but {len(groups)} groups; pass one group per value")
    if not len(values):
        raise ValueError("no values: no item has scores on both sides")
    index = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    member = np.array([index[name] for name in groups])
    return np.bincount(member, np.asarray(values, np.float64))


def _check_paired(first: Sequence[float], second: Sequence[float]) -> None:
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"{len(first)} and {len(second)} scores; a paired test requires the same items, at "
            "least 1"
        )
