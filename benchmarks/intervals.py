"""python benchmarks/intervals.py [--draws 1000]

Measures how often 95 % intervals over groups contain the truth, by design: groups, items of each,
share of right answers, and correlation within groups (intra-class correlation). Each draw is a new
sample of groups; a group's own share is beta distributed about the truth.

ours         eval/stats/intervals.py
percentile   the middle 95 % of a bootstrap over groups
t            Student's t of the means' standard error over groups, without a span

Designs of 20 groups and more are those whose intervals the pages draw; the others are marked. With
few independent items, the coverage at one share jumps with every item (10 items, 0.9: 0.930 or
0.987 for any interval), so `spread` averages it over shares. The last line is one JSON object,
with the mean width of ours as well.
"""

import dataclasses
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
from scipy import special

from medmax_jax import arguments
from medmax_jax.eval.stats import intervals

RESAMPLES = 2_000


@dataclasses.dataclass(frozen=True)
class Design:
    """Describes the groups and items of a test of coverage.

    `group_size`: items per group; 0: log-normal sizes from 1 to about 40.
    paired: items are differences of two models, -1, 0 or 1, of which `share` are not 0; the truth
    is 0 and `icc` is of their signs.
    spread: each draw has a share from share - spread to share + spread.
    """

    groups: int
    group_size: int
    share: float
    icc: float
    paired: bool = False
    spread: float = 0.0

    @property
    def name(self) -> str:
        size = self.group_size or "unequal"
        kind = "differences, " if self.paired else ""
        low, high = self.share - self.spread, self.share + self.spread
        share = f"{low:g} to {high:g}" if self.spread else f"{low:g}"
        return f"{kind}{self.groups} groups of {size}, share {share}, icc {self.icc:g}"

    @property
    def drawn(self) -> bool:
        """Return whether the pages draw the interval of so many groups."""
        return self.groups >= intervals.FEW

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        """Return (values, the group of each, the true mean)."""
        sizes = np.full(self.groups, self.group_size)
        if not self.group_size:
            sizes = np.maximum(1, np.round(rng.lognormal(1.2, 1.0, self.groups))).astype(int)
        member = np.repeat(np.arange(self.groups), sizes)
        share = self.share + (self.spread * rng.uniform(-1, 1) if self.spread else 0.0)
        center = 0.5 if self.paired else share
        shares = np.full(self.groups, center)
        if self.icc:
            spread = 1 / self.icc - 1
            shares = rng.beta(center * spread, (1 - center) * spread, self.groups)
        values = (rng.uniform(size=len(member)) < shares[member]).astype(np.float64)
        if self.paired:
            values = (2 * values - 1) * (rng.uniform(size=len(member)) < share)
        return values, member, 0.0 if self.paired else share


DESIGNS = (
    Design(20, 1, 0.94, 0.0, spread=0.04),
    Design(30, 1, 0.94, 0.0, spread=0.04),
    Design(50, 1, 0.94, 0.0, spread=0.04),
    Design(50, 1, 0.5, 0.0),
    Design(200, 1, 0.9, 0.0),
    Design(20, 5, 0.5, 0.3),
    Design(20, 5, 0.9, 0.2),
    Design(20, 0, 0.5, 0.3),
    Design(20, 0, 0.9, 0.3),
    Design(25, 10, 0.8, 0.5),
    Design(30, 3, 0.7, 0.1),
    Design(30, 0, 0.8, 0.2),
    Design(40, 5, 0.95, 0.2),
    Design(40, 13, 0.9, 0.3),
    Design(50, 0, 0.9, 0.3),
    Design(80, 5, 0.5, 0.2),
    Design(100, 3, 0.97, 0.2),
    Design(100, 0, 0.6, 0.5),
    Design(20, 5, 0.2, 0.3, paired=True),
    Design(30, 0, 0.2, 0.2, paired=True),
    Design(40, 5, 0.1, 0.2, paired=True),
    Design(50, 1, 0.2, 0.0, paired=True),
    Design(80, 5, 0.05, 0.3, paired=True),
    Design(2, 30, 0.5, 0.3),
    Design(3, 30, 0.5, 0.3),
    Design(3, 30, 0.9, 0.3),
    Design(5, 20, 0.5, 0.3),
    Design(5, 20, 0.9, 0.3),
    Design(7, 0, 0.8, 0.3),
    Design(10, 1, 0.94, 0.0, spread=0.04),
    Design(10, 10, 0.5, 0.3),
    Design(19, 5, 0.9, 0.2),
    Design(19, 13, 0.98, 0.3),
    Design(19, 13, 0.03, 0.5),
    Design(5, 20, 0.1, 0.3, paired=True),
    Design(19, 13, 0.02, 0.3, paired=True),
)


def coverage(design: Design, *, draws: int, seed: int) -> dict[str, float]:
    """Return the share of intervals that contain the truth by method, and our mean width."""
    rng, width = np.random.default_rng(seed), 0.0
    contained = dict.fromkeys(("ours", "percentile", "t"), 0)
    span = intervals.of_differences(intervals.SHARE) if design.paired else intervals.SHARE
    for draw in range(draws):
        values, member, truth = design.draw(rng)
        interval = intervals.mean_interval(
            values, member.tolist(), resampling=intervals.Resampling(draw, RESAMPLES), span=span
        )
        width += (interval.high - interval.low) / draws
        ends = {"ours": (interval.low, interval.high)} | _others(values, member, design.groups, rng)
        for name, (low, high) in ends.items():
            contained[name] += low - 1e-12 <= truth <= high + 1e-12
    return {name: round(float(count) / draws, 3) for name, count in contained.items()} | {
        "width": round(width, 3)
    }


def _others(
    values: np.ndarray, member: np.ndarray, groups: int, rng: np.random.Generator
) -> dict[str, tuple[float, float]]:
    sums = np.bincount(member, values, groups)
    sizes = np.bincount(member, minlength=groups)
    drawn = rng.integers(groups, size=(RESAMPLES, groups))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    mean = values.mean()
    residuals = sums - sizes * mean
    half_width = special.stdtrit(groups - 1, 0.975) * np.sqrt(
        groups / (groups - 1) * (residuals**2).sum()
    )
    return {
        "percentile": (float(low), float(high)),
        "t": (mean - half_width / len(values), mean + half_width / len(values)),
    }


def main() -> None:
    """Run the command line."""
    parser = arguments.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1_000)
    args = parser.parse_args()
    shares, begin = {}, time.perf_counter()
    for design in DESIGNS:
        shares[design.name] = coverage(design, draws=args.draws, seed=0)
        mark = "drawn " if design.drawn else "marked"
        print(
            mark,
            design.name,
            shares[design.name],
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    print(json.dumps({"draws": args.draws, "coverage": shares}))


if __name__ == "__main__":
    main()
