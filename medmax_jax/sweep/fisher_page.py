"""Write the page of `sweep fisher`: the spectrum of single documents' gradients along training.

    imax=D1 imax=D2 plain=D3    runs of medmax_jax.train with train.fisher_every, by name; runs of
                                one name are its seeds: thin lines, and their mean as a thick one

    overall    spectral entropy (SE) and share of the largest eigenvalue (rho), by step
    layers     the same of the adapters of a few layers, and of all layers at the last step
    tasks      cosine of the gradients of two tasks, on the same image and on different images

The values are those of training/fisher.py; the page only arranges them.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from medmax_jax.environment import environment
from medmax_jax.io import charts, html_page
from medmax_jax.io.run_files import damage_warning, read_metrics
from medmax_jax.io.text_files import TextFileError
from medmax_jax.storage.atomic_folder import private_umask
from medmax_jax.sweep.axes import SweepError

WIDE = 9.6  # inches
LAYERS = 4  # that have a chart of their own, evenly spaced
PAIRS = 8  # pairs of tasks that have one; the table has all
STATISTICS = {
    "spectral_entropy": "spectral entropy, nats",
    "leading_share": "share of the largest eigenvalue",
}
IMAGES = ("same", "other")
DEFINITIONS = {
    "documents": "of a step, whose gradients are compared; more of them raise the entropy",
    "measurements": "steps with documents of both tasks, over all runs of the name",
    "same image": "mean cosine of the gradients of two documents about one image",
    "other images": "mean cosine of the gradients of two documents about different images",
    "spectral entropy": "of the eigenvalues of the empirical Fisher matrix, divided by their sum; "
    "IMAX (arXiv 2504.09967) reports lower values for its data",
    "leading share": "of the largest eigenvalue in their sum; IMAX reports higher values",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Curves:
    """The measurements of one run; NaN where a step has no value."""

    steps: Int[np.ndarray, "n"]
    values: Mapping[str, Float[np.ndarray, "n"]]  # by their name in metrics.jsonl


Arms = Mapping[str, Sequence[Curves]]


def write(specs: Sequence[str], out: Path, *, log: Callable[[str], None]) -> dict[str, int]:
    """Write the page of runs that are given as NAME=FOLDER; return how many it has."""
    arms: dict[str, list[Curves]] = {}
    private = False
    for spec in specs:
        name, _, folder = spec.partition("=")
        if not name or not folder:
            raise SweepError(f"{spec!r} is no run; write NAME=FOLDER, such as imax=runs/imax_tiny")
        path = Path(folder) / "metrics.jsonl"
        arms.setdefault(name, []).append(read(path, log=log))
        private |= not path.stat().st_mode & 0o044  # that of a credentialed run
    if len(arms) > len(charts.SERIES):
        raise SweepError(f"{len(arms)} names; a chart has at most {len(charts.SERIES)}")
    partial = out.with_name(out.name + ".partial")
    with private_umask() if private else contextlib.nullcontext():
        partial.write_text(page(arms), encoding="utf-8")
    os.replace(partial, out)
    return dict(runs=len(specs), names=len(arms))


def read(path: Path, *, log: Callable[[str], None]) -> Curves:
    """Return the rows of kind fisher of a metrics.jsonl; raise SweepError if there are none."""
    try:
        rows, damaged = read_metrics(path)
    except TextFileError as error:
        raise SweepError(f"{error}: cannot be read; check the folder of the run") from error
    if damaged:
        log(damage_warning(path, damaged))
    # A run that was resumed may have measured a step twice; the last row is valid.
    measured = {row["step"]: row for row in rows if row["kind"] == "fisher"}
    if not measured:
        raise SweepError(
            f"{path}: no Fisher information was measured; train with "
            "--config.train.fisher_every=N, or check the folder"
        )
    steps = sorted(measured)
    names = dict.fromkeys(name for step in steps for name in measured[step])
    values = {
        name: np.array([_number(measured[step].get(name)) for step in steps])
        for name in names
        if name not in ("step", "kind")
    }
    return Curves(np.array(steps), values)


def page(arms: Arms) -> str:
    """Return the page."""
    layers = layer_numbers(arms)
    note = (
        "The empirical Fisher information of the adapters, from the gradients of single documents "
        "of the step that was just trained. IMAX (arXiv 2504.09967) explains its results by a "
        "lower spectral entropy and a higher share of the largest eigenvalue; its estimator was "
        "not available to us. Both depend on the documents of the step: where a step has several "
        "documents of an image, their arrangement changes the values even if the model is the same."
    )
    body = html_page.provenance({"runs": sum(map(len, arms.values()))} | environment())
    body += html_page.paragraph(note, note=True)
    chart = html_page.chart(overall(arms), "All adapters, by step; thin lines are single runs")
    body += html_page.section("Overall", chart + _overall_table(arms))
    if layers:
        chosen = spaced(layers, LAYERS)
        chart = html_page.chart(by_layer(arms, chosen), "The adapters of single layers, by step")
        body += html_page.section("Layers", chart + _layer_table(arms, layers))
    if names := pairs(arms):
        body += html_page.section("Tasks", _tasks(arms, names))
    return html_page.document("Gradients of single documents", body)


# ---- values ----


def layer_numbers(arms: Arms) -> list[str]:
    """Return the layers that any run has, as their names have them: "00", "01", ..."""
    names = {name for runs in arms.values() for run in runs for name in run.values}
    return sorted({n.split("/")[0].removeprefix("layer_") for n in names if n[:6] == "layer_"})


def spaced(items: Sequence[str], count: int) -> list[str]:
    """Return at most `count` items, evenly spaced, with the first and the last."""
    at = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[n] for n in at]


def pairs(arms: Arms) -> dict[str, int]:
    """Return pair of tasks -> its measurements on the same image, the most frequent one first."""
    counts: dict[str, int] = {}
    for run in (run for runs in arms.values() for run in runs):
        for name, values in run.values.items():
            if name.startswith("cosine/"):
                pair, _, image = name.removeprefix("cosine/").rpartition("/")
                same = int(np.isfinite(values).sum()) if image == "same_image" else 0
                counts[pair] = counts.get(pair, 0) + same
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def mean_curve(
    runs: Sequence[Curves], name: str
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Return steps, and the mean of a value at each over the runs that have it.

    The steps are those of the first run, within the range of all; other runs, which may have
    measured at other steps, are interpolated linearly. NaN where no run has a value.
    """
    steps = runs[0].steps
    first, last = max(run.steps[0] for run in runs), min(run.steps[-1] for run in runs)
    steps = steps[(steps >= first) & (steps <= last)]
    rows = np.array([np.interp(steps, run.steps, _values(run, name)) for run in runs])
    count = np.isfinite(rows).sum(0)
    return steps, np.where(count, np.nansum(rows, 0), np.nan) / np.maximum(count, 1)


def mean_value(runs: Sequence[Curves], name: str) -> tuple[float | None, int]:
    """Return the mean over all measurements of a value, and how many there are."""
    values = np.concatenate([_values(run, name) for run in runs])
    values = values[np.isfinite(values)]
    return (float(values.mean()) if len(values) else None), len(values)


def _values(run: Curves, name: str) -> Float[np.ndarray, "n"]:
    return run.values.get(name, np.full(len(run.steps), np.nan))


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


# ---- charts ----


@charts.page_style()
def overall(arms: Arms) -> str:
    """Plot both statistics of all adapters."""
    figure, axes = charts.subplots(1, 2, size=(WIDE, 3.4))
    for axis, (name, label) in zip(axes, STATISTICS.items(), strict=True):
        _plot(axis, arms, name)
        axis.set(xlabel="step", ylabel=label)
    charts.legend(figure, axes[0])
    return charts.svg(figure)


@charts.page_style()
def by_layer(arms: Arms, layers: Sequence[str]) -> str:
    """Plot both statistics of some layers, a column for each."""
    size = (WIDE, 4.6)
    figure, axes = charts.subplots(2, len(layers), size=size, sharey="row", squeeze=False)
    for row, (name, label) in zip(axes, STATISTICS.items(), strict=True):
        for axis, layer in zip(row, layers, strict=True):
            _plot(axis, arms, f"layer_{layer}/{name}")
        row[0].set(ylabel=label)
    for top, bottom, layer in zip(*axes, layers, strict=True):
        top.set(title=f"layer {int(layer)}")
        bottom.set(xlabel="step")
    charts.legend(figure, axes[0][0])
    return charts.svg(figure)


@charts.page_style()
def by_pair(arms: Arms, names: Sequence[str]) -> str:
    """Plot the cosines of pairs of tasks: solid on the same image, dashed on different ones."""
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = charts.subplots(
        rows, columns, size=(WIDE, 0.5 + 2.3 * rows), sharex=True, sharey=True, squeeze=False
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for style, image in zip(("-", "--"), IMAGES, strict=True):
            _plot(axis, arms, f"cosine/{name}/{image}_image", style=style, single=False)
        axis.set_title(name.replace(", ", "\n"), fontsize=8)
        axis.axhline(0, color=charts.LINE, lw=1, zorder=0)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set(ylabel="cosine")
    for axis in axes[-1]:
        axis.set(xlabel="step")
    charts.legend(figure, axes[0][0])
    return charts.svg(figure)


def _plot(axis: Axes, arms: Arms, name: str, *, style: str = "-", single: bool = True) -> None:
    """Draw a value of each name, the mean of its runs thick; `single`: also each run, thin."""
    for color, (arm, runs) in zip(charts.SERIES, arms.items(), strict=False):
        if single and len(runs) > 1:
            for run in runs:
                axis.plot(run.steps, _values(run, name), color=color, lw=0.7, alpha=0.6)
        steps, values = mean_curve(runs, name)
        found = np.isfinite(values)
        label = arm if style == "-" else None
        # The marker shows a single measurement between steps without one.
        axis.plot(steps[found], values[found], f".{style}", color=color, lw=1.6, ms=4, label=label)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.grid(axis="y", lw=0.6)


# ---- tables ----


def _overall_table(arms: Arms) -> str:
    rows = []
    for arm, runs in arms.items():
        names = ("documents", *STATISTICS)
        documents, *means = (mean_value(runs, name)[0] for name in names)
        last = [mean_curve(runs, name)[1][-1:].tolist() for name in STATISTICS]
        lasts = [_finite(values[0]) if values else None for values in last]
        rows.append((arm, len(runs), round(documents or 0), *means, *lasts))
    head = ["", "runs", "documents", "spectral entropy", "leading share"]
    head += ["spectral entropy, last", "leading share, last"]
    caption = (
        "Means over all measurements, and at the last step that all runs of a name have reached"
    )
    return html_page.table(head, rows, caption=caption, definitions=DEFINITIONS)


def _layer_table(arms: Arms, layers: Sequence[str]) -> str:
    rows = [
        (
            int(layer),
            *(
                mean_value(runs, f"layer_{layer}/{statistic}")[0]
                for runs in arms.values()
                for statistic in STATISTICS
            ),
        )
        for layer in layers
    ]
    short = ("SE", "rho")
    head = ["layer", *(f"{arm}: {name}" for arm in arms for name in short)]
    caption = "Means over all measurements; SE: spectral entropy, rho: share of the largest"
    return html_page.details("All layers", html_page.table(head, rows, caption=caption))


def _tasks(arms: Arms, counts: Mapping[str, int]) -> str:
    shown = [name for name, count in counts.items() if count][:PAIRS] or list(counts)[:PAIRS]
    caption = "Cosine of the gradients of two tasks; solid: on the same image, dashed: on others"
    rest = [name for name in counts if name not in shown]
    body = html_page.chart(by_pair(arms, shown), caption) + _pair_table(arms, shown)
    return body + (html_page.details("Other tasks", _pair_table(arms, rest)) if rest else "")


def _pair_table(arms: Arms, names: Sequence[str]) -> str:
    rows = []
    for name in names:
        for arm, runs in arms.items():
            found = [mean_value(runs, f"cosine/{name}/{image}_image") for image in IMAGES]
            rows.append((name, arm, *(mean for mean, _ in found), max(n for _, n in found)))
    head = ["tasks", "runs of", "same image", "other images", "measurements"]
    return html_page.table(head, rows, definitions=DEFINITIONS)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
