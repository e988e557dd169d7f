"""A paper's tables from stand-ins in the released formats: numbers, reasons, citation, page."""

import dataclasses
import json

import eval_setup
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from llm_server import serving, short_waits  # noqa: F401
from safetensors.numpy import save_file
from test_biomedclip import CONFIG, cases, tensors
from test_eval_rows import CHAT
from test_html_page import parsed

from medmax_jax.config import build
from medmax_jax.configs import eval_paper
from medmax_jax.data.release import eval_rows
from medmax_jax.eval import reproduce as program
from medmax_jax.eval.config import EvalError, Settings
from medmax_jax.eval.encoders import biomedclip
from medmax_jax.eval.metrics import per_record, release
from medmax_jax.eval.pipeline.cost_estimate import PlanError
from medmax_jax.eval.reproduction import citation, page, parts, published, scores
from medmax_jax.eval.results import Summary
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks import catalog
from medmax_jax.io import journal

COUNT, FEW = 21, 6  # rows of a task and question type
MANY = ("vqa_rad", "visual_chat", "mm_out")  # tasks with COUNT rows, and one of captions


def answer_of(task, kind, n):
    """Return (reference, answer): what the model wrote is right for two of three questions."""
    right = n % 3 > 0
    if kind == "mcq":
        return "B", "B" if right else "A"
    if kind == "closed":
        return "yes", "Yes." if right else "no"
    if task == "visual_chat":
        return repr(CHAT), "A CT." if right else "An MRI."
    return "A CT of the chest", "A CT" if right else "An MRI"


def write_released(folder, *, count=COUNT, few=FEW):
    """Write items.jsonl of a parquet in the published form, and recorded answers to it."""
    rows, answers = [], []
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for task, kinds in eval_rows.QUESTION_TYPES.items():
        for kind in kinds or ("",):
            many = task in MANY or (task, kind) == ("image_captioning", "quilt")
            for n in range(count if many else few):
                name = f"images/{task}_{kind}_{n}.png"
                pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
                PIL.Image.fromarray(pixels).save(folder / name)
                reference, text = answer_of(task, kind, n)
                prompt = "<image>\n" * (task == "visual_chat") + f"What is on image {n}?"
                prompt += "\nA: MRI\nB: CT" * (kind == "mcq")
                answers.append({"id": f"{task}-{len(rows):06d}", "text": text, "images": []})
                if task in ("image_generation", "mm_out"):
                    answers[-1]["images"] = [name]
                rows.append(
                    dict(task_name=task, question_type=kind, prompt=prompt, answer=reference,
                         image_path=f"./{name}")
                )  # fmt: skip
    schema = pa.schema([(name, pa.string()) for name in eval_rows.COLUMNS])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "train.parquet")
    eval_rows.import_items(
        folder / "train.parquet", folder / "items.jsonl",
        tasks=(), allow_counts=True, say=lambda _: None,
    )  # fmt: skip
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    return folder


def write_encoder(folder):
    """Write BiomedCLIP's published files, of a small network."""
    (folder / "vocab.txt").write_text("\n".join(cases.WORDS) + "\n", "utf-8")
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    save_file(tensors("tiny"), folder / biomedclip.SAFE)
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("biomedclip"))


def settings_of(released, url="", encoder="", **judge):
    config = eval_paper.get_config().unlock()
    config.judge.service.key_env = ""
    if url:
        config.judge.endpoint = f"gpt-4o-mini-2024-07-18@{url}"
        config.judge.service.credentialed_hosts = url.split("/")[2]
    config.judge.service.update(judge)
    config.scorers = f"biomedclip:{encoder}" if encoder else ""
    return parts.with_rows(build(Settings, config), str(released), "")


def reproduce(settings, released, workdir, *, tables="", strict=False, model=published.MODEL):
    lines, answers = [], parts.Model(model=f"predictions:{released / 'answers.jsonl'}")
    every = parts.divide(settings, answers, tables, strict=strict)
    parts.plan(every, answers, str(workdir), progress=lines.append)
    for part in every:
        parts.run(part, answers, str(workdir), progress=lines.append, stopped=lambda: False)
    content = citation.build("medmax", model, settings, every, workdir)
    journal.write_json(workdir / citation.FILE, content)
    return content, lines


@pytest.fixture(scope="module")
def complete(released, encoder, tmp_path_factory):
    """Return the citation of a complete reproduction, and its workdir."""
    workdir = tmp_path_factory.mktemp("reproduction")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(biomedclip, "PUBLISHED_SIZES", cases.TINY)
        with serving(eval_setup.judge) as llm:
            settings = settings_of(released, llm.url, encoder)
            content, lines = reproduce(settings, released, workdir)
            every = parts.divide(settings, parts.Model(model="predictions:"), "", strict=False)
    again = citation.build("medmax", published.MODEL, settings, every, workdir)
    assert again | {"environment": 0} == content | {"environment": 0}
    (total,) = [line for line in lines if line.startswith("in total: ")]
    assert " requests and " in total and total.endswith(" calls to the judge")
    return content, workdir


def by_key(content):
    return {(cell["task"], cell["metric"]): cell for cell in content["cells"]}


def test_every_published_number_of_the_catalog_is_a_cell():
    for model in ("MedMax 7B", "Chameleon 7B"):
        values = [cell.published.value for cell in published.cells(model)]
        stated = [
            one.value
            for spec in catalog.TASKS.values()
            for one in spec.published
            if one.model == model
        ]
        extra = [one.value for one in (*catalog.AVERAGES, *catalog.CHAT_OVERALL)]
        assert sorted(set(stated) - set(values)) == [] and set(values) <= set(stated) | set(extra)
        assert len(values) == len(stated) + 2 == 24
    gpt = {o.value for c in published.cells("MedMax 7B") for o in c.others if o.model == "GPT-4o"}
    assert {42.0, 47.2} <= gpt  # the site and the abstract disagree
    with pytest.raises(EvalError, match="'MedMax 8B', which has no published numbers; use one of"):
        published.cells("MedMax 8B")


def test_numbers_are_those_of_the_released_scoring(complete):
    content, workdir = complete
    cells = by_key(content)
    for cell in cells.values():
        if cell["released"]:
            low, value, high = (cell["released"][name] for name in ("low", "value", "high"))
            assert low <= value <= high and low < high + (value == 1.0)
    summary = json.loads((workdir / "paper" / "recorded" / "summary.json").read_text())
    compared = 0
    for row in summary["scores"]:
        cell = cells.get((row["task"], row["metric"]))
        if cell and row["paper"] is not None:
            scale = 1 if metric_is_cosine(row["metric"]) else 100
            assert cell["released"]["value"] == pytest.approx(row["paper"] * scale, abs=1e-8)
            compared += 1
    assert compared == 12 + 3 + 2 + 2  # questions, captions, chats, interleaved
    two_thirds = cells["vqa_rad_closed", "accuracy"]["released"]
    assert two_thirds["value"] == pytest.approx(200 / 3) and two_thirds["n"] == COUNT
    average = cells["vqa_average", "mean"]
    means = [cells[t, m]["released"]["value"] for t, m in cells if t in catalog.COLUMNS]
    assert average["released"]["value"] == pytest.approx(np.mean(means))
    overall = cells["visual_chat_overall", "judge_relative"]
    assert overall["released"]["n"] == 2 * COUNT and overall["published"] == 60.4
    stopped = cells["image_generation_report", "clip_image_text"]
    assert stopped["status"] == scores.NO_SCORE and "first 100 or stops" in stopped["reason"]
    assert cells["captioning_report", "clip_image_text"]["status"] == scores.FEW


def metric_is_cosine(metric):
    return metric.startswith("clip_")


def test_generated_images_are_those_of_the_first_rows():
    cosines = np.linspace(0.1, 0.4, 120)
    records = [
        eval_setup.record(eval_setup.item("image_generation_quilt", "image_generation", n), "")
        for n in range(120)
    ]
    lines = {r.id: {"image_text": [c]} for r, c in zip(records, cosines, strict=True)}
    inputs = per_record.ScoringInputs(image_scores={"biomedclip": lines})
    items = release.release_items(records, inputs, "clip_image_text")
    assert [value for _, value in items] == list(cosines[:100]) and items[3][0] == "g1"
    score = release.release_scores(records, inputs)["clip_image_text"]["paper"]
    assert score == pytest.approx(np.mean(cosines[:100]))
    assert release.release_items(records[:99], inputs, "clip_image_text") == []


def test_strict_generation_is_a_run_of_its_own(tmp_path):
    (tmp_path / "released").mkdir()
    released = write_released(tmp_path / "released", count=2, few=1)
    content, _ = reproduce(settings_of(released), released, tmp_path / "w", strict=True)
    assert set(content["parts"]) == {"paper/recorded", "strict/recorded"}
    cell = by_key(content)["vqa_rad_closed", "accuracy"]
    assert cell["strict_generation"] == cell["strict"] and cell["strict"]["value"] == 50.0
    journal.write_json(tmp_path / "w" / citation.FILE, content)
    assert citation.check(tmp_path / "w" / citation.FILE, tmp_path / "w")[1] == []
    modes = [
        json.loads((tmp_path / "w" / mode / "recorded" / "run.json").read_text())
        for mode in ("paper", "strict")
    ]
    assert [run["mode"] for run in modes] == ["paper", "strict"]
    penalties = [run["sample"]["repetition_penalty"] for run in modes]
    assert penalties == [1.2, 1.0]
    text = program.as_text(content, "w/")
    assert "| vqa_rad_closed | 75.300 | 50.000 |" in text and text.endswith("w/reproduction.json")


def test_a_reason_repeats_no_reply_of_the_judge():
    cell = next(c for c in published.cells("MedMax 7B") if c.task == "visual_chat_conversation")
    item = eval_setup.item("visual_chat_conversation", "visual_chat", 0)
    record = eval_setup.record(item, "An opacity.")
    votes = {"votes": ["The opacity of SECRET"]}
    answers = scores.Answers(
        records=[record],
        inputs=per_record.ScoringInputs(
            judgments={per_record.PAPER_RELATIVE: {record.id: votes}}, judge="j"
        ),
        resampling=intervals.Resampling(0, 2_000),
        summary=Summary(model="m", scores=()),
        run={},
    )
    (row,) = scores.score_cells([cell], [answers])
    assert row["reason"] == scores.UNREADABLE and row["released"] is None


def test_a_status_follows_from_the_interval():
    cell = next(c for c in published.cells("MedMax 7B") if c.task == "vqa_rad_closed")  # 75.3

    def status(low, high, groups=300):
        released = dict(value=(low + high) / 2, low=low, high=high, n=groups, groups=groups)
        return scores._status(cell, released, None)

    assert status(70.0, 80.0) == status(75.34, 80.0) == scores.REPRODUCED  # half a printed digit
    assert status(75.4, 80.0) == status(60.0, 75.2) == scores.DIFFERS
    assert status(60.0, 85.0) == status(70.0, 80.0, groups=19) == scores.FEW
    assert scores._status(cell, None, None) == scores.NOT_RUN


def test_a_citation_is_checked_against_its_records(complete, tmp_path):
    content, workdir = complete
    file = workdir / citation.FILE
    cited, problems = citation.check(file, workdir)
    assert problems == [] and cited["schema"] == citation.SCHEMA
    assert citation.code_changes(cited) == []
    changed = json.loads(file.read_text())
    changed["cells"][0]["released"]["value"] = 75.3
    changed["scorers"]["code"]["metrics"] = "0" * 64
    journal.write_json(tmp_path / "changed.json", changed)
    cited, problems = citation.check(tmp_path / "changed.json", workdir)
    assert len(problems) == 1 and "vqa_rad_closed accuracy: released is" in problems[0]
    assert citation.code_changes(cited) == ["metrics"]
    renamed = content | {"model": content["model"] | {"model": "another"}}
    journal.write_json(tmp_path / "renamed.json", renamed)
    _, problems = citation.check(tmp_path / "renamed.json", workdir)
    assert len(problems) == 1 and problems[0].startswith("model is {'kind': ")
    program.verify(str(file), "")
    with pytest.raises(program.CitationError, match="1 statements do not follow from the records"):
        program.verify(str(tmp_path / "changed.json"), str(workdir))
    records = workdir / "paper" / "recorded" / "records.jsonl"
    before = records.read_text()
    try:
        records.write_text(before.replace('"text": "no"', '"text": "yes"', 1))
        _, problems = citation.check(file, workdir)
    finally:
        records.write_text(before)
    assert problems[0].startswith("paper/recorded: the answers differ") and len(problems) > 1
    uncited = {"paper/recorded": {"answers": None}}  # a part that is not cited is not compared
    journal.write_json(tmp_path / "changed.json", content | {"parts": uncited, "cells": []})
    _, problems = citation.check(tmp_path / "changed.json", workdir)
    assert len(problems) == 24 and all("missing from the file" in line for line in problems)
    _, problems = citation.check(file, tmp_path)  # without records
    assert len(problems) > 20
    for text, message in (
        ("{}", "schema is 'None'; required"),
        ("[", "not a citation"),
        (json.dumps(content | {"cells": [3]}), "a cell lacks one of"),
        (json.dumps(content | {"parts": {"../x": {}}}), "part '../x' is unknown"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(EvalError, match=message):
            citation.check(tmp_path / "bad.json", workdir)


def test_a_citation_states_what_its_numbers_depend_on(complete):
    content, workdir = complete
    text = json.dumps(content)
    assert content["scorers"]["judge"]["model"] == "gpt-4o-mini-2024-07-18"
    assert len(content["scorers"]["encoders"]["biomedclip"]) == 16
    assert set(content["scorers"]["code"]) == set(citation.CODE)
    assert content["model"]["kind"] == "predictions" and content["data"][0]["file"] == "items.jsonl"
    assert str(workdir) not in text and "127.0.0.1" not in text  # nothing of this machine
    (differs,) = {tuple(c["settings_differ"][:1]) for c in content["cells"] if c["released"]}
    assert differs == ("answers of predictions: the published decoding is not used",)


def test_the_page_has_every_number_and_no_script(complete):
    content, _ = complete
    markup = page.render(content)
    text = parsed(markup).text
    assert "<script" not in markup and "Of 24 published numbers of MedMax 7B, " in text
    for cell in content["cells"]:
        assert cell["title"] in text and page._number(cell, cell["published"]) in text
    assert "HuatuoGPT-Vision 7B" in text and "requires training runs" in text
    assert content["scorers"]["code"]["metrics"] in text
    assert "Mean of the 12 tasks, GPT-4o: also 47.2, by the paper's abstract" in text


def test_what_cannot_be_run_states_its_reason(released, tmp_path):
    settings, native = settings_of(released), parts.Model(model="native:nowhere")
    every = parts.divide(settings, native, "", strict=False)
    content = citation.build("medmax", published.MODEL, settings, every, tmp_path)
    cells = by_key(content)
    assert {cell["status"] for cell in content["cells"]} == {scores.NOT_RUN}
    assert cells["vqa_rad_open", "judge_correct"]["reason"] == scores.NO_JUDGE
    assert cells["captioning_quilt", "clip_image_text"]["reason"] == scores.NO_SCORER
    assert cells["vqa_average", "mean"]["reason"] == "12 of the 12 tasks have no score"
    reasons = {p.folder: p.reason for p in parts.divide(settings, native, "", strict=True)}
    assert reasons["paper/choices"] == reasons["strict/choices"] == ""
    assert reasons["paper/open"] == reasons["paper/chat"] == scores.NO_JUDGE
    assert reasons["strict/images"] == scores.NO_SCORER
    assert reasons["paper/interleaved"] == f"{scores.NO_JUDGE}; or {scores.NO_SCORER}"
    (tmp_path / "one.jsonl").write_text((released / "items.jsonl").read_text().split("\n")[0])
    few = dataclasses.replace(settings, questions=(str(tmp_path / "one.jsonl"),))
    reasons = {p.name: p.reason for p in parts.divide(few, native, "vqa", strict=False)}
    assert reasons["open"] == scores.NO_ROWS and reasons["images"] == parts.NOT_SELECTED


def test_wrong_flags_and_high_prices_are_reported_before_anything_is_run(released, tmp_path):
    settings = settings_of(released)
    with pytest.raises(EvalError, match="--tables has 'vqb'; use names from vqa, images"):
        parts.divide(settings, parts.Model(model=""), "vqb", strict=False)
    strict = build(Settings, eval_paper.get_config())
    with pytest.raises(EvalError, match="config.mode is 'strict'; required: paper"):
        parts.with_rows(dataclasses.replace(strict, mode="strict"), str(released), "")
    with serving(eval_setup.judge) as llm:
        costly = settings_of(released, llm.url, price_in=1e6, price_out=1e6, max_usd=1.0)
        with pytest.raises(PlanError, match=r"config.judge.service.max_usd is 1 but the parts"):
            reproduce(costly, released, tmp_path / "w")
        assert not llm.requests and not (tmp_path / "w").exists()


def test_settings_that_differ_are_named(released):
    settings = settings_of(released)
    cell = next(c for c in published.cells("MedMax 7B") if c.task == "vqa_rad_open")
    named = dict(kind="native", model="MedMax 7B")
    assert parts.differences(cell, settings, n=179, **named) == []
    assert parts.differences(cell, settings, n=5, **named) == ["5 items; the benchmark has 179"]
    judge = dataclasses.replace(settings.judge, endpoint="org/llama@http://h/v1", repeats=3)
    sample = dataclasses.replace(settings.sample, repetition_penalty=1.0)
    other = dataclasses.replace(settings, judge=judge, sample=sample, prompt="chat")
    assert parts.differences(cell, other, n=179, **named) == [
        "sample.repetition_penalty 1.0; published 1.2",
        "prompts chat; published sft",
        "judge.repeats 3; published 1",
        "judge org/llama; published gpt-4o-mini",
    ]
