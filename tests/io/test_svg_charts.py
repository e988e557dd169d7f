"""Charts: marks lie where the values are, text stays text, axes have round numbers."""

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


def drawn(points, **changes):
    x, y = changes.pop("axes", UNIT)
    text = svg_charts.chart("t", "c", x=x, y=y, points=points, **changes)
    return ET.fromstring(text).find("svg")


def of(svg, name, kind):
    return [one for one in svg.iter(name) if one.get("class") == kind]


def numbers(svg):
    said = [one.text for one in svg.iter("text")]
    return [float(text) for text in said if re.fullmatch(r"-?[\d.]+", text)]


def test_marks_lie_where_the_values_are():
    points = [Point(0.0, 0.5, 0.25, 1.0, "a"), Point(1.0, 0.0, 0.0, 0.0, "b", size=0.25)]
    svg = drawn(points, guides=[(0.0, 0.0, 1.0, 1.0)])
    first, second = of(svg, "circle", "dot")
    assert float(first.get("cx")) == svg_charts.LEFT
    assert float(first.get("cy")) == svg_charts.TOP + INSIDE[1] / 2
    assert float(second.get("cx")) == svg_charts.LEFT + INSIDE[0]
    assert float(second.get("cy")) == svg_charts.HEIGHT - svg_charts.BOTTOM
    assert float(second.get("r")) == pytest.approx(float(first.get("r")) / 2, abs=0.06)  # by area
    assert [one.find("title").text for one in (first, second)] == ["a", "b"]
    whisker = of(svg, "line", "whisker")[0]
    assert float(whisker.get("y2")) == svg_charts.TOP
    assert float(whisker.get("y1")) == svg_charts.TOP + INSIDE[1] * 0.75
    (guide,) = of(svg, "line", "guide")
    assert [float(guide.get(end)) for end in ("x1", "y1", "x2", "y2")] == [
        svg_charts.LEFT, svg_charts.HEIGHT - svg_charts.BOTTOM,
        svg_charts.LEFT + INSIDE[0], svg_charts.TOP
    ]  # fmt: skip
    assert not of(svg, "polyline", "line")


def test_a_joined_line_has_a_band():
    points = [Point(x, 0.5, 0.25, 0.75, "") for x in (0.2, 0.6, 1.0)]
    svg = drawn(points, joined=True)
    (line,), (band,) = of(svg, "polyline", "line"), of(svg, "polygon", "band")
    assert len(line.get("points").split()) == 3 and len(band.get("points").split()) == 6
    assert not of(svg, "line", "whisker") and len(of(svg, "circle", "dot")) == 3


def test_hostile_text_stays_text_and_nothing_is_fetched():
    point = Point(0.5, 0.5, 0.5, 0.5, HOSTILE)
    axes = Axis(HOSTILE, 0.0, 1.0), Axis(HOSTILE, 0.0, 1.0)
    one = svg_charts.chart(HOSTILE, HOSTILE, x=axes[0], y=axes[1], points=[point])
    tags = parsed(
        html_page.document("t", svg_charts.side_by_side([one]) + html_page.details(HOSTILE, ""))
    )
    assert not [t for t, _ in tags.tags if t in ("script", "img", "iframe", "image", "use", "a")]
    assert tags.text.count(HOSTILE) == 6  # two axes, over the point, title, caption, summary
    assert not any(n.startswith("on") or n in ("href", "style") for _, a in tags.tags for n in a)


@given(st.floats(-1e3, 1e3), st.floats(0.01, 1e4))
def test_axes_have_a_few_round_numbers_within_them(low, span):
    axis = Axis("x", low, low + span)
    svg = drawn([Point(low, 0.5, 0.5, 0.5, "")], axes=(axis, UNIT[1]))
    lines = of(svg, "line", "grid")
    across = [one for one in lines if one.get("x1") == one.get("x2")]
    assert 2 <= len(across) <= svg_charts.TICKS + 1
    for one in across:
        assert (
            svg_charts.LEFT - 0.1
            <= float(one.get("x1"))
            <= svg_charts.WIDTH - svg_charts.RIGHT + 0.1
        )
    found = numbers(svg)
    assert len(set(found[: len(across)])) == len(across)  # told apart as they are written


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
def test_an_axis_around_values(values, ends):
    assert svg_charts.axis_limits(values, step=0.1, least=0.3) == pytest.approx(ends)


def test_an_axis_without_length_is_refused():
    with pytest.raises(ValueError, match="axis 'confidence' from 1.0 to 1.0: low < high"):
        drawn([], axes=(Axis("confidence", 1.0, 1.0), UNIT[1]))
