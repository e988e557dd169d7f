"""Charts: inline SVG that is safe, follows the page's theme, and leaves matplotlib's settings."""

import re
from html.parser import HTMLParser

import matplotlib
import pytest

from medmax_jax.io import charts, html_page

HOSTILE = "</svg><script>alert(1)</script>&\"'"


class Tags(HTMLParser):
    """All tags of a page with their attributes, and its text."""

    def __init__(self, markup: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(markup)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@charts.page_style()
def drawn(text: str = "loss", color: str = charts.MARK) -> str:
    figure, axes = charts.subplots(size=(4.0, 3.0))
    axes.plot([0, 1, 2], [3.0, 2.0, 1.5], "o-", color=color, label=text, gid=charts.TOOLTIP + "0")
    axes.set(title=text, xlabel=text, ylabel="y")
    axes.legend()
    return charts.svg(figure, tooltips={charts.TOOLTIP + "0": text})


def test_hostile_text_stays_text_and_nothing_is_fetched():
    page = html_page.document("t", html_page.chart(drawn(HOSTILE), HOSTILE))
    tags = Tags(page)
    assert [t for t, _ in tags.tags].count("style") == 1  # the page's own
    assert not [t for t, _ in tags.tags if t in ("script", "img", "iframe", "image", "a")]
    assert tags.text.count(HOSTILE) == 5  # title, axis, legend, tooltip, caption
    for _, attributes in tags.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("xlink:href", "#").startswith("#")


def test_colors_are_variables_of_the_page():
    for color in charts.VARIABLES:
        assert f"var({charts.VARIABLES[color]})" in drawn(color=color)
        assert color not in drawn(color=color)
    for color, variable in charts.VARIABLES.items():
        light = re.search(rf"{variable}: light-dark\((#\w+), #\w+\)", html_page.STYLE)[1]
        assert color == (light if len(light) == 7 else "#" + 2 * light[1:]), variable


def test_a_chart_is_the_same_bytes_again():
    assert drawn() == drawn() != drawn("other")


def test_the_text_of_the_page_is_text():
    assert 'font-family: inherit"' in drawn() or "font-family: inherit;" in drawn()
    assert ">loss</text>" in drawn() and "<title>loss</title>" in drawn()


def test_letters_that_the_font_lacks_are_left_to_the_page():
    assert ">폐 \x9b</text>" in drawn("폐 \x9b")  # a warning would be an error here


def test_the_callers_settings_stay():
    before = {name: matplotlib.rcParams[name] for name in charts._RC}
    drawn()
    assert {name: matplotlib.rcParams[name] for name in before} == before


@pytest.mark.parametrize("suffix, start", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_file_has_colors_of_its_own(tmp_path, suffix, start):
    with charts.page_style():
        figure, axes = charts.subplots(1, 2, size=(4.0, 2.0), sharey=True)
        axes[0].plot([0, 1], [0, 1])
        charts.save(figure, tmp_path / f"a{suffix}")
    data = (tmp_path / f"a{suffix}").read_bytes()
    assert data.startswith(start) and b"var(" not in data
