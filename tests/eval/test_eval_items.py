"""Rows of evaluation files: read, or refused by name before the first request."""

import json
import pathlib

import pytest

from medmax_jax.eval.config import EvalError
from medmax_jax.eval.metrics import text
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.eval.tasks import probes, selection
from medmax_jax.eval.tasks.items import TaskError
from medmax_jax.io.text_files import MAX_LINE_BYTES

F = pathlib.Path("f")
CLOSED = dict(task_name="mine", question_type="closed", prompt="Did it grow?", answer="yes",
              image_path="a.png")  # fmt: skip
MCQ = CLOSED | dict(question_type="mcq", prompt="Which?\nA: CT\nB: MRI", answer="B")


def only(row, **changes):
    (item,) = task_items.from_rows([row | changes])
    return item


# Images and their marks.


@pytest.mark.parametrize(
    "prompt, parts",
    [
        ("Did it grow?", ("a", "b", "Did it grow?")),
        ("<image> <image> Did it grow?", ("a", "b", "Did it grow?")),
        ("<image><image>\nDid it grow?", ("a", "b", "Did it grow?")),
        ("Is <image> older than <image>?", ("Is", "a", "older than", "b", "?")),
        ("<image> is first, <image> second.", ("a", "is first,", "b", "second.")),
        ("Which is it? <image> <image>", ("Which is it?", "a", "b")),
        ("Is <image 2> older than <image 1>?", ("Is", "b", "older than", "a", "?")),
        ("<image_1> or <image_2>?", ("a", "or", "b", "?")),
    ],
)
@pytest.mark.parametrize("field", ["image_path", "images"])
def test_several_images_are_placed_at_their_marks(prompt, parts, field):
    row = {k: v for k, v in CLOSED.items() if k != "image_path"}
    item = only(row, prompt=prompt, **{field: ["a.png", "b.png"]})
    paths = tuple(F / f"{p}.png" if p in ("a", "b") else p for p in parts)
    assert task_items.prompt_parts(item, F) == paths
    for style in ("default", "chameleon"):
        result = task_items.prompt_parts(item, F, style)
        assert [p for p in result if isinstance(p, pathlib.Path)] == [F / n for n in item.images]
        assert not any("<image" in p for p in result if isinstance(p, str))


def test_a_single_image_has_one_mark_or_none():
    item = only(CLOSED, prompt="<image>\nDid it grow?")
    assert (item.prompt, item.images, item.further_images) == ("Did it grow?", ("a.png",), ())
    assert task_items.prompt_parts(item, F) == (F / "a.png", "Did it grow?")
    assert only(CLOSED, image_path=["a.png"]) == only(CLOSED)
    assert "further_images" not in item.item_fields()  # earlier workdirs stay valid
    two = only(CLOSED, image_path=["a.png", "b.png"])
    assert two.item_fields()["further_images"] == ["b.png"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompt="<image><image> Grown?"), "2 image marks for 1 images"),
        (dict(prompt="<image> Grown?", image_path=["a.png", "b.png"]), "1 image marks for 2"),
        (dict(prompt="<image 1> <image 1>", image_path=["a.png", "b.png"]), "numbered 1 to 2"),
        (dict(prompt="<image> <image 2>", image_path=["a.png", "b.png"]), "numbered 1 to 2"),
        (dict(image_path={"a": 1}), "image_path is of type dict; expected a path, or a list"),
        (dict(image_path=[7]), "image_path: 7 leads out"),
        (dict(image_path=7), "image_path is of type int"),
        (dict(image_path=[]), "image_path is missing; a vqa_closed row requires an image"),
        (dict(images=["b.png"]), "image_path and images differ"),
        (dict(task_name="image_captioning", image_path=["a.png", "b.png"]), "accepts one"),
        (dict(task_name="image_generation", prompt="Draw <image>"), "1 image marks for 0"),
        (dict(prompt=None), "prompt is of type NoneType; expected a string"),
        (dict(prompt=["a"]), "prompt is of type list"),
        (dict(answer=None), "answer is of type NoneType"),
        (dict(answer={"a": 1}), "answer is of type dict"),
        (dict(task_name=["a"]), "task_name is of type list"),
        (dict(question_type={}), "question_type is of type dict"),
        (dict(slices=[1]), "slices is of type list"),
        (dict(answer="left"), "answer 'left' cannot be read as yes or no"),
    ],
)
def test_invalid_rows_are_refused(change, message):
    with pytest.raises(TaskError, match="^row 0: ") as caught:
        only(CLOSED, **change)
    assert message in str(caught.value)
    with pytest.raises(TaskError, match="row 0: a JSON list; expected an object"):
        task_items.from_rows([[1]])


def test_probes_of_several_images():
    rows = [
        CLOSED | dict(id=str(n), group=str(n), image_path=[f"{n}a.png", f"{n}b.png"][: 1 + n % 2])
        for n in range(6)
    ]
    items = task_items.from_rows(rows)
    for probed in (probes.swapped(items, seed=0), probes.shuffled(items, seed=0)):
        for old, new in zip(items, probed, strict=True):
            assert len(new.images) == len(old.images) and not set(new.images) & set(old.images)
    assert [i.images for i in probes.blank(items, None)] == [
        ("blank.png",) * len(item.images) for item in items
    ]


# Options.


@pytest.mark.parametrize(
    "options",
    [["CT", "MRI"], ["A) CT", "B) MRI"], ["A. CT", "B. MRI"], {"A": "CT", "B": "MRI"}],
)
@pytest.mark.parametrize("field", ["options", "choices"])
def test_options_of_a_field_are_added_to_the_prompt(options, field):
    item = only(MCQ, prompt="Which one is it?", **{field: options})
    assert item.prompt == "Which one is it?\nA: CT\nB: MRI"
    assert text.options(item.prompt) == {"A": "CT", "B": "MRI"}
    assert only(MCQ, **{field: options}).prompt == MCQ["prompt"]  # listed there already


def test_numbers_may_be_options():
    assert only(MCQ, prompt="How many?", options=[1, 2.5]).prompt == "How many?\nA: 1\nB: 2.5"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompt="Which one is it?"), "no options can be read from the prompt"),
        (dict(prompt="Which?\n1. CT\n2. MRI"), "no options can be read"),
        (dict(prompt="Which?", options=["CT"]), "options: expected a list of 2 to 26 texts"),
        (dict(prompt="Which?", options="CT, MRI"), "options: expected a list"),
        (dict(prompt="Which?", options=["CT", None]), "option B is of type NoneType"),
        (dict(prompt="Which?", options=["CT", ["x"]]), "option B is of type list"),
        (dict(prompt="Which?", options=["CT", " "]), "option B is empty"),
        (dict(prompt="Which?", options={"1": "CT", "2": "MRI"}), "keys are not A, B, C"),
        (dict(options=["CT", "PET"]), "options differs from the options in the prompt"),
    ],
)
def test_invalid_options_are_refused(change, message):
    with pytest.raises(TaskError, match="^row 0: ") as caught:
        only(MCQ, **change)
    assert message in str(caught.value)


# References.


@pytest.mark.parametrize("answer", ["2", "Z", "C", "A or B", "", 2])
def test_references_that_cannot_be_parsed(answer):
    with pytest.raises(TaskError, match="row 0: answer .* cannot be read as one of the question's"):
        only(MCQ, answer=answer)


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B: MRI", "MRI"])
def test_references_that_can_be_parsed(answer):
    assert only(MCQ, answer=answer).answer == answer


def test_a_reference_beyond_the_parsed_options_is_refused():
    """Eleven options: the last is read where the parser reads eleven letters, else refused."""
    listed = [f"finding {n}" for n in range(11)]
    letters = "ABCDEFGHIJK"
    prompt = "\n".join(["Which?", *(f"{a}: {t}" for a, t in zip(letters, listed, strict=True))])
    can_read = len(text.options(prompt)) == len(listed)
    if can_read:
        assert only(MCQ, prompt=prompt, answer="K").answer == "K"
    else:
        with pytest.raises(TaskError, match="'K' cannot be read"):
            only(MCQ, prompt=prompt, answer="K")
        with pytest.raises(TaskError, match="options has 11 options, of which"):
            only(MCQ, prompt="Which?", options=listed, answer="B")


# Files.


def test_messages_name_the_line(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(CLOSED) + "\n\n" + json.dumps(CLOSED | {"id": "x", "answer": "?"}))
    rows = selection.read_rows(path)
    assert [place for place, _ in rows] == ["q.jsonl line 1", "q.jsonl line 3"]
    with pytest.raises(TaskError, match="^q.jsonl line 3, id x: answer"):
        task_items.from_rows([row for _, row in rows], places=[place for place, _ in rows])


@pytest.mark.parametrize(
    "content",
    [b"[1]", b"7", b"{", b"\xff", b"[" * 100_000, b'{"prompt": "a", "prompt": "b"}',
     b'{"a": NaN}', b'{"a": "' + b"x" * MAX_LINE_BYTES + b'"}'],
)  # fmt: skip
def test_invalid_files_give_an_error_of_one_line(tmp_path, content):
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(EvalError, match="config.questions is .*name a JSONL file") as caught:
        selection.read_rows(tmp_path / "q.jsonl")
    assert "\n" not in str(caught.value)
