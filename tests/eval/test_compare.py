"""Tests of differences, by hand and by simulation; calibration; comparison of two workdirs."""

import itertools
import json
import math
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import special

from medmax_jax.eval.reporting import comparison
from medmax_jax.eval.stats import calibration, intervals, paired_tests
from medmax_jax.eval.stats.intervals import Resampling

ROOT = Path(__file__).parents[2]


def test_mcnemar():
    first, second = [1] * 1 + [0] * 9 + [1] * 5, [0] * 1 + [1] * 9 + [1] * 5
    result = paired_tests.mcnemar(first, second)
    assert (result.only_first, result.only_second) == (1, 9)
    assert result.p == pytest.approx(2 * (1 + 10) / 1024)
    assert paired_tests.mcnemar([1, 0], [1, 0]).p == 1
    assert paired_tests.mcnemar([1, 1], [1, 1]).p == 1  # no discordant item
    with pytest.raises(ValueError, match="requires scores of 0 and 1"):
        paired_tests.mcnemar([0.5], [1])
    with pytest.raises(ValueError, match="same items"):
        paired_tests.mcnemar([1], [1, 0])


def test_mcnemar_is_the_exact_sum_in_any_size():
    for b, c in itertools.product((0, 1, 2, 5, 17, 40, 90), repeat=2):
        tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
        exact = min(Fraction(1), Fraction(2 * tail, 2 ** (b + c)))
        result = paired_tests.mcnemar([1] * b + [0] * c + [1], [0] * b + [1] * c + [1])
        assert result.p == pytest.approx(float(exact), rel=1e-9), (b, c)
    start = time.process_time()
    result = paired_tests.mcnemar([1] * 5_000 + [0] * 5_100, [0] * 5_000 + [1] * 5_100)
    assert result.p == pytest.approx(0.3245815463, abs=1e-9)
    assert time.process_time() - start < 1  # 0.01 s; the sum took 6 s, and with 40,000 minutes


def test_sign_flips():
    # three groups that agree: of 8 signings, + + + and - - - are as far out
    assert paired_tests.sign_flip([1, 1, 1], "abc", resampling=Resampling(0, 2_000)) == 2 / 8
    assert paired_tests.sign_flip([1] * 30, "abc" * 10, resampling=Resampling(0, 2_000)) == 2 / 8
    assert paired_tests.sign_flip([0, 0], "ab", resampling=Resampling(0, 2_000)) == 1
    many = paired_tests.sign_flip([1] * 40, range(40), resampling=Resampling(0, 2_000))
    assert many == 1 / 2_001


def test_sign_flips_hold_their_level_where_mcnemar_does_not():
    """No true difference, ten equal answers per image: 5 % false positives."""
    rng, wrong, naive = np.random.default_rng(0), 0, 0
    for world in range(200):
        side = np.repeat(rng.integers(0, 2, 20), 10)
        groups = np.repeat(np.arange(20), 10).tolist()
        p = paired_tests.sign_flip(2.0 * side - 1, groups, resampling=Resampling(world, 2_000))
        wrong += p < 0.05
        naive += paired_tests.mcnemar(side.tolist(), (1 - side).tolist()).p < 0.05
    assert wrong <= 20 and naive > 80


def test_holm():
    result = paired_tests.holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert result == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert paired_tests.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_detectable_differences():
    values = [1.0] * 300 + [0.0] * 200  # 60 % of 500
    assert intervals.minimum_detectable_effect(values, range(500), paired=False) == pytest.approx(
        0.087, abs=1e-3
    )
    copies = np.repeat(values[::10], 10)
    clustered = intervals.minimum_detectable_effect(
        copies, np.repeat(range(50), 10).tolist(), paired=False
    )
    # 49 degrees of freedom instead of 499, and 50 / 49 in the variance
    reach = [sum(special.stdtrit(df, [0.975, 0.8])) for df in (49, 499)]
    wider = np.sqrt(10 * 50 / 49) * reach[0] / reach[1]
    assert clustered == pytest.approx(0.087 * wider, rel=0.005)
    assert intervals.minimum_detectable_effect([1.0, 0.0], "aa", paired=True) == np.inf


def test_the_interval_includes_the_variance_of_the_judge():
    """95 % intervals of noisy votes contain the true value; the judge's part is separate."""
    rng, covered, judge_sds = np.random.default_rng(0), 0, []
    for world in range(150):
        chance = rng.choice([0.2, 0.8], 60)
        votes = (rng.random((60, 3)) < chance[:, None]).astype(float)
        result = intervals.judged_interval(
            votes.tolist(), range(60), resampling=Resampling(world, 2_000)
        )
        covered += result.interval.low <= 0.5 <= result.interval.high
        judge_sds.append(result.judge_sd)
    assert 0.88 <= covered / 150 <= 0.99
    assert np.mean(judge_sds) == pytest.approx(np.sqrt(0.16 / 3 / 60), rel=0.05)
    once = intervals.judged_interval([[1.0], [0.0]], "ab", resampling=Resampling(0, 2_000))
    assert once.judge_sd is None
    with pytest.raises(ValueError, match="item 1 has no votes"):
        intervals.judged_interval([[1.0], []], "ab", resampling=Resampling(0, 2_000))


def test_suite_interval_weights_tasks_equally_and_shares_groups():
    parts = [([1.0] * 90, list(range(90))), ([0.0] * 10, list(range(10)))]
    assert intervals.suite_interval(parts, resampling=Resampling(0, 2_000)).mean == 0.5
    opposite = [([1.0, -1.0] * 20, list(range(40))), ([-1.0, 1.0] * 20, list(range(40)))]
    result = intervals.suite_interval(opposite, resampling=Resampling(0, 2_000), span=(-1.0, 1.0))
    # what one task gains the other loses, but items are no more certain for it
    assert result.mean == 0 and -0.25 < result.low < -0.15 and 0.15 < result.high < 0.25
    same = intervals.suite_interval(
        [([0.0] * 40, list(range(40)))] * 2, resampling=Resampling(0, 2_000)
    )
    assert 0 < same.high == pytest.approx(1 - 0.025 ** (1 / 40)) and same.low == 0


def test_calibration():
    np.testing.assert_allclose(calibration.option_probabilities([0.0, np.log(3)]), [0.25, 0.75])
    assert calibration.top_option(calibration.option_probabilities([0.0, np.log(3)])) == (
        1,
        pytest.approx(0.75),
    )
    assert calibration.ece([0.9] * 10, [1] * 9 + [0], bins=5) == pytest.approx(0)
    assert calibration.ece([0.9] * 10, [0] * 10, bins=5) == pytest.approx(0.9)
    # two levels, two bins: (|1.0 - 0.5| + |0.6 - 0.5|) / 2
    assert calibration.ece([1, 1, 0.6, 0.6], [1, 0, 1, 0], bins=2) == pytest.approx(0.3)
    assert calibration.brier([np.array([0.25, 0.75])], [1]) == pytest.approx(0.125)
    curve = calibration.risk_coverage([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 0])
    np.testing.assert_allclose(curve.risk, [0, 0, 1 / 3, 1 / 2])
    assert calibration.accuracy_at_coverage(curve, 0.5) == 1 and curve.area == pytest.approx(5 / 24)
    ties = [
        calibration.risk_coverage([0.5] * 4, right).area for right in ([1, 1, 0, 0], [0, 0, 1, 1])
    ]
    assert ties[0] == ties[1] == 0.5
    for call in (
        lambda: calibration.option_probabilities([0.0]),
        lambda: calibration.option_probabilities([0.0, np.nan]),
        lambda: calibration.ece([1.5], [1], bins=2),
        lambda: calibration.brier([np.array([1.0, 0.0])], [2]),
        lambda: calibration.accuracy_at_coverage(curve, 0.0),
    ):
        with pytest.raises(ValueError):
            call()


def write(folder, answers, task="vqa_closed", **changes):
    folder.mkdir(exist_ok=True)
    with open(folder / "records.jsonl", "a") as file:
        for n, text in enumerate(answers):
            row = dict(
                id=f"{task}/{n}",
                task=task,
                family=task,
                prompt="Is it?",
                answer="yes",
                image="a.png",
            )
            row |= dict(
                group=f"g{n // 2}",
                facts=[],
                modality="",
                images=[],
                predicted_modality=None,
                text=text,
            )
            file.write(json.dumps(row | changes) + "\n")
    return folder


def test_comparison_decides_or_is_inconclusive(tmp_path):
    first = write(tmp_path / "one", ["no"] * 40)
    second = write(tmp_path / "two", ["yes"] * 35 + ["no"] * 5)
    write(first, ["a b"] * 6, "vqa_open"), write(second, ["yes"] + ["a b"] * 5, "vqa_open")
    write(second, ["x"] * 3, "captioning")
    result = comparison.compare(first, second, seed=0, resamples=2_000)
    rows = {(row["task"], row["metric"]): row for row in result.rows}
    closed = rows["vqa_closed", "accuracy"]
    assert closed["claim"] == f"{second} wins" and closed["diff"] == 0.875
    assert closed["p_holm"] < 0.01 and closed["p_mcnemar"] < 1e-9
    assert (closed["n"], closed["groups"]) == (40, 20) and closed["mde"] < 0.3
    assert rows["vqa_open", "exact"]["claim"] == comparison.INCONCLUSIVE
    assert rows["vqa_open", "token_f1"]["claim"] == ""  # not its headline
    assert result.left_out == [
        "captioning: not run by the first",
        "3 items that only the second answered",
    ]
    assert result.suite["first"] == 0 and result.suite["second"] == result.suite["diff"]
    assert result.suite["first_low"] == 0 <= result.suite["second_low"] < result.suite["diff"]
    assert result.suite["tasks"] == 2 and result.suite["diff"] == pytest.approx((0.875 + 1 / 6) / 2)
    back = comparison.compare(second, first, seed=0, resamples=2_000).rows[0]
    assert back["claim"] == f"{second} wins" and back["diff"] == -0.875


def test_workdirs_that_cannot_be_compared(tmp_path):
    first = write(tmp_path / "one", ["no"])
    with pytest.raises(comparison.ComparisonError, match="is missing; name a workdir"):
        comparison.compare(first, tmp_path, seed=0, resamples=2_000)
    other = write(tmp_path / "two", ["no"], prompt="Else?")
    with pytest.raises(comparison.ComparisonError, match="prompt is 'Is it\\?' and 'Else\\?'"):
        comparison.compare(first, other, seed=0, resamples=2_000)
    disjoint = write(tmp_path / "three", ["no"], id="x")
    with pytest.raises(comparison.ComparisonError, match="no item has a score on both"):
        comparison.compare(first, disjoint, seed=0, resamples=2_000)


def test_the_program(tmp_path):
    first, second = write(tmp_path / "one", ["no"] * 40), write(tmp_path / "two", ["yes"] * 40)
    command = [sys.executable, "-m", "eval.compare", str(first), str(second)]
    done = subprocess.run(
        [*command, "--json"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout.splitlines()[-1])["rows"][0]["claim"] == f"{second} wins"
    assert not done.stderr
    folder = tmp_path / "new" / "folder"
    command = [*command, f"--workdir={folder}"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"page: {folder / 'comparison.html'}"
    assert f"<b>{second} is better.</b>" in (folder / "comparison.html").read_text()
    command = command[:-1]
    wrong = subprocess.run([*command[:-1], "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1 and "nowhere/records.jsonl is missing" in wrong.stderr


def test_the_page_of_a_comparison(tmp_path):
    first = write(tmp_path / "one", ["no"] * 40)
    second = write(tmp_path / "two", ["yes"] * 40)
    write(first, ["a b"] * 6, "vqa_open"), write(second, ["yes"] + ["a b"] * 5, "vqa_open")
    result = comparison.compare(first, second, seed=0, resamples=2_000)
    result.left_out.append("<script>")
    names = dict.fromkeys((str(first), str(second)))
    facts = [dict(model="m", digest="0123"), {}, dict(seed=0, commit="abc")]
    text = comparison.render(result, *names, facts=facts)
    assert "<script" not in text and text.count("<svg") == 1
    heads = [part.split("</p>")[0] for part in text.split('<p class="head">')[1:]]
    assert heads[0] == f"first: {first} · model m · digest 0123"
    assert heads[1:] == [f"second: {second}", "seed 0 · commit abc"]
    assert f'<li class="good"><b>{second} is better.</b> vqa_closed: accuracy 0.000' in text
    assert '<li class="neutral"><b>Inconclusive.</b> vqa_open: exact' in text
    assert f"Of 2 tasks, {second} is better on 1, {first} is better on 0, and 1 are" in text
    assert "(approximate: few groups), on 6 items of 3 groups" in text
    assert "not drawn" in text  # the three groups of vqa_open
    backward = comparison.compare(second, first, seed=0, resamples=2_000)
    text = comparison.render(backward, str(second), str(first), facts=facts)
    assert f'<li class="bad"><b>{second} is better.</b>' in text


def test_reads_of_a_judge_count_on_both_sides_or_on_neither(tmp_path):
    sides = [write(tmp_path / name, ["paraphrase"] * 4) for name in ("one", "two")]
    names = [f"vqa_closed/{n}" for n in range(4)]

    def judged(folder, judge):
        lines = [
            dict(id=name, kind="read", votes=["yes"], why=[], judge=judge, case="c")
            for name in names
        ]
        (folder / "judgments.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        result = comparison.compare(*sides, seed=0, resamples=2_000)
        rows = {row["metric"]: row for row in result.rows}
        return rows["accuracy"]["second"], [x for x in result.left_out if "reads" in x]

    assert judged(sides[1], "one judge") == (
        0.0, ["reads of a judge: not by the same judge on both sides, so unparsed here"]
    )  # fmt: skip
    assert len(judged(sides[0], "another judge")[1]) == 1
    assert judged(sides[0], "one judge") == (1.0, [])


def test_small_p_values_are_printed_as_such():
    assert [comparison.p_text(p) for p in (0.0214, 0.001, 0.00099, 0.0, None)] == [
        "0.021", "0.001", "<0.001", "<0.001", None
    ]  # fmt: skip
    row = dict(p=1e-9, p_holm=0.5, p_mcnemar=None, diff=1e-9)
    assert comparison.printed([row]) == [
        dict(p="<0.001", p_holm="0.500", p_mcnemar=None, diff=1e-9)
    ]
