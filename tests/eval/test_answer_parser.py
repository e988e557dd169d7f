"""Parsing of options and of yes and no from answers: reviewed answers, and properties."""

import itertools
import json
from pathlib import Path

import eval_setup
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks import answer_readers
from medmax_jax.data.instruct import replies
from medmax_jax.endpoints import reasoning
from medmax_jax.eval.metrics import llm_judge, per_record, release, strict
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.pipeline import judging
from medmax_jax.eval.tasks import probes

QUESTIONS = json.loads((answer_readers.ANSWERS / "questions.json").read_text("utf-8"))
ANSWERS = answer_readers.load_answers()
# "A thickened gallbladder wall and a stone in its neck": two findings, one in an option's words.
MISREAD = 1

NAMES = ["glioma", "lung abscess", "cyst", "infarct", "mitral stenosis"]
LETTERS = "ABCDE"
# {x}: an option, by its letter or by its text, that the answer denies.
DENIALS = [
    "Not {x}",
    "It is not {x}.",
    "It isn't {x}.",
    "Definitely not {x}!",
    "This is not {x}",
    "It cannot be {x}.",
    "The answer is not {x}.",
    "The correct answer is not {x}",
    "The answer isn't {x}",
    "The answer cannot be {x}.",
    "I don't think it is {x}.",
    "I do not think the answer is {x}.",
    "I would not choose {x}.",
    "I wouldn't say {x}",
    "{x} is incorrect.",
    "{x} is wrong",
    "{x} is not correct.",
    "{x} isn't right.",
    "{x} is clearly wrong.",
    "{x} is not the correct answer.",
    "{x} is unlikely.",
    "{x} is the least likely.",
    "{x} can be ruled out.",
    "{x} is excluded",
    "{x} can be excluded.",
    "{x} does not fit.",
    "{x} doesn't match the image.",
    "{x}: incorrect",
    "{x}: no.",
    "{x} - wrong",
    "I ruled out {x}.",
    "Excluding {x}.",
    "Anything except {x}",
    "Everything but {x}.",
    "Any option other than {x}.",
    "There is no sign of {x}.",
    "No evidence of {x} is seen.",
    "The incorrect option is {x}.",
    "Wrong answer: {x}",
    "The answer is anything but {x}.",
    "Neither {x} nor anything else",
    "None of them, not even {x}.",
    "It is never {x}.",
    "\\boxed{{not {x}}}",
    "<answer>not {x}</answer>",
    "**Not {x}**",
    "{x} is false",
    "It is unlikely to be {x}",
    "答案不是{x}",
    "不是{x}",
    "No es {x}.",
    "Es ist nicht {x}.",
    "La réponse n'est pas {x}.",
    "A resposta não é {x}.",
    "La risposta non è {x}.",
]
STATEMENTS = ["{x}", "It is {x}.", "The answer is {x}.", "Answer: {x}", "<answer>{x}</answer>",
              "\\boxed{{{x}}}", "{x} is the correct answer.", "I choose {x}.",
              "**{x}**", "The correct answer is **{x}**."]  # fmt: skip
BEFORE = ["", "The image is bright. ", "Let me think.\n", "<think>It is {y}.</think>", "- "]
AFTER = ["", " The image is bright.", "\n\nThat is all.", " "]
FRAGMENTS = [
    *LETTERS, *"abi", *NAMES, *"I:().,\n?}{'\"\u0002\u0003", "yes", "no", "not",
    "neither", "nor",
    "or", "and", "answer", "is", "**", "\\boxed{", "<answer>", "</answer>", "<think>", "</think>",
    "wrong", "correct", "if", "A.", "B:", "答案是", "不", "option", "cannot", "image", "would",
    "be", "but", "[[", "]]", "n't",
]  # fmt: skip


def prompt_of(names):
    lines = (f"{letter}: {name}" for letter, name in zip(LETTERS, names, strict=False))
    return "Which is it?\n" + "\n".join(lines)


def read(text, names=NAMES):
    return strict.parse_answer("vqa_mcq", text, prompt_of(names))


def test_answers_are_read_as_labelled_or_not_at_all():
    """The labels are what a reader of the answer understands; tests/answers."""
    wrong, reads = [], []
    for row in ANSWERS:
        reads.append(answer_readers.ours(row["family"], row["question"], row["answer"]))
        if reads[-1] not in (row["states"], None):
            wrong.append(row)
    assert len(wrong) <= MISREAD, wrong
    recorded = json.loads((answer_readers.ANSWERS / "reads.json").read_text("utf-8"))
    changed = [
        (row, was, read)
        for row, was, read in zip(ANSWERS, recorded["ours"], reads, strict=True)
        if read != was
    ]
    assert not changed, "run benchmarks/answer_readers.py --write, and look at what changed"


@pytest.mark.parametrize("part", answer_readers.SETS)
def test_precision_and_recall(part):
    recorded = json.loads((answer_readers.ANSWERS / "reads.json").read_text("utf-8"))
    chosen = [n for n, row in enumerate(ANSWERS) if row["set"] == part]
    rows = [ANSWERS[n] for n in chosen]
    scores = {
        name: answer_readers.score(rows, [reads[n] for n in chosen])
        for name, reads in recorded.items()
    }
    assert scores["ours"]["precision"] >= 0.995 and scores["ours"]["recall"] >= 0.85
    others = [numbers for name, numbers in scores.items() if name != "ours"]
    assert len(others) == 3
    for key in ("precision", "recall"):
        assert scores["ours"][key] > max(numbers[key] for numbers in others)


def test_the_answers_are_many_and_no_two_are_the_same():
    keys = [(row["family"], row["question"], row["answer"]) for row in ANSWERS]
    assert len(keys) >= 1_800 and len(set(keys)) == len(keys)
    assert {row["states"] for row in ANSWERS} >= {*"ABCDEFGHIJ", "yes", "no", None}


def test_a_side_without_a_checkout_has_its_recorded_reads(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["answer_readers.py"])
    answer_readers.main()
    lines = capsys.readouterr().out.splitlines()
    assert "MedEvalKit: no checkout; its recorded reads are used" in lines
    table = json.loads(lines[-1])
    assert table["ours, all, multiple choice"]["precision"] >= 0.995
    assert table["MedEvalKit, all, multiple choice"]["read"] > 1_300


def test_every_list_of_options_is_parsed_except_the_one_without_options():
    for name, prompt in QUESTIONS.items():
        assert bool(text_metrics.options(prompt)) == (name != "unlisted"), name


@pytest.mark.parametrize(
    "prompt, options",
    [
        ("In type A. dissection, which?\nA: CT\nB: MRI", {"A": "CT", "B": "MRI"}),
        ("Which?\nA. E. coli\nB. S. aureus", {"A": "E. coli", "B": "S. aureus"}),
        ("Which? A: E. coli B: S. aureus", {"A": "E. coli", "B": "S. aureus"}),
        ("Which?\na) CT\nb) MRI", {"A": "CT", "B": "MRI"}),
        ("Which?\n(A) CT\n(B) MRI", {"A": "CT", "B": "MRI"}),
        ("Which? (A) CT (B) MRI", {"A": "CT", "B": "MRI"}),
        ("Which?\n- A. CT\n- B. MRI", {"A": "CT", "B": "MRI"}),
        ("Which?\nA：CT\nB：MRI", {"A": "CT", "B": "MRI"}),
        ("A. Look.\nB. Say which:\nA: CT\nB: MRI", {"A": "CT", "B": "MRI"}),
        ("Which?\nA: CT B: MRI\nC: PET D: US", {"A": "CT", "B": "MRI", "C": "PET", "D": "US"}),
        ("Which?\nA: CT\nC: MRI", {}),
        ("Which?\nA: CT", {}),
        ("Which?\nA: \nB: MRI", {}),
        ("Is vitamin A: good?", {}),
        ("", {}),
    ],
)
def test_options_of_a_question(prompt, options):
    assert text_metrics.options(prompt) == options


def test_ten_or_more_options_are_parsed():
    lines = "".join(f"\n{letter}: finding {n}" for n, letter in enumerate("ABCDEFGHIJKL"))
    assert list(text_metrics.options("Which?" + lines)) == list("ABCDEFGHIJKL")
    assert strict.choice("K", "K", "Which?" + lines).value == 1


# Properties.


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.sampled_from(["", " "]))
def test_any_text_is_parsed_without_an_error(fragments, joint):
    text = joint.join(fragments)
    assert read(text) in (*LETTERS, None)
    assert strict.parse_answer("vqa_mcq", text, "") in (*"ABCDEFGHIJ", None)
    assert strict.parse_answer("vqa_closed", text, "Is it a cyst?") in ("yes", "no", None)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
@example("\ud800", "A: \ud800\nB: x")
@example("A" * 50_000, "A: x\nB: y")
@example("<think>" * 5_000, "")
@example("((((" * 5_000, "A: (\nB: )")
def test_any_answer_and_question_are_parsed_without_an_error(text, prompt):
    strict.parse_answer("vqa_mcq", text, prompt)
    strict.parse_answer("vqa_closed", text, prompt)
    reasoning.final_answer(text)


@pytest.mark.parametrize(
    "part", ["A B ", "cyst ", "the answer is cyst ", "我选B", "<answer>B", "not ", "(", "? "]
)
def test_long_repetitions_are_parsed_in_bounded_time(part):
    """The time grew with the square of the length before, to 40 s."""
    text = part * (40_000 // len(part))
    assert read(text) in (None, "A", "B", "C")
    assert strict.parse_answer("vqa_closed", text, "Is there a cyst?") in (None, "yes", "no")


def test_long_answers_are_parsed_from_their_end():
    filler = "The opacity is not a cyst, and if A were right the margin would be sharp. " * 2_000
    assert read(filler + "\nAnswer: B") == "B"
    assert read(filler) is None
    assert strict.parse_answer("vqa_closed", filler + " Answer: no", "") == "no"


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(DENIALS),
    st.integers(0, len(NAMES) - 1),
    st.booleans(),
    st.sampled_from(BEFORE),
    st.sampled_from(AFTER),
)
def test_denied_options_are_never_returned(template, option, by_letter, before, after):
    denied = LETTERS[option] if by_letter else NAMES[option]
    text = before.format(y=denied) + template.format(x=denied) + after
    assert read(text) != LETTERS[option], text


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(DENIALS),
    st.sampled_from(STATEMENTS),
    st.integers(0, len(NAMES) - 1),
    st.integers(0, len(NAMES) - 1),
    st.booleans(),
    st.sampled_from([" ", "\n", ". "]),
)
def test_a_denial_next_to_a_statement(denial, statement, no, yes, by_letter, joint):
    denied = LETTERS[no] if by_letter else NAMES[no]
    stated = LETTERS[yes] if by_letter else NAMES[yes]
    text = denial.format(x=denied) + joint + statement.format(x=stated)
    result = read(text)
    assert result is None or (result == LETTERS[yes] if no != yes else True), text


@pytest.mark.parametrize("statement", STATEMENTS)
@pytest.mark.parametrize("before", BEFORE[:4])
def test_an_option_named_by_its_text_is_parsed_in_any_order(statement, before):
    for names in itertools.permutations(NAMES, 4):
        for name in names:
            text = before.format(y=names[0]) + statement.format(x=name)
            assert read(text, names) == LETTERS[names.index(name)], text


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_stated_letter_is_parsed(statement):
    lines = "".join(f"\n{letter}: finding {n}" for n, letter in enumerate("ABCDEFGHIJ"))
    for letter in "ABCDEFGHIJ":
        assert (
            strict.parse_answer("vqa_mcq", statement.format(x=letter), "Which?" + lines) == letter
        )


@pytest.mark.parametrize("denial", DENIALS)
@pytest.mark.parametrize("value", ["yes", "no"])
def test_denied_yes_or_no_is_never_returned(denial, value):
    text = denial.format(x=value)
    if value == "no" and text.startswith(("No ", "no ", "no:", "no -")):
        return  # "no is wrong" begins as an answer does
    assert strict.parse_answer("vqa_closed", text, "") != value, text


# Scorings.


@pytest.mark.parametrize(
    "text", ["<think>x</think>B", "B.", "The answer is B", "b", "normal", "no"]
)
def test_the_scoring_of_the_release_receives_the_unchanged_text(text):
    assert release.parse_and_judge("vqa_mcq", text, "B", prompt_of(NAMES))[
        "paper"
    ] == release.choice(text, "B")
    assert release.parse_and_judge("vqa_closed", text, "no", "")["paper"] == release.closed(
        text, "no"
    )


THOUGHT = "<think>It may be a CT.</think>"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("A CT.", "A CT."),
        (f"{THOUGHT}\n\nAn MRI.", "An MRI."),
        (f"{THOUGHT}A{THOUGHT}B", "B"),
        ("A CT, or not?</think>B", "B"),
        ("<think>A CT", None),
        (f"{THOUGHT}<think>again", None),
        (THOUGHT, ""),
        ("<THINK >a</ThinK>B", "B"),
        ('<thinking mode="long">a</thinking>B', "B"),
        ("B <reason>since</reason>", "B"),
        ("<reason>a</reason>B<reason>since</reason>", "B"),
        ("<reason>since</reason>", ""),
        ("<think>a</think>B<|im_end|>", "B"),
        ("<thinker>a</thinker>", "<thinker>a</thinker>"),
        ("analysis of the image: a CT", "analysis of the image: a CT"),
        ("", ""),
    ],
)
def test_reasoning_text_is_not_an_answer(text, answer):
    assert reasoning.final_answer(text) == answer


def test_strict_metrics_exclude_reasoning_and_records_keep_it():
    item = eval_setup.item("slake_open", "vqa_open", 0, answer="An MRI.")
    record = eval_setup.record(item, f"{THOUGHT}\nAn MRI.")
    result = per_record.record_scores(record)
    assert result["exact"].value == result["token_f1"].value == 1
    assert judging.judge_case(record).answer == "An MRI."
    assert probes.parsed_answer(record) == "mri"
    assert "it may be a ct" in str(judging.paper_messages(record, ""))  # as released
    chat = eval_setup.item("visual_chat_conversation", "visual_chat", 0, answer="An MRI.")
    assert (
        per_record.record_scores(eval_setup.record(chat, f"{THOUGHT}An MRI."))["rouge_l"].value == 1
    )
    assert per_record.record_scores(eval_setup.record(chat, "<think>An MRI."))["rouge_l"].value == 0


def test_verdicts_of_a_judge_that_reasons():
    right, wrong = '{"case": "t", "correct": true}', '{"case": "t", "correct": false}'
    assert llm_judge.parse_verdict(llm_judge.CORRECT, f"<think>{right}</think>{wrong}", "t") == 0
    assert llm_judge.parse_verdict(llm_judge.CORRECT, f"<think>Perhaps {right}", "t") is None
    assert (
        llm_judge.parse_verdict(llm_judge.CORRECT, f"<think>Perhaps {right}</think>", "t") is None
    )
    assert strict.parse_correctness("<think>Correctness: 1?</think>Correctness: 0").value == 0
    assert strict.parse_correctness("<think>Correctness: 1").value is None
    assert strict.parse_score_pair("<think>\n9 9\n</think>\n\n8 7\nBoth are good.") == (8, 7)
    assert strict.parse_score_pair("<think>8 7") is None
    assert release.parse_judgment("<think>Correctness: 1</think>") is True  # as released


def test_replies_of_a_curator_that_reasons():
    reply = '{"keep": true, "reason": "names a finding"}'
    drop = '{"keep": false, "reason": "vague"}'
    assert replies.read_verdict(f"<think>{drop}</think>\n{reply}")[0] is True
    with pytest.raises(replies.Unparsable, match="ends within its reasoning"):
        replies.read_verdict(f"<think>{reply}")


def test_rouge_l_equals_the_package_rouge_score():
    golden = json.loads((Path(__file__).parents[1] / "parity" / "rouge.json").read_text("utf-8"))
    assert len(golden["pairs"]) > 90
    for pair in golden["pairs"]:
        result = text_metrics.rouge_l(pair["answer"], pair["reference"])
        assert result == pytest.approx(pair["rouge_l"], abs=1e-12), pair
    assert text_metrics.rouge_l("the lung", "the heart") == 0.5
