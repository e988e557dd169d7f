"""All stages of one evaluation with a real model, a judge on a server, probes, likelihoods."""

import dataclasses
import json

import eval_setup
import pytest
import test_generate as micro
from llm_server import serving, short_waits  # noqa: F401
from test_eval import settings

from data import prepare
from eval import loop, stages

folder = micro.folder


def whole(tmp_path, url):
    now = settings(tmp_path)
    judge = dataclasses.replace(now.judge, endpoint=f"m@{url}", repeats=2, paper=True)
    probes = ("blank", "shuffled", "swapped", "rotated")
    return dataclasses.replace(now, judge=judge, probes=probes[:1] + probes[2:], options=True)


def test_every_stage_adds_to_the_summary_and_none_is_done_twice(folder, tmp_path):
    out = tmp_path / "out"
    with serving(eval_setup.judge) as llm:
        asked = dict(model=f"native:{folder}", progress=lambda line: None)
        found = stages.run(whole(tmp_path, llm.url), out, **asked)
        files = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
        calls = len(llm.requests)
        again = stages.run(whole(tmp_path, llm.url), out, **asked)
        assert len(llm.requests) == calls > 0
    names = {"records", "options", "judged", "judge_calls", "probe_blank", "probe_swapped"}
    assert names | {"probe_rotated_1"} <= {name.removesuffix(".jsonl") for name in files}
    for name, data in files.items():
        assert name == "history.jsonl" or (out / name).read_bytes() == data, name
    assert again["scores"] == found["scores"] and again["probes"] == found["probes"]
    assert found["judge"]["model"] == "m" and found["judge"]["calls"] == calls
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


def test_what_cannot_be_done_is_said_before_anything_is_asked(folder, tmp_path):
    now = settings(tmp_path)
    asked = dict(model=f"native:{folder}", progress=lambda line: None)
    wrong = [
        (dict(probes=("flipped",)), "'flipped' is none"),
        (dict(probes=("blank",), probe_families=("multimodal",)), "'multimodal' shows no picture"),
        (dict(probes=("shuffled",)), "cannot shuffle; leave shuffled out of config.probes"),
        (dict(scorers=("clip:x",)), "write biomedclip:FOLDER"),
        (dict(train_records=str(tmp_path / "none")), "none"),
        (dict(judge=dataclasses.replace(now.judge, endpoint="gpt-4o-mini@http://127.0.0.1:9/v1")),
         "is a name that moves"),
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
    with pytest.raises(loop.EvalError, match="config.train_model is empty; name the folder"):
        stages.run(now, tmp_path / "out", **asked)
    now = dataclasses.replace(now, train_model=str(prepare.TINY))
    found = stages.run(now, tmp_path / "out", **asked)
    assert found["calibration"] == dict(reason="n/a: a baseline has no likelihoods", rows=[])
    parts = {(row["task"], row["part"]): row["n"] for row in found["contamination"]["rows"]}
    assert parts["slake_open", "clean"] == 1 and parts["slake_open", "contaminated"] == 0
    assert found["contamination"]["compared"]["items"] == 3 and found["not_judged"] == [
        "slake_open"
    ]
