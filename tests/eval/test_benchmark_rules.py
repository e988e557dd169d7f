"""Each benchmark's own rule equals its own code, and is reported next to the strict score."""

import dataclasses
import json
import sys
from pathlib import Path

import eval_setup
import pytest

from medmax_jax.data.sources.vqa import choice_text
from medmax_jax.eval.benchmarks import (
    gmai_mmbench,
    kormedmcqa,
    medbookvqa,
    medframeqa,
    medthink,
    medxpertqa,
)
from medmax_jax.eval.metrics import aggregate, strict
from medmax_jax.eval.stats.intervals import Resampling
from medmax_jax.eval.tasks import catalog

RELEASE = Path(__file__).parents[1] / "release"
sys.path.insert(0, str(RELEASE))

import benchmark_outputs  # noqa: E402
import run_benchmarks  # noqa: E402

EXPECTED = json.loads((RELEASE / "benchmark_verdicts.json").read_text())
MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (gmai_mmbench, kormedmcqa, medbookvqa, medframeqa, medthink, medxpertqa)
}


PROMPT = "Which?\nA: CT\nB: MRI"


def record_of(row):
    options = dict(zip("ABCDE", row["options"], strict=False))
    prompt = choice_text(row["question"], options)
    item = eval_setup.item("task", "vqa_mcq", 0, prompt=prompt, answer=row["answer"])
    return eval_setup.record(dataclasses.replace(item, context=row["context"]), row["text"])


def verdicts(name, rule):
    """Return one character per output, as tests/release/run_benchmarks.py does."""
    records = map(record_of, benchmark_outputs.rows(name))
    values = [rule(record.text, record) for record in records]
    return "".join("-" if value is None else "01"[value] for value in values)


@pytest.mark.parametrize("name", MODULES)
def test_the_own_rule_equals_the_benchmark_s_code(name):
    rows, expected = benchmark_outputs.rows(name), EXPECTED[name]
    assert len(rows) >= 1_000 and run_benchmarks.digest(rows) == expected["inputs"]
    assert verdicts(name, MODULES[name].own_correct) == expected["verdicts"]
    assert expected["verdicts"].count("1") >= 100 and expected["verdicts"].count("0") >= 100
    for card in MODULES[name].CARDS:
        if card.own_correct:
            assert card.own_correct is MODULES[name].own_correct
            assert f"at {expected['commit']}: agrees on {len(rows):,} of {len(rows):,} outputs" in (
                card.own_scorer
            )


@pytest.mark.parametrize(
    "name, attribute, value",
    [
        ("medframeqa", "MARKERS", medframeqa.MARKERS[::-1]),
        ("medframeqa", "MARKERS", medframeqa.MARKERS[:2]),
        ("kormedmcqa", "THINKING", kormedmcqa.THINKING[1:]),
        ("kormedmcqa", "_KEYS", ("answer", "정답")),
        ("kormedmcqa", "_LETTER", "([ABCDE])"),
        ("medxpertqa", "TRIGGER", "among A through {last}, the answer is"),
        ("medxpertqa", "UNWANTED", ()),
        ("gmai_mmbench", "REFUSALS", gmai_mmbench.REFUSALS[1:]),
        ("gmai_mmbench", "FAILED_REQUEST", "?"),
        ("medthink", "_STATED", medthink.re.compile(r"answer is \(([A-Z])\)")),
    ],
)
def test_a_rule_that_differs_is_found(monkeypatch, name, attribute, value):
    monkeypatch.setattr(MODULES[name], attribute, value)
    assert verdicts(name, MODULES[name].own_correct) != EXPECTED[name]["verdicts"]


def test_a_stripped_answer_is_another_rule():
    rule = lambda text, record: medbookvqa.own_correct(text.strip(), record)  # noqa: E731
    assert verdicts("medbookvqa", rule) != EXPECTED["medbookvqa"]["verdicts"]


def test_the_summary_has_both_scores():
    item = eval_setup.item("gmai_mmbench_mcq", "vqa_mcq", 0, answer="B", prompt=PROMPT)
    texts = ["B", "It is an MRI", "The answer is B because of X", "(B)", "A"]
    records = [eval_setup.record(dataclasses.replace(item, id=text), text) for text in texts]
    settings = dict(mode="strict", resampling=Resampling(0, 2_000))
    (row,) = aggregate.summary(records, **settings, cards=catalog.TASKS)
    assert row.value == sum(strict.choice(t, "B", item.prompt).value for t in texts) / 5
    own = [gmai_mmbench.own_correct(record.text, record) for record in records]
    assert (row.own, row.own_n, row.headline) == (sum(own) / 5, 5, True)
    assert row.paper is None  # the release does not score it
    (other,) = aggregate.summary(records, **settings)
    assert other.own is None and other.paper is not None


def test_an_output_that_a_benchmark_skips_is_not_counted():
    item = eval_setup.item("medframeqa_mcq", "vqa_mcq", 0, answer="B", prompt=PROMPT)
    records = [
        eval_setup.record(dataclasses.replace(item, id=text), text) for text in ("Answer: B", "")
    ]
    row = aggregate.summary(
        records, mode="strict", resampling=Resampling(0, 2_000), cards=catalog.TASKS
    )[0]
    assert (row.own, row.own_n, row.value) == (1.0, 1, 0.5)
