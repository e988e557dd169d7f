"""Charts: marks are at the values, text is escaped, axes have round numbers."""

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_html_page import HOSTILE, parsed

from medmax_jax.io import html_page, svg_charts
from medmax_jax.io.svg_charts import Axis, Point

UNIT = Axis("confidence", 0.0, 1.0), Axis("accuracy", 0.0, 1.0)
INSIDE = (
    svg_charts.WIDTH - svg_charts.LEFT - svg_charts.RIGHT,
    svg_charts.HEIGHT - svg_charts.TOP - svg_charts.BOTTOM,
)


def render(points, **changes):
    x, y = changes.pop("axes", UNIT)
    text = svg_charts.chart("t", "c", x=x, y=y, points=points, **changes)
    return ET.fromstring(text).find("svg")


def elements(svg, name, kind):
    return [element for element in svg.iter(name) if element.get("class") == kind]


def numbers(svg):
    texts = [element.text for element in svg.iter("text")]
    return [float(text) for text in texts if re.fullmatch(r"-?[\d.]+", text)]


def test_marks_are_at_the_coordinates_of_the_values():
    points = [Point(0.0, 0.5, 0.25, 1.0, "a"), Point(1.0, 0.0, 0.0, 0.0, "b", size=0.25)]
    svg = render(points, guides=[(0.0, 0.0, 1.0, 1.0)])
    first, second = elements(svg, "circle", "dot")
    assert float(first.get("cx")) == svg_charts.LEFT
    assert float(first.get("cy")) == svg_charts.TOP + INSIDE[1] / 2
    assert float(second.get("cx")) == svg_charts.LEFT + INSIDE[0]
    assert float(second.get("cy")) == svg_charts.HEIGHT - svg_charts.BOTTOM
    assert float(second.get("r")) == pytest.approx(float(first.get("r")) / 2, abs=0.06)  # by area
    assert [element.find("title").text for element in (first, second)] == ["a", "b"]
    whisker = elements(svg, "line", "whisker")[0]
    assert float(whisker.get("y2")) == svg_charts.TOP
    assert float(whisker.get("y1")) == svg_charts.TOP + INSIDE[1] * 0.75
    (guide,) = elements(svg, "line", "guide")
    assert [float(guide.get(end)) for end in ("x1", "y1", "x2", "y2")] == [
        svg_charts.LEFT, svg_charts.HEIGHT - svg_charts.BOTTOM,
        svg_charts.LEFT + INSIDE[0], svg_charts.TOP
    ]  # fmt: skip
    assert not elements(svg, "polyline", "line")


def test_joined_points_have_a_line_and_a_band():
    points = [Point(x, 0.5, 0.25, 0.75, "") for x in (0.2, 0.6, 1.0)]
    svg = render(points, joined=True)
    (line,), (band,) = elements(svg, "polyline", "line"), elements(svg, "polygon", "band")
    assert len(line.get("points").split()) == 3 and len(band.get("points").split()) == 6
    assert not elements(svg, "line", "whisker") and len(elements(svg, "circle", "dot")) == 3


def test_hostile_chart_text_is_escaped_and_nothing_is_loaded():
    point = Point(0.5, 0.5, 0.5, 0.5, HOSTILE)
    axes = Axis(HOSTILE, 0.0, 1.0), Axis(HOSTILE, 0.0, 1.0)
    element = svg_charts.chart(HOSTILE, HOSTILE, x=axes[0], y=axes[1], points=[point])
    tags = parsed(
        html_page.document("t", svg_charts.side_by_side([element]) + html_page.details(HOSTILE, ""))
    )
    assert not [t for t, _ in tags.tags if t in ("script", "img", "iframe", "image", "use", "a")]
    assert tags.text.count(HOSTILE) == 6  # two axes, over the point, title, caption, summary
    assert not any(n.startswith("on") or n in ("href", "style") for _, a in tags.tags for n in a)


@given(st.floats(-1e3, 1e3), st.floats(0.01, 1e4))
def test_axis_labels_are_few_round_numbers(low, span):
    axis = Axis("x", low, low + span)
    svg = render([Point(low, 0.5, 0.5, 0.5, "")], axes=(axis, UNIT[1]))
    lines = elements(svg, "line", "grid")
    across = [element for element in lines if element.get("x1") == element.get("x2")]
    assert 2 <= len(across) <= svg_charts.TICKS + 1
    for element in across:
        assert (
            svg_charts.LEFT - 0.1
            <= float(element.get("x1"))
            <= svg_charts.WIDTH - svg_charts.RIGHT + 0.1
        )
    labels = numbers(svg)
    assert len(set(labels[: len(across)])) == len(across)  # told apart as they are written


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0.52, 0.58], (0.4, 0.7)),
        ([0.5, 1.0], (0.5, 1.0)),
        ([1.0, 1.0], (0.7, 1.0)),
        ([0.0], (0.0, 0.3)),
        ([0.26, 0.91], (0.2, 1.0)),
    ],
)
def test_axis_limits(values, ends):
    assert svg_charts.axis_limits(values, step=0.1, least=0.3) == pytest.approx(ends)


def test_empty_axis_range_is_rejected():
    with pytest.raises(ValueError, match="axis 'confidence' goes from 1.0 to 1.0; low must be"):
        render([], axes=(Axis("confidence", 1.0, 1.0), UNIT[1]))
