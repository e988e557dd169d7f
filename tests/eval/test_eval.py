"""Tasks, scores of hand values, baselines, and inference: resumed, interrupted, as a program."""

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import test_generate as micro

from medmax_jax.config import build
from medmax_jax.configs import eval_tiny
from medmax_jax.data.sample.documents import eval_items
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.eval.config import EvalError, Settings
from medmax_jax.eval.encoders import modality
from medmax_jax.eval.metrics import aggregate, answer_parser, per_record, yes_no_parser
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.models import base, baselines
from medmax_jax.eval.pipeline import inference, stages
from medmax_jax.eval.records import EvalRecord, read_records
from medmax_jax.eval.reporting import page
from medmax_jax.eval.results import read_summary
from medmax_jax.eval.stats.intervals import Resampling
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.eval.tasks import probes, selection
from medmax_jax.generation import model_bundle

ROWS = [
    dict(task_name=name, question_type=kind, prompt=prompt, answer=answer, image_path=path)
    for name, kind, prompt, answer, path in [
        ("vqa_rad", "closed", "Is it a CT?", "yes", "a.png"),
        ("pmc_vqa", "mcq", "Which?\nA: CT\nB: MRI", "B", "b.png"),
        ("slake", "open", "What is it?", "an MRI", "c.png"),
        ("image_captioning", "pmc_oa", "ignored", "A CT of the chest.", "a.png"),
        ("image_generation", "quilt", "Draw a CT.", "", "a.png"),
        ("mm_out", "", "Explain a CT.", "This is a CT.", "b.png"),
    ]
]


# Scores of one answer; the expected values were computed by hand.


@pytest.mark.parametrize(
    "text, read",
    [
        ("yes", "yes"),
        ("Yes.", "yes"),
        ("no", "no"),
        ("No, it is not.", "no"),
        ("yes and no", None),
        ("", None),
        ("maybe", None),
        *[(word, None) for word in ("normal", "None", "unknown", "eyes", "nodule", "abnormal")],
    ],
)
def test_yes_no(text, read):
    assert yes_no_parser.parse_yes_no(text) == read


@pytest.mark.parametrize(
    "text, read",
    [
        ("B", "B"),
        ("b", "B"),
        ("(C).", "C"),
        ("B: MRI", "B"),
        ("The answer is D", "D"),
        ("A lung nodule", None),
        ("A: a lung nodule", "A"),
        ("A or B", None),
        ("E", None),
        ("CT", None),
        ("", None),
    ],
)
def test_letter(text, read):
    assert answer_parser.parse_choice(text, {}, letters="ABCD") == read


def test_overlap_scores():
    # "left lung" of left lower lung: precision 1, recall 2/3 -> 0.8
    assert text_metrics.token_f1("left lung", "the left lower lung") == pytest.approx(0.8)
    assert text_metrics.token_f1("lung lung", "lung") == pytest.approx(2 / 3)
    assert text_metrics.token_f1("", "lung") == 0 and text_metrics.token_f1("", "") == 1
    assert text_metrics.rouge_l("y x", "x y") == 0.5  # subsequence of one
    # "axial ct of chest" and "axial contrast ct chest": LCS axial ct chest = 3 of 4 and 4
    assert text_metrics.rouge_l("axial ct of chest", "axial contrast ct chest") == 0.75
    assert text_metrics.exact("The X-ray.", "x ray") == 1 and text_metrics.exact("CT", "MRI") == 0
    assert text_metrics.recall("An axial CT of the chest", ["CT", "chest", "brain"]) == 2 / 3
    assert text_metrics.recall("anything", []) == 1


def test_image_features_and_nearest_centroid():
    dark, light = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    one = modality.features(np.array([0, 0, 1, 1]), dark, num_codes=4)
    np.testing.assert_allclose(one[:4], np.sqrt([0.5, 0.5, 0, 0]))
    np.testing.assert_allclose(one[4:], -1 / np.sqrt(192))
    two = modality.features(np.array([2, 2, 2, 2]), light, num_codes=4)
    centroids = modality.fit_centroids([one, two, two], ["CT", "MRI", "MRI"])
    assert centroids.names == ("CT", "MRI")
    assert [modality.nearest_centroid(centroids, x) for x in (one, two, 0.9 * two)] == [
        "CT",
        "MRI",
        "MRI",
    ]
    with pytest.raises(ValueError, match="required are at least 8 per side"):
        modality.features(np.array([0]), dark[:4], num_codes=4)


def record(task, text, answer, group="g", **changes):
    fields = dict(id=f"{group}/{text}", task=task, family=task, prompt="", answer=answer, image="")
    return EvalRecord.from_json(fields | dict(text=text, group=group) | changes)


def test_values_of_each_task():
    assert aggregate.record_values(record("vqa_closed", "Yes.", "yes")) == dict(
        accuracy=1, unparsed=0
    )
    assert aggregate.record_values(record("vqa_closed", "normal", "no")) == dict(
        accuracy=0, unparsed=1
    )
    assert aggregate.record_values(record("vqa_mcq", "b", "B")) == dict(accuracy=1, unparsed=0)
    assert aggregate.record_values(record("vqa_open", "a CT", "CT")) == dict(exact=1, token_f1=1)
    caption = aggregate.record_values(record("captioning", "A CT.", "A CT.", facts=["CT", "chest"]))
    assert caption == dict(token_f1=1, rouge_l=1, fact_recall=0.5)
    generated = record("image_generation", "", "", modality="CT", predicted_modality="CT")
    assert aggregate.record_values(generated) == dict(modality_match=1)
    no_image = record("multimodal", "A CT.", "A CT.", modality="CT", predicted_modality="")
    assert aggregate.record_values(no_image) == dict(
        token_f1=1, rouge_l=1, has_image=0, modality_match=0
    )
    invalid = per_record.record_scores(record("vqa_closed", "yes", "perhaps"))["accuracy"]
    assert (invalid.status, invalid.lower, invalid.upper) == ("unscored", 0, 1)
    assert "answer 'perhaps' is not an answer to a vqa_closed question; fix" in invalid.why


def test_scores_pair_items_and_put_the_primary_first():
    def answers(texts):
        captions = [record("captioning", "x", "x", group="h")]
        return captions + [
            record("vqa_closed", text, "yes", group=f"g{i % 4}", id=str(i))
            for i, text in enumerate(texts)
        ]

    before, after = answers(["no"] * 8 + ["yes"] * 4), answers(["yes"] * 12)
    rows = aggregate.scores(before, after[:-1], resampling=Resampling(0, 2_000))
    first = rows[0]
    assert (first["task"], first["metric"]) == aggregate.PRIMARY
    assert (first["n"], first["groups"], first["after"]) == (11, 4, 1.0)
    assert first["diff"] == pytest.approx(first["after"] - first["before"])
    assert first["ci_low"] <= first["diff"] <= first["ci_high"]
    first = aggregate.summary(after, mode="strict", resampling=Resampling(0, 2_000))[0]
    assert (first.value, first.n_unparsed, first.headline) == (1, 0, True)
    guessed = aggregate.with_answers(after, {r.id: "no" for r in after})
    assert aggregate.scores(guessed, after, resampling=Resampling(0, 2_000))[0]["diff"] == 1


# Tasks.


def test_released_rows_become_items():
    items = task_items.from_rows(ROWS)
    assert [item.family for item in items] == list(task_items.FAMILIES)[: len(ROWS)]
    assert [item.task for item in items] == [
        "vqa_rad_closed", "pmc_vqa_mcq", "slake_open", "captioning_pmc_oa",
        "image_generation_quilt", "multimodal",
    ]  # fmt: skip
    # Verbatim: part of the data.
    assert items[3].prompt == "Please describe this picture."
    assert task_items.prompt_parts(items[0], Path("f")) == (Path("f/a.png"), "Is it a CT?")
    assert task_items.prompt_parts(items[4], Path("f")) == ("Draw a CT.",)
    assert (items[0].group, items[0].id, items[0].facts) == ("a.png", "0", ())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(task_name="chess", question_type="game"), "is not a task of this suite"),
        (dict(image_path=""), "image_path is missing; a vqa_closed row requires an image"),
        (dict(id="1"), "id '1' occurs more than once"),
    ],
)
def test_invalid_rows_are_refused(change, message):
    with pytest.raises(task_items.TaskError, match=message):
        task_items.from_rows([ROWS[0] | change, *ROWS[1:]])
    with pytest.raises(task_items.TaskError, match="row 0: answer is missing"):
        task_items.from_rows([{k: v for k, v in ROWS[0].items() if k != "answer"}])


def sample_items(split="test"):
    manifest = read_manifest(selection.SAMPLE / "manifest.jsonl")
    return task_items.from_rows(eval_items(manifest, 0, split=split), manifest)


def test_items_of_the_embedded_sample():
    items = sample_items()
    assert set(item.task for item in items) == set(task_items.FAMILIES)
    assert all(item.modality and item.facts for item in items)
    for item in items:
        if item.task == "captioning":
            assert text_metrics.recall(item.answer, list(item.facts)) == 1, item
    closed = [item for item in items if item.task == "vqa_closed"]
    chosen = task_items.sample_items(closed, 25, seed=0)
    groups = collections.Counter(item.group for item in chosen)
    assert len(chosen) == 25 and max(groups.values()) - min(groups.values()) <= 1
    assert task_items.sample_items(closed, -1, seed=0) == closed
    # each template's questions are balanced, so that the blind guesser is at chance
    guesses = baselines.blind(sample_items("train"), closed)
    right = np.mean([guesses[item.id] == item.answer for item in closed])
    assert 0.45 <= right <= 0.55


def test_swapping_uses_an_image_of_another_group():
    closed = [item for item in sample_items() if item.task == "vqa_closed"]
    swapped = probes.swapped(closed, seed=0)
    owner = {item.image: item.group for item in closed}
    for old, new in zip(closed, swapped, strict=True):
        assert owner[new.image] != old.group
        assert dataclasses.replace(new, image=old.image) == old
    assert probes.swapped(closed[::-1], seed=0) == swapped[::-1]
    assert probes.swapped(closed, seed=1) != swapped
    with pytest.raises(task_items.TaskError, match="one group"):
        probes.swapped(closed[:1], seed=0)


# Inference with scripted answers in place of a model.


class Scripted:
    """Answers "yes" or a gray image, and lists the requested items."""

    def __init__(self):
        self.requested = []

    def stream(self, requests):
        for index in reversed(range(len(requests))):  # in another order than requested
            self.requested.append(requests[index].id)
            image = PIL.Image.new("RGB", (16, 16), "gray")
            generated = [model_bundle.Image(image, np.array([1, 2]))]
            yield (
                index,
                generated if requests[index].mode == "image" else [model_bundle.Text(" yes ")],
            )


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(inference, "FLUSH", 2)
    return Scripted()


def run_all(model, tmp_path, items, progress=print):
    return inference.run_items(
        model,
        items,
        mode="strict",
        images_folder=tmp_path,
        out=tmp_path / "records.jsonl",
        progress=progress,
    )


def many(count=7):
    rows = [ROWS[i % 5] | dict(id=f"i/{i}") for i in range(count)]
    return task_items.from_rows(rows)


def test_records_are_in_the_order_of_the_items(scripted, tmp_path):
    items = many()
    records = run_all(scripted, tmp_path, items)
    assert [r.id for r in records] == [item.id for item in items]
    assert records[0].text == "yes" and records[4].generated == ("records_images/i_4_0.png",)
    assert (tmp_path / records[4].generated[0]).exists()
    assert sorted(scripted.requested) == sorted(item.id for item in items)
    assert run_all(scripted, tmp_path, items) == records and len(scripted.requested) == len(items)


def untimed(records):
    """Return the records without their times, which differ between runs."""
    return [dataclasses.replace(record, seconds=None) for record in records]


@pytest.mark.parametrize("cut", [0, 9])
def test_an_interrupted_run_resumes(scripted, tmp_path, cut):
    items = many(9)
    whole = run_all(scripted, tmp_path / "whole", items)
    lines = []

    def stop(line):
        lines.append(line)
        if len(lines) == 3:
            raise KeyboardInterrupt

    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        run_all(scripted, part, items, progress=stop)
    path = part / "records.jsonl"
    if cut:  # a crash in the middle of a line
        path.write_bytes(path.read_bytes()[:-cut])
    kept = len(path.read_text().splitlines()) - bool(cut)
    assert 0 < kept < len(items)
    scripted.requested.clear()
    assert untimed(run_all(scripted, part, items)) == untimed(whole)
    assert len(scripted.requested) == len(items) - kept
    written = [read_records(folder / "records.jsonl") for folder in (part, tmp_path / "whole")]
    by_id = [sorted(untimed(records), key=lambda record: record.id) for records in written]
    assert by_id[0] == by_id[1] and len(by_id[0]) == len(items)


def test_other_items_require_another_workdir(scripted, tmp_path):
    run_all(scripted, tmp_path, many())
    changed = [dataclasses.replace(item, prompt="else") for item in many()]
    with pytest.raises(EvalError, match="item i/0 differs from the item"):
        run_all(scripted, tmp_path, changed)


class Plain:
    """A minimal model of a user: one method that returns texts and images."""

    def generate(self, requests):
        return [[PIL.Image.new("RGB", (16, 16))] if a.mode == "image" else "yes" for a in requests]


def test_any_object_with_generate_is_a_model(tmp_path):
    records = run_all(Plain(), tmp_path, many())
    assert [bool(r.generated) for r in records] == [i % 5 == 4 for i in range(7)]
    assert [r.text for r in records if not r.generated] == ["yes"] * 6
    with pytest.raises(ValueError, match="item i/0: a segment is a int; use str or PIL.Image"):
        base.split_segments([3], where="item i/0")


# The program, with a model of random weights.

folder = micro.folder


def settings(tmp_path):
    (tmp_path / "items.jsonl").write_text(
        "".join(json.dumps(row | dict(group=f"g{i}")) + "\n" for i, row in enumerate(ROWS[:3]))
    )
    for name in "abc":
        PIL.Image.new("RGB", (20, 20), dict(a="red", b="blue", c="gray")[name]).save(
            tmp_path / f"{name}.png"
        )
    config = eval_tiny.get_config().unlock()
    config.questions = str(tmp_path / "items.jsonl")
    config.counts.update(captioning=0, image_generation=0, multimodal=0)
    config.update(baselines="", probes="", rows=4)
    return dataclasses.replace(build(Settings, config), sample=micro.SAMPLE)


def test_a_run_writes_scores_and_a_page(folder, tmp_path):
    out = tmp_path / "out"
    arguments = dict(model=f"native:{folder}", adapter="", progress=print)
    summary = stages.run(settings(tmp_path), out, **arguments)
    assert read_summary(out).to_json() == json.loads((out / "summary.json").read_text())
    assert {(row.task, row.metric) for row in summary.scores} == {
        ("vqa_rad_closed", "accuracy"),
        ("pmc_vqa_mcq", "accuracy"),
        ("slake_open", "exact"),
        ("slake_open", "token_f1"),
    }
    text = (out / "report.html").read_text()
    assert "Content-Security-Policy" in text and "Is it a CT?" in text
    assert page.markdown([row.to_json() for row in summary.scores]).startswith(
        "| task | family | metric | mode | n |"
    )
    before = (out / "records.jsonl").read_bytes()
    stages.run(settings(tmp_path), out, **arguments)
    assert (out / "records.jsonl").read_bytes() == before
    other = dataclasses.replace(
        settings(tmp_path), sample=dataclasses.replace(micro.SAMPLE, max_gen_len=3)
    )
    with pytest.raises(EvalError, match="another sample; use a new --workdir"):
        stages.run(other, out, **arguments)


def test_a_model_without_a_kind_is_refused(tmp_path):
    with pytest.raises(EvalError, match="expected KIND:WHERE with KIND one of native, hf"):
        stages.run(settings(tmp_path), tmp_path, model="somewhere", adapter="", progress=print)
