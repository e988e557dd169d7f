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


def whole(tmp_path, url):
    now = settings(tmp_path)
    service = dataclasses.replace(now.judge.service, price_in=1.0, price_out=1.0)
    judge = dataclasses.replace(
        now.judge, endpoint=f"m@{url}", repeats=2, paper=True, service=service
    )
    probes = ("blank", "shuffled", "swapped", "rotated")
    return dataclasses.replace(now, judge=judge, probes=probes[:1] + probes[2:], options=True)


def test_every_stage_adds_to_the_summary_and_none_is_done_twice(folder, tmp_path):
    out, said = tmp_path / "out", []
    with serving(eval_setup.judge) as llm:
        asked = dict(model=f"native:{folder}", progress=said.append)
        found = stages.run(whole(tmp_path, llm.url), out, **asked)
        files = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
        calls = len(llm.requests)
        again = stages.run(whole(tmp_path, llm.url), out, **asked)
        assert len(llm.requests) == calls > 0
    names = {"records", "options", "judgments", "judge_calls", "probe_blank", "probe_swapped"}
    assert names | {"probe_rotated_1"} <= {name.removesuffix(".jsonl") for name in files}
    for name, data in files.items():
        assert name == "history.jsonl" or (out / name).read_bytes() == data, name
    assert again["scores"] == found["scores"] and again["probes"] == found["probes"]
    assert found["judge"]["model"] == "m" and found["judge"]["calls"] == calls
    wanted = r"judge: (\d+) calls, at most about ([\d.]+) USD"
    told = next(m for line in said if (m := re.search(wanted, line)))
    assert int(told[1]) == calls and float(told[2]) >= found["judge"]["usd"] > 0
    rows = {(row["task"], row["metric"]): row for row in found["scores"]}
    assert rows["slake_open", "judge_correct"]["headline"] and found["not_judged"] == []
    assert rows["slake_open", "judge_correct"]["paper_n"] == 1
    probed = {(row["probe"], row["task"]) for row in found["probes"]["rows"]}
    assert {("blank", "slake_open"), ("swapped", "vqa_rad_closed")} <= probed
    assert {("rotated_1", "pmc_vqa_mcq"), ("rotated_all", "pmc_vqa_mcq")} <= probed
    likely = {(row["task"], row["metric"]) for row in found["calibration"]["rows"]}
    assert ("vqa_rad_closed", "ece") in likely and ("pmc_vqa_mcq", "accuracy_at_80") in likely
    assert found["contamination"] is None and found["scorers"] == {}
    json.dumps(found, allow_nan=False)


COLOURS = ("red", "lime", "blue", "yellow")


class Looking:
    """Says the colour of the picture that it is shown, to whatever it is asked."""

    def generate(self, asks):
        return [[self.colour(next(p for p in ask.parts if isinstance(p, Path)))] for ask in asks]

    def colour(self, path):
        with PIL.Image.open(path) as picture:
            found = picture.convert("RGB").getpixel((0, 0))
        return next((name for name in COLOURS if PIL.ImageColor.getrgb(name) == found), "grey")


def test_captions_and_chats_are_probed_as_often_as_the_plan_says(tmp_path):
    rows = []
    for n, colour in enumerate(COLOURS):
        PIL.Image.new("RGB", (8, 8), colour).save(tmp_path / f"{n}.png")
        fixed = dict(image_path=f"{n}.png", group=f"g{n}")
        caption = dict(task_name="image_captioning", question_type="pmc_oa", prompt="")
        chat = dict(task_name="visual_chat", question_type="conversation", prompt="What?\n<image>")
        rows.append(caption | fixed | dict(answer=f"It is {colour}", id=f"a{n}"))
        rows.append(chat | fixed | dict(answer=repr(CHAT | {"gpt4_answer": colour}), id=f"b{n}"))
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = dict(baselines="", options=False, counts=dict(visual_chat=-1))
    for families, expected in (
        ("captioning,visual_chat", {"captioning_pmc_oa", "visual_chat_conversation"}),
        ("captioning", {"captioning_pmc_oa"}),
    ):
        out, said = tmp_path / families, []
        found = evaluate(
            Looking(), tmp_path / "items.jsonl", out, "strict",
            progress=said.append, probe_families=families, **changes,
        )  # fmt: skip
        (told,) = [re.search(r"probes: (\d+) requests", s)[1] for s in said if "probes:" in s]
        lines = [path.read_bytes().count(b"\n") for path in out.glob("probe_*.jsonl")]
        assert len(lines) == 3 and sum(lines) == int(told) == 3 * 4 * len(expected)
        table = found["probes"]["rows"]
        assert {row["task"] for row in table} == expected and len(table) == 3 * len(expected)
        for row in table:  # each picture has one colour: another picture, another answer
            assert row["metric"] == "token_f1" and row["flips"] == 1
            assert row["before"] > row["after"] == 0 and row["few_groups"]
            # four groups that all lose the same: by their signs p is 1/8, so 0 is not excluded
            assert row["ci_low"] <= row["diff"] < 0 < row["ci_high"]
        assert "Probes are not judged" in (out / "report.html").read_text()


def test_what_cannot_be_done_is_said_before_anything_is_asked(folder, tmp_path):
    now = settings(tmp_path)
    asked = dict(model=f"native:{folder}", progress=lambda line: None)
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
            stages.run(dataclasses.replace(now, **changes), tmp_path / "out", **asked)
        assert not (tmp_path / "out" / "records.jsonl").exists(), message


def test_a_model_that_tells_no_likelihoods_has_the_reason(tmp_path):
    records = tmp_path / "train"
    command = ["sample", "--out", str(records), "--split", "validation", "--kind", "instruction"]
    assert prepare.main(command) == 0
    now = dataclasses.replace(settings(tmp_path), options=True, train_records=str(records))
    asked = dict(model="baseline:constant", progress=lambda line: None)
    with pytest.raises(EvalError, match="config.train_model is empty; set it to the model folder"):
        stages.run(now, tmp_path / "out", **asked)
    now = dataclasses.replace(now, train_model=str(prepare.TINY))
    found = stages.run(now, tmp_path / "out", **asked)
    assert found["calibration"] == dict(reason="n/a: a baseline has no likelihoods", rows=[])
    parts = {(row["task"], row["part"]): row["n"] for row in found["contamination"]["rows"]}
    assert parts["slake_open", "clean"] == 1 and parts["slake_open", "contaminated"] == 0
    assert found["contamination"]["compared"]["items"] == 3 and found["not_judged"] == [
        "slake_open"
    ]
