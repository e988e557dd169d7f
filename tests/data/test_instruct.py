"""Tests of the curation against a real server: stages, bad replies, killed and resumed runs."""

import collections
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import PIL.Image
import pytest
from llm_server import (  # noqa: F401
    ANSWER,
    KEEP,
    QUESTION,
    WRITTEN,
    completion,
    good,
    serving,
    short_waits,
)

from medmax_jax.data import prepare
from medmax_jax.data.instruct import curation, replies
from medmax_jax.data.records import writer

ROOT = pathlib.Path(__file__).parents[2]
N = 24


@pytest.fixture
def work(tmp_path):
    """Write captions, scores and images; `argv(llm)` is the command that reads them."""
    return Work(tmp_path)


class Work:
    def __init__(self, folder: pathlib.Path):
        self.folder, self.out = folder, folder / "out"
        (folder / "images").mkdir()
        self.rows = [
            dict(id=f"r{i}", caption=f"Caption number {i}.", images=[f"{i}.png"], source="PMC-OA",
                 data_class="open", group=f"g{i // 2}")
            for i in range(N)
        ]  # fmt: skip
        self.scores = {row["id"]: 0.5 for row in self.rows}
        for i in range(N):
            PIL.Image.new("L", (8, 8), i).save(folder / "images" / f"{i}.png")

    def argv(self, llm, *flags: str) -> list[str]:
        f = self.folder
        write(f / "captions.jsonl", self.rows)
        write(f / "scores.jsonl", [dict(id=i, score=s) for i, s in self.scores.items()])
        command = ["instruct", "--from", f / "captions.jsonl", "--images", f / "images", "--out"]
        command += [self.out, "--scores", f / "scores.jsonl", "--threshold", "0.3", "--endpoint"]
        command += [f"m@{llm.url}", "--timeout", "2", "--retries", "2", "--concurrency", "4"]
        return [str(word) for word in [*command, *flags]]

    def lines(self, name: str) -> dict[str, dict]:
        return {line["id"]: line for line in read(self.out / name)}

    @property
    def report(self) -> dict:
        return json.loads((self.out / "report.json").read_text())


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def number(request: dict) -> int:
    return int(re.search(r"Caption number (\d+)", request["messages"][1]["content"])[1])


def is_filter(request: dict) -> bool:
    return "You decide" in request["messages"][0]["content"]


# From captions to documents.


def test_all_stages(work):
    def behave(request, n):
        if is_filter(request) and number(request) == 4:
            return completion(json.dumps({"keep": False, "reason": "states nothing"}))
        return good(request)

    work.scores |= {"r0": 0.1, "r1": None, "r2": 0.3}
    work.rows[5]["images"] += ["6.png"]
    work.rows[6]["images"] = ["nowhere.png"]
    with serving(behave) as llm:
        assert prepare.main(work.argv(llm)) == 0
    ends = {"score low": 1, "score unscored": 1, "caption drop": 1, "images several": 1,
            "images missing": 1, "writing written": N - 5}  # fmt: skip
    assert work.report["outcomes"] == ends and work.report["rows"] == sum(ends.values()) == N
    assert work.lines("1_score.jsonl")["r0"]["reason"] == "0.1 < 0.3"
    assert work.lines("2_caption.jsonl")["r4"]["reason"] == "states nothing"
    documents = read(work.out / "documents.jsonl")
    assert [d["id"] for d in documents] == ["r2", "r3", *(f"r{i}" for i in range(7, N))]
    assert documents[0] == dict(
        id="r2", text=f"{QUESTION}<reserved08706>{ANSWER}", image_path="2.png", turns=1,
        task="Multimodal Generation", source="PMC-OA", credential="no", data_class="open",
        group="g1",
    )  # fmt: skip
    sent = json.dumps(llm.requests)
    assert "png" not in sent and "image_url" not in sent  # captions are sent, images are not
    assert len(llm.requests) == (N - 2) + (N - 5)


def test_documents_become_records(work, capsys):
    with serving() as llm:
        assert prepare.main(work.argv(llm)) == 0
    folder = work.folder / "records"
    command = [
        "documents",
        "--from",
        work.out / "documents.jsonl",
        "--images",
        work.folder / "images",
    ]
    assert prepare.main([*map(str, command), "--out", str(folder)]) == 0
    capsys.readouterr()
    assert prepare.main(["check", str(folder), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["text"] == f"{QUESTION}<reserved08706>{ANSWER}" and summary["documents"] == N
    meta = writer.open_records(folder).meta
    assert meta["image_tokens"] == 64 * N and meta["groups"] == N // 2
    assert meta["tasks"] == {"Multimodal Generation": N} and meta["sources"] == {"PMC-OA": N}


def test_bad_replies_are_stored_and_counted(work):
    filters = {
        0: completion("Yes, keep it."),
        1: completion(json.dumps({"keep": "yes", "reason": "x"})),
        2: b"<html>gateway</html>",
        3: completion(KEEP, finish="length"),
        4: 400,
        5: completion(f"```json\n{KEEP}\n```"),
    }
    writings = {
        6: completion("Certainly! " + WRITTEN),
        7: completion(json.dumps({"question": QUESTION, "answer": "no sections"})),
        8: 422,
        9: ("huge", 5_000_000),
    }

    def behave(request, n):
        bad = filters if is_filter(request) else writings
        return bad.get(number(request), good(request))

    with serving(behave) as llm:
        assert prepare.main(work.argv(llm)) == 0
    ends = {"caption unparsable": 4, "caption refused": 1, "writing unparsable": 2,
            "writing invalid": 1, "writing refused": 1, "writing written": N - 9}  # fmt: skip
    assert work.report["outcomes"] == ends and sum(ends.values()) == N
    lines = work.lines("2_caption.jsonl")
    assert lines["r0"]["raw"] == "Yes, keep it." and lines["r2"]["raw"] == "<html>gateway</html>"
    assert lines["r3"]["reason"].startswith("cut off") and KEEP in json.loads(lines["r3"]["raw"])[
        "choices"][0]["message"]["content"]  # fmt: skip
    lines = work.lines("4_writing.jsonl")
    assert "200 to 3600" in lines["r7"]["reason"] and "no sections" in lines["r7"]["raw"]
    assert lines["r6"]["raw"].startswith("Certainly!") and lines["r9"]["raw"].startswith("xxx")


def test_transient_endpoint_errors_do_not_change_the_result(work, tmp_path):
    """Each good reply follows a 429, 500, slow, reset, truncated or malformed one."""
    trouble = [("status", 429, {"Retry-After": "0.2"}), 500, ("slow", 2.5), "reset",
               ("cut", completion(KEEP)), b"{"]  # fmt: skip

    def behave(request, n):
        return good(request) if n else trouble[number(request) % len(trouble)]

    with serving() as llm:
        assert prepare.main(work.argv(llm)) == 0
        best = (work.out / "documents.jsonl").read_bytes()
        work.out = tmp_path / "again"
    with serving(behave) as llm:
        assert prepare.main(work.argv(llm)) == 0
    assert (work.out / "documents.jsonl").read_bytes() == best
    assert len(llm.requests) == 4 * N and work.report["no_reply_now"] == 0


def test_rows_without_a_reply_are_undecided_and_requested_again(work, capsys):
    down = {3, 7}
    with serving(lambda r, n: 500 if number(r) in down else good(r)) as llm:
        assert prepare.main(work.argv(llm)) == 75
        stderr = capsys.readouterr().err
        assert f"2 of {N} rows had no reply; rerun the same command to request them again" in stderr
        assert "status 500" in stderr and work.report["undecided"] == 2
        assert work.report["written"] == N - 2 == len(read(work.out / "documents.jsonl"))
        before = len(llm.requests)
        down.clear()
        assert prepare.main(work.argv(llm)) == 0
    assert len(llm.requests) == before + 4
    assert work.report["outcomes"] == {"writing written": N}
    assert [d["id"] for d in read(work.out / "documents.jsonl")] == [f"r{i}" for i in range(N)]


# What it costs.


PRICES = ("--price_in", "2.5", "--price_out", "10")


def test_cost_estimate_and_actual_cost(work, capsys):
    with serving() as llm:
        assert prepare.main(work.argv(llm, *PRICES, "--dry_run", "--json")) == 0
        before = json.loads(capsys.readouterr().out)
        assert llm.connections == 0 and not work.out.exists()
        assert prepare.main(work.argv(llm, *PRICES)) == 0
        capsys.readouterr()
        assert prepare.main(work.argv(llm, *PRICES, "--dry_run", "--json")) == 0
        assert json.loads(capsys.readouterr().out)["caption"]["calls"] == 0
    prompts = replies.load_prompts(replies.FOLDER)
    for stage, name in curation.PROMPT_OF.items():
        size = sum(len(m["content"]) for m in prompts[name].messages("Caption number 10."))
        assert before[stage]["calls"] == N
        assert before[stage]["tokens_in"] == pytest.approx(N * (size / 4 + 16), rel=0.02)
    assert before["usd"] == pytest.approx(before["caption"]["usd"] + before["writing"]["usd"])
    after = work.report["stages"]["writing"]
    assert (after["calls"], after["tokens_in"], after["tokens_out"]) == (N, 100 * N, 10 * N)
    assert work.report["usd"] == pytest.approx(2 * N * (100 * 2.5 + 10 * 10) / 1e6)


def test_unknown_usage_and_prices_are_not_guessed(work, capsys):
    with serving(lambda r, n: completion(KEEP, usage=False) if is_filter(r) else good(r)) as llm:
        assert prepare.main(work.argv(llm)) == 0
    assert work.report["usd"] is None
    assert work.report["stages"]["caption"]["calls_without_usage"] == N


def test_two_endpoints_with_a_key_for_one_host(work, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-secret123")
    with serving() as llm, serving() as other:
        flags = ["--key_env", "TEST_KEY", "--filter_endpoint", f"small@{other.url}"]
        flags += [*PRICES, "--filter_price_in", "0.1", "--filter_price_out", "0.5"]
        assert prepare.main(work.argv(llm, *flags)) == 0
    assert {r["model"] for r in other.requests} == {"small"} and set(other.keys) == {None}
    assert {r["model"] for r in llm.requests} == {"m"} and set(llm.keys) == {"Bearer sk-secret123"}
    assert work.report["stages"]["caption"]["usd"] == pytest.approx(N * (10 + 5) / 1e6)
    for path in work.folder.rglob("*.json*"):
        assert "secret" not in path.read_text()


# Where data may go.


def test_nothing_is_sent_if_one_row_is_credentialed(work, capsys):
    work.rows[-1] |= dict(data_class="credentialed")
    with serving() as llm:
        assert prepare.main(work.argv(llm)) == 1
        stderr = capsys.readouterr().err
        assert llm.connections == 0 and not work.out.exists()
        name = llm.url.removeprefix("http://").removesuffix("/v1")
        assert f"credentialed data may not be sent to {name}, which is not listed" in stderr
        assert prepare.main(work.argv(llm, "--credentialed_host", f"x{name}")) == 1
        assert llm.connections == 0
        assert prepare.main(work.argv(llm, "--credentialed_host", name)) == 0
    marks = [(d["credential"], d["data_class"]) for d in read(work.out / "documents.jsonl")]
    assert marks == [("no", "open")] * (N - 1) + [("yes", "credentialed")]


def test_each_call_has_the_data_class_of_its_row(work, monkeypatch):
    """Each call is checked in addition to the check of all rows at the start."""
    monkeypatch.setattr(curation, "check", lambda rows, settings: None)
    work.rows[5] |= dict(data_class="credentialed")
    with serving() as llm:
        assert prepare.main(work.argv(llm, "--concurrency", "1")) == 1
    assert [number(request) for request in llm.requests] == [0, 1, 2, 3, 4]


def test_both_endpoints_must_be_listed(work, capsys):
    work.rows[0] = {k: v for k, v in work.rows[0].items() if k != "data_class"}
    work.rows[0]["credential"] = "YES"
    with serving() as llm, serving() as other:
        flags = ["--filter_endpoint", f"m@{other.url}", "--credentialed_host", llm.url]
        assert prepare.main(work.argv(llm, *flags)) == 1
        assert llm.connections == other.connections == 0
    assert "which is not listed" in capsys.readouterr().err


# Stopped and resumed.


def start(work, llm) -> subprocess.Popen:
    command = [sys.executable, "-m", "data.prepare", *work.argv(llm, "--timeout", "20")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(condition):
    for _ in range(1_200):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError("it did not come to that in 60 s")


def slowly(request, n):
    time.sleep(0.1)
    return good(request)


@pytest.mark.parametrize("after", [10, N + 10])
def test_killed_run_does_not_repeat_recorded_calls(work, after):
    with serving(slowly) as llm:
        with start(work, llm) as child:
            wait_for(lambda: len(llm.requests) >= after)
            child.send_signal(signal.SIGKILL)
        calls = (work.out / "calls.jsonl").read_bytes()
        recorded = calls.count(b"\n")
        # As a kill in the middle of a line leaves it.
        (work.out / "calls.jsonl").write_bytes(calls + b'{"key": "ab')
        sent = len(llm.requests)
        assert recorded >= after - 4 and sent - recorded <= 4  # in flight: --concurrency
        assert prepare.main(work.argv(llm)) == 0
    assert len(llm.requests) == sent + 2 * N - recorded
    times = collections.Counter(json.dumps(request) for request in llm.requests)
    assert len(times) == 2 * N and max(times.values()) <= 2
    assert work.report["outcomes"] == {"writing written": N}
    assert len(read(work.out / "documents.jsonl")) == N


def test_ctrl_c_exits_75_and_the_same_command_resumes(work):
    with serving(slowly) as llm:
        with start(work, llm) as child:
            wait_for(lambda: len(llm.requests) >= 10)
            child.send_signal(signal.SIGINT)
            _, stderr = child.communicate(timeout=60)
        assert child.returncode == 75 and "run the same command again to resume" in stderr
        assert "Traceback" not in stderr and not (work.out / "documents.jsonl").exists()
        sent = len(llm.requests)
        assert work.report["undecided"] == work.report["rows"] == N
        assert len(read(work.out / "calls.jsonl")) == sent  # what was in flight is taken
        assert prepare.main(work.argv(llm)) == 0
    assert len(llm.requests) == 2 * N


def test_finished_run_sends_nothing(work):
    with serving() as llm:
        assert prepare.main(work.argv(llm)) == 0
        before = {path: path.read_bytes() for path in work.out.glob("*.jsonl")}
        assert prepare.main(work.argv(llm)) == 0
    assert len(llm.requests) == 2 * N and len(before) == 6
    assert {path: path.read_bytes() for path in before} == before


def test_progress_reports_rate_and_remaining_time(work, caplog):
    messages = []
    with serving() as llm:
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "log_to_stderr", lambda: prepare.log.addHandler(handler))
            prepare.log.setLevel(logging.INFO)
            assert prepare.main(work.argv(llm)) == 0
        prepare.log.removeHandler(handler)
    assert any(
        re.fullmatch(rf"writing: {N} of {N} rows, [\d.]+ per second, 0 s left", s) for s in messages
    )
    assert f"{N} rows; remaining calls, at most: caption {N} calls" in messages[0]


@pytest.mark.parametrize("change", ["threshold", "captions", "scores", "endpoints", "prompts"])
def test_other_inputs_require_another_folder(work, capsys, change):
    with serving() as llm:
        assert prepare.main(work.argv(llm)) == 0
        flags = ()
        if change == "threshold":
            flags = ("--threshold", "0.2")
        elif change == "captions":
            work.rows[0]["caption"] += "!"
        elif change == "scores":
            work.scores["r0"] = 0.6
        elif change == "endpoints":
            flags = ("--parameters", '{"temperature": 1}')
        else:
            folder = work.folder / "prompts"
            folder.mkdir()
            for path in replies.FOLDER.glob("*.txt"):
                (folder / path.name).write_text(path.read_text().replace("biomedical", "medical"))
            flags = ("--prompts", str(folder))
        assert prepare.main(work.argv(llm, *flags)) == 1
        stderr = capsys.readouterr().err
        assert f"was started with {change}" in stderr and "use another --out" in stderr
        calls = str(work.out / "calls.jsonl")
        work.out = work.folder / "other"
        assert prepare.main(work.argv(llm, *flags, "--calls", calls)) == 0
    again = {"threshold": 0, "captions": 2, "scores": 0, "endpoints": N, "prompts": 2 * N}
    assert len(llm.requests) == 2 * N + again[change]
