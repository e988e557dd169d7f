"""The defects of the released evaluation, by number: that this one has none of them.

docs/reference/release_defects.md has the table of all; the others' goldens are in the files that it
names.
"""

import dataclasses
import re
import tempfile
import time
from pathlib import Path

import differences_of_families
import eval_setup
import numpy as np
import PIL.Image
import pytest
from llm_server import serving, short_waits  # noqa: F401
from test_efficientnet import tensors as lite_tensors
from test_eval import settings
from test_house import imports, modules
from test_judging import a_judge, judge_all

from medmax_jax.configs import eval_paper, eval_suite
from medmax_jax.eval.config import JudgeSettings
from medmax_jax.eval.encoders import efficientnet
from medmax_jax.eval.encoders.scorer import EfficientNetScorer
from medmax_jax.eval.metrics import aggregate, llm_judge, per_record, release
from medmax_jax.eval.models import base
from medmax_jax.eval.pipeline import image_scoring, inference, judging, stages
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.stats.intervals import Resampling
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.io import journal

ROOT = Path(__file__).parents[2]
SETTINGS = dict(mode="strict", resampling=Resampling(0, 2_000))


class Scripted:
    """Says what it is told to, by id; answers in the reverse of the order that it was asked in."""

    def __init__(self, said):
        self.said, self.asked = said, []

    def stream(self, asks):
        self.asked += [ask.id for ask in asks]
        for index in reversed(range(len(asks))):
            yield index, self.said.get(asks[index].id, [])

    def generate(self, asks):
        return [found for _, found in sorted(self.stream(asks), key=lambda pair: pair[0])]


def answers(model, items, folder, **more):
    fixed = dict(mode="strict", images_folder=folder, out=folder / "records.jsonl")
    return inference.run_items(model, items, progress=lambda line: None, **fixed, **more)


def test_1_2_image_generation_runs_on_all_rows_and_on_fewer_than_100(tmp_path):
    rows = [
        dict(task_name="image_generation", question_type="quilt", prompt=f"Draw {n}.", answer="")
        | dict(image_path="")
        for n in range(3)
    ]
    items = task_items.from_rows(rows)
    drawn = PIL.Image.new("RGB", (32, 32), "red")
    records = answers(Scripted({item.id: [drawn] for item in items}), items, tmp_path)
    assert [len(record.generated) for record in records] == [1, 1, 1]
    with pytest.raises(release.PaperError, match="takes the first 100 or stops"):
        release.generation([0.5] * 3)


def test_3_folders_may_be_relative(tmp_path, monkeypatch):
    records = eval_setup.records(tmp_path / "deep" / "folder")
    monkeypatch.chdir(tmp_path)
    lite = EfficientNetScorer(efficientnet.from_tensors(lite_tensors()), batch=4)
    folder = Path("deep/folder")
    image_scoring.score_images(
        records,
        [lite],
        folder,
        images_folder=folder,
        resampling=Resampling(0, 2_000),
        progress=lambda line: None,
    )
    lines = per_record.read(folder).image_scores["efficientnet_lite0"]
    assert lines["multimodal/0"]["image_image"] == pytest.approx([1.0], abs=1e-5)


@pytest.mark.parametrize("family", task_items.FAMILIES)
def test_5_every_prompt_requests_existing_text_and_images(family, tmp_path):
    for prompt in task_items.PROMPTS:
        found = task_items.prompt_parts(eval_setup.item("x", family, 0), tmp_path, prompt)
        assert all(found) and sum(isinstance(part, Path) for part in found) == (
            task_items.FAMILIES[family].shows_image
        )


def test_6_an_empty_answer_is_an_answer(tmp_path):
    items = [eval_setup.item("x_closed", "vqa_closed", 0, answer="yes"),
             eval_setup.item("multimodal", "multimodal", 1)]  # fmt: skip
    records = answers(Scripted({}), items, tmp_path)
    assert [(r.text, r.generated) for r in records] == [("", ()), ("", ())]
    row = aggregate.summary(records, **SETTINGS)[0]
    assert (row.value, row.n_unparsed, row.n) == (0, 1, 1)


def test_7_failed_items_do_not_stop_the_others(tmp_path):
    items = [eval_setup.item("x_closed", "vqa_closed", 0, answer="yes"),
             eval_setup.item("x_closed", "vqa_closed", 1, answer="yes"),
             eval_setup.item("captioning_x", "captioning", 2)]  # fmt: skip
    output = {
        "x_closed/0": base.FailedResponse(why="refused"),
        "x_closed/1": ["yes"],
        "captioning_x/2": ["A CT"],
    }
    rows = aggregate.summary(answers(Scripted(output), items, tmp_path), **SETTINGS)
    closed = rows[0]
    assert (closed.n, closed.n_errors, closed.n_unscored) == (2, 1, 1)
    assert (closed.value, closed.best, closed.scored_only) == (0.5, 1, 1)
    assert rows[1].task == "captioning_x" and rows[1].n_errors == 0


def test_13_14_16_strict_has_no_penalty_and_states_image_sampling():
    strict, published = (c.get_config().sample for c in (eval_suite, eval_paper))
    assert strict.repetition_penalty == 1.0 and published.repetition_penalty == 1.2
    assert strict.text_greedy and not strict.image_greedy  # said by two fields, not implied by one
    assert strict.budget == "answer"  # max_gen_len is of an answer's text, not of each part


def test_22_the_reference_caption_counts(tmp_path):
    one = eval_setup.item("captioning_x", "captioning", 0, answer="A CT of the chest")
    rows = aggregate.summary([eval_setup.record(one, "A CT of the chest")], **SETTINGS)
    assert {row.metric: row.value for row in rows} == {
        "token_f1": 1, "rouge_l": 1, "bleu": pytest.approx(1), "cider": 0
    }  # fmt: skip
    assert "caption_caption" in per_record.IMAGE_METRICS["captioning"]


def test_23_rubric_requires_the_same_answer():
    ours, theirs = (
        (ROOT / "eval" / "prompts" / f"{name}.txt").read_text()
        for name in ("judge_correct", "release_correctness")
    )
    assert "good enough" in theirs and "good enough" not in ours
    assert "says the same as the reference" in ours and "is not correct if it contradicts" in ours


def test_26_intervals_account_for_questions_that_share_an_image():
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(40) < 0.6, 14)  # all questions of an image have the same result
    items = [eval_setup.item("x_closed", "vqa_closed", n, answer="yes", group=f"g{n // 14}")
             for n in range(560)]  # fmt: skip
    records = [
        eval_setup.record(i, "yes" if r else "no") for i, r in zip(items, right, strict=True)
    ]
    (row,) = aggregate.summary(records, **SETTINGS)
    naive = 2 * 1.96 * release.accuracy(right.astype(float))[1]
    assert row.groups == 40 and row.ci_high - row.ci_low > 3 * naive
    assert row.mde == pytest.approx(
        intervals.minimum_detectable_effect(right, [i.group for i in items], paired=False)
    )


def test_27_28_answers_of_all_tasks_are_kept_without_duplicates(tmp_path):
    records = eval_setup.records(tmp_path)
    lite = EfficientNetScorer(efficientnet.from_tensors(lite_tensors()), batch=4)

    def see():
        image_scoring.score_images(
            records,
            [lite],
            tmp_path,
            images_folder=tmp_path,
            resampling=Resampling(0, 2_000),
            progress=lambda line: None,
        )
        return (tmp_path / per_record.IMAGE_SCORES).read_bytes()

    once = see()
    assert see() == once
    named = {record.task for record in records if record.family in per_record.IMAGE_METRICS}
    lines = per_record.read(tmp_path).image_scores["efficientnet_lite0"]
    assert {name.split("/")[0] for name in lines} == named and len(named) == 3
    items = [eval_setup.item(task, "captioning", n) for task in ("a", "b") for n in range(2)]
    items = [dataclasses.replace(i, id=f"{i.task}{n}") for n, i in enumerate(items)]
    answers(Scripted({}), items, tmp_path / "out")
    kept = journal.read_jsonl(tmp_path / "out" / "records.jsonl")
    assert {record["task"] for record in kept} == {"a", "b"} and len(kept) == 4


def test_29_missing_key_is_reported_before_any_request(tmp_path, monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    now = settings(tmp_path)
    service = dataclasses.replace(now.judge.service, key_env="A_KEY")
    who = dataclasses.replace(now.judge, endpoint="m@http://127.0.0.1:9/v1", service=service)
    with pytest.raises(llm_judge.JudgeError, match="'A_KEY', a variable that is not set; export"):
        stages.run(
            dataclasses.replace(now, judge=who),
            tmp_path / "out",
            model="baseline:constant",
            progress=print,
        )
    assert not (tmp_path / "out" / "records.jsonl").exists()
    assert isinstance(who, JudgeSettings)


def test_29_cost_and_calls_are_reported(tmp_path):
    records = [r for r in eval_setup.records(tmp_path) if r.family == "vqa_open"]

    def behave(request, n):
        time.sleep(0.05)  # so that calls meet
        return eval_setup.judge(request)

    with serving(behave) as llm:
        report = judge_all(a_judge(llm.url, price_in=1.0, price_out=10.0), records, tmp_path)
        assert report["calls"] == len(llm.requests) > 0
        assert report["usd"] == pytest.approx(2e-4 * report["calls"]) and llm.most_at_once > 1
    assert (tmp_path / judging.CALLS).exists()


def test_30_estimates_and_requests_download_nothing():
    names = {"tiktoken", "openai", "backoff", "open_clip", "datasets"}
    for name, path in modules().items():
        if name.startswith(
            (
                "medmax_jax.eval",
                "medmax_jax.endpoints.cached_chat_api",
                "medmax_jax.endpoints.chat_api",
            )
        ):
            found = set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
            assert not names & found, name
    assert "medmax_jax.endpoints.cached_chat_api" in imports(
        modules()["medmax_jax.eval.pipeline.judging"]
    )


def test_31_answers_are_paired_by_id_and_never_by_order(tmp_path):
    items = [eval_setup.item("x_closed", "vqa_closed", n, answer="yes") for n in range(6)]
    output = {item.id: ["yes" if n < 2 else "no"] for n, item in enumerate(items)}
    records = answers(Scripted(output), items, tmp_path)
    assert [r.text for r in records] == ["yes"] * 2 + ["no"] * 4
    twice = [dict(task_name="image_captioning", question_type="x", prompt="", answer="", id="a",
                  image_path="a.png")] * 2  # fmt: skip
    with pytest.raises(task_items.TaskError, match="id 'a' occurs more than once"):
        task_items.from_rows(twice)


def test_the_documents_have_the_families_side_by_side():
    with tempfile.TemporaryDirectory() as name:
        table = differences_of_families.table(Path(name))
    text = (ROOT / "docs" / "explanation" / "scoring.md").read_text()
    for line in table.splitlines():
        assert line in text, line


def test_every_defect_has_a_line_and_each_test_it_names_exists():
    part = (ROOT / "docs" / "reference" / "release_defects.md").read_text()
    rows = re.findall(r"^\| (\d+) \| .* \| `(\w+\.py)::(\w+)` \|$", part, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 32))
    for _, file, name in rows:
        assert re.search(
            rf"^def {name}\(", next((ROOT / "tests").rglob(file)).read_text(), re.MULTILINE
        ), name
