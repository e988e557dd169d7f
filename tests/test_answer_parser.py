"""Which option, and which of yes and no, an answer states: reviewed answers, and properties."""

import itertools

import answer_cases
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eval import paper, reading, score_text, strict
from medmax_jax.io import reasoning

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
FRAGMENTS = [*LETTERS, *"abi", *NAMES, "yes", "no", "not", "neither", "nor", "or", "and", "answer", ":",
             "is", "(", ")", ".", ",", "\n", "**", "\\boxed{", "}", "<answer>", "</answer>", "<think>",
             "</think>", "wrong", "correct", "if", "?", "A.", "B:", "答案是", "不", "I", "option", "cannot",
             "image", "would", "be", "but", "\u0002", "\u0003", "[[", "]]", "{", "'", '"', "n't"]  # fmt: skip


def prompt_of(names):
    lines = (f"{letter}: {name}" for letter, name in zip(LETTERS, names, strict=False))
    return "Which is it?\n" + "\n".join(lines)


def read(text, names=NAMES):
    return strict.read("vqa_mcq", text, prompt_of(names))


@pytest.mark.parametrize("question, text, letter", answer_cases.CHOICES)
def test_choices(question, text, letter):
    assert strict.read("vqa_mcq", text, answer_cases.QUESTIONS[question]) == letter


@pytest.mark.parametrize("question, text, value", answer_cases.YES_NO)
def test_yes_or_no(question, text, value):
    assert strict.read("vqa_closed", text, question) == value


def test_the_table_is_large_and_has_no_answer_twice():
    for cases in (answer_cases.CHOICES, answer_cases.YES_NO):
        keys = [case[:2] for case in cases]
        assert len(keys) >= 150 and len(set(keys)) == len(keys)


def test_every_list_of_options_is_read_but_the_one_that_is_none():
    for name, prompt in answer_cases.QUESTIONS.items():
        assert bool(score_text.options(prompt)) == (name != "unlisted"), name


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
    assert score_text.options(prompt) == options


def test_ten_options_and_more_are_read():
    lines = "".join(f"\n{letter}: finding {n}" for n, letter in enumerate("ABCDEFGHIJKL"))
    assert list(score_text.options("Which?" + lines)) == list("ABCDEFGHIJKL")
    assert strict.choice("K", "K", "Which?" + lines).value == 1


# Properties.


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.sampled_from(["", " "]))
def test_any_text_is_read_or_not(fragments, joint):
    text = joint.join(fragments)
    assert read(text) in (*LETTERS, None)
    assert strict.read("vqa_mcq", text, "") in (*"ABCDEFGHIJ", None)
    assert strict.read("vqa_closed", text, "Is it a cyst?") in ("yes", "no", None)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
@example("\ud800", "A: \ud800\nB: x")
@example("A" * 50_000, "A: x\nB: y")
@example("<think>" * 5_000, "")
@example("((((" * 5_000, "A: (\nB: )")
def test_any_text_of_answer_and_question(text, prompt):
    strict.read("vqa_mcq", text, prompt)
    strict.read("vqa_closed", text, prompt)
    reasoning.final_answer(text)


def test_long_answers_are_read_by_their_end_and_in_time():
    filler = "The opacity is not a cyst, and if A were right the margin would be sharp. " * 2_000
    assert read(filler + "\nAnswer: B") == "B"
    assert read(filler) is None
    assert strict.read("vqa_closed", filler + " Answer: no", "") == "no"


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(DENIALS),
    st.integers(0, len(NAMES) - 1),
    st.booleans(),
    st.sampled_from(BEFORE),
    st.sampled_from(AFTER),
)
def test_what_an_answer_denies_is_never_read(template, option, by_letter, before, after):
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
    found = read(text)
    assert found is None or (found == LETTERS[yes] if no != yes else True), text


@pytest.mark.parametrize("statement", STATEMENTS)
@pytest.mark.parametrize("before", BEFORE[:4])
def test_the_option_named_in_words_is_read_in_any_order(statement, before):
    for names in itertools.permutations(NAMES, 4):
        for name in names:
            text = before.format(y=names[0]) + statement.format(x=name)
            assert read(text, names) == LETTERS[names.index(name)], text


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_stated_letter_is_read(statement):
    lines = "".join(f"\n{letter}: finding {n}" for n, letter in enumerate("ABCDEFGHIJ"))
    for letter in "ABCDEFGHIJ":
        assert strict.read("vqa_mcq", statement.format(x=letter), "Which?" + lines) == letter


@pytest.mark.parametrize("denial", DENIALS)
@pytest.mark.parametrize("value", ["yes", "no"])
def test_denied_yes_or_no_is_never_read(denial, value):
    text = denial.format(x=value)
    if value == "no" and text.startswith(("No ", "no ", "no:", "no -")):
        return  # "no is wrong" begins as an answer does
    assert strict.read("vqa_closed", text, "") != value, text


# Scorings.


@pytest.mark.parametrize("text", ["<think>x</think>B", "B.", "The answer is B", "b", "normal", "no"])
def test_the_scoring_of_the_release_reads_the_text_as_it_came(text):
    assert reading.read("vqa_mcq", text, "B", prompt_of(NAMES))["paper"] == paper.choice(text, "B")
    assert reading.read("vqa_closed", text, "no", "")["paper"] == paper.closed(text, "no")
