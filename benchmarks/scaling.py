"""python benchmarks/scaling.py --part {coverage,speed} [--draws 200] [--points T.csv]

coverage   how often 95% intervals of medmax_jax.scaling contain the true parameter of laws that are
           known: tables are drawn from a law with noise of 0.5% (runs of a size and an amount of
           data, two seeds), fitted, bootstrapped
speed      seconds of one fit, of 1,000 bootstraps, and of all that the program does (with held-outs
           and the influence of each run), on 240 runs of a known law, or on a table (--points)

The last line is one JSON object, with the machine's load.
"""

import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np

from medmax_jax import arguments
from medmax_jax.scaling import allocation, diagnostics, fit, study, table
from medmax_jax.scaling.laws import LAWS

NOISE = 0.005  # of ln loss
TRUE = {
    "chinchilla": dict(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37),
    "tied": dict(E=1.8, A=166.0, B=287.0, alpha=0.27),
    "power": dict(E=1.2, B=2_000.0, beta=0.35),
    "finetune": dict(E=1.2, A=40.0, alpha=0.08, beta=0.12),
    "rectified": dict(E=0.5, B=900.0, beta=0.6, D_l=400.0),
    "accuracy": dict(E=0.85, A=2.2, gamma=0.72),
}


def design(law: str, *, sizes: int, amounts: int, seeds: int) -> dict[str, np.ndarray]:
    """Return the columns of a grid of runs."""
    n = np.geomspace(5e7, 1.5e10, sizes)
    d = np.geomspace(1e9, 3e11, amounts)
    if law in ("finetune", "rectified"):
        d = np.geomspace(2e2, 2e6, amounts)
    if law == "accuracy":
        return {"loss": np.repeat(np.linspace(2.2, 4.5, sizes * amounts), seeds)}
    if law in ("power", "rectified"):
        return {"tokens": np.repeat(np.geomspace(d[0], d[-1], sizes * amounts), seeds)}
    grid = np.array([(i, j) for i in n for j in d for _ in range(seeds)])
    return {"params": grid[:, 0], "tokens": grid[:, 1]}


def truth(law: str, x: dict[str, np.ndarray]) -> np.ndarray:
    """Return the law's values without noise."""
    values, form = TRUE[law], LAWS[law]
    exponents = tuple(
        np.array([np.log(values[e.name]) if e.log else values[e.name]]) for e in form.exponents
    )
    terms = form.terms(exponents, x)
    signed = zip(form.signs, form.names, terms, strict=True)
    return sum(sign * values[name] * np.exp(term) for sign, name, term in signed)


def draw_table(law: str, x: dict[str, np.ndarray], rng: np.random.Generator) -> table.Table:
    """Return a table of runs of the law with noise."""
    exact = truth(law, x)
    noise = NOISE * rng.standard_normal(len(exact))
    return table.Table(
        x=x,
        y=exact * np.exp(noise),
        target="loss",
        runs=np.arange(len(exact)),
        labels=tuple(f"row {i + 1}" for i in range(len(exact))),
        excluded=(),
        notes=(),
    )


def coverage(
    law: str, *, draws: int, bootstraps: int, seed: int, delta: float, **grid: int
) -> dict[str, float]:
    """Return the share of intervals that contain the truth, by parameter."""
    rng, x = np.random.default_rng(seed), design(law, **grid)
    true_values = dict(TRUE[law])
    if law in allocation.LAWS:
        true_values["size_exponent"] = allocation.exponent(true_values)
    hits = dict.fromkeys(true_values, 0)
    for k in range(draws):
        rows = draw_table(law, x, rng)
        estimate = fit.fit(LAWS[law], rows.x, rows.y, delta=delta, fixed={})
        by_name = diagnostics.bootstrap(estimate, rows, count=bootstraps, seed=k).named()
        if law in allocation.LAWS:
            by_name["size_exponent"] = allocation.exponent(by_name)
        for name, value in true_values.items():
            low, high = diagnostics.interval(by_name[name], diagnostics.LEVEL)
            hits[name] += low <= value <= high
    return {name: round(count / draws, 3) for name, count in hits.items()}


def speed(points: str | None) -> dict[str, float]:
    """Return the seconds; the median of five fits."""
    if points:
        rows = table.read(points, LAWS["chinchilla"], target="loss", columns={}, exclude=())
    else:
        x = design("chinchilla", sizes=20, amounts=12, seeds=1)
        rows = draw_table("chinchilla", x, np.random.default_rng(0))
    seconds, busy = [], []
    for _ in range(5):
        begin, cpu = time.perf_counter(), time.process_time()
        estimate = fit.fit(LAWS["chinchilla"], rows.x, rows.y, delta=1e-3, fixed={})
        seconds.append(time.perf_counter() - begin)
        busy.append(time.process_time() - cpu)
    begin, cpu = time.perf_counter(), time.process_time()
    diagnostics.bootstrap(estimate, rows, count=1_000, seed=0)
    wall, bootstrap_cpu = time.perf_counter() - begin, time.process_time() - cpu
    options = study.Options(delta=1e-3, fixed={}, draws=1_000, seed=0, flops=6.0, budgets=())
    begin, cpu = time.perf_counter(), time.process_time()
    study.run_study(LAWS["chinchilla"], rows, options)
    return dict(
        runs=len(rows),
        fit_seconds=round(float(np.median(seconds)), 3),
        fit_cpu_seconds=round(float(np.median(busy)), 3),
        bootstraps_1000_seconds=round(wall, 2),
        bootstraps_1000_cpu_seconds=round(bootstrap_cpu, 2),
        study_1000_seconds=round(time.perf_counter() - begin, 2),
        study_1000_cpu_seconds=round(time.process_time() - cpu, 2),
    )


def main() -> None:
    """Run the command line."""
    parser = arguments.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", required=True, choices=("coverage", "speed"))
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--bootstraps", type=int, default=200)
    parser.add_argument("--laws", default=",".join(TRUE))
    parser.add_argument("--points", help="speed: params,tokens,loss as CSV")
    args = parser.parse_args()
    if args.part == "speed":
        results = speed(args.points)
    else:
        results = {}
        for law in args.laws.split(","):
            begin = time.perf_counter()
            results[law] = coverage(
                law, draws=args.draws, bootstraps=args.bootstraps, seed=0, delta=1e-3, sizes=4,
                amounts=4, seeds=2,
            )  # fmt: skip
            print(law, results[law], f"{time.perf_counter() - begin:.0f} s", flush=True)
    load = [round(x, 2) for x in os.getloadavg()]
    print(json.dumps({"part": args.part, "draws": args.draws, **results, "load": load}))


if __name__ == "__main__":
    main()
