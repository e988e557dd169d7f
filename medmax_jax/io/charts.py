"""Charts by matplotlib, as inline SVG in the colors of the page, or as files.

    @page_style()
    def loss(steps, values) -> str:
        figure, axes = subplots(size=(9.6, 3.2))
        axes.plot(steps, values, color=SERIES[0], label="text")
        return svg(figure)                    # or save(figure, workdir / "loss.png")

    html_page.chart(loss(steps, values), "Training loss by step")

A figure is drawn in the colors of the light page, in which a file is saved. In inline SVG these
colors become the variables of the page's style sheet (html_page.STYLE), so that a chart follows the
reader's light or dark theme and is sharp at any size.
"""

import html
import io
import re
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The light page's value of each variable of html_page.STYLE that a chart uses.
INK, SOFT, LINE, CARD, MARK = "#1d2430", "#5b6675", "#d9dee5", "#ffffff", "#0b6e69"
SERIES = (MARK, "#b4552d", "#3b5b92", "#a58a1f", "#7a4a88", "#5f6b78", "#2f8f4e", "#c2568b")
VARIABLES = {
    **{INK: "--ink", SOFT: "--soft", LINE: "--line", CARD: "--card", MARK: "--mark"},
    **{color: f"--series-{number}" for number, color in enumerate(SERIES[1:], start=1)},
}
DPI = 130  # of a PNG
TOOLTIP = "tooltip-"
_RC = {
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.labelcolor": SOFT,
    "axes.labelsize": 9,
    "axes.prop_cycle": matplotlib.cycler(color=SERIES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "figure.facecolor": CARD,
    "font.family": ["DejaVu Sans"],
    "grid.color": LINE,
    "legend.edgecolor": LINE,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it is selectable and in the page's font
    "text.color": INK,
    "xtick.color": SOFT,
    "xtick.labelsize": 8,
    "ytick.color": SOFT,
    "ytick.labelsize": 8,
}


def page_style() -> AbstractContextManager[None]:
    """Return the style as a context, also a decorator; the caller's own rcParams stay."""
    return matplotlib.rc_context(_RC)


def subplots(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float], **layout: Any
) -> tuple[Figure, Any]:
    """Return a figure of `size` (width, height; inches), and its axes.

    layout: further arguments of `matplotlib.figure.Figure.subplots`.
    """
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **layout)


def legend(figure: Figure, axes: Axes) -> None:
    """Add the legend of `axes` below all axes of the figure, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))


def svg(figure: Figure, *, tooltips: Mapping[str, str] | None = None) -> str:
    """Return a figure as an `<svg>` element for `html_page.chart`.

    tooltips: text for artists by their gid, which starts with `TOOLTIP`:
        axes.plot(x, y, "o", gid=TOOLTIP + "0")
        svg(figure, tooltips={TOOLTIP + "0": "17 answers"})
    """
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    background = figure.get_facecolor()
    figure.set_facecolor("none")  # the page's own
    equal_bytes = {"svg.hashsalt": "medmax_jax"}  # of equal charts
    with matplotlib.rc_context(_RC | equal_bytes), warnings.catch_warnings():
        # The page's font draws the text; a warning would print a control character unescaped.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(text, format="svg", metadata=nothing)
    figure.set_facecolor(background)
    markup = text.getvalue()
    markup = markup[markup.index("<svg ") :]
    markup = re.sub(r' (?:width|height)="[\d.]+pt"', "", markup, count=2)  # the page sets the width
    markup = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", markup, count=2)  # HTML needs no namespaces
    markup = re.sub(r"<style .*?</style>", "", markup, flags=re.DOTALL)  # it would hold page-wide
    markup = markup.replace("font-family: 'DejaVu Sans'", "font-family: inherit")
    for color, variable in VARIABLES.items():
        markup = markup.replace(color, f"var({variable})")
    for gid, tooltip in (tooltips or {}).items():
        markup = markup.replace(f'<g id="{gid}">', f"<g><title>{html.escape(tooltip)}</title>")
    markup = re.sub(r'<g id="[^"]*">', "<g>", markup)  # several charts are in one document
    return markup


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file; the suffix is the format (.png, .svg, .pdf)."""
    with matplotlib.rc_context(_RC):
        figure.savefig(path, dpi=DPI)
