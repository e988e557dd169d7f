"""Tests of differences on hand values and by simulation; calibration; two workdirs compared."""

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
    found = paired_tests.mcnemar(first, second)
    assert (found.only_first, found.only_second) == (1, 9)
    assert found.p == pytest.approx(2 * (1 + 10) / 1024)
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
        found = paired_tests.mcnemar([1] * b + [0] * c + [1], [0] * b + [1] * c + [1])
        assert found.p == pytest.approx(float(exact), rel=1e-9), (b, c)
    start = time.process_time()
    found = paired_tests.mcnemar([1] * 5_000 + [0] * 5_100, [0] * 5_000 + [1] * 5_100)
    assert found.p == pytest.approx(0.3245815463, abs=1e-9)
    assert time.process_time() - start < 1  # 0.01 s; the sum took 6 s, and with 40,000 minutes


def test_sign_flips():
    # three groups that agree: of 8 signings, + + + and - - - are as far out
    assert paired_tests.sign_flip([1, 1, 1], "abc", resampling=Resampling(0, 2_000)) == 2 / 8
    assert paired_tests.sign_flip([1] * 30, "abc" * 10, resampling=Resampling(0, 2_000)) == 2 / 8
    assert paired_tests.sign_flip([0, 0], "ab", resampling=Resampling(0, 2_000)) == 1
    many = paired_tests.sign_flip([1] * 40, range(40), resampling=Resampling(0, 2_000))
    assert many == 1 / 2_001


def test_sign_flips_are_rarely_wrong_where_mcnemar_is():
    """No true difference, ten questions a picture that go the same way: 5 % false claims."""
    rng, wrong, naive = np.random.default_rng(0), 0, 0
    for world in range(200):
        side = np.repeat(rng.integers(0, 2, 20), 10)
        groups = np.repeat(np.arange(20), 10).tolist()
        p = paired_tests.sign_flip(2.0 * side - 1, groups, resampling=Resampling(world, 2_000))
        wrong += p < 0.05
        naive += paired_tests.mcnemar(side.tolist(), (1 - side).tolist()).p < 0.05
    assert wrong <= 20 and naive > 80


def test_holm():
    found = paired_tests.holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
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


def test_the_judge_s_variance_is_in_the_interval():
    """95 % intervals of one noisy vote an item hold the truth; the judge's part is told apart."""
    rng, held, told = np.random.default_rng(0), 0, []
    for world in range(150):
        chance = rng.choice([0.2, 0.8], 60)
        votes = (rng.random((60, 3)) < chance[:, None]).astype(float)
        found = intervals.judged_interval(
            votes.tolist(), range(60), resampling=Resampling(world, 2_000)
        )
        held += found.interval.low <= 0.5 <= found.interval.high
        told.append(found.judge_sd)
    assert 0.88 <= held / 150 <= 0.99
    assert np.mean(told) == pytest.approx(np.sqrt(0.16 / 3 / 60), rel=0.05)
    once = intervals.judged_interval([[1.0], [0.0]], "ab", resampling=Resampling(0, 2_000))
    assert once.judge_sd is None
    with pytest.raises(ValueError, match="item 1 has no votes"):
        intervals.judged_interval([[1.0], []], "ab", resampling=Resampling(0, 2_000))


def test_suite_interval_weighs_tasks_alike_and_shares_groups():
    parts = [([1.0] * 90, list(range(90))), ([0.0] * 10, list(range(10)))]
    assert intervals.suite_interval(parts, resampling=Resampling(0, 2_000)).mean == 0.5
    opposite = [([1.0, -1.0] * 20, list(range(40))), ([-1.0, 1.0] * 20, list(range(40)))]
    found = intervals.suite_interval(opposite, resampling=Resampling(0, 2_000), span=(-1.0, 1.0))
    # what one task gains the other loses, but items are no more certain for it
    assert found.mean == 0 and -0.25 < found.low < -0.15 and 0.15 < found.high < 0.25
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


def test_who_wins_and_where_nobody_can_say(tmp_path):
    one = write(tmp_path / "one", ["no"] * 40)
    two = write(tmp_path / "two", ["yes"] * 35 + ["no"] * 5)
    write(one, ["a b"] * 6, "vqa_open"), write(two, ["yes"] + ["a b"] * 5, "vqa_open")
    write(two, ["x"] * 3, "captioning")
    found = comparison.compare(one, two, seed=0, resamples=2_000)
    rows = {(row["task"], row["metric"]): row for row in found.rows}
    closed = rows["vqa_closed", "accuracy"]
    assert closed["claim"] == f"{two} wins" and closed["diff"] == 0.875
    assert closed["p_holm"] < 0.01 and closed["p_mcnemar"] < 1e-9
    assert (closed["n"], closed["groups"]) == (40, 20) and closed["mde"] < 0.3
    assert rows["vqa_open", "exact"]["claim"] == comparison.INCONCLUSIVE
    assert rows["vqa_open", "token_f1"]["claim"] == ""  # not its headline
    assert found.left_out == [
        "captioning: not run by the first",
        "3 items that only the second answered",
    ]
    assert found.suite["first"] == 0 and found.suite["second"] == found.suite["diff"]
    assert found.suite["first_low"] == 0 <= found.suite["second_low"] < found.suite["diff"]
    assert found.suite["tasks"] == 2 and found.suite["diff"] == pytest.approx((0.875 + 1 / 6) / 2)
    back = comparison.compare(two, one, seed=0, resamples=2_000).rows[0]
    assert back["claim"] == f"{two} wins" and back["diff"] == -0.875


def test_workdirs_that_cannot_be_compared(tmp_path):
    one = write(tmp_path / "one", ["no"])
    with pytest.raises(comparison.ComparisonError, match="is missing; name a workdir"):
        comparison.compare(one, tmp_path, seed=0, resamples=2_000)
    other = write(tmp_path / "two", ["no"], prompt="Else?")
    with pytest.raises(comparison.ComparisonError, match="prompt is 'Is it\\?' and 'Else\\?'"):
        comparison.compare(one, other, seed=0, resamples=2_000)
    apart = write(tmp_path / "three", ["no"], id="x")
    with pytest.raises(comparison.ComparisonError, match="no item has a score on both"):
        comparison.compare(one, apart, seed=0, resamples=2_000)


def test_the_program(tmp_path):
    one, two = write(tmp_path / "one", ["no"] * 40), write(tmp_path / "two", ["yes"] * 40)
    command = [sys.executable, "-m", "eval.compare", str(one), str(two)]
    said = subprocess.run(
        [*command, "--json"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert json.loads(said.stdout.splitlines()[-1])["rows"][0]["claim"] == f"{two} wins"
    assert not said.stderr
    wrong = subprocess.run([*command[:-1], "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1 and "nowhere/records.jsonl is missing" in wrong.stderr
