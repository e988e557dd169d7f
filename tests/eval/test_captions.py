"""BLEU and CIDEr-D of captions, against the packages that define them."""

import dataclasses
import json
from pathlib import Path

import eval_setup
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_jax.eval.metrics import aggregate, captions
from medmax_jax.eval.reporting import page
from medmax_jax.eval.stats.intervals import Resampling

GOLDEN = json.loads((Path(__file__).parents[1] / "parity" / "captions.json").read_text("utf-8"))
RESAMPLING = Resampling(0, 2_000)
TEXTS = st.lists(st.sampled_from("no a pleural effusion is seen . lung".split()), max_size=12)


def sides():
    return zip(*GOLDEN["pairs"], strict=True)


def test_cider_equals_pycocoevalcap():
    scores = captions.cider(*sides())
    np.testing.assert_allclose(scores, GOLDEN["cider"], rtol=1e-9, atol=1e-12)
    assert np.mean(scores) == pytest.approx(GOLDEN["cider_mean"], rel=1e-9)
    assert max(scores) > 1 and len(scores) > 60


def test_bleu_equals_sacrebleu():
    pytest.importorskip("sacrebleu", reason="the package sacrebleu is not installed")
    answers, references = map(list, sides())
    for count, key in ((len(answers), "bleu"), (7, "bleu_of_edges")):
        groups = [str(n) for n in range(count)]
        result = captions.bleu_interval(
            answers[:count], references[:count], groups, resampling=RESAMPLING
        )
        assert result.mean == pytest.approx(GOLDEN[key] / 100, rel=1e-9)
        assert 0 <= result.low <= result.mean <= result.high <= 1 and result.low < result.high


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
def test_cider_is_in_its_span_and_best_for_the_reference(pairs):
    answers, references = ([" ".join(pair[side]) for pair in pairs] for side in (0, 1))
    scores, best = captions.cider(answers, references), captions.cider(references, references)
    assert (scores >= 0).all() and (scores <= best + 1e-9).all() and (best <= 10 + 1e-9).all()


def test_rows_of_a_captioning_task():
    texts = ["no effusion is seen", "the heart is large", "a mass in the left lung", "", "normal"]
    items = [
        eval_setup.item("captioning_report", "captioning", n, answer=text or "a fracture")
        for n, text in enumerate(texts)
    ]
    records = [eval_setup.record(item, text) for item, text in zip(items, texts, strict=True)]
    rows = {r.metric: r for r in aggregate.summary(records, mode="test", resampling=RESAMPLING)}
    assert rows["cider"].value == pytest.approx(
        np.mean(captions.cider(texts, [*texts[:3], "a fracture", "normal"]))
    )
    assert rows["cider"].value > 2 and rows["cider"].ci_high <= 10
    assert 0 < rows["bleu"].value <= 1 and rows["bleu"].ci_high <= 1
    assert rows["cider"].n == rows["rouge_l"].n == 5 and not rows["cider"].headline


def test_metrics_that_are_not_computed_are_named():
    item = eval_setup.item("captioning_report", "captioning", 0, answer="a lung")
    rows = aggregate.summary(
        [eval_setup.record(item, "a lung")], mode="test", resampling=RESAMPLING
    )
    text = page.caption_metrics_not_run(rows)
    assert all(name in text for name in ("METEOR", "RadGraph-F1", "GREEN", "bert-score"))
    others = [dataclasses.replace(row, family="vqa_open") for row in rows]
    assert page.caption_metrics_not_run(others) == ""
