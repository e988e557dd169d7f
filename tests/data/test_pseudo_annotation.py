"""Tests of `prepare pseudo`: questions, filters, caps, the overlap gate, and what is written."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from llm_server import completion, serving, short_waits  # noqa: F401

from medmax_jax.data import prepare
from medmax_jax.data.analysis import check, near_duplicates
from medmax_jax.data.annotation import annotate, cli, evidence, filters, kinds, overlap
from medmax_jax.data.annotation import questions as annotation_questions
from medmax_jax.data.annotation.filters import Thresholds
from medmax_jax.data.annotation.generators import Choice
from medmax_jax.data.annotation.questions import ImageFacts, Question
from medmax_jax.data.image_tokens.encoder import load_encoder
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import check_document
from medmax_jax.data.records.jsonl import to_text
from medmax_jax.data.records.reader import open_records
from medmax_jax.io import journal
from medmax_jax.models.tokenizer import Tokenizer, TokenizerError, document_ids
from medmax_jax.models.vocab import RELEASED

ROOT = pathlib.Path(__file__).parents[2]
ADAPTER = ROOT / "medmax_jax" / "tiny_adapter"
TASKS = ("Image Generation", "Image Captioning", "VQA")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(
        prepare.TINY / "tokenizer.json", dataclasses.replace(RELEASED, **TINY_VOCAB)
    )


@pytest.fixture(scope="module", autouse=True)
def computed_once():
    """Compute with the VQGAN what all runs have in common once: hashes, and evaluation images."""
    patch = pytest.MonkeyPatch()
    looks, real_looks = {}, near_duplicates.hash_codes

    def hash_codes(encoder, codes):
        codes = [np.asarray(c) for c in codes]
        new = [c for c in codes if c.tobytes() not in looks]
        looks.update(zip([c.tobytes() for c in new], real_looks(encoder, new), strict=True))
        yield from (looks[c.tobytes()] for c in codes)

    patch.setattr(near_duplicates, "hash_codes", hash_codes)
    items = overlap._sample_items()
    patch.setattr(overlap, "_sample_items", lambda: (items[0], items[1][:8], items[2]))
    encoder_of = functools.cache(load_encoder)
    read = functools.cache(overlap.read_evaluation)
    patch.setattr(overlap, "read_evaluation", lambda a, *rest: read(tuple(a), *rest))
    patch.setattr(check, "resolve_encoder", lambda records, model: encoder_of(model))
    yield
    patch.undo()


TINY_VOCAB = dict(size=9728, image_codes=256, text_start=8712)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six real images, each with the documents of one task: a DMAX."""
    pool = tmp_path_factory.mktemp("pool")
    prepare.prepare_sample(pool / "all", split="validation")
    records = open_records(pool / "all")
    paths = sorted({d.image_path for d in records})
    task = {path: TASKS[n % len(TASKS)] for n, path in enumerate(paths)}
    chosen = (d for d in records if d.task == task[d.image_path])
    writer.write(
        pool / "dmax", chosen, shard_size=64, layout=records.layout, notes=dict(split="validation")
    )
    return pool / "dmax"


def text_of(document, tokenizer):
    return to_text(document, SimpleNamespace(vocab=tokenizer.vocab), tokenizer)


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
    assert filters.failed(all_low, thresholds) == list(filters.FILTERS)
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


# ---- The command, with a generator in place of a model ----


class Oracle:
    """Answers as scripted: right about what a question names, in one of two ways otherwise."""

    digest = hashlib.sha256(b"oracle").hexdigest()
    last_error = ""

    def __init__(self, stop_after=None):
        self.calls, self.stop_after, self.asked = 0, stop_after, []

    def _call(self):
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise KeyboardInterrupt

    def samples(self, prompts, count):
        self._call()
        self.asked += [prompt.name for prompt in prompts]
        return [[self.answer(prompt)] * count for prompt in prompts]

    def answer(self, prompt):
        q = prompt.question
        if q.kind == "mcq":
            return kinds.LETTERS[q.options.index(q.stated)]
        if q.kind == "closed":
            return q.stated or "yes"
        return q.options[0] if q.options else f"The image {q.image} shows tissue {q.id[-18:-2]}."

    def choose(self, prompts, texts):
        self._call()
        return [
            Choice(pick=0, likelihoods=(-0.5, *[-1.0 - len(t) / 64 for t in own[1:]]))
            for own in texts
        ]


@pytest.fixture
def run(folder, monkeypatch, tmp_path, capsys):
    """Run the command with an Oracle; return (exit code, last line of stderr)."""

    def run(*flags, oracle=None, records=folder, out=tmp_path / "out"):
        monkeypatch.setattr(cli, "_generator", lambda *_: oracle or Oracle())
        code = prepare.main(["pseudo", str(records), "--out", str(out), *map(str, flags)])
        return code, capsys.readouterr().err.strip().splitlines()[-1]

    run.out = tmp_path / "out"
    return run


def read_report(out):
    return json.loads((out / cli.REPORT).read_text())


def test_the_folder_has_all_records_and_the_kept_documents(run, folder, tokenizer):
    assert run()[0] == 0
    before, after, report = open_records(folder), open_records(run.out), read_report(run.out)
    added = [after[n] for n in range(len(before), len(after))]
    for n, document in enumerate(before):
        assert writer.to_bytes(after[n]) == writer.to_bytes(document)
    assert len(added) == report["outcomes"]["kept"] == after.index["pseudo"].sum() > 6
    assert report["pseudo_documents_checked"] == len(added)
    codes = {d.image_path: d for d in before}
    for document in added:
        check_document(document, after.layout)
        original = codes[document.image_path]
        for name in ("group", "source", "credential", "image_sha256"):
            assert getattr(document, name) == getattr(original, name)
        is_code = (document.tokens >= 4) & (document.tokens < 260)
        assert (document.tokens[is_code] == original.tokens[
            (original.tokens >= 4) & (original.tokens < 260)]).all()  # fmt: skip
        assert document.generator == Oracle.digest and set(document.scores) == set(filters.FILTERS)
        assert document.turns == 1 and document.task in TASKS + ("Report Understanding",)
    texts = {d.id.split("/")[1]: text_of(d, tokenizer) for d in added}
    assert texts["generation"].startswith("Generate an image. The image ")
    assert texts["generation"].endswith("<reserved08706><image>")
    assert texts["caption"].startswith(f"<image>{kinds.DESCRIBE['caption']}<reserved08706>The ")
    assert report["per_image"]["before"]["tasks"] == 1 < report["per_image"]["after"]["tasks"]
    assert report["per_image"]["IMAX (published)"] == dict(tasks=4.1, entries=7.46)


def test_counts_add_up(run):
    run("--max_source_share", 0.3, "--max_task_share", 0.05)
    report = read_report(run.out)
    assert sum(report["outcomes"].values()) == report["questions"]
    assert report["outcomes"]["source_share"] + report["outcomes"]["task_share"] > 0
    for row in report["kinds"].values():
        images = row["images"]
        parts = ("overlap", "other_view", "unsupported", "asked")
        assert sum(images[name] for name in parts) == images["missing"]
        assert images["missing"] + images["present"] == report["images"] == 6
        assert sum(row["outcomes"].values()) == row["questions"]
    kept = report["documents"]["after"] - report["documents"]["before"]
    assert kept == report["outcomes"]["kept"]


def contents(out):
    names = ("dataset.json", "index.npy", cli.REPORT, evidence.SAMPLES, evidence.EVIDENCE)
    files = [*(out / name for name in names), *sorted(out.glob("*.array_record"))]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("calls", [3, 14])
def test_an_interrupted_run_ends_with_the_same_bytes(run, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(evidence, "BATCH", 3)
    assert run()[0] == 0
    again = tmp_path / "again"
    code, line = run(oracle=Oracle(stop_after=calls), out=again)
    assert code == 75 and "rerun the same command" in line
    assert not (again / "dataset.json").exists()
    done = {row["id"] for row in journal.read_jsonl(again / evidence.SAMPLES)}
    rest = Oracle()
    assert run(oracle=rest, out=again)[0] == 0
    assert not done & set(rest.asked)  # each question is answered exactly once
    assert contents(again) == contents(run.out)


def test_a_batch_that_was_journaled_in_part_is_completed(run, tmp_path):
    assert run()[0] == 0
    again = tmp_path / "again"
    run(oracle=Oracle(stop_after=9), out=again)
    path = again / evidence.SAMPLES
    path.write_bytes(path.read_bytes()[:-30])  # a kill while a line was written
    assert run(out=again)[0] == 0
    assert contents(again)["dataset.json"] == contents(run.out)["dataset.json"]


def test_other_thresholds_need_no_new_answers(run):
    code, line = run("--min_agreement", 1, "--min_margin", 50)
    assert code == 1 and "none of" in line and "margin" in line and "no records were" in line
    assert not (run.out / "dataset.json").exists()
    oracle = Oracle()
    assert run(oracle=oracle)[0] == 0 and oracle.calls == 0
    code, line = run()
    assert code == 1 and "already contains a finished data set" in line


def test_a_generator_that_agrees_with_nothing(run):
    class Random(Oracle):
        def samples(self, prompts, count):
            replies = [None, "\x00", "<image>", "�"]
            return [replies[:count] for _ in prompts]

    code, line = run(oracle=Random())
    assert code == 1 and "unusable" in line and not (run.out / "dataset.json").exists()


def test_other_flags_are_not_mixed_with_earlier_answers(run):
    run("--min_margin", 50)
    code, line = run("--seed", 1)
    assert code == 1 and "was started with other seed" in line


def test_no_missing_kind_writes_nothing(run, folder, tmp_path):
    records = open_records(folder)
    of_task = (d for d in records if d.task == "Image Captioning")
    writer.write(tmp_path / "one", of_task, shard_size=64, layout=records.layout, notes={})
    code, line = run("--tasks", "caption", records=tmp_path / "one")
    assert code == 1 and "no document to add" in line and "caption: 2 present" in line
    assert not run.out.exists()


def test_unknown_task_and_few_samples(folder, tmp_path, capsys):
    for flags, text in (
        (["--tasks", "captions"], "'captions' is unknown; did you mean caption?"),
        (["--samples", "1"], "1 samples cannot agree; use 2 or more"),
        (["--min_order", "2"], "2 is not a share; use 0 to 1"),
    ):
        with pytest.raises(SystemExit):
            prepare.main(["pseudo", str(folder), "--out", str(tmp_path / "x"), *flags])
        assert text in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# ---- Evaluation images ----


def test_images_of_an_evaluation_set_are_excluded(run, folder, tmp_path):
    records = open_records(folder)
    path = records[0].image_path
    other = dict(image_sha256="", id="e", image_path="renamed.png")
    document = dataclasses.replace(records[0], **other)
    writer.write(tmp_path / "eval", [document], shard_size=4, layout=records.layout, notes={})
    assert run("--against", tmp_path / "eval")[0] == 0
    report, written = read_report(run.out), open_records(run.out)
    assert report["overlap"]["same_codes"] == report["overlap"]["images"] == 1
    assert path not in {d.image_path for d in written if d.pseudo}
    assert path in {d.image_path for d in written}  # the records themselves are unchanged
    assert report["kinds"]["caption"]["images"]["overlap"] == 1


def test_items_with_the_files_of_training_images_are_excluded_by_bytes(run, folder, tmp_path):
    path = open_records(folder)[0].image_path
    row = dict(id="1", prompt="?", answer="!", image_path=path, data_class="open")
    (tmp_path / "items.jsonl").write_text(json.dumps(row) + "\n")
    flags = ("--against", tmp_path / "items.jsonl")
    code, line = run(*flags)
    assert code == 1 and "1 images cannot be read; set --eval_images" in line
    assert run(*flags, "--eval_images", prepare.SAMPLE)[0] == 0
    overlap_counts = read_report(run.out)["overlap"]
    assert overlap_counts["images"] == 1 and overlap_counts["evaluation_images"] == 1


def test_the_written_folder_is_checked_again(run, monkeypatch):
    """A gate that misses an image while the questions are made is found before it is used."""
    real = overlap.compare

    def blind(*args):
        gate = real(*args)
        return dataclasses.replace(gate, excluded={}, compared=frozenset())

    monkeypatch.setattr(overlap, "compare", blind)
    code, line = run()
    assert code == 1 and "shows an image of an evaluation set" in line


# ---- Credentialed images ----


@pytest.fixture
def credentialed(folder, tmp_path):
    records = open_records(folder)
    first = records[0].image_path
    changed = (
        dataclasses.replace(d, credential="yes") if d.image_path == first else d for d in records
    )
    writer.write(tmp_path / "c", changed, shard_size=64, layout=records.layout, notes={})
    return tmp_path / "c", first


def test_pseudo_documents_of_credentialed_images_are_credentialed(run, credentialed):
    records, path = credentialed
    assert run(records=records)[0] == 0
    for document in open_records(run.out):
        assert (document.credential == "yes") == (document.image_path == path)
    assert {p.stat().st_mode & 0o77 for p in [run.out, *run.out.iterdir()]} == {0}
    page = (run.out / cli.PAGE).read_text()
    assert path not in page and "credentialed images: not shown" in page
    for name in (evidence.SAMPLES, evidence.EVIDENCE, cli.REPORT, cli.RUN):
        assert path not in (run.out / name).read_text()


# ---- An endpoint ----


def reply(request, n):
    text = request["messages"][0]["content"]
    text = next(part["text"] for part in text if part["type"] == "text")
    if "yes or no" in text:
        return completion("Yes.")
    if "letter only" in text:
        return completion("A" if "\nA: MRI" in text else "B")
    seed = request.get("seed", 0)
    return completion(f"An image with the words {hash(text) % 7} and seed {seed % 2}.")


def endpoint_flags(llm, *flags):
    command = ["--endpoint", f"m@{llm.url}", "--min_margin", "off", "--timeout", "5"]
    return [*command, "--images", str(prepare.SAMPLE), *map(str, flags)]


def test_an_endpoint_answers_and_no_call_is_repeated(folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["pseudo", str(folder), "--out", str(out), "--samples", "2", "--tasks", "closed"]
    with serving(reply) as llm:
        flags = endpoint_flags(llm)
        assert prepare.main([*command, *flags, "--dry_run"]) == 0 and not llm.requests
        assert prepare.main([*command, *flags, "--min_agreement", "0.9"]) == 0
        calls = len(llm.requests)
        report = read_report(out)
        assert calls == report["questions"] * (2 + 2)  # two samples, two orders
        (out / "dataset.json").unlink()
        assert prepare.main([*command, *flags]) == 0 and len(llm.requests) == calls
    first = llm.requests[0]
    assert first["messages"][0]["content"][0]["image_url"]["url"].startswith(
        "data:image/png;base64"
    )
    parts = [[p["type"] for p in r["messages"][0]["content"]] for r in llm.requests]
    assert ["text", "image_url"] in parts and {r["temperature"] for r in llm.requests} == {0, 0.7}
    assert report["thresholds"]["margin"] is None and report["outcomes"]["kept"] > 0
    digest = hashlib.sha256(json.dumps([llm.url, "m"]).encode()).hexdigest()
    assert report["generator"] == digest
    assert all(set(d.scores) == {"agreement", "order"} for d in open_records(out) if d.pseudo)


def test_an_endpoint_has_no_likelihoods(folder, tmp_path, capsys):
    command = ["pseudo", str(folder), "--out", str(tmp_path / "x")]
    command += ["--endpoint", "m@http://127.0.0.1:9/v1"]
    assert prepare.main(command) == 1
    error = capsys.readouterr().err
    assert "returns no likelihoods" in error and "set --min_margin off" in error
    assert prepare.main([*command, "--min_margin", "off"]) == 1
    assert "--images is None; set it to the folder" in capsys.readouterr().err
    assert prepare.main([*command, "--min_margin", "off", "--adapter", str(ADAPTER)]) == 1
    assert "an endpoint has no adapter" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_credentialed_images_are_not_sent(credentialed, tmp_path, capsys):
    command = ["pseudo", str(credentialed[0]), "--out", str(tmp_path / "x"), "--samples", "2"]
    with serving(reply) as llm:
        assert prepare.main([*command, *endpoint_flags(llm)]) == 1
        assert "credentialed data may not be sent" in capsys.readouterr().err
        assert not llm.connections and not (tmp_path / "x").exists()
        host = llm.url.removeprefix("http://").removesuffix("/v1")
        flags = endpoint_flags(llm, "--credentialed_host", host, "--tasks", "closed")
        assert prepare.main([*command, *flags]) == 0
        assert llm.requests
    assert (tmp_path / "x" / cli.CALLS).stat().st_mode & 0o77 == 0


def test_questions_without_a_reply_are_asked_again(folder, tmp_path, capsys):
    down = {"on": True}

    def behave(request, n):
        is_second = request["seed"] == 1
        return 500 if down["on"] and is_second else reply(request, n)

    command = ["pseudo", str(folder), "--out", str(tmp_path / "x"), "--samples", "2"]
    command += ["--tasks", "closed", "--retries", "1", "--min_agreement", "0"]
    with serving(behave) as llm:
        flags = endpoint_flags(llm)
        assert prepare.main([*command, *flags]) in (1, 75)
        assert not (tmp_path / "x" / "dataset.json").exists()
        before = Counter(json.dumps(r) for r in llm.requests if r["seed"] == 0)
        down["on"] = False
        assert prepare.main([*command, *flags]) == 0
        after = Counter(json.dumps(r) for r in llm.requests if r["seed"] == 0)
    assert all(after[request] == n for request, n in before.items())


# ---- The shipped model ----


def test_the_tiny_model_answers_in_batches(folder, tmp_path):
    out = tmp_path / "out"
    command = [
        "pseudo",
        str(folder),
        "--adapter",
        str(ADAPTER),
        "--out",
        str(out),
        "--samples",
        "2",
    ]
    thresholds = ["--min_margin", "-9", "--min_agreement", "0", "--min_order", "0"]
    assert prepare.main([*command, *thresholds, "--tasks", "closed"]) == 0
    report = read_report(out)
    assert report["questions"] == sum(report["outcomes"].values())
    lines = journal.read_jsonl(out / evidence.EVIDENCE)
    assert len(lines) >= report["outcomes"]["kept"] > 0
    for line in lines:
        scores = line["likelihoods"]
        assert len(scores) == 1 + len(line["distractors"]) and max(scores) < 0
        assert (line["picks"][0] == 0) == (scores[0] == max(scores))
    added = [d for d in open_records(out) if d.pseudo]
    assert {d.task for d in added} == {"VQA"} and all(d.scores["order"] >= 0 for d in added)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [evidence.SAMPLES, evidence.EVIDENCE])
def test_a_killed_process_resumes_to_the_same_bytes(folder, tmp_path, stage, monkeypatch):
    """SIGKILL after the first batches of a stage, with the real model and batches of 4."""
    program = (
        "import sys; from medmax_jax.data import prepare; from medmax_jax.data.annotation import "
        "evidence; evidence.BATCH = 4; sys.exit(prepare.main(sys.argv[1:]))"
    )

    def command(out):
        words = ["pseudo", folder, "--adapter", ADAPTER, "--out", out, "--samples", "2"]
        words += ["--min_agreement", "0", "--tasks", "closed", "open", "caption"]
        return [sys.executable, "-c", program, *map(str, words)]

    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    assert subprocess.run(command(tmp_path / "a"), cwd=ROOT, env=environment).returncode == 0
    child = subprocess.Popen(command(tmp_path / "b"), cwd=ROOT, env=environment)
    path = tmp_path / "b" / stage
    for _ in range(6_000):
        if path.exists() and path.read_bytes().count(b"\n") >= 4:
            break
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    lines = path.read_bytes().count(b"\n")
    total = (tmp_path / "a" / stage).read_bytes().count(b"\n")
    assert 4 <= lines < total and not (tmp_path / "b" / "dataset.json").exists()
    assert subprocess.run(command(tmp_path / "b"), cwd=ROOT, env=environment).returncode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
