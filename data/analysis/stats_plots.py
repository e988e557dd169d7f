"""Draw the plots of a page of statistics, each as PNG bytes, from counts only."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

TEXT, IMAGE, GRAY = "#0b6e69", "#b4552d", "#8a94a3"
COLORS = ("#0b6e69", "#b4552d", "#3b5b92", "#a58a1f", "#7a4a88", "#5f6b78", "#2f8f4e", "#c2568b")
BINS = 60
BARS = 25  # at most, of documents per image
WIDE = 9.6  # inches


def mixture(by_source: Mapping[str, tuple], by_task: Mapping[str, tuple]) -> bytes:
    """Plot tokens of text and of images, one bar for each name; values are (text, image)."""
    rows = max(len(by_source), len(by_task))
    figure = Figure(figsize=(WIDE, 1.3 + 0.3 * rows), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, table, title in ((left, by_source, "by source"), (right, by_task, "by task")):
        names = sorted(table, key=lambda name: sum(table[name]))
        text, image = (np.array([table[n][k] for n in names], float) for k in (0, 1))
        axis.barh(names, text, color=TEXT, label="text")
        axis.barh(names, image, left=text, color=IMAGE, label="image")
        axis.set(title=f"Tokens {title}")
        axis.xaxis.set_major_formatter(FuncFormatter(_count))
        axis.locator_params(axis="x", nbins=5)
    left.legend(frameon=False, loc="lower right")
    return _png(figure)


def lengths(
    length: Int[np.ndarray, "n"],
    text: Int[np.ndarray, "n"],
    task: Int[np.ndarray, "n"],
    names: Sequence[str],
) -> bytes:
    """Plot documents by tokens, and by tokens of text only; each task is a layer."""
    figure = Figure(figsize=(WIDE, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, values, title in ((left, length, "all tokens"), (right, text, "tokens of text")):
        edges = np.linspace(values.min(), values.max() + 1, min(BINS, np.ptp(values) + 1) + 1)
        below = np.zeros(len(edges) - 1)
        for number, name in enumerate(names):
            count = np.histogram(values[task == number], edges)[0]
            color = COLORS[number % len(COLORS)]
            axis.stairs(below + count, edges, baseline=below, fill=True, color=color, label=name)
            below = below + count
        axis.set(title=f"Documents by {title}", xlabel="tokens of a document", ylabel="documents")
        axis.yaxis.set_major_formatter(FuncFormatter(_count))
    right.legend(frameon=False, fontsize=8)
    return _png(figure)


def packing(fills: Mapping[int, Mapping[str, float]], padded: float) -> bytes:
    """Plot how full rows are at each row length, next to offline packing and padding."""
    figure = Figure(figsize=(WIDE, 3.2), layout="constrained")
    axis = figure.subplots()
    positions = np.arange(len(fills))
    for shift, name, color, label in (
        (-0.18, "fill", TEXT, "this plan"),
        (0.18, "offline", GRAY, "best fit over all documents"),
    ):
        values = [100 * row[name] for row in fills.values()]
        bars = axis.bar(positions + shift, values, 0.34, color=color, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    label = "one document per row, batches of 8 padded to the longest"
    axis.axhline(100 * padded, color=IMAGE, linestyle="--", label=label)
    axis.set_xticks(positions, [f"{n:,}" for n in fills])
    axis.set(title="Fill of rows", xlabel="tokens per row", ylabel="% of positions", ylim=(0, 119))
    axis.legend(frameon=False, ncols=3, fontsize=8, loc="upper center")
    return _png(figure)


def images(counts: Mapping[str, int], title: str, of_entries: Mapping[int, int]) -> bytes:
    """Plot images by modality or source, and how many documents each has."""
    figure = Figure(figsize=(WIDE, max(3.2, 1.2 + 0.26 * len(counts))), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = sorted(counts, key=lambda name: counts[name])
    bars = left.barh(names, [counts[n] for n in names], color=IMAGE)
    left.bar_label(bars, labels=[f"{counts[n]:,}" for n in names], padding=3, fontsize=8)
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
    return _png(figure)


def _count(value: float, _: Any = None) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _bare(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.title.set_fontsize(11)


def _png(figure: Figure) -> bytes:
    for axis in figure.axes:
        _bare(axis)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()
