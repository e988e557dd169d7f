"""Draw the figures of a study and its page: the law, its residuals, exponents and best sizes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from medmax_jax.io import charts, html_page
from medmax_jax.io.charts import MARK, SERIES, SOFT
from medmax_jax.scaling import allocation as scaling_allocation
from medmax_jax.scaling import checklist, diagnostics
from medmax_jax.scaling.diagnostics import LEVEL
from medmax_jax.scaling.study import Study

POINTS = 120  # of a drawn curve
INTERVAL = f"{100 * LEVEL:.0f} % interval"
DEFINITIONS = {
    "parameter": "of the law's formula",
    INTERVAL: "of bootstraps over runs; a dash: no bootstrap moves the parameter",
    "status": "fitted, fixed by a flag, or at the bound of its range, where no interval exists",
    "condition number": "of the normal matrix of the fit; large: some parameters are nearly "
    "interchangeable; lower is better",
    "most influential run": "the run without which the fit moves most",
    "result": "errors of held-out runs are those of a law fitted without them; lower is better",
    "compute": "floating-point operations of a training run",
    "parameters": "size of least loss with this compute, and its interval",
    "tokens": "training tokens with this compute at that size, and its interval",
    "loss": "loss that the law predicts there, and its interval; lower is better",
}
BEYOND = 3.0  # a curve continues by this factor beyond the largest run
CURVES = 6  # sizes that get a curve of their own; of more, this many are shown
NAMES = {"params": "parameters", "tokens": "tokens", "unique_tokens": "unique tokens"}


def all_plots(study: Study) -> dict[str, tuple[Figure, str]]:
    """Return file name -> (figure, caption)."""
    law_caption = "The law at selected sizes, its interval, and the runs by nearest size."
    plots = {
        "law.png": (law(study), law_caption),
        "residuals.png": (residuals(study), "The deviation of each run from the law."),
        "bootstrap.png": (spread(study), "The bootstrap distribution of the exponents."),
    }
    if study.allocation:
        allocation_caption = (
            "The model size of least loss by compute, with its interval, and the runs."
        )
        plots["allocation.png"] = (allocation(study), allocation_caption)
    return plots


@charts.page_style()
def law(study: Study) -> Figure:
    """Plot loss by tokens, a curve for each size; loss alone if the law has no size."""
    x_column = "loss" if "loss" in study.table.x else "tokens"
    figure, axes = charts.subplots(size=(7.2, 4.6))
    legend_title, groups = _groups(study)
    for color, (value, rows) in zip(SERIES, groups, strict=False):
        x = _along(study, x_column, rows)
        low, high = study.band(x)
        axes.fill_between(x[x_column], low, high, color=color, alpha=0.15, lw=0)
        label = None if value is None else f"{value:.3g}"
        axes.plot(x[x_column], study.fit.predict(x), color=color, lw=1.5, label=label)
        axes.plot(study.table.x[x_column][rows], study.table.y[rows], "o", color=color, ms=4.5)
    axes.set(xlabel=NAMES.get(x_column, x_column), ylabel=study.table.target.replace("_", " "))
    if x_column != "loss":
        _log_x(axes)
        _log_y(axes)
    if len(groups) > 1:
        axes.legend(title=legend_title, title_fontsize=8)
    axes.set_title(f"{study.table.target.replace('_', ' ')} = {study.law.formula}", fontsize=9)
    return _with_grid(figure)


@charts.page_style()
def residuals(study: Study) -> Figure:
    """Plot relative residuals by the largest column, with held-out errors."""
    figure, (left, right) = charts.subplots(1, 2, size=(8.6, 3.4), width_ratios=(2, 1), sharey=True)
    table = study.table
    x_column = "loss" if "loss" in table.x else "tokens"
    misses = 100 * (study.fit.predict(table.x) / table.y - 1)
    left.axhline(0, color=SOFT, lw=1)
    left.plot(table.x[x_column], misses, "o", color=SOFT, ms=4.5)
    legend_title, groups = _groups(study)
    for color, (value, rows) in zip(SERIES, groups, strict=False):  # as in the chart of the law
        label = None if value is None else f"{value:.3g}"
        left.plot(table.x[x_column][rows], misses[rows], "o", color=color, ms=4.5, label=label)
    if len(groups) > 1:
        left.legend(title=legend_title, title_fontsize=8)
    left.set(xlabel=NAMES.get(x_column, x_column), ylabel="law / run - 1, %", title="fitted runs")
    if x_column != "loss":
        _log_x(left)
    fitted = [holdout for holdout in study.holdouts if not holdout.why]
    for k, holdout in enumerate(fitted):
        right.plot(
            np.full(holdout.count, k), 100 * holdout.errors, "o", color=SERIES[1], ms=4, alpha=0.7
        )
    right.axhline(0, color=SOFT, lw=1)
    right.set_xticks(range(len(fitted)), [_wrapped(e.name) for e in fitted], fontsize=7)
    right.set(title="held-out runs", xlim=(-0.6, max(len(fitted), 1) - 0.4))
    return _with_grid(figure)


@charts.page_style()
def spread(study: Study) -> Figure:
    """Plot two exponents against each other, or a single one as a histogram."""
    names = [e.name for e in study.law.exponents if e.name not in study.options.fixed][:2]
    figure, axes = charts.subplots(size=(4.6, 3.8))
    if len(names) == 2:
        x, y = (study.named[n] for n in names)
        axes.plot(x, y, ".", color=MARK, ms=3, alpha=0.35)
        axes.plot(*(study.fit.values[n] for n in names), "+", color=SERIES[1], ms=14, mew=2)
        axes.set(xlabel=names[0], ylabel=names[1])
        for set_scale, values in ((axes.set_xscale, x), (axes.set_yscale, y)):
            if values.min() > 0 and values.max() / values.min() > 50:
                set_scale("log")
    else:
        name = names[0] if names else study.law.names[0]
        axes.hist(study.named[name], bins=40, color=MARK, alpha=0.6)
        axes.axvline(study.fit.values[name], color=SERIES[1], lw=2)
        axes.set(xlabel=name, ylabel="draws")
    axes.set_title(f"{len(study.draws):,} bootstraps over runs", fontsize=9)
    return _with_grid(figure)


@charts.page_style()
def allocation(study: Study) -> Figure:
    """Plot best size by compute with its interval, over the runs that the law comes from."""
    flops, x = study.options.flops, study.table.x
    runs = flops * x["params"] * x["tokens"]
    budgets = [row["compute"] for row in study.allocation]
    compute = np.geomspace(runs.min(), max(runs.max(), *budgets), POINTS)
    best = scaling_allocation.optimal_allocation(study.fit.values, compute, flops=flops)["params"]
    tail = (1 - diagnostics.LEVEL) / 2
    drawn = {name: samples[:, None] for name, samples in study.named.items()}
    low, high = np.quantile(
        scaling_allocation.optimal_allocation(drawn, compute[None], flops=flops)["params"],
        [tail, 1 - tail],
        axis=0,
    )
    figure, axes = charts.subplots(size=(5.6, 3.8))
    axes.fill_between(compute, low, high, color=MARK, alpha=0.18, lw=0)
    axes.plot(compute, best, color=MARK, lw=1.8, label="size of least loss")
    axes.plot(runs, x["params"], "o", color=SOFT, ms=3, alpha=0.6, label="runs")
    axes.axvline(
        runs.max(), color=SERIES[1], lw=1, ls="--", label="largest run; extrapolation beyond"
    )
    axes.set(xscale="log", yscale="log", xlabel=f"compute, {flops:g} N D", ylabel="parameters")
    axes.legend()
    return _with_grid(figure)


@charts.page_style()
def agreement(y: np.ndarray, predicted: np.ndarray, target: str) -> Figure:
    """Plot prediction against truth, for laws of several tables."""
    figure, axes = charts.subplots(size=(4.6, 4.2))
    ends = [min(y.min(), predicted.min()), max(y.max(), predicted.max())]
    axes.plot(ends, ends, color=SOFT, lw=1)
    axes.plot(y, predicted, "o", color=MARK, ms=4)
    axes.set(xlabel=f"{target} of the run", ylabel=f"{target} of the law")
    return _with_grid(figure)


def _groups(study: Study) -> tuple[str, list[tuple[float | None, np.ndarray]]]:
    """Return what curves represent, and (value, rows) of each; with repeats, the largest size."""
    x, all_rows = study.table.x, np.arange(len(study.table))
    if "unique_tokens" in x:
        largest = np.flatnonzero(x["params"] == x["params"].max())
        title = f"unique tokens, {x['params'].max():.3g} parameters"
        return title, _spread(x["unique_tokens"], largest)
    if "params" not in x:
        return "", [(None, all_rows)]
    return NAMES["params"], _spread(x["params"], all_rows)


def _spread(column: np.ndarray, rows: np.ndarray) -> list[tuple[float | None, np.ndarray]]:
    """Return at most CURVES values of a column, each with its rows; continuous ones are binned."""
    distinct = np.unique(column[rows])
    if len(distinct) > 2 * CURVES:  # every run has its own size: neighbors share a curve
        parts = np.array_split(rows[np.argsort(column[rows])], CURVES)
        return [(float(np.exp(np.log(column[part]).mean())), part) for part in parts]
    places = np.unique(np.linspace(0, len(distinct) - 1, CURVES).round().astype(int))
    return [(float(distinct[p]), rows[column[rows] == distinct[p]]) for p in places]


def _along(study: Study, x_column: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of a curve: `x_column` varies, others stay at their middle in `rows`."""
    column, table = study.table.x[x_column], study.table
    if x_column == "loss":
        points = np.linspace(column.min(), column.max(), POINTS)
    else:
        points = np.geomspace(column.min(), BEYOND * column.max(), POINTS)
    columns = {
        name: np.full(POINTS, np.exp(np.log(np.maximum(values[rows], 1e-300)).mean()))
        for name, values in table.x.items()
    }
    columns[x_column] = points
    if "unique_tokens" in columns:
        columns["unique_tokens"] = np.minimum(columns["unique_tokens"], points)
    return columns


def _log_x(axes: Axes) -> None:
    """Set a logarithmic axis of counts, with round ticks: 30 k, 100 k, 300 k, 1 M."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1.0, 3.0) if high > 10 * low else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


def _log_y(axes: Axes) -> None:
    """Set a logarithmic axis over about a decade, with round ticks as plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _wrapped(name: str) -> str:
    words = name.split()
    return "\n".join(" ".join(words[i : i + 2]) for i in range(0, len(words), 2))


def _with_grid(figure: Figure) -> Figure:
    for axis in figure.axes:
        axis.grid(lw=0.6)
        axis.set_axisbelow(True)
    return figure


# ---- Pages ----
#
# page.html of a fit: every figure, number, check and answer, in one self-contained file.


def write(
    studies: Sequence[Study],
    statements: Mapping[str, str],
    folder: Path,
    *,
    title: str,
    facts: Mapping[str, object],
) -> Path:
    """Write the page of one study or several, and each figure as a file of its own.

    facts: for `html_page.provenance`.
    """
    body = ""
    for study in studies:
        prefix = f"{study.table.target}_" if len(studies) > 1 else ""
        plots = all_plots(study)
        for name, (figure, _) in plots.items():
            charts.save(figure, folder / f"{prefix}{name}")
        body += _sections(study, plots, statements)
    return render(folder, title, body, facts=facts)


def render(folder: Path, title: str, body: str, *, facts: Mapping[str, object]) -> Path:
    """Write the page and return its path."""
    path = folder / "page.html"
    markup = html_page.document(title, html_page.provenance(facts) + body)
    path.write_text(markup, encoding="utf-8")
    return path


def parameters(
    fitted: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float] | None],
    fixed: Sequence[str],
) -> str:
    """Return the table of parameters."""
    rows = [
        [
            name,
            f"{value:.5g}",
            checklist.ends(intervals[name]),
            "fixed" if name in fixed else "fitted" if intervals[name] else "at a bound",
        ]
        for name, value in fitted.items()
    ]
    head = ["parameter", "value", INTERVAL, "status"]
    return html_page.table(head, rows, definitions=DEFINITIONS)


def _sections(study: Study, plots: dict, statements: Mapping[str, str]) -> str:
    name = study.table.target.replace("_", " ")
    lead = f"{name} = {study.law.formula}, after {study.law.paper}; {len(study.table)} rows."
    parts = [
        html_page.section(
            f"{name}: the law",
            html_page.paragraph(lead) + _chart(plots, "law.png")
            + parameters(study.fit.values, study.intervals, list(study.options.fixed)),
        ),
        html_page.section(f"{name}: evidence against it", _doubts(study, plots)),
    ]  # fmt: skip
    if study.allocation:
        parts.append(html_page.section(f"{name}: compute allocation", _allocation(study, plots)))
    rows = [[q, a] for q, a in checklist.checklist(study, statements).items()]
    note = html_page.paragraph("The questions of arXiv 2502.18969.", note=True)
    parts.append(html_page.section(f"{name}: checklist", note + html_page.table(["", ""], rows)))
    return "".join(parts)


def _chart(plots: dict, name: str) -> str:
    figure, caption = plots[name]
    return html_page.chart(charts.svg(figure), caption)


def _doubts(study: Study, plots: dict) -> str:
    rows: list[list[Any]] = [["condition number", f"{study.condition:.3g}"]]
    rows.append(["most influential run", study.influential])
    rows += [line.split(": ", 1) for line in checklist.format_holdout(study)]
    warnings = "".join(html_page.paragraph(f"Warning: {w}.") for w in study.warnings)
    return (
        (warnings or html_page.paragraph("No warning."))
        + _chart(plots, "residuals.png")
        + html_page.table(["check", "result"], rows, definitions=DEFINITIONS)
        + _chart(plots, "bootstrap.png")
    )


def _allocation(study: Study, plots: dict) -> str:
    columns = ("params", "tokens", "tokens_per_param", "loss")
    head = ["compute", "parameters", "tokens", "tokens per parameter", "loss"]
    rows = [
        [f"{row['compute']:.3g}"]
        + [f"{row[c]:.3g}\n{checklist.ends(row[f'{c}_interval'])}" for c in columns]
        for row in study.allocation
    ]
    exponent = scaling_allocation.exponent(study.fit.values)
    text = (
        f"With compute = {study.options.flops:g} N D, the size of least loss grows as compute to "
        f"the power {exponent:.3f}. Beyond the largest run this is an extrapolation."
    )
    return (
        html_page.paragraph(text)
        + _chart(plots, "allocation.png")
        + html_page.table(head, rows, definitions=DEFINITIONS)
    )
