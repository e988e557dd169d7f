"""Small SVG charts inside a page, side by side, in the page's colors, light or dark.

    side_by_side([chart("slake_closed", "416 answers", x=Axis(...), y=Axis(...), points=[...])])

    y  |        o     dots with whiskers and a tooltip
       |    o         a line through them and a band around it, if requested
       | o   - - -    guides: dashed, from one corner to another
       +---------- x

Like html_page.py these functions escape their arguments. An SVG needs no library, is sharp at any
size and follows the reader's theme, which a PNG does not.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 300, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 40  # margins: numbers and names of the axes
RADIUS, LEAST = 4.5, 2.0  # of the largest dot, and of the smallest
TICKS = 5  # approximate number of labels on an axis
STEPS = (0.2, 0.25, 0.5, 1.0, 2.0)  # between two labels, times the axis' power of ten
NEAR = 1e-9
DIGITS = 6  # of a number on an axis, at most


@dataclasses.dataclass(frozen=True)
class Axis:
    """The label and the range of one axis; low < high."""

    label: str
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Point:
    """A data point; low and high are the ends of its interval.

    size: share of the area of the largest dot. tooltip: the text that appears over the dot.
    """

    x: float
    y: float
    low: float
    high: float
    tooltip: str
    size: float = 1.0


def chart(
    title: str,
    caption: str,
    *,
    x: Axis,
    y: Axis,
    points: Sequence[Point],
    guides: Sequence[tuple[float, float, float, float]] = (),
    joined: bool = False,
) -> str:
    """Return a figure.

    guides: dashed lines x0, y0, x1, y1. joined: draw a line and a band instead of whiskers.
    """
    for axis in (x, y):
        if not axis.low < axis.high:
            raise ValueError(
                f"axis {axis.label!r} goes from {axis.low} to {axis.high}; low must be below high"
            )
    scale = _Scale(x, y)
    body = _axes(scale)
    body += "".join(_line("guide", *scale(a, b), *scale(c, d)) for a, b, c, d in guides)
    body += _band(scale, points) if joined else "".join(_whisker(scale, p) for p in points)
    body += "".join(_dot(scale, point) for point in points)
    label = html.escape(f"{title}: {y.label} against {x.label}. {caption}")
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">\n{body}'
        f"</svg><figcaption><b>{html.escape(title)}</b>{html.escape(caption)}</figcaption>"
        "</figure>\n"
    )


def side_by_side(charts: Sequence[str]) -> str:
    """Return several charts in as many columns as fit on the page."""
    return f'<div class="charts">\n{"".join(charts)}</div>\n'


def axis_limits(values: Sequence[float], *, step: float, least: float) -> tuple[float, float]:
    """Return the ends of an axis in 0..1 that contains all values.

    The ends are multiples of step and differ by at least `least`: [0.52, 0.58] by 0.1, at least
    0.2: (0.4, 0.6).
    """
    first, top = math.floor(min(values) / step + NEAR), round(1 / step)
    last = max(math.ceil(max(values) / step - NEAR), first + 1)
    missing = max(round(least / step) - (last - first), 0)
    up = min(missing // 2, top - last)
    first = max(first - (missing - up), 0)
    return first * step, max(last + up, min(first + round(least / step), top)) * step


class _Scale:
    """Maps values to coordinates in the chart."""

    def __init__(self, x: Axis, y: Axis):
        self.x, self.y = x, y

    def __call__(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x.low) / (self.x.high - self.x.low)
        up = (y - self.y.low) / (self.y.high - self.y.low)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )


def _axes(scale: _Scale) -> str:
    """Return grid lines with their numbers, and the labels of the axes."""
    x, y = scale.x, scale.y
    body = ""
    for value in _ticks(x):
        at, foot = scale(value, y.low)
        body += _line("grid", at, foot, *scale(value, y.high))
        body += _text(at, foot + 14, _number(value), "middle")
    for value in _ticks(y):
        left, at = scale(x.low, value)
        body += _line("grid", left, at, *scale(x.high, value))
        body += _text(left - 6, at + 4, _number(value), "end")
    middle, foot = scale((x.low + x.high) / 2, y.low)
    body += _text(middle, foot + 32, x.label, "middle")
    _, height = scale(x.low, (y.low + y.high) / 2)
    turn = f' transform="rotate(-90 11 {height:.1f})"'
    return body + _text(11.0, height + 4, y.label, "middle", turn)


def _ticks(axis: Axis) -> list[float]:
    span = axis.high - axis.low
    scale = 10 ** math.floor(math.log10(span))
    step = next(s * scale for s in STEPS if span / (s * scale) <= TICKS + NEAR)
    first, last = math.ceil(axis.low / step - NEAR), math.floor(axis.high / step + NEAR)
    return [number * step for number in range(first, last + 1)]


def _band(scale: _Scale, points: Sequence[Point]) -> str:
    edge = [scale(p.x, p.high) for p in points] + [scale(p.x, p.low) for p in reversed(points)]
    middle = [scale(p.x, p.y) for p in points]
    return (
        f'<polygon class="band" points="{_path(edge)}"/>\n'
        f'<polyline class="line" points="{_path(middle)}"/>\n'
    )


def _whisker(scale: _Scale, point: Point) -> str:
    return _line("whisker", *scale(point.x, point.low), *scale(point.x, point.high))


def _dot(scale: _Scale, point: Point) -> str:
    x, y = scale(point.x, point.y)
    radius = max(RADIUS * math.sqrt(point.size), LEAST)
    tooltip = f"<title>{html.escape(point.tooltip)}</title>"
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">{tooltip}</circle>\n'


def _line(kind: str, x: float, y: float, to_x: float, to_y: float) -> str:
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
    return f'<line class="{kind}" {ends}/>\n'


def _text(x: float, y: float, text: str, anchor: str, attributes: str = "") -> str:
    position = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attributes}'
    return f"<text {position}>{html.escape(text)}</text>\n"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _number(value: float) -> str:
    """Return 0.5 and not 0.5000000001, and 0 for a rounding error of 0."""
    return f"{round(value, DIGITS) + 0.0:g}"
