"""Paper mode equals the scoring of the MedMax release, with its defects; strict mode has none."""

import hashlib
import json
import math
import random
import sys
from pathlib import Path

import eval_setup
import numpy as np
import pytest

from medmax_jax.eval.metrics import aggregate, release, strict

RELEASE = Path(__file__).parents[1] / "release"
sys.path.insert(0, str(RELEASE))

import differences  # noqa: E402
import raw_outputs  # noqa: E402
import scripts  # noqa: E402

EXPECTED = json.loads((RELEASE / "verdicts.json").read_text())
RAW = raw_outputs.rows()


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# Paper mode, held to what the release's own functions said (tests/release/run_release.py).


def test_the_outputs_are_those_that_the_release_judged():
    assert sum(map(len, RAW.values())) >= 5_000
    assert digest(RAW) == EXPECTED["inputs"]


@pytest.mark.parametrize(
    "kind, rule",
    [
        ("closed", release.closed),
        ("mcq", release.choice),
        ("open", lambda raw, _: release.parse_judgment(raw)),
    ],
)
def test_every_verdict_equals_the_release(kind, rule):
    ours = [rule(raw, answer) for answer, raw in RAW[kind]]
    shown = "".join({True: "1", False: "0", None: "-"}[x] for x in ours)
    assert shown == EXPECTED[kind]
    assert {"1", "0"} <= set(shown)  # or nothing is held to anything
    mean, error = release.accuracy([x for x in ours if x is not None])
    theirs = EXPECTED["tasks"][kind]
    np.testing.assert_allclose([mean, error], [theirs["accuracy"], theirs["std_err"]], rtol=1e-12)


def test_every_comparison_equals_the_release():
    stopped = 0
    for (_, reply), theirs in zip(RAW["relative"], EXPECTED["relative"], strict=True):
        if theirs is None:
            stopped += 1
            with pytest.raises(release.PaperError):
                release.relative([reply])
            continue
        result = release.relative([reply])
        ours = [result["gpt4_score"], result["pred_score"], result["pred_relative_score"]]
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, err_msg=reply)
    assert 100 < stopped < 900


def test_totals_equal_the_release():
    theirs = EXPECTED["tasks"]
    good = [r for (_, r), v in zip(RAW["relative"], EXPECTED["relative"], strict=True) if v]
    good = [r for r in good if "nan" not in r and "inf" not in r][: len(scripts.OUTPUTS)]
    pictured = [out for out in scripts.OUTPUTS if release.text_and_image(out)[1]]
    result = release.multimodal(good, scripts.COSINES[: len(pictured)])
    assert result == pytest.approx(theirs["mm_out"], rel=1e-12)
    chat = release.visual_chat([(kind, row["domain"], reply) for kind, row, reply in scripts.CHAT])
    assert list(chat) == list(theirs["visual_chat"])
    for name, part in chat.items():
        assert part == pytest.approx(theirs["visual_chat"][name], rel=1e-12)
    for name, k in (("pmc_oa", 1.0), ("quilt", 0.5), ("report", 0.25)):
        cosines = [k * c for c in scripts.COSINES]
        np.testing.assert_allclose(
            release.accuracy(cosines), list(theirs["image_captioning"][name].values()), rtol=1e-12
        )
        np.testing.assert_allclose(
            release.generation(cosines), list(theirs["image_generation"][name].values()), rtol=1e-12
        )


def test_the_judge_messages_equal_the_release():
    messages = [
        release.open_messages(str(n), answer, "Said") for n, (answer, _) in enumerate(RAW["open"])
    ]
    assert digest(messages) == EXPECTED["messages"]["open"]
    messages = [
        [release.multimodal_messages("Explain.", "It is.", release.text_and_image(out)[0])]
        for out in scripts.OUTPUTS
    ]
    assert digest(messages) == EXPECTED["messages"]["mm_out"]
    record = dict(prompt="What?", text="A CT.", answer_id="answer-id", model_id="x", metadata={})
    messages = [
        [release.chat_messages(row, "What?\n<image>", {"question_id": n} | record)]
        for n, (_, row, _) in enumerate(scripts.CHAT)
    ]
    assert digest(messages) == EXPECTED["messages"]["visual_chat"]


# The defects that concern scoring, each with what paper says and what strict says.


@pytest.mark.parametrize(
    "raw",
    "Normal None Not Unknown noted Diagnosis abnormal now nodule".split(),
)
def test_words_that_contain_no_are_a_no_in_the_paper_only(raw):
    assert release.closed(raw, "no") and strict.closed(raw, "no").status == strict.UNPARSED


def test_closed_answers():
    assert release.closed("eyes", "yes") and strict.closed("eyes", "yes").status == strict.UNPARSED
    assert not release.closed("Yes", "Yes") and strict.closed("Yes", "Yes").value == 1
    assert not release.closed("No, yes", "no") and strict.closed("no or yes", "no").value is None
    for raw, expected in [
        ("Yes, there is no fracture", 1),
        ("no\nyes", None),
        ("I have no idea", None),
        ("neither yes nor no", None),
        ("not yes", None),
    ]:
        assert strict.closed(raw, "yes").value == expected, raw
    with pytest.raises(strict.StrictError, match="'perhaps' is not an answer to a vqa_closed"):
        strict.closed("yes", "perhaps")


PROMPT = "Where is it?\nA: left lung\nB: left lung base\nC: heart"


@pytest.mark.parametrize(
    "raw, of_paper, of_strict",
    [
        ("b", True, 1),
        (" B\n", True, 1),
        ("B.", False, 1),
        ("(B)", False, 1),
        ("The answer is B", False, 1),
        ("left lung base", False, 1),
        ("the left lung", False, 0),
        ("heart and left lung", False, None),
        ("A or B", False, None),
        ("D", False, None),
        ("The", False, None),
        ("", False, None),
    ],
)
def test_choices(raw, of_paper, of_strict):
    assert release.choice(raw, "B") == of_paper
    assert strict.choice(raw, "B", PROMPT).value == of_strict


@pytest.mark.parametrize(
    "reply, of_paper, of_strict",
    [
        ("Correctness: 1", True, 1),
        ("Correctness: 0\n", False, 0),
        ("**Correctness:** 1", None, 1),
        ("Correctness:1", None, 1),
        ("correctness: 1", None, 1),
        ("1", None, None),
        ("Correctness: 10", True, None),
        ("Correctness: 0.5", False, None),
        ("Correctness: 1? No. Correctness: 0", True, 0),
        ("I'm sorry, I cannot help.", None, None),
        ("", None, None),
    ],
)
def test_replies_on_open_answers(reply, of_paper, of_strict):
    assert release.parse_judgment(reply) is of_paper
    assert strict.parse_correctness(reply).value == of_strict


@pytest.mark.parametrize(
    "reply, read",
    [
        ("8 7\nBoth are good.", (8, 7)),
        ("8, 7", (8, 7)),
        ("8  7", (8, 7)),
        ("**8 7**", (8, 7)),
        ("Assistant 1: 8 Assistant 2: 7", (8, 7)),
        ("Assistant 1: 8", None),
        ("8/10 7/10", None),
        ("0 5", None),
        ("nan 5", None),
        ("I cannot rate these.", None),
        ("", None),
    ],
)
def test_replies_on_comparisons(reply, read):
    assert strict.parse_score_pair(reply) == read
    if reply.startswith("8 7"):
        assert release.pair(reply) == read
    elif reply != "nan 5":
        with pytest.raises(release.PaperError):
            release.relative([reply])


def test_dropping_wrong_answers_raises_the_score_of_the_paper():
    """5 of 40 wrong answers have unparsed verdicts: 63.2 % in the paper, 60 to 65 % in truth."""
    replies = ["Correctness: 1"] * 60 + ["Correctness: 0"] * 35 + ["Wrong."] * 5
    kept = [x for reply in replies if (x := release.parse_judgment(reply)) is not None]
    assert release.accuracy(kept)[0] == pytest.approx(0.632, abs=5e-4)
    result = strict.total([strict.parse_correctness(reply) for reply in replies])
    assert (result.n, result.n_unscored, result.value, result.best) == (100, 5, 0.60, 0.65)
    assert result.scored_only == pytest.approx(0.632, abs=5e-4)


def test_one_low_reference_lifts_the_mean_of_ratios():
    pairs = [(8.0, 8.0)] * 9 + [(1.0, 10.0)]
    result = strict.comparison(pairs)
    assert release.relative([f"{a:g} {b:g}" for a, b in pairs])["pred_relative_score"] == 190
    assert result["mean_of_ratios"] == 1.9 and result["ratio_of_means"] == pytest.approx(82 / 73)
    assert (result["win"], result["tie"], result["loss"]) == (1, 9, 0)
    open_ = strict.comparison([(8.0, 8.0), None])
    assert (open_["n"], open_["n_unscored"], open_["ratio_of_means"]) == (2, 1, 1)
    assert (open_["worst"], open_["best"]) == (9 / 18, 18 / 9)
    assert strict.comparison([None])["mean_of_ratios"] is None
    with pytest.raises(strict.StrictError, match="must be between 1 and 10"):
        strict.comparison([(0.0, 5.0)])


def test_one_good_image_wins_in_the_paper():
    once, always = [[0.9]] + [[]] * 9, [[0.8]] * 10
    scores = [
        release.multimodal(["8 8"], [some[0] for some in side if some])["image_score"]
        for side in (once, always)
    ]
    assert scores[0] > scores[1]
    once_score, always_score = (
        strict.image_similarity_summary(side, missing_score=0.1) for side in (once, always)
    )
    assert (once_score["coverage"], always_score["coverage"]) == (0.1, 1.0)
    assert once_score["with_missing"] == pytest.approx(0.18) and always_score[
        "with_missing"
    ] == pytest.approx(0.8)
    assert strict.image_similarity_summary([[0.2, 0.7]], missing_score=0)["best_of_all"] == 0.7
    assert strict.image_similarity_summary([[], []], missing_score=0)["first"] is None
    assert release.multimodal(["8 8"], [])["image_score"] == 0


def test_generation_takes_the_first_rows():
    assert release.generation([1.0] * 100 + [0.0] * 50)[0] == 1
    with pytest.raises(release.PaperError, match="99 rows"):
        release.generation([1.0] * 99)


def test_standard_errors_of_few_scores():
    assert math.isnan(release.accuracy([])[0]) and math.isnan(release.accuracy([1])[1])


def test_probmed_pairs():
    """A model that always answers yes: half right in the paper, no correct pair."""
    answers = ["yes", "no"] * 6
    image_names = [f"p{n // 4}" for n in range(12)]
    kinds = ["modality", "modality", "entity", "entity"] * 3
    always = [strict.closed("yes", answer) for answer in answers]
    assert release.accuracy([release.closed("yes", a) for a in answers])[0] == 0.5
    result = strict.grouped_accuracy(always, image_names, kinds)
    assert {name: part.value for name, part in result.items()} == dict(
        modality=0, entity=0, overall=0
    )
    assert result["overall"].n == 6 and result["modality"].n == 3
    right = [strict.closed(answer, answer) for answer in answers]
    assert strict.grouped_accuracy(right, image_names, kinds)["overall"].value == 1
    right[0] = strict.closed("maybe", "yes")
    half = strict.grouped_accuracy(right, image_names, kinds)["overall"]
    assert (half.value, half.best, half.n_unparsed) == (5 / 6, 1, 1)
    right[1] = strict.closed("yes", "no")  # wrong: now the pair cannot be right
    lost = strict.grouped_accuracy(right, image_names, kinds)["overall"]
    assert (lost.value, lost.best, lost.n_unparsed) == (5 / 6, 5 / 6, 0)


def test_bounds_hold_whatever_the_missing_verdicts_were():
    rng = random.Random(0)
    for _ in range(200):
        truth = [rng.random() < 0.6 for _ in range(30)]
        is_scored = [rng.random() < 0.8 for _ in truth]
        result = strict.total(
            [
                strict.scored(t) if k else (strict.unparsed if t else strict.unscored)("lost")
                for t, k in zip(truth, is_scored, strict=True)
            ]
        )
        assert result.value <= sum(truth) / 30 + 1e-12 and sum(truth) / 30 <= result.best + 1e-12
        assert result.n_unparsed + result.n_unscored == 30 - sum(is_scored)
    with pytest.raises(strict.StrictError, match="item_scores is empty"):
        strict.total([])


def test_the_accuracy_of_the_suite_parses_option_texts():
    item = eval_setup.item("x", "vqa_mcq", 0, prompt=PROMPT, answer="B")
    record = eval_setup.record(item, "Left lung base.")
    assert aggregate.record_values(record) == dict(accuracy=1, unparsed=0)


def test_the_documentation_has_the_table_of_differences():
    text = (RELEASE.parents[1] / "docs" / "explanation" / "scoring.md").read_text()
    assert differences.table() in text
    result = differences.relative()
    assert f"{result['paper']} of the {result['n']:,} comparisons" in text
    assert f"{result['strict']} by strict" in text
