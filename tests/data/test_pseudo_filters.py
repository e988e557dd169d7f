"""Tests of the questions, filters and caps of pseudo-annotation, without a model."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from medmax_jax.data import prepare
from medmax_jax.data.annotation import annotate, evidence, filters, kinds
from medmax_jax.data.annotation import questions as annotation_questions
from medmax_jax.data.annotation.filters import Thresholds
from medmax_jax.data.annotation.questions import ImageFacts, Question
from medmax_jax.models.tokenizer import Tokenizer, TokenizerError, document_ids
from medmax_jax.models.vocab import RELEASED

TINY_VOCAB = dict(size=9728, image_codes=256, text_start=8712)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(
        prepare.TINY / "tokenizer.json", dataclasses.replace(RELEASED, **TINY_VOCAB)
    )


def question(kind, text="Is this an MRI?", **fields):
    options = dict(closed=("yes", "no"), mcq=("MRI", "CT", "X-ray"), count=("3", "4")).get(kind, ())
    return Question(**(dict(id="q", image=0, kind=kind, text=text, options=options) | fields))


# ---- Filters ----


def test_agreement_is_the_mean_over_the_other_samples():
    closed = question("closed")
    assert filters.agreement(closed, ["no", "yes", "yes", "yes"]) == ("yes", pytest.approx(2 / 3))
    assert filters.agreement(closed, ["MRI", "CT", "MRI", ""]) == ("MRI", pytest.approx(1 / 3))
    assert filters.agreement(closed, ["yes", "no"]) == ("yes", 0.0)
    assert filters.agreement(closed, ["", ""]) == ("", 0.0)
    text, score = filters.agreement(
        question("caption"), ["A CT of the chest.", "a ct of the head", "An MRI."]
    )
    assert text == "A CT of the chest." and score == pytest.approx((0.8 + 0) / 2)


def test_word_f1_counts_repeated_words():
    assert filters.word_f1("a CT of the chest", "CT of the head") == pytest.approx(6 / 9)
    assert filters.word_f1("lesion lesion", "lesion") == pytest.approx(2 / 3)
    assert filters.word_f1("MRI", "CT") == filters.word_f1("", "") == 0


def test_margin_and_order():
    assert filters.margin([-1.0, -3.0, -1.5]) == pytest.approx(0.5)
    assert filters.margin([-3.0, -1.0]) == pytest.approx(-2.0)
    assert filters.order_share([0, 0, 1, None]) == 0.5


@pytest.mark.parametrize("name", filters.FILTERS)
def test_each_filter_rejects_by_its_own_threshold(name):
    thresholds = Thresholds(margin=0.5, agreement=0.6, order=0.75)
    least = dict(margin=0.5, agreement=0.6, order=0.75)
    assert filters.failed(least, thresholds) == []
    assert filters.failed(least | {name: least[name] - 0.01}, thresholds) == [name]
    assert filters.failed(least | {name: float("nan")}, thresholds) == [name]
    all_low = dict.fromkeys(least, -9.0)
    assert filters.failed(all_low, thresholds) == ["margin", "agreement", "order"]
    off = dataclasses.replace(thresholds, margin=None)
    assert filters.failed(dict(agreement=1, order=1), off) == []


@pytest.mark.parametrize(
    ("kind", "reply", "answer"),
    [
        ("closed", "Yes.", "yes"),
        ("closed", "yesterday", ""),
        ("mcq", "B: CT", "B"),
        ("mcq", "(c)", "C"),
        ("mcq", "D", ""),  # there are three options
        ("mcq", "Both", ""),
        ("count", "12 nuclei", "12"),
        ("count", "many", ""),
        ("location", "On the Left side.", "left"),
        ("open", "<think>It may be CT.</think> MRI", "MRI"),
        ("caption", "An MRI.\nOf the brain.", "An MRI.\nOf the brain."),
        ("caption", None, ""),
        ("caption", "  ", ""),
        ("caption", "An <image> of it", ""),
        ("caption", "yes<reserved08706>no", ""),
        ("caption", "a\x1bb", ""),
        ("caption", "half \ud800", ""),
        ("caption", "cut \ufffd", ""),
        ("caption", "MRI of the brain. " * 60, ""),  # longer than its bound
        ("open", "x" * 100_000, ""),
    ],
)
def test_a_reply_is_read_only_as_an_answer_of_its_kind(kind, reply, answer, tokenizer):
    assert filters.read_answer(question(kind), reply, tokenizer) == answer


def test_names_of_control_tokens_never_reach_a_document(tokenizer):
    for name in ("<s>", "</s>", "<pad>", "<eoss>", "<racm3:break>", "<image>", "<reserved08706>"):
        answer = filters.read_answer(question("caption"), f"A CT {name}", tokenizer)
        if answer:  # a name that is ordinary text for this tokenizer
            ids = document_ids(tokenizer, answer, None, tokenizer.vocab)[1:-1]
            assert min(ids) >= tokenizer.vocab.text_start
    with pytest.raises(TokenizerError):
        document_ids(tokenizer, "A CT <image>", None, tokenizer.vocab)


# ---- What texts state ----


@pytest.mark.parametrize(
    ("task", "text", "answer", "kind", "stated"),
    [
        ("VQA", "Is this an MRI?", "yes", "closed", {"MRI"}),
        ("VQA", "Is this an MRI?", "No.", "closed", set()),
        ("VQA", "What kind of image is this?\nA: CT\nB: MRI", "B", "mcq", {"MRI"}),
        ("VQA", "Which modality is this?", "ultrasound", "open", {"ultrasound"}),
        ("VQA", "How many nuclei are shown?", "12", "count", set()),
        ("VQA", "Where is the lesion?", "in the left lung on CT", "location", {"CT"}),
        ("Image Captioning", "Describe it.", "A chest X-ray.", "caption",
         {"X-ray"}),
        ("Image Generation", "Generate an axial CT.", "", "generation", {"CT"}),
        ("Visual Chat", "What is it?", "A CT, unlike an MRI.", "", set()),  # two that exclude
        ("Other", "Is this an MRI?", "yes", "", {}),
    ],
)  # fmt: skip
def test_kinds_and_stated_values(task, text, answer, kind, stated):
    assert kinds.kind_of(task, text, answer) == kind
    if stated != {}:
        found = kinds.ATTRIBUTES["modality"].values(kinds.stated_text(task, [text, answer]))
        assert found == stated


def test_counts_and_sides_of_one_sentence():
    assert kinds.stated_count("It shows 17 nuclei.") == ("nuclei", "17")
    assert kinds.stated_count("2 cells and 3 lesions") is None
    assert kinds.stated_side("A lesion is marked on the left side.") == ("lesion", "left")
    assert kinds.stated_side("On the right there is a nodule.") == ("nodule", "right")
    assert kinds.stated_side("A lesion is marked. It is the left eye.") is None


def test_contradictions():
    stated = {"modality": {"MRI"}, "body_part": {"chest", "heart"}, "plane": set()}
    assert kinds.contradicts(stated, "An axial CT.")
    assert kinds.contradicts(stated, "An MRI of the brain.")
    assert not kinds.contradicts(stated, "A sagittal MRI of the heart.")
    assert not kinds.contradicts(stated, "A lesion is marked.")
    assert filters.contradicted(question("closed", stated="no"), "yes", {})
    mcq = question("mcq", stated="CT")
    assert not filters.contradicted(mcq, "B", {}) and filters.contradicted(mcq, "A", {})


def facts(path, *, kind="", **stated):
    values = {name: set(value.split(", ")) for name, value in stated.items()}
    return ImageFacts(
        path=path, group="g", source="s", credential="no", stated=values,
        kinds={kind} if kind else set(), codes={"released": np.zeros(4, np.uint16)},
    )  # fmt: skip


LAYOUT = SimpleNamespace(view="released", answer_view="released")


def make(images, wanted=tuple(kinds.KINDS), excluded=()):
    made, states = annotation_questions.make_questions(images, wanted, excluded, LAYOUT, seed=0)
    return made, {kind: dict(+counts) for kind, counts in states.items()}


def test_questions_of_missing_kinds_only():
    images = [
        facts("a", kind="closed", modality="MRI", plane="axial"),
        facts("b", kind="caption", modality="CT", plane="coronal"),
        facts("c"),
        facts("d", modality="ultrasound"),
    ]
    made, states = make(images, excluded={3})
    of = {(q.image, q.kind): q for q in made}
    assert (
        (0, "closed") not in of and (1, "caption") not in of and not any(q.image == 3 for q in made)
    )
    assert states["closed"] == dict(present=1, overlap=1, asked=2)
    assert states["report"] == dict(overlap=1, unsupported=1, asked=2)  # c states no modality
    assert states["count"] == states["location"] == dict(overlap=1, unsupported=3)
    closed = [q for q in made if q.kind == "closed" and q.image == 1]
    assert sorted(q.stated for q in closed) == ["no", "yes"]
    assert {q.attribute for q in made if q.image == 2} <= {"modality", ""}
    mcq = of[0, "mcq"]
    assert mcq.stated in mcq.options and mcq.text.endswith(f"C: {mcq.options[2]}")
    assert (2, "mcq") not in of  # what its options would be is not stated
    assert len({q.id for q in made}) == len(made) and make(images, excluded={3})[0] == made


def test_an_attribute_with_one_value_needs_no_image_and_is_not_asked():
    made, states = make(
        [facts("a", modality="MRI"), facts("b", modality="MRI")], ("closed", "open")
    )
    assert not made and states == dict.fromkeys(("closed", "open"), dict(unsupported=2))


def test_count_questions_come_from_stated_counts():
    images = [facts("a"), facts("b")]
    images[0].counts, images[1].counts = {("nuclei", "12")}, {("nuclei", "30")}
    made, _ = make(images, ("count",))
    assert [(q.text, q.stated, q.options) for q in made] == [
        ("How many nuclei are shown?", "12", ("12", "30")),
        ("How many nuclei are shown?", "30", ("12", "30")),
    ]


def test_each_option_is_once_in_each_place():
    q = question("mcq", annotation_questions.with_options("Which?", ("MRI", "CT", "X-ray")))
    asked = evidence.orders(q)
    assert asked[0][0].text == q.text and asked[1][0].text == "Which?\nA: CT\nB: X-ray\nC: MRI"
    for order, letters in asked:
        shown = kinds.options(order.text)
        own = kinds.options(q.text)
        assert all(shown[letters[letter]] == text for letter, text in own.items())
    assert {letters["A"] for _, letters in asked} == set("ABC")
    assert [order.image_first for order, _ in evidence.orders(question("closed"))] == [True, False]


def test_distractors_say_something_else():
    images = [question("caption", id=str(n), image=n) for n in range(4)]
    texts = ["An axial MRI of the brain.", "an axial MRI of the brain", "A chest X-ray.", "A CT."]
    answers = dict(zip("0123", texts, strict=True))
    chosen = evidence.choose_distractors(images, answers, seed=0)
    assert set(chosen["0"]) == {"A chest X-ray.", "A CT."}  # not the same words again
    opened = question("open", attribute="body_part", options=("brain", "head", "leg", "skin"))
    chosen = evidence.choose_distractors([opened], {"q": "the brain"}, seed=0)
    assert set(chosen["q"]) == {"leg", "skin"}  # a brain is in a head


# ---- Caps ----


def verdicts(counts, kind="closed"):
    return [
        annotate.Verdict(
            question=question(kind, id=f"{image}/{n}", image=image), answer="yes",
            scores=dict(margin=float(n), agreement=1.0, order=1.0), below=[],
            contradicts=False, outcome="kept",
        )
        for image, count in enumerate(counts) for n in range(count)
    ]  # fmt: skip


def pool_of(source, task, pseudo):
    names = dict(source=sorted(set(source)), task=sorted(set(task)))
    columns = dict(source=source, task=task)
    index = {label: np.array([names[label].index(x) for x in columns[label]]) for label in columns}

    class Pool(SimpleNamespace):
        def __len__(self):
            return len(source)

    return Pool(index=index | dict(pseudo=np.array(pseudo)), names=names.get)


def test_caps_by_source_and_task_keep_the_best():
    images = [facts("a"), facts("b")]
    records = pool_of(["s"] * 6, ["VQA"] * 6, [0] * 6)
    own = verdicts([2, 2])
    annotate.apply_caps(own, images, records, annotate.Caps(source=1.0, task=1.0))
    assert Counter(v.outcome for v in own) == {"kept": 4}
    annotate.apply_caps(own, images, records, annotate.Caps(source=0.25, task=1.0))
    kept = {v.question.id for v in own if v.outcome == "kept"}
    assert kept == {"0/0", "1/0"}  # 2 of 8; the first of each image before the second of one
    own = verdicts([2, 2])
    annotate.apply_caps(own, images, records, annotate.Caps(source=1.0, task=0.1))
    assert Counter(v.outcome for v in own) == {"task_share": 4}  # 1 of 7 would be more than a tenth
    own = verdicts([2, 2])
    annotate.apply_caps(own, images, records, annotate.Caps(source=1.0, task=0.25))
    assert Counter(v.outcome for v in own) == {"kept": 2, "task_share": 2}  # 2 of 8


def test_caps_count_the_pseudo_documents_that_are_already_there():
    records = pool_of(["s"] * 6, ["VQA"] * 6, [0, 0, 0, 0, 1, 1])
    own = verdicts([4])
    annotate.apply_caps(own, [facts("a")], records, annotate.Caps(source=0.5, task=1.0))
    assert Counter(v.outcome for v in own) == {"kept": 2, "source_share": 2}  # 4 of 8
