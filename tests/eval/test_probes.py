"""Probes with changed images and options; option likelihoods; contamination by training records."""

import dataclasses
import json
import shutil

import eval_setup
import numpy as np
import pytest

from medmax_jax.data import prepare
from medmax_jax.data.analysis import check
from medmax_jax.data.records import jsonl, writer
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.metrics import aggregate, per_record
from medmax_jax.eval.pipeline import contamination, option_likelihoods
from medmax_jax.eval.stats.intervals import Resampling
from medmax_jax.eval.tasks import catalog, probes
from medmax_jax.eval.tasks import items as task_items

RESAMPLING = Resampling(0, 2_000)


def many(count=12):
    result = [
        eval_setup.item("x_closed", "vqa_closed", n, answer="yes", image=f"{n // 3}.png")
        for n in range(count)
    ]
    return result + [
        eval_setup.item("x_mcq", "vqa_mcq", n, answer="ABC"[n % 3], prompt=eval_setup.PROMPT)
        for n in range(count)
    ]


def test_shuffled_images_stay_in_the_task_and_leave_their_question():
    items = many()
    moved = probes.shuffled(items, seed=0)
    assert [i.id for i in moved] == [i.id for i in items]
    for task in ("x_closed", "x_mcq"):
        before, after = ([i.image for i in part if i.task == task] for part in (items, moved))
        assert sorted(before) == sorted(after)
        assert all(a != b for a, b in zip(before, after, strict=True))
    assert moved == probes.shuffled(items, seed=0) != probes.shuffled(items, seed=1)
    alike = [dataclasses.replace(item, image="0.png") for item in items]
    with pytest.raises(
        task_items.TaskError, match="more than half of its 12 questions are about one image"
    ):
        probes.shuffled(alike, seed=0)


def test_blank_images_have_their_own_folder(tmp_path):
    items = probes.blank(many(), tmp_path / "blank")
    assert {item.image for item in items} == {probes.BLANK}
    with probes.PIL.Image.open(tmp_path / "blank" / probes.BLANK) as image:
        assert image.getextrema() == ((128, 128),) * 3


def test_options_move_with_the_answer():
    item = eval_setup.item("x", "vqa_mcq", 0, prompt=eval_setup.PROMPT, answer="A")
    (turned,) = probes.rotated([item], 1)
    assert turned.prompt == "Which?\nA: PET\nB: CT\nC: MRI" and turned.answer == "B"
    (twice,) = probes.rotated([item], 2)
    assert twice.prompt == "Which?\nA: MRI\nB: PET\nC: CT" and twice.answer == "C"
    assert probes.rotated([item], 3) == [] and twice.id == item.id
    tail = dataclasses.replace(item, prompt=eval_setup.PROMPT + "\nAnswer with a letter.")
    assert probes.rotated([tail, eval_setup.item("x", "vqa_closed", 1)], 1) == []


ALL = probes.IMAGE_FAMILIES


def test_probes_and_their_numbers_of_items():
    items = many()
    makers = probes.probe_items(items, ("blank", "shuffled", "swapped", "rotated"), ALL)
    assert list(makers) == ["blank", "shuffled", "swapped", "rotated_1", "rotated_2"]
    assert len(makers["rotated_2"](0, None)) == 12
    assert {name: len(of(0, None)) for name, of in makers.items()} == dict(
        blank=24, shuffled=24, swapped=24, rotated_1=12, rotated_2=12
    )
    assert (
        probes.probe_items(items, (), ALL) == {} and probes.probe_items([], ("blank",), ALL) == {}
    )
    with pytest.raises(task_items.TaskError, match="'flipped', which is not a probe; use blank"):
        probes.probe_items(items, ("flipped",), ALL)


def test_every_family_that_shows_an_image_can_be_probed():
    questions = {"vqa_closed", "vqa_mcq", "vqa_rationale", "vqa_open", "vqa_numeric"}
    assert set(ALL) == questions | {"captioning", "visual_chat"}
    items = many() + [
        eval_setup.item(f"x_{family}", family, n)
        for family in (*ALL[2:], "image_generation")
        for n in range(4)
    ]
    names = ("blank", "shuffled", "swapped", "rotated")
    for families in (ALL, ("captioning", "vqa_mcq"), ("visual_chat",), ()):
        makers = probes.probe_items(items, names, families)
        result = {name: of(0, None) for name, of in makers.items()}
        for name in set(names) - {"rotated"} & set(result):
            assert len(result[name]) == sum(item.family in families for item in items)
        assert {i.family for some in result.values() for i in some} == set(families)
    few, whole = (probes.probe_items(items, names, some) for some in (("vqa_mcq",), ALL))
    for name in ("shuffled", "swapped", "rotated_1"):  # another family asks no other question
        assert {i.id: i for i in few[name](0, None)}.items() <= {
            i.id: i for i in whole[name](0, None)
        }.items()
    with pytest.raises(
        task_items.TaskError, match="'image_generation', which is not a family that shows"
    ):
        probes.probe_items(items, names, ("image_generation",))


def test_captions_and_chats_have_a_metric_without_a_judge():
    """A probe compares metrics that both sides have; a scorer's metric comes first."""
    caption, chat, opened = (
        [eval_setup.record(eval_setup.item(f"x_{f}", f, n, answer="A CT of it."), "A CT of it.")
         for n in range(6)]
        for f in ("captioning", "visual_chat", "vqa_open")
    )  # fmt: skip
    before = caption + chat + opened
    after = [
        dataclasses.replace(one, text="An MRI" if n % 2 else "a CT of it")
        for n, one in enumerate(before)
    ]
    after = [dataclasses.replace(one, image="other.png") for one in after]
    judged = {
        "correct": {r.id: dict(votes=[1.0], why="") for r in opened},
        "relative": {r.id: dict(votes=[[8.0, 9.0]], why="") for r in chat},
    }
    inputs = per_record.ScoringInputs(judgments=judged)
    rows = {
        r["task"]: r
        for r in probes.summary(before, {"swapped": after}, inputs, resampling=RESAMPLING)
    }
    metrics = {task: row["metric"] for task, row in rows.items()}
    assert metrics == {
        "x_captioning": "token_f1", "x_visual_chat": "token_f1", "x_vqa_open": "exact"
    }  # fmt: skip
    for row in rows.values():
        assert (row["before"], row["flips"]) == (1, 0.5) and row["after"] == 0.5
    true = probes.captions_to_score(before, {"swapped": after, "rotated_1": after[6:]})
    assert list(true) == ["swapped"] and len(true["swapped"]) == 6
    assert [one.image for one in true["swapped"]] == [one.image for one in caption]

    def scored(cosine):
        lines = {r.id: dict(image_text=[cosine], text_text=1.0, combined=0.5) for r in caption}
        return per_record.ScoringInputs(image_scores={"biomedclip": lines})

    result = probes.summary(
        before, {"swapped": after}, scored(0.5), {"swapped": scored(0.2)}, resampling=RESAMPLING
    )
    (row,) = [row for row in result if row["task"] == "x_captioning"]
    assert (row["metric"], row["before"]) == ("clip_image_text", 0.5)
    assert row["after"] == pytest.approx(0.2)
    unseen = probes.summary(before, {"swapped": after}, scored(0.5), resampling=RESAMPLING)
    assert [r["metric"] for r in unseen if r["task"] == "x_captioning"] == ["token_f1"]


def test_deltas_and_flips():
    """A model that always answers B keeps its accuracy per rotation and has none over all."""
    items = [i for i in many() if i.family == "vqa_mcq"]
    records = [eval_setup.record(item, "B") for item in items]
    turned = {
        f"rotated_{k}": [eval_setup.record(item, "B") for item in probes.rotated(items, k)]
        for k in (1, 2)
    }
    rows = {row["probe"]: row for row in probes.summary(records, turned, resampling=RESAMPLING)}
    assert rows["rotated_1"]["before"] == rows["rotated_1"]["after"] == pytest.approx(1 / 3)
    assert rows["rotated_1"]["flips"] == 1 and rows["rotated_1"]["ci_low"] < 0
    assert rows["rotated_all"]["after"] == 0 and rows["rotated_all"]["flips"] == 1
    assert rows["rotated_all"]["n"] == 12 and rows["rotated_all"]["groups"] == 6
    reads = {
        name: [eval_setup.record(item, item.answer) for item in probes.rotated(items, k)]
        for k, name in ((1, "rotated_1"), (2, "rotated_2"))
    }
    right = [eval_setup.record(item, item.answer) for item in items]
    rows = {row["probe"]: row for row in probes.summary(right, reads, resampling=RESAMPLING)}
    assert rows["rotated_all"]["after"] == 1 and rows["rotated_all"]["flips"] == 0
    closed = [i for i in many() if i.family == "vqa_closed"]
    before = [eval_setup.record(item, "yes") for item in closed]
    after = [eval_setup.record(item, "yes" if n < 6 else "No.") for n, item in enumerate(closed)]
    (row,) = probes.summary(before, {"blank": after}, resampling=RESAMPLING)
    assert (row["diff"], row["flips"]) == (-0.5, 0.5) and row["ci_low"] < -0.5 < row["ci_high"]


class Likely:
    """Gives a high likelihood to "yes" and to B."""

    fingerprint = "likely"
    requested = 0

    def score_options(self, requests, options):
        self.requested += len(requests)
        return [[np.log(0.9) if o in ("yes", "B") else np.log(0.05) for o in os] for os in options]


def score(model, items, out, lines=None):
    return option_likelihoods.score(
        model,
        items,
        mode="strict",
        prompt="sft",
        images_folder="x",
        out=out,
        progress=(lines if lines is not None else []).append,
        window=256,
    )


def test_likelihoods_are_computed_once_and_calibrated(tmp_path):
    items = [dataclasses.replace(i, answer="no") if i.id in ("x_closed/0", "x_closed/1") else i
             for i in many()]  # fmt: skip
    items.append(eval_setup.item("x_mcq", "vqa_mcq", 99, prompt="Which?", answer="A"))
    model, out = Likely(), tmp_path / "options.jsonl"
    lines = score(model, items, out)
    assert (
        model.requested == 24 and lines[0]["options"] == ["yes", "no"] and lines[0]["answer"] == 1
    )
    assert lines[12]["options"] == ["A", "B", "C"] and lines[12]["answer"] == 0
    rows = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(rows[:20]) + rows[20][:30])
    assert score(model, items, out) == lines and model.requested == 24 + 4
    progress: list[str] = []
    result = option_likelihoods.summary(
        lines, n_items=25, reason="", progress=progress.append, resampling=RESAMPLING
    )
    assert progress[-1].startswith(f"calibration of {lines[-1]['task']}: 2000 of 2000 resamples")
    rows = {(row["task"], row["metric"]): row for row in result["rows"]}
    assert result["left_out"] == 1 and len(rows) == 12
    closed = rows["x_closed", "accuracy_by_likelihood"]
    assert closed["value"] == pytest.approx(10 / 12) and closed["ci_low"] < closed["value"]
    sure = 0.9 / 0.95
    assert rows["x_closed", "ece"]["value"] == pytest.approx(sure - 10 / 12)
    assert rows["x_closed", "accuracy_at_80"]["value"] == pytest.approx(10 / 12)  # all as sure
    brier = np.array([2 * (1 - sure) ** 2, 2 * sure**2])
    assert rows["x_closed", "brier"]["value"] == pytest.approx((10 * brier[0] + 2 * brier[1]) / 12)
    (bin_,) = result["bins"]["x_closed"]  # all as sure: one bin holds them
    assert (bin_["n"], bin_["groups"]) == (12, 6) and bin_["low"] == bin_["high"]
    assert bin_["accuracy"] == closed["value"] and bin_["confidence"] == pytest.approx(sure)
    assert (bin_["ci_low"], bin_["ci_high"]) == (closed["ci_low"], closed["ci_high"])
    curve = result["curves"]["x_mcq"]
    assert [point["coverage"] for point in curve] == [k / 10 for k in range(1, 11)]
    assert curve[-1]["risk"] == pytest.approx(2 / 3)
    assert all(point["ci_low"] <= point["risk"] <= point["ci_high"] for point in curve)
    changed = [dataclasses.replace(items[0], prompt="Else?")]
    with pytest.raises(EvalError, match="differs from the item that was scored"):
        score(model, changed, out)


def test_the_calibration_error_is_that_of_the_bins():
    rng = np.random.default_rng(0)
    lines = [
        dict(task="x", group=f"g{n // 2}", answer=int(rng.random() < 0.3),
             log_likelihoods=[0.0, rng.normal()])
        for n in range(105)
    ]  # fmt: skip
    result = option_likelihoods.summary(lines, n_items=105, reason="", resampling=RESAMPLING)
    bins = result["bins"]["x"]
    assert len(bins) == 10 and {one["n"] for one in bins} == {10, 11}
    assert all(a["high"] < b["low"] for a, b in zip(bins, bins[1:], strict=False))
    gap = sum(one["n"] * abs(one["confidence"] - one["accuracy"]) for one in bins) / 105
    (ece,) = [row["value"] for row in result["rows"] if row["metric"] == "ece"]
    assert gap == pytest.approx(ece) and gap > 0.01
    assert all(one["ci_low"] <= one["accuracy"] <= one["ci_high"] for one in bins)
    json.dumps(result, allow_nan=False)


def test_models_without_likelihoods_report_the_reason(tmp_path):
    class Told:
        no_options = "a chat endpoint tells none"

    lines = []
    assert score(Told(), many(), tmp_path / "o.jsonl", lines) == []
    assert lines == ["options: n/a: a chat endpoint tells none"]
    assert not (tmp_path / "o.jsonl").exists()
    result = option_likelihoods.summary(
        [], n_items=24, reason=option_likelihoods.unsupported_reason(Told()), resampling=RESAMPLING
    )
    assert result == dict(reason="n/a: a chat endpoint tells none", rows=[])
    assert option_likelihoods.unsupported_reason(object()) == (
        "n/a: this model has no method score_options"
    )


# Items that are contained in training records.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    command = ["sample", "--out", str(folder / "r"), "--split", "validation"]
    assert prepare.main([*command, "--kind", "instruction"]) == 0
    return folder / "r"


def test_headlines_with_and_without_contaminated_items(trained, tmp_path):
    result = writer.open_records(trained)
    path = next(d.image_path for d in result if d.image_path)
    tokenizer = check.resolve_tokenizer(result, None, prepare.TINY)
    long = max((jsonl.plain_text(d, result.layout, tokenizer) for d in result), key=len)
    folder = tmp_path / "images"
    eval_setup.write_images(folder)
    shutil.copy(prepare.SAMPLE / path, folder / "seen.jpg")
    items = [
        eval_setup.item("x_closed", "vqa_closed", n, answer="yes", image=f"{n % 2}.png")
        for n in range(4)
    ]
    items[0] = dataclasses.replace(items[0], image="seen.jpg")
    items[1] = dataclasses.replace(items[1], prompt=long)

    def find(progress):
        return contamination.find(
            items, trained, tmp_path, model=prepare.TINY, images_folder=folder, progress=progress
        )

    lines = []
    compared = find(lines.append)
    assert len(lines) == 1 and (compared["items"], compared["by_codes"]) == (4, 4)
    flags = contamination.read(tmp_path)
    # Verbatim: part of the data.
    assert flags["x_closed/0"] == dict(id="x_closed/0", picture=True, codes=True, words=False)
    assert flags["x_closed/1"]["words"] and not flags["x_closed/1"]["codes"]
    assert not any(flags["x_closed/2"][way] for way in contamination.WAYS)
    assert [compared[way] for way in contamination.WAYS] == [1, 1, 1]
    assert find(lines.append) == compared and len(lines) == 1  # nothing is compared twice
    answers = [eval_setup.record(i, "yes" if n < 2 else "no") for n, i in enumerate(items)]
    rows = contamination.summary(
        answers, flags, per_record.NO_INPUTS, mode="strict", resampling=RESAMPLING
    )
    parts = {row["part"]: (row["n"], row["value"]) for row in rows}
    assert parts["all"] == (4, 0.5) and parts["clean"] == (2, 0) and parts["contaminated"] == (2, 1)
    by_bytes, _, by_words = contamination.WAYS
    assert parts[by_bytes] == (1, 1) and parts[by_words] == (1, 1)
    ends = {row["part"]: (row["ci_low"], row["ci_high"]) for row in rows}
    assert ends[by_bytes] == ends[by_words] == (None, None)  # of one group each
    wide = [row for row in rows if row["groups"] > 1]
    assert wide and all(row["ci_low"] < row["ci_high"] for row in wide)
    assert all(row["few_groups"] for row in rows)
    none = contamination.summary(
        answers[2:], flags, per_record.NO_INPUTS, mode="strict", resampling=RESAMPLING
    )
    assert {row["part"]: row["n"] for row in none}["contaminated"] == 0


def test_records_of_another_tokenizer_are_refused(trained, tmp_path):
    other = tmp_path / "model"
    other.mkdir()
    with pytest.raises(contamination.ContaminationError, match="whose tokenizer did not write"):
        contamination.find(
            many(), trained, tmp_path, model=other, images_folder=tmp_path, progress=print
        )


# Rows of the summary.


def by_metric(records):
    rows = aggregate.summary(records, mode="strict", resampling=RESAMPLING, cards=catalog.TASKS)
    return {row.metric: vars(row) for row in rows}


def test_probmed_pairs_are_right_together():
    kinds = ["modality", "modality", "entity", "entity"]
    items = [
        eval_setup.item("probmed_closed", "vqa_closed", n, answer="yes" if n % 2 == 0 else "no",
                        image=f"{n // 4}.png", group=f"{n // 4}",
                        slices=(("question_type", kinds[n % 4]),))
        for n in range(8)
    ]  # fmt: skip
    records = [eval_setup.record(i, "yes") for i in items]  # yes to everything has no correct pair
    records[1] = dataclasses.replace(records[1], text="no")  # except for one pair
    rows = by_metric(records)
    assert rows["accuracy"]["value"] == 5 / 8 and rows["accuracy"]["headline"]
    assert (rows["paired_accuracy"]["value"], rows["paired_accuracy"]["n"]) == (1 / 4, 4)
    assert rows["paired_accuracy modality"]["value"] == 1 / 2
    assert rows["paired_accuracy entity"]["value"] == 0
    records[0] = dataclasses.replace(records[0], error="refused")
    rows = by_metric(records)
    assert rows["accuracy"]["n_errors"] == rows["accuracy"]["n_unscored"] == 1
    assert rows["paired_accuracy"]["value"] == 0 and rows["paired_accuracy"]["best"] == 1 / 4


def test_rows_have_the_minimum_detectable_effect_and_are_json(tmp_path):
    records = eval_setup.records(tmp_path)
    rows = [
        row.to_json() for row in aggregate.summary(records, mode="paper", resampling=RESAMPLING)
    ]
    closed = rows[0]
    assert (closed["task"], closed["n"], closed["groups"]) == ("vqa_rad_closed", 5, 3)
    # Yes. right, normal unread, No right, nothing unread, no wrong
    assert (closed["value"], closed["best"], closed["n_unparsed"]) == (2 / 5, 4 / 5, 2)
    assert (closed["scored_only"], closed["paper"], closed["paper_n"]) == (2 / 3, 3 / 5, 5)
    assert closed["mde"] > 0.3 and closed["mode"] == "paper"
    choices = next(row for row in rows if row["task"] == "pmc_vqa_mcq")
    assert (choices["value"], choices["paper"]) == (3 / 5, 1 / 5)
    json.dumps(rows, allow_nan=False)
    heads = [row["task"] for row in rows if row["headline"]]
    assert len(heads) == len(set(heads)) == len({row["task"] for row in rows}) == 6
    assert aggregate.not_scored(eval_setup.records(tmp_path)) == ["image_generation_pmc_oa"]
    alone = aggregate.summary(
        [eval_setup.record(eval_setup.item("x", "vqa_open", 0), "A CT.")],
        mode="strict",
        resampling=RESAMPLING,
    )
    assert alone[0].mde is None
