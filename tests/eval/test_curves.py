"""Axes of calibration charts, and what the charts show of their points."""

import re

import pytest

from medmax_jax.eval.reporting import curves

BIN = dict(
    n=8, groups=3, low=0.5, high=0.6, confidence=0.55, accuracy=0.75, ci_low=0.3, ci_high=0.9
)


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
    assert curves.axis_limits(values, step=0.1, least=0.3) == pytest.approx(ends)


def test_each_bin_has_a_dot_with_its_numbers():
    bins = [BIN, BIN | dict(n=2, confidence=0.58, accuracy=0.5, ci_low=None, ci_high=None)]
    page = curves.render_curves({"bins": {"x_closed": bins}})
    tooltips = re.findall(r"<title>(.*?)</title>", page)
    assert tooltips == [
        "8 answers, confidence 0.500 to 0.600 (mean 0.550): accuracy 0.750",
        "2 answers, confidence 0.500 to 0.600 (mean 0.580): accuracy 0.500",
    ]
    assert "<b>x_closed</b>10 answers in 2 bins of 2 to 8" in page


def test_a_risk_curve_states_all_and_half():
    curve = [
        dict(coverage=c, risk=r, ci_low=None, ci_high=None) for c, r in ((0.5, 0.1), (1.0, 0.25))
    ]
    page = curves.render_curves({"curves": {"x_closed": curve}})
    assert "risk 0.250 of all answers, 0.100 of the most confident half" in page


def test_nothing_to_draw_is_no_markup():
    assert curves.render_curves({}) == ""
