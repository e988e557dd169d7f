"""The own scores of benchmarks equal those of their published code, recorded in score_verdicts."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import eval_setup
import numpy as np
import pytest

from medmax_jax.data.sources.vqa import choice_text
from medmax_jax.eval.benchmarks import deeptumorvqa, mediconfusion, smmile
from medmax_jax.eval.metrics import aggregate, full_reference, per_record
from medmax_jax.eval.stats.intervals import Resampling
from medmax_jax.eval.tasks import catalog

RELEASE = Path(__file__).parents[1] / "release"
sys.path.insert(0, str(RELEASE))

import run_benchmarks  # noqa: E402
import score_outputs  # noqa: E402

EXPECTED = json.loads((RELEASE / "score_verdicts.json").read_text())
SETTINGS = dict(mode="strict", resampling=Resampling(0, 2_000), cards=catalog.TASKS)


def scoring(name, count=None):
    """Return our verdicts on the first outputs of a scoring, as run_scores.py has them."""
    rules = dict(
        smmile_open=smmile.own_correct_open,
        smmile_mcq=smmile.own_correct_mcq,
        deeptumorvqa_mcq=deeptumorvqa.own_correct_mcq,
        deeptumorvqa_closed=deeptumorvqa.own_correct_closed,
        deeptumorvqa_open=deeptumorvqa.own_correct_open,
    )
    rows = score_outputs.rows(name)[:count]
    if name == "mediconfusion":
        read = [mediconfusion.chosen_option(row["text"]) for row in rows]
        records = [SimpleNamespace(**row, group=n // 2) for n, row in enumerate(rows)]
        scores = mediconfusion.own_scores(records)
        return read, {metric: round(100 * score.own, 2) for metric, score in scores.items()}
    if name == "medgen_bench":
        pairs = [full_reference.scores(*score_outputs.images(row)) for row in rows]
        return [[round(pair["psnr"], 6), round(pair["ssim"], 6)] for pair in pairs]
    if name == "deeptumorvqa_numeric":
        rows = [SimpleNamespace(**row) for row in rows]
        accuracies = [deeptumorvqa.own_accuracy(row.text, row) for row in rows]
        return [
            accuracy
            if accuracy is None
            else [
                round(accuracy, 4),
                *(int(deeptumorvqa.own_within(r.text, r, p)) for p in per_record.TOLERANCES),
            ]
            for r, accuracy in zip(rows, accuracies, strict=True)
        ]
    options = [dict(zip("ABCDE", row.get("options", ()), strict=False)) for row in rows]
    records = [
        SimpleNamespace(**row, prompt=choice_text("?", o))
        for row, o in zip(rows, options, strict=True)
    ]
    return [int(rules[name](record.text, record)) for record in records]


@pytest.mark.parametrize("name", EXPECTED)
def test_own_scores_equal_those_of_the_published_code(name):
    expected, ours = EXPECTED[name], scoring(name)
    rows = score_outputs.rows(name)
    assert len(rows) >= 1_000 and run_benchmarks.digest(rows) == expected["inputs"]
    if name == "mediconfusion":
        read, scores = ours
        *options, table = expected["verdicts"]
        assert read == options
        # Total, set accuracy, individual accuracy, confusion of the printed line.
        assert [scores["set_accuracy"], scores["accuracy"], scores["confusion"]] == table[1:4]
        assert {"A", "B", ""} == set(options)
    elif name == "medgen_bench":
        assert np.allclose(ours, expected["verdicts"], rtol=0, atol=2e-5)
        assert len({tuple(pair) for pair in ours}) > 900
    else:
        assert ours == expected["verdicts"]
        right = [v if isinstance(v, int) else v and v[0] for v in ours]
        assert sum(v == 1 for v in right) >= 100 and sum(v == 0 for v in right) >= 100


@pytest.mark.parametrize("name", EXPECTED)
def test_the_cards_state_the_comparison(name):
    scorers = [card.own_scorer for task, card in catalog.TASKS.items() if task.startswith(name)]
    assert scorers
    for scorer in scorers:
        assert f"at {EXPECTED[name]['commit']}" in scorer or scorer.startswith("none: ")
        assert re.search(r"agrees on (1,[02]00) of \1 ", scorer) or scorer.startswith("none: ")


@pytest.mark.parametrize(
    "name, module, attribute, value",
    [
        ("mediconfusion", mediconfusion, "FORMS", mediconfusion.FORMS[:-1]),
        ("mediconfusion", mediconfusion, "FORMS", (*mediconfusion.FORMS, "({0})")),
        ("smmile_open", smmile, "MISSING", set()),
        ("smmile_open", smmile, "_PUNCTUATION", {}),
        ("smmile_mcq", smmile, "STATEMENTS", smmile.STATEMENTS[:-1]),
        ("smmile_mcq", smmile, "STATEMENTS", smmile.STATEMENTS[:6]),
        ("smmile_mcq", smmile, "_tagged", lambda text: ""),
        ("deeptumorvqa_mcq", deeptumorvqa, "without_reasoning", str.strip),
        ("deeptumorvqa_numeric", deeptumorvqa, "without_reasoning", str.strip),
        ("deeptumorvqa_closed", deeptumorvqa, "without_reasoning", str.strip),
        ("deeptumorvqa_open", deeptumorvqa, "own_phrase", str.lower),
        ("medgen_bench", full_reference, "WINDOW", 5),
        ("medgen_bench", full_reference, "K2", 0.02),
        ("medgen_bench", full_reference, "MAX_PSNR", 99.0),
    ],
)
def test_a_scoring_that_differs_is_found(monkeypatch, name, module, attribute, value):
    count = 100 if name == "medgen_bench" else None
    before = scoring(name, count)
    monkeypatch.setattr(module, attribute, value)
    assert scoring(name, count) != before


def pairs(*texts):
    prompt = "Which?\nA: A cyst\nB: A mass"
    answers = "ABBAABBA"
    return [
        eval_setup.record(
            eval_setup.item(
                "mediconfusion_mcq", "vqa_mcq", n, prompt=prompt, answer=answers[n],
                group=f"p{n // 2}", slices=(("category", "Cerebral"), ("category", "Vascular")),
            ),
            text,
        )
        for n, text in enumerate(texts)
    ]  # fmt: skip


def test_pairs_of_images_are_right_or_confused_together():
    # Both right; the same option twice; one unparsed and one right; "(B)" twice.
    records = pairs("A", "B", "B", "B", "?", "B", "(B)", "(B)")
    rows = {row.metric: vars(row) for row in aggregate.summary(records, **SETTINGS)}
    assert list(rows) == ["accuracy", "set_accuracy", "confusion"]
    assert (rows["accuracy"]["value"], rows["accuracy"]["n"]) == (5 / 8, 8)
    assert (rows["set_accuracy"]["value"], rows["set_accuracy"]["best"]) == (1 / 4, 2 / 4)
    confusion = rows["confusion"]  # lower is better: the unparsed pair counts as confused
    assert (confusion["value"], confusion["best"], confusion["n_unparsed"]) == (3 / 4, 2 / 4, 1)
    assert confusion["scored_only"] == 2 / 3 and rows["accuracy"]["headline"]
    # The published code does not read "(B)", and has confusion over readable pairs only.
    assert (rows["set_accuracy"]["own"], rows["set_accuracy"]["own_n"]) == (1 / 4, 4)
    assert (confusion["own"], confusion["own_n"]) == (1 / 2, 2)
    assert all(row["paper"] is None for row in rows.values())


def test_half_a_pair_is_no_set():
    rows = {row.metric: vars(row) for row in aggregate.summary(pairs("A", "B", "B"), **SETTINGS)}
    assert (rows["accuracy"]["n"], rows["set_accuracy"]["n"], rows["confusion"]["n"]) == (3, 1, 1)
    assert rows["set_accuracy"]["own_n"] == 1
    (alone,) = aggregate.summary(pairs("A"), **SETTINGS)
    assert alone.metric == "accuracy"


def test_numbers_have_relative_accuracy():
    item = eval_setup.item("deeptumorvqa_numeric", "vqa_numeric", 0, answer="100 mL")
    texts = ("about 90 mL", "105", "20 to 100", "", "1,000")
    items = [dataclasses.replace(item, id=str(n)) for n in range(len(texts))]
    records = [eval_setup.record(i, text) for i, text in zip(items, texts, strict=True)]
    rows = {row.metric: vars(row) for row in aggregate.summary(records, **SETTINGS)}
    mra = rows["mra"]
    assert (mra["value"], mra["n_unparsed"]) == (pytest.approx((0.9 + 0.95) / 5), 2)
    assert mra["own"] == pytest.approx((0.9 + 0.95 + 0.2 + 0.01) / 5)  # of 20 and of 1
    assert (rows["within_5"]["value"], rows["within_10"]["value"]) == (1 / 5, 2 / 5)
    assert rows["within_5"]["own_n"] == 5
