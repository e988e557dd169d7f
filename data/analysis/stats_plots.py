"""Draw the charts of a page of statistics, each as SVG, from counts only."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.ticker import FuncFormatter

from medmax_jax.io import charts

TEXT, IMAGE = charts.SERIES[:2]
BINS = 60
BARS = 25  # at most, of documents per image
WIDE = 9.6  # inches


@charts.page_style()
def mixture(by_source: Mapping[str, tuple], by_task: Mapping[str, tuple]) -> str:
    """Plot tokens of text and of images, one bar for each name; values are (text, image)."""
    rows = max(len(by_source), len(by_task))
    figure, (left, right) = charts.subplots(1, 2, size=(WIDE, 1.3 + 0.3 * rows))
    for axis, table, title in ((left, by_source, "by source"), (right, by_task, "by task")):
        names = sorted(table, key=lambda name: sum(table[name]))
        text, image = (np.array([table[n][k] for n in names], float) for k in (0, 1))
        axis.barh(names, text, color=TEXT, label="text")
        axis.barh(names, image, left=text, color=IMAGE, label="image")
        axis.set(title=f"Tokens {title}")
        axis.xaxis.set_major_formatter(FuncFormatter(_count))
        axis.locator_params(axis="x", nbins=5)
    charts.legend(figure, left)
    return charts.svg(figure)


@charts.page_style()
def lengths(
    length: Int[np.ndarray, "n"],
    text: Int[np.ndarray, "n"],
    task: Int[np.ndarray, "n"],
    names: Sequence[str],
) -> str:
    """Plot documents by tokens, and by tokens of text only; each task is a layer."""
    figure, (left, right) = charts.subplots(1, 2, size=(WIDE, 3.6))
    for axis, values, title in ((left, length, "all tokens"), (right, text, "tokens of text")):
        edges = np.linspace(values.min(), values.max() + 1, min(BINS, np.ptp(values) + 1) + 1)
        below = np.zeros(len(edges) - 1)
        for number, name in enumerate(names):
            count = np.histogram(values[task == number], edges)[0]
            color = charts.SERIES[number % len(charts.SERIES)]
            axis.stairs(below + count, edges, baseline=below, fill=True, color=color, label=name)
            below = below + count
        axis.set(title=f"Documents by {title}", xlabel="tokens of a document", ylabel="documents")
        axis.yaxis.set_major_formatter(FuncFormatter(_count))
    charts.legend(figure, right)
    return charts.svg(figure)


@charts.page_style()
def packing(fills: Mapping[int, Mapping[str, float]], padded: float) -> str:
    """Plot how full rows are at each row length, next to offline packing and padding."""
    figure, axis = charts.subplots(size=(WIDE, 3.2))
    positions = np.arange(len(fills))
    for shift, name, color, label in (
        (-0.18, "fill", TEXT, "this plan"),
        (0.18, "offline", charts.SOFT, "best fit over all documents"),
    ):
        values = [100 * row[name] for row in fills.values()]
        bars = axis.bar(positions + shift, values, 0.34, color=color, label=label)
        axis.bar_label(bars, fmt="%.1f")
    label = "one document per row, batches of 8 padded to the longest"
    axis.axhline(100 * padded, color=IMAGE, linestyle="--", label=label)
    axis.set_xticks(positions, [f"{n:,}" for n in fills])
    axis.set(title="Fill of rows", xlabel="tokens per row", ylabel="% of positions", ylim=(0, 109))
    charts.legend(figure, axis)
    return charts.svg(figure)


@charts.page_style()
def images(counts: Mapping[str, int], title: str, of_entries: Mapping[int, int]) -> str:
    """Plot images by modality or source, and how many documents each has."""
    figure, (left, right) = charts.subplots(1, 2, size=(WIDE, max(3.2, 1.2 + 0.26 * len(counts))))
    names = sorted(counts, key=lambda name: counts[name])
    bars = left.barh(names, [counts[n] for n in names], color=IMAGE)
    left.bar_label(bars, labels=[f"{counts[n]:,}" for n in names], padding=3)
    left.set(title=f"Images by {title}")
    left.margins(x=0.15)
    entries, images_with = np.array(sorted(of_entries.items())).T
    width = -(-int(entries.max()) // BARS)
    edges = np.arange(1, entries.max() + width + 1, width)
    count = np.histogram(entries, edges, weights=images_with)[0]
    right.bar((edges[:-1] + edges[1:] - 1) / 2, count, 0.85 * width, color=IMAGE)
    right.set(title="Documents per image", xlabel="documents", ylabel="images")
    right.set_xlim(0.5, max(10, edges[-1]) + 0.5)
    for axis, number in ((left, left.xaxis), (right, right.yaxis)):
        number.set_major_formatter(FuncFormatter(_count))
        axis.locator_params(axis="x" if axis is left else "y", nbins=5)
    return charts.svg(figure)


def _count(value: float, _: Any = None) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
