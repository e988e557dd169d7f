"""Stated confidences: how replies are read, what is asked, the measures, and the plan."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import eval_setup
import pytest
from eval_setup import ITEMS, write_items
from llm_server import completion, serving, short_waits  # noqa: F401
from test_eval_models import program, run

from medmax_jax import cli
from medmax_jax.endpoints.egress import OutgoingError
from medmax_jax.eval import evaluate
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.models.base import FailedResponse
from medmax_jax.eval.pipeline import verbalized_confidence
from medmax_jax.eval.stats.intervals import Resampling
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.io import journal

QUESTION = task_items.CONFIDENCE_PROMPT


@pytest.mark.parametrize(
    ("reply", "confidence"),
    [
        ("85", 0.85),
        ("85%", 0.85),
        ("85 %.", 0.85),
        ("85/100", 0.85),
        ("**85 / 100**", 0.85),
        ("0.85", 0.85),
        (".85", 0.85),
        ("1.0", 1.0),
        ("1", 0.01),
        ("0", 0.0),
        ("100", 1.0),
        ("99.5", 0.995),
        ("0.85 %", 0.0085),
        ("0.85 (85 %)", 0.85),
        ("Confidence: 85", 0.85),
        ("I am 95% sure.", 0.95),
        ("<answer>85</answer>", 0.85),
        ("<think>Maybe 50, or 60.</think>85", 0.85),
        ("<think>It may be 50", None),
        ("", None),
        ("very confident", None),
        ("85-90", None),
        ("between 80 and 90", None),
        ("85 of 90", None),
        ("-5", None),
        ("101", None),
        ("8,5", None),
        ("5,5", None),
        ("3/4", None),
        ("85/10", None),
        ("> 90", None),
        ("85, as in T2", None),
        ("1e2", None),
        ("00085", None),
        ("٨٥", None),
    ],
)
def test_a_reply_is_one_number_or_unparsed(reply, confidence):
    assert verbalized_confidence.parse_confidence(reply) == confidence


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("sft", "Is it a CT?\nAnswer: Yes.\n\n"),
        ("chat", "Is it a CT?\nAnswer with yes or no only.\nAnswer: Yes.\n\n"),
        (
            "chameleon",
            "Answer the question based on this image and respond 'yes' or 'no'.\n"
            "Question: Is it a CT?\nAnswer: Yes.\n\n",
        ),
    ],
)
def test_the_request_repeats_the_question_and_the_answer(prompt, text):
    item = eval_setup.item("x", "vqa_closed", 0, prompt="Is it a CT?", answer="no")
    request = verbalized_confidence.make_request(item, "Yes.", Path("f"), "paper", prompt)
    assert request.parts == (Path("f/0.png"), text + QUESTION)
    assert (request.mode, request.max_tokens, request.id) == ("text", 16, item.id)
    # the image is last, where the row places it so: the answer follows it
    assert task_items.confidence_parts(("What?", Path("0.png")), "CT") == (
        "What?",
        Path("0.png"),
        f"Answer: CT\n\n{QUESTION}",
    )


class Stating:
    """Answers yes, and states the confidence of each item; counts the questions of both kinds."""

    def __init__(self, stated, stop_after=10_000):
        self.stated, self.stop_after = stated, stop_after
        self.answered, self.asked = [], []

    def generate(self, requests):
        return [segments for _, segments in self.stream(requests)]

    def stream(self, requests):
        for index, request in enumerate(requests):
            if QUESTION not in request.parts[-1]:
                self.answered.append(request.id)
                yield index, ["Yes."]
                continue
            if len(self.asked) == self.stop_after:
                raise cli.Interrupted("stopped")
            self.asked.append(request.id)
            reply = self.stated(int(request.id[1:]))
            yield index, reply if isinstance(reply, FailedResponse) else [reply]


class Scoring(Stating):
    def score_options(self, requests, options):
        return [[-0.1, -3.0] for _ in requests]


def scripted(n):
    """90 for the first half, 60 for the second one; the last three are no number."""
    return ("90" if n < ITEMS / 2 else "60 %") if n < ITEMS - 3 else "high"


SETTINGS = dict(probes="", baselines="", resamples=2_000, progress=lambda line: None)


def measured(summary):
    return {row["metric"]: row for row in summary["verbalized"]["rows"]}


def test_known_confidences_give_the_measures_computed_by_hand(tmp_path):
    items, model = write_items(tmp_path / "data"), Scoring(scripted)
    result = evaluate(model, items, tmp_path / "out", verbalized_confidence=True, **SETTINGS)
    plain = evaluate(Stating(scripted), items, tmp_path / "plain", options=False, **SETTINGS)
    assert result["scores"] == plain["scores"] and plain["verbalized"] is None
    assert len(model.answered) == len(model.asked) == ITEMS
    verbalized, rows = result["verbalized"], measured(result)
    assert (verbalized["n_unparsed"], verbalized["left_out"], verbalized["reason"]) == (3, 0, "")
    # 12 answers with 0.9, 8 of them right; 9 with 0.6, 6 of them right: two bins
    by_hand = dict(
        accuracy=14 / 21,
        confidence=(12 * 0.9 + 9 * 0.6) / 21,
        ece=(12 * abs(0.9 - 8 / 12) + 9 * abs(0.6 - 6 / 9)) / 21,
        binary_brier=(8 * 0.1**2 + 4 * 0.9**2 + 6 * 0.4**2 + 3 * 0.6**2) / 21,
        risk_coverage_area=1 / 3,
        accuracy_at_80=2 / 3,
    )
    assert {name: row["value"] for name, row in rows.items()} == pytest.approx(by_hand)
    assert all(row["ci_low"] < row["value"] < row["ci_high"] for row in rows.values())
    assert all((row["n"], row["groups"]) == (21, 11) for row in rows.values())
    bins = verbalized["bins"]["vqa_rad_closed"]
    assert [(b["confidence"], b["accuracy"], b["n"]) for b in bins] == [
        (pytest.approx(0.6), pytest.approx(6 / 9), 9),
        (pytest.approx(0.9), pytest.approx(8 / 12), 12),
    ]
    likely = 1 / (1 + 2.718281828459045 ** (0.1 - 3.0))  # of yes; it is right 14 times of 21
    ece, brier = verbalized["paired"]
    assert (ece["metric"], brier["metric"], ece["n"]) == ("ece", "binary_brier", 21)
    assert ece["likelihoods"] == pytest.approx(likely - 14 / 21)
    assert ece["verbalized"] == pytest.approx(by_hand["ece"])
    assert ece["diff"] == pytest.approx(ece["verbalized"] - ece["likelihoods"])
    assert brier["likelihoods"] == pytest.approx((14 * (1 - likely) ** 2 + 7 * likely**2) / 21)
    assert brier["diff"] == pytest.approx(by_hand["binary_brier"] - brier["likelihoods"])
    assert all(row["ci_low"] < row["diff"] < row["ci_high"] for row in (ece, brier))
    json.dumps(verbalized, allow_nan=False)
    page = (tmp_path / "out" / "report.html").read_text()
    section = page[page.index("Stated confidence, and calibration") :]
    assert "<b>vqa_rad_closed</b>21 answers in 2 bins of 9 to 12" in section
    assert "Replies without one number: 3. Items that were not asked: 0." in section
    assert "verbalized minus likelihoods" in section and "binary_brier" in section


def test_an_interrupted_stage_resumes_without_repeated_requests(tmp_path):
    items, out = write_items(tmp_path / "data"), tmp_path / "out"
    settings = SETTINGS | dict(options=False, verbalized_confidence=True, window=8)
    first, second = Stating(scripted, stop_after=20), Stating(scripted)
    with pytest.raises(cli.Interrupted):
        evaluate(first, items, out, **settings)
    path = out / "confidence.jsonl"
    kept = [row["id"] for row in journal.read_jsonl(path)]
    assert len(kept) == 16 and not (out / "summary.json").exists()
    with open(path, "a") as file:
        file.write('{"id": "q2')  # what a crash leaves of a line
    evaluate(second, items, out, **settings)
    assert second.answered == [] and len(second.asked) == ITEMS - 16
    rows = journal.read_jsonl(path)
    assert sorted(kept + second.asked) == sorted(row["id"] for row in rows)
    assert {row["answer"] for row in rows} == {"Yes."} and len(rows) == ITEMS
    changed = [json.loads(line) | {"answer": "No."} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(EvalError, match="item q0 or its answer differs from what the confidence"):
        evaluate(Stating(scripted), items, out, **settings)


@pytest.mark.slow
def test_the_shipped_model_is_asked_about_each_answer(tmp_path):
    counts = dict.fromkeys(task_items.FAMILIES, 0) | dict(vqa_closed=3, vqa_mcq=3)
    arguments = SETTINGS | dict(options=False, verbalized_confidence=True, counts=counts)
    result = evaluate("native:medmax_jax/tiny", "sample", tmp_path / "out", **arguments)
    rows = journal.read_jsonl(tmp_path / "out" / "confidence.jsonl")
    assert len(rows) + result["verbalized"]["left_out"] == 6 and len(rows) > 0
    assert all(row["text"] for row in rows)


@pytest.mark.slow
def test_a_killed_stage_repeats_only_requests_in_flight(tmp_path):
    """SIGKILL of the program after the answers, while a server counts its requests."""
    items, out = write_items(tmp_path / "data"), tmp_path / "out"

    def behave(request, n):
        if QUESTION not in json.dumps(request).replace("\\n", "\n"):
            return completion("yes")
        time.sleep(0.05)
        return completion("70")

    with serving(behave) as llm:
        flags = ["--config.service.concurrency=2", "--config.verbalized_confidence"]
        given = program(items, out, f"endpoint:m@{llm.url}", *flags)
        process = subprocess.Popen(
            **given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        while len(llm.requests) < ITEMS + 9 and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (out / "summary.json").exists()
        done = subprocess.run(**given, capture_output=True)
        assert done.returncode == cli.DONE, done.stderr
        assert 2 * ITEMS <= len(llm.requests) <= 2 * ITEMS + 2
    ids = [row["id"] for row in journal.read_jsonl(out / "confidence.jsonl")]
    assert sorted(ids) == sorted(f"q{n}" for n in range(ITEMS))


def test_an_endpoint_receives_the_image_the_question_and_its_answer(tmp_path, capsys):
    items, out = write_items(tmp_path / "data", 6), tmp_path / "out"

    def behave(request, n):
        text = request["messages"][0]["content"][1]["text"]
        if QUESTION not in text:
            return completion("<think>Dark.</think>No, it is not.")
        return 400 if "number 2?" in text else completion("80")

    with serving(behave) as llm:
        plan = dict(price_in=2.0, price_out=2.0, verbalized_confidence=True)
        run(items, out, f"endpoint:m@{llm.url}", dry_run=True, **plan)
        planned = capsys.readouterr().out
        assert "plan: confidence in answers: 6 requests in addition" in planned
        run(items, out, f"endpoint:m@{llm.url}", dry_run=True, shard="0/2", **plan)
        assert "confidence in answers" not in capsys.readouterr().out  # the merging run asks
        with pytest.raises(ValueError, match="6 of config.verbalized_confidence cost about"):
            run(items, out, f"endpoint:m@{llm.url}", **plan, max_usd=1e-9)
        assert llm.connections == 0
        summary = run(items, out, f"endpoint:m@{llm.url}", **plan)
        assert len(llm.requests) == 12
        capsys.readouterr()
        run(items, out, f"endpoint:m@{llm.url}", **plan)
        after = capsys.readouterr().out
        assert len(llm.requests) == 12 and "confidence in answers" not in after
    contents = [request["messages"][0]["content"] for request in llm.requests[:6]]
    images = {text["text"]: image for image, text in contents}
    for request in llm.requests[6:]:
        image, text = request["messages"][0]["content"]
        question = text["text"].partition("\n")[0]
        assert image == images[question] and request["max_tokens"] == 16
        assert text["text"] == f"{question}\nAnswer: No, it is not.\n\n{QUESTION}"
    usd = float(re.search(r"at most about ([\d.]+) USD", planned)[1])
    assert usd >= summary["spent"]["usd"] > 0 and summary["spent"]["calls"] == 12
    rows = {row["id"]: row for row in journal.read_jsonl(out / "confidence.jsonl")}
    assert "error" in rows["q2"] and summary["verbalized"]["n_unparsed"] == 1
    assert measured(summary)["confidence"]["value"] == pytest.approx(0.8)


def test_credentialed_answers_are_not_sent(tmp_path):
    """The answers exist already, so the only requests left are those of this stage."""
    items = write_items(tmp_path / "data", 4, data_class="credentialed")
    with serving(lambda request, n: completion("yes")) as llm:
        host = llm.url.removeprefix("http://").removesuffix("/v1")
        run(items, tmp_path / "out", f"endpoint:m@{llm.url}", credentialed_hosts=host)
        connections = llm.connections
        with pytest.raises(OutgoingError, match="credentialed"):
            run(items, tmp_path / "out", f"endpoint:m@{llm.url}", verbalized_confidence=True)
        assert (len(llm.requests), llm.connections) == (4, connections)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("baseline", "n/a: a baseline has no confidence"),
        ("predictions", "n/a: the answers are recorded, so the model cannot be asked about them"),
    ],
)
def test_models_that_cannot_be_asked_have_the_reason(tmp_path, capsys, kind, reason):
    items, file = write_items(tmp_path / "data", 4), tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(dict(id=f"q{n}", text="yes")) + "\n" for n in range(4)))
    where = file if kind == "predictions" else "constant"
    summary = run(items, tmp_path / "out", f"{kind}:{where}", verbalized_confidence=True)
    assert summary["verbalized"] == dict(reason=reason, rows=[])
    assert f"Not available: {reason}" in (tmp_path / "out" / "report.html").read_text()
    assert "confidence in answers" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "confidence.jsonl").exists()


def test_answers_that_are_missing_and_replies_that_are_unparsed_are_counted():
    lines = [dict(id=f"q{n}", task="x", group="g", text="high") for n in range(3)]
    options = dict(n_items=5, reason="", resampling=Resampling(0, 2_000))
    assert verbalized_confidence.summary(lines, {}, **options) == dict(
        reason="none of the 3 replies states one number from 0 to 100",
        rows=[],
        left_out=2,
        n_unparsed=3,
    )
    empty = verbalized_confidence.summary([], {}, **options)
    assert empty["reason"] == "no closed or multiple choice item has an answer"
    assert verbalized_confidence.unsupported_reason("python", type("M", (), {"modes": ("image",)}))
    record = eval_setup.record(eval_setup.item("x", "vqa_closed", 0), "<think>It may be")
    assert verbalized_confidence.answer_of(record) == ""
