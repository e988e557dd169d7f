"""Tests of the conversion of the evaluation parquet to items of the suite."""

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
    """Return a row of each task and question type."""
    return [
        row(
            task,
            kind,
            prompt=f"{task} {kind} \u2028 é" + "\nA: CT\nB: MRI" * (kind == "mcq"),
            image_path=f"./images/{task}_{kind}.png",  # an image has one class
            answer=repr(CHAT) if task == "visual_chat" else "B" if kind == "mcq" else "yes",
        )
        for task, kinds in eval_rows.QUESTION_TYPES.items()
        for kind in (kinds or ("", "multimodal", None))
    ]


def parquet(tmp_path, rows, **types):
    fields = [(n, types.get(n, pa.string())) for n in eval_rows.COLUMNS]
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    pq.write_table(table, tmp_path / "eval.parquet", row_group_size=7)
    return tmp_path / "eval.parquet"


def bring(tmp_path, rows, tasks=(), out="items.jsonl", **types):
    path = parquet(tmp_path, rows, **types)
    defaults = dict(tasks=tasks, allow_counts=True, say=lambda _: None)
    return eval_rows.import_items(path, tmp_path / out, **defaults)


def items_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]  # as eval/run.py splits


def test_every_row_becomes_an_item(tmp_path):
    rows = every()
    counts = bring(tmp_path, rows)
    items = items_in(tmp_path / "items.jsonl")
    assert counts["rows"] == len(items) == len(rows) and set(counts["tasks"]) == set(
        eval_rows.QUESTION_TYPES
    )
    for n, (item, expected) in enumerate(zip(items, rows, strict=True)):
        assert item["id"] == f"{expected['task_name']}-{n:06d}"
        assert item["image_path"] == expected["image_path"].removeprefix("./")
        assert item["question_type"] == (expected["question_type"] or "")
        assert (item["prompt"], item["answer"]) == (expected["prompt"], expected["answer"])
    assert stat.S_IMODE((tmp_path / "items.jsonl").stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.parquet", "items.jsonl"]


def test_suite_reads_all_items(tmp_path):
    counts = bring(tmp_path, every())
    items = task_items.from_rows(items_in(tmp_path / "items.jsonl"))
    beyond = {"vqa_rationale", "vqa_numeric", "image_editing", "multimodal_generation"}
    assert len(items) == counts["rows"]
    assert {i.family for i in items} == set(task_items.FAMILIES) - beyond
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
def test_invalid_chat_answers_are_rejected(tmp_path, answer):
    with pytest.raises(PublishedError, match="visual_chat: answer"):
        bring(tmp_path, [row("visual_chat", "conversation", answer=answer)])
    with pytest.raises(task_items.TaskError, match="row x: answer"):
        task_items.from_rows([row("visual_chat", "conversation", answer=answer, id="x")])


@pytest.mark.parametrize("written", [repr, json.dumps])
def test_chat_answer_remains_text(tmp_path, written):
    bring(tmp_path, [row("visual_chat", "conversation", answer=written(CHAT))])
    (item,) = items_in(tmp_path / "items.jsonl")
    assert item["answer"] == written(CHAT)
    (read,) = task_items.from_rows([item])
    assert read.answer == "A thin tissue." and read.slices == (("domain", "histology"),)
    assert "Fig. 3: A cyst's wall." in read.context and "None found" in read.context
    assert dict(read.released)["in_text_mention"] == str(CHAT["in_text_mention"])


def test_unpublished_row_counts_require_a_flag(tmp_path):
    path = parquet(tmp_path, [row()] * 20)
    options = dict(tasks=[], say=lambda _: None)
    with pytest.raises(
        PublishedError, match="20 rows, but 9465 to 9474 are published; 20 rows of vqa"
    ):
        eval_rows.import_items(path, tmp_path / "items.jsonl", allow_counts=False, **options)
    assert not (tmp_path / "items.jsonl").exists()
    counts = bring(tmp_path, [row()] * 20)
    assert len(counts["other_counts"]) == 2
    low, together = RELEASED_ROWS[0], RELEASED_TOGETHER[1]
    rows = [row("pathvqa")] * together + [row("slake")] * (low - together)
    path = parquet(tmp_path, rows)
    counts = eval_rows.import_items(
        path, tmp_path / "complete.jsonl", allow_counts=False, **options
    )
    assert counts["other_counts"] == [] and counts["rows"] == low


def test_rows_of_several_batches(tmp_path):
    counts = bring(tmp_path, [row(prompt=f"{n}?") for n in range(eval_rows.BATCH * 2 + 3)])
    items = items_in(tmp_path / "items.jsonl")
    assert counts["rows"] == len(items) == 515 and [i["prompt"] for i in items][514] == "514?"


def test_unknown_rows_are_listed_and_nothing_is_written(tmp_path):
    rows = [row(), row("vqa_rad", "mcq"), row("vqa_rad", "mcq"), row("new_task"), row(None, None)]
    with pytest.raises(PublishedError) as error:
        bring(tmp_path, rows)
    for message in (
        "unknown vqa_rad / mcq (2 rows, first 1)",
        "unknown new_task / closed (1 rows, first 3)",
        "unknown None / None (1 rows, first 4)",
    ):
        assert message in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["eval.parquet"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(prompt=None), "vqa_rad: prompt is missing"),
        (row(answer=""), "vqa_rad: answer is missing"),
        (row(image_path=None), "vqa_rad: image_path is missing"),
        (row(image_path="/etc/a.png"), "image_path leaves its folder"),
        (row(image_path="a/../../b.png"), "image_path leaves its folder"),
        (row(prompt="x" * (eval_rows.MAX_TEXT + 1)), "prompt has more than 1048576 characters"),
    ],
)
def test_incomplete_rows_are_rejected(tmp_path, bad, message):
    with pytest.raises(PublishedError, match=message):
        bring(tmp_path, [row(), bad])
    assert not (tmp_path / "items.jsonl").exists()


def test_image_generation_requires_no_answer(tmp_path):
    bring(tmp_path, [row("image_generation", "pmc_oa", answer=None)])
    assert items_in(tmp_path / "items.jsonl")[0]["answer"] == ""


def test_files_of_other_formats_are_rejected(tmp_path, monkeypatch):
    out = tmp_path / "items.jsonl"

    def rejected(path, message, tasks=()):
        with pytest.raises(PublishedError, match=message):
            eval_rows.import_items(path, out, tasks=tasks, allow_counts=True, say=print)
        assert not out.exists()

    rejected(tmp_path / "none.parquet", "no such file; set --from to the published parquet")
    path = parquet(tmp_path, [row()] * 20)
    original = path.read_bytes()
    for damaged in (
        b"",
        original[: len(original) // 2],
        b"PAR1" + bytes(200),
        original[:4] + original[40:],
    ):
        path.write_bytes(damaged)
        rejected(path, "not a parquet file, or damaged|column .* is missing")
    pq.write_table(pa.table({"task_name": ["a"]}), path)
    rejected(path, "column question_type is missing; the published file has")
    columns = {name: ["a"] for name in eval_rows.COLUMNS} | {"answer": [1]}
    pq.write_table(pa.table(columns), path)
    rejected(path, "column answer is int64; expected text")
    path = parquet(tmp_path, [row()])
    rejected(path, "--tasks has 'chat'; use names from", tasks=["chat"])
    rejected(path, "no row of the requested tasks", tasks=["slake"])
    monkeypatch.setattr(eval_rows, "MAX_ROWS", 0)
    rejected(path, "1 rows, in groups")
    out.write_text("mine")
    with pytest.raises(PublishedError, match="exists; use another --out"):
        eval_rows.import_items(path, out, tasks=[], allow_counts=True, say=print)


def test_dictionary_columns_are_read(tmp_path):
    bring(tmp_path, [row()], task_name=pa.dictionary(pa.int32(), pa.string()))
    assert items_in(tmp_path / "items.jsonl")[0]["task_name"] == "vqa_rad"


def test_program(tmp_path):
    path, out = parquet(tmp_path, every()), tmp_path / "items.jsonl"
    command = [sys.executable, "-m", "data.prepare", "import", "--from", path, "--out", out]
    arguments = [*map(str, command), "--tasks", "vqa_rad", "mm_out", "--json"]
    done = subprocess.run(arguments, cwd=prepare.TINY.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"] == {"mm_out": 3, "vqa_rad": 2}
    assert len(task_items.from_rows(items_in(out))) == 5
    again = subprocess.run(arguments, cwd=prepare.TINY.parents[1], capture_output=True, text=True)
    assert again.returncode == 1 and "exists; use another" in again.stderr
