"""All stages of one evaluation with a real model, a judge on a server, probes, likelihoods."""

import dataclasses
import json
import re
from pathlib import Path

import eval_setup
import PIL.Image
import PIL.ImageColor
import pytest
import test_generate as micro
from llm_server import serving, short_waits  # noqa: F401
from test_eval import settings
from test_eval_rows import CHAT

from medmax_jax.data import prepare
from medmax_jax.eval import evaluate
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.pipeline import stages

folder = micro.folder


def all_stages(tmp_path, url):
    now = settings(tmp_path)
    service = dataclasses.replace(now.judge.service, price_in=1.0, price_out=1.0)
    judge = dataclasses.replace(
        now.judge, endpoint=f"m@{url}", repeats=2, paper=True, service=service
    )
    probes = ("blank", "shuffled", "swapped", "rotated")
    return dataclasses.replace(now, judge=judge, probes=probes[:1] + probes[2:], options=True)


def test_every_stage_adds_to_the_summary_and_none_is_repeated(folder, tmp_path):
    out, lines = tmp_path / "out", []
    with serving(eval_setup.judge) as llm:
        arguments = dict(model=f"native:{folder}", progress=lines.append)
        summary = eval_setup.content(stages.run(all_stages(tmp_path, llm.url), out, **arguments))
        files = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
        calls = len(llm.requests)
        again = eval_setup.content(stages.run(all_stages(tmp_path, llm.url), out, **arguments))
        assert len(llm.requests) == calls > 0
    names = {"records", "options", "judgments", "judge_calls", "probe_blank", "probe_swapped"}
    assert names | {"probe_rotated_1"} <= {name.removesuffix(".jsonl") for name in files}
    for name, data in files.items():
        assert name == "history.jsonl" or (out / name).read_bytes() == data, name
    assert again["scores"] == summary["scores"] and again["probes"] == summary["probes"]
    assert summary["judge"]["model"] == "m" and summary["judge"]["calls"] == calls
    wanted = r"judge: (\d+) calls, at most about ([\d.]+) USD"
    match = next(m for line in lines if (m := re.search(wanted, line)))
    assert int(match[1]) == calls and float(match[2]) >= summary["judge"]["usd"] > 0
    rows = {(row["task"], row["metric"]): row for row in summary["scores"]}
    assert rows["slake_open", "judge_correct"]["headline"] and summary["not_judged"] == []
    assert rows["slake_open", "judge_correct"]["paper_n"] == 1
    probed = {(row["probe"], row["task"]) for row in summary["probes"]["rows"]}
    assert {("blank", "slake_open"), ("swapped", "vqa_rad_closed")} <= probed
    assert {("rotated_1", "pmc_vqa_mcq"), ("rotated_all", "pmc_vqa_mcq")} <= probed
    likely = {(row["task"], row["metric"]) for row in summary["calibration"]["rows"]}
    assert ("vqa_rad_closed", "ece") in likely and ("pmc_vqa_mcq", "accuracy_at_80") in likely
    assert summary["contamination"] is None and summary["scorers"] == {}
    json.dumps(summary, allow_nan=False)


COLORS = ("red", "lime", "blue", "yellow")


class ColorModel:
    """Answers every question with the color of the image that it receives."""

    def generate(self, requests):
        return [[self.color(next(p for p in ask.parts if isinstance(p, Path)))] for ask in requests]

    def color(self, path):
        with PIL.Image.open(path) as image:
            found = image.convert("RGB").getpixel((0, 0))
        return next((name for name in COLORS if PIL.ImageColor.getrgb(name) == found), "grey")


def test_captions_and_chats_are_probed_as_often_as_estimated(tmp_path):
    rows = []
    for n, color in enumerate(COLORS):
        PIL.Image.new("RGB", (8, 8), color).save(tmp_path / f"{n}.png")
        fixed = dict(image_path=f"{n}.png", group=f"g{n}")
        caption = dict(task_name="image_captioning", question_type="pmc_oa", prompt="")
        chat = dict(task_name="visual_chat", question_type="conversation", prompt="What?\n<image>")
        rows.append(caption | fixed | dict(answer=f"It is {color}", id=f"a{n}"))
        rows.append(chat | fixed | dict(answer=repr(CHAT | {"gpt4_answer": color}), id=f"b{n}"))
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = dict(baselines="", options=False, counts=dict(visual_chat=-1))
    for families, expected in (
        ("captioning,visual_chat", {"captioning_pmc_oa", "visual_chat_conversation"}),
        ("captioning", {"captioning_pmc_oa"}),
    ):
        out, lines_ = tmp_path / families, []
        summary = evaluate(
            ColorModel(), tmp_path / "items.jsonl", out, "strict",
            progress=lines_.append, probe_families=families, **changes,
        )  # fmt: skip
        (estimated,) = [
            re.search(r"probes: (\d+) requests", s)[1] for s in lines_ if "probes:" in s
        ]
        lines = [path.read_bytes().count(b"\n") for path in out.glob("probe_*.jsonl")]
        assert len(lines) == 3 and sum(lines) == int(estimated) == 3 * 4 * len(expected)
        table = summary["probes"]["rows"]
        assert {row["task"] for row in table} == expected and len(table) == 3 * len(expected)
        for row in table:  # each image has one color: another image, another answer
            assert row["metric"] == "token_f1" and row["flips"] == 1
            assert row["before"] > row["after"] == 0 and row["few_groups"]
            # four groups that all lose the same: by their signs p is 1/8, so 0 is not excluded
            assert row["ci_low"] <= row["diff"] < 0 < row["ci_high"]
        assert "Probes are not judged" in (out / "report.html").read_text()


def test_impossible_settings_are_reported_before_the_first_request(folder, tmp_path):
    now = settings(tmp_path)
    arguments = dict(model=f"native:{folder}", progress=lambda line: None)
    wrong = [
        (dict(probes=("flipped",)), "'flipped', which is not a probe"),
        (dict(probes=("blank",), probe_families=("multimodal",)), "'multimodal', which is not a"),
        (dict(probes=("shuffled",)), "cannot be shuffled; leave shuffled out of config.probes"),
        (dict(scorers=("clip:x",)), "use biomedclip:FOLDER"),
        (dict(train_records=str(tmp_path / "none")), "none"),
        (dict(judge=dataclasses.replace(now.judge, endpoint="gpt-4o-mini@http://127.0.0.1:9/v1")),
         "is a name that the provider may assign to other weights"),
    ]  # fmt: skip
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            stages.run(dataclasses.replace(now, **changes), tmp_path / "out", **arguments)
        assert not (tmp_path / "out" / "records.jsonl").exists(), message


def test_a_model_without_likelihoods_reports_the_reason(tmp_path):
    records = tmp_path / "train"
    command = ["sample", "--out", str(records), "--split", "validation", "--kind", "instruction"]
    assert prepare.main(command) == 0
    now = dataclasses.replace(settings(tmp_path), options=True, train_records=str(records))
    arguments = dict(model="baseline:constant", progress=lambda line: None)
    with pytest.raises(EvalError, match="config.train_model is empty; set it to the model folder"):
        stages.run(now, tmp_path / "out", **arguments)
    now = dataclasses.replace(now, train_model=str(prepare.TINY))
    summary = eval_setup.content(stages.run(now, tmp_path / "out", **arguments))
    assert summary["calibration"] == dict(reason="n/a: a baseline has no likelihoods", rows=[])
    parts = {(row["task"], row["part"]): row["n"] for row in summary["contamination"]["rows"]}
    assert parts["slake_open", "clean"] == 1 and parts["slake_open", "contaminated"] == 0
    assert summary["contamination"]["compared"]["items"] == 3 and summary["not_judged"] == [
        "slake_open"
    ]
