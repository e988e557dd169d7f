"""The evaluation parquet to items that the suite asks, and what is refused."""

import json
import stat
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medmax_jax.data import prepare
from medmax_jax.data.mixture import RELEASED_ROWS, RELEASED_TOGETHER
from medmax_jax.data.release import chat_answers, eval_rows
from medmax_jax.data.release.train_rows import PublishedError
from medmax_jax.endpoints import egress
from medmax_jax.eval.tasks import items as task_items

CHAT = {  # the published form, written as Python writes it
    "fig_label": "Fig. 3",
    "fig_caption": "A cyst's wall.",
    "in_text_mention": [{"tokens": "None found ( Fig. 3 ) .", "entities": [{"start_tok": 3}]}],
    "gpt4_answer": "A thin tissue.",
    "domain": {"chest_xray": False, "mri": False, "ct_scan": False, "histology": True},
}


def row(task="vqa_rad", kind="closed", **changes):
    columns = dict(prompt="Is it a CT?", answer="yes", image_path="images/a.png")
    return dict(task_name=task, question_type=kind) | columns | changes


def every():
    """A row of each task and question type."""
    return [
        row(
            task,
            kind,
            prompt=f"{task} {kind} \u2028 é" + "\nA: CT\nB: MRI" * (kind == "mcq"),
            image_path=f"./images/{task}_{kind}.png",  # an image has one class
            answer=repr(CHAT) if task == "visual_chat" else "B" if kind == "mcq" else "yes",
        )
        for task, kinds in eval_rows.KNOWN.items()
        for kind in (kinds or ("", "multimodal", None))
    ]


def parquet(tmp_path, rows, **types):
    fields = [(n, types.get(n, pa.string())) for n in eval_rows.COLUMNS]
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    pq.write_table(table, tmp_path / "eval.parquet", row_group_size=7)
    return tmp_path / "eval.parquet"


def bring(tmp_path, rows, tasks=(), out="items.jsonl", **types):
    path = parquet(tmp_path, rows, **types)
    fixed = dict(tasks=tasks, allow_counts=True, say=lambda _: None)
    return eval_rows.import_items(path, tmp_path / out, **fixed)


def items_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]  # as eval/run.py splits


def test_every_row_becomes_an_item(tmp_path):
    rows = every()
    told = bring(tmp_path, rows)
    found = items_in(tmp_path / "items.jsonl")
    assert told["rows"] == len(found) == len(rows) and set(told["tasks"]) == set(eval_rows.KNOWN)
    for n, (item, given) in enumerate(zip(found, rows, strict=True)):
        assert item["id"] == f"{given['task_name']}-{n:06d}"
        assert item["image_path"] == given["image_path"].removeprefix("./")
        assert item["question_type"] == (given["question_type"] or "")
        assert (item["prompt"], item["answer"]) == (given["prompt"], given["answer"])
    assert stat.S_IMODE((tmp_path / "items.jsonl").stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.parquet", "items.jsonl"]


def test_the_suite_asks_all(tmp_path):
    told = bring(tmp_path, every())
    items = task_items.from_rows(items_in(tmp_path / "items.jsonl"))
    assert len(items) == told["rows"] and {i.family for i in items} == set(task_items.FAMILIES)
    reports = {i.task for i in items if i.data_class == egress.CREDENTIALED}
    assert reports == {"captioning_report", "image_generation_report"}  # MIMIC-CXR


@pytest.mark.parametrize(
    "answer",
    [
        repr(CHAT | {"gpt4_answer": 1}),
        repr(CHAT | {"gpt4_answer": " "}),
        repr(CHAT).replace("'A thin tissue.'", "__import__('os').abort()"),
        repr(CHAT) + "x" * chat_answers.MAX_TEXT,
        "[" * 500,
        "(" * 5_000 + ")" * 5_000,
        "yes",
        "['a']",
    ],
)
def test_a_dictionary_that_is_none(tmp_path, answer):
    with pytest.raises(PublishedError, match="visual_chat: answer"):
        bring(tmp_path, [row("visual_chat", "conversation", answer=answer)])
    with pytest.raises(task_items.TaskError, match="row x: answer"):
        task_items.from_rows([row("visual_chat", "conversation", answer=answer, id="x")])


@pytest.mark.parametrize("written", [repr, json.dumps])
def test_a_dictionary_as_text_stays_text(tmp_path, written):
    bring(tmp_path, [row("visual_chat", "conversation", answer=written(CHAT))])
    (item,) = items_in(tmp_path / "items.jsonl")
    assert item["answer"] == written(CHAT)
    (read,) = task_items.from_rows([item])
    assert read.answer == "A thin tissue." and read.slices == (("domain", "histology"),)
    assert "Fig. 3: A cyst's wall." in read.context and "None found" in read.context
    assert dict(read.released)["in_text_mention"] == str(CHAT["in_text_mention"])


def test_other_numbers_of_rows_than_published(tmp_path):
    path = parquet(tmp_path, [row()] * 20)
    fixed = dict(tasks=[], say=lambda _: None)
    with pytest.raises(PublishedError, match="20 rows, published are 9465 to 9474; 20 rows of vqa"):
        eval_rows.import_items(path, tmp_path / "items.jsonl", allow_counts=False, **fixed)
    assert not (tmp_path / "items.jsonl").exists()
    told = bring(tmp_path, [row()] * 20)
    assert len(told["other_counts"]) == 2
    low, together = RELEASED_ROWS[0], RELEASED_TOGETHER[1]
    rows = [row("pathvqa")] * together + [row("slake")] * (low - together)
    path = parquet(tmp_path, rows)
    told = eval_rows.import_items(path, tmp_path / "whole.jsonl", allow_counts=False, **fixed)
    assert told["other_counts"] == [] and told["rows"] == low


def test_more_rows_than_a_batch(tmp_path):
    told = bring(tmp_path, [row(prompt=f"{n}?") for n in range(eval_rows.BATCH * 2 + 3)])
    found = items_in(tmp_path / "items.jsonl")
    assert told["rows"] == len(found) == 515 and [i["prompt"] for i in found][514] == "514?"


def test_unknown_rows_are_listed_and_nothing_is_written(tmp_path):
    rows = [row(), row("vqa_rad", "mcq"), row("vqa_rad", "mcq"), row("new_task"), row(None, None)]
    with pytest.raises(PublishedError) as error:
        bring(tmp_path, rows)
    for said in (
        "unknown vqa_rad / mcq (2 rows, first 1)",
        "unknown new_task / closed (1 rows, first 3)",
        "unknown None / None (1 rows, first 4)",
    ):
        assert said in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["eval.parquet"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row(prompt=None), "vqa_rad: no prompt"),
        (row(answer=""), "vqa_rad: no answer"),
        (row(image_path=None), "vqa_rad: no image_path"),
        (row(image_path="/etc/a.png"), "image_path leaves its folder"),
        (row(image_path="a/../../b.png"), "image_path leaves its folder"),
        (row(prompt="x" * (eval_rows.MAX_TEXT + 1)), "prompt over 1048576 characters"),
    ],
)
def test_a_row_that_is_not_whole(tmp_path, bad, said):
    with pytest.raises(PublishedError, match=said):
        bring(tmp_path, [row(), bad])
    assert not (tmp_path / "items.jsonl").exists()


def test_a_generated_image_needs_no_answer(tmp_path):
    bring(tmp_path, [row("image_generation", "pmc_oa", answer=None)])
    assert items_in(tmp_path / "items.jsonl")[0]["answer"] == ""


def test_files_that_are_something_else(tmp_path, monkeypatch):
    out = tmp_path / "items.jsonl"

    def refused(path, said, tasks=()):
        with pytest.raises(PublishedError, match=said):
            eval_rows.import_items(path, out, tasks=tasks, allow_counts=True, say=print)
        assert not out.exists()

    refused(tmp_path / "none.parquet", "no such file; name the published parquet")
    path = parquet(tmp_path, [row()] * 20)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"PAR1" + bytes(200), whole[:4] + whole[40:]):
        path.write_bytes(damaged)
        refused(path, "no parquet, or damaged|no column")
    pq.write_table(pa.table({"task_name": ["a"]}), path)
    refused(path, "no column question_type; the published file has")
    columns = {name: ["a"] for name in eval_rows.COLUMNS} | {"answer": [1]}
    pq.write_table(pa.table(columns), path)
    refused(path, "column answer is int64; need text")
    path = parquet(tmp_path, [row()])
    refused(path, "--tasks has 'chat'; use some of", tasks=["chat"])
    refused(path, "no row of the tasks asked for", tasks=["slake"])
    monkeypatch.setattr(eval_rows, "MAX_ROWS", 0)
    refused(path, "1 rows, in groups")
    out.write_text("mine")
    with pytest.raises(PublishedError, match="exists; choose another --out"):
        eval_rows.import_items(path, out, tasks=[], allow_counts=True, say=print)


def test_columns_as_categories(tmp_path):
    bring(tmp_path, [row()], task_name=pa.dictionary(pa.int32(), pa.string()))
    assert items_in(tmp_path / "items.jsonl")[0]["task_name"] == "vqa_rad"


def test_program(tmp_path):
    path, out = parquet(tmp_path, every()), tmp_path / "items.jsonl"
    command = [sys.executable, "-m", "data.prepare", "import", "--from", path, "--out", out]
    asked = [*map(str, command), "--tasks", "vqa_rad", "mm_out", "--json"]
    done = subprocess.run(asked, cwd=prepare.TINY.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"] == {"mm_out": 3, "vqa_rad": 2}
    assert len(task_items.from_rows(items_in(out))) == 5
    again = subprocess.run(asked, cwd=prepare.TINY.parents[1], capture_output=True, text=True)
    assert again.returncode == 1 and "exists; choose another" in again.stderr
