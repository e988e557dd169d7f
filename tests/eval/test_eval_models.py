"""Models of all kinds through eval.run: endpoints, predictions, baselines, parts, kills, Python."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from eval_setup import ITEMS, content, says_yes_after, write_items
from llm_server import completion, serving, short_waits  # noqa: F401

from medmax_jax import cli
from medmax_jax.config import build
from medmax_jax.configs import eval_tiny
from medmax_jax.convert import convert
from medmax_jax.endpoints.egress import OutgoingError
from medmax_jax.eval import evaluate
from medmax_jax.eval.config import EvalError, Settings, pinned
from medmax_jax.eval.models import loading, predictions
from medmax_jax.eval.pipeline import inference, stages
from medmax_jax.eval.tasks import selection
from medmax_jax.io import journal
from medmax_jax.storage import hub

ROOT = pathlib.Path(__file__).parents[2]


def settings(items: pathlib.Path, **changes) -> Settings:
    config = eval_tiny.get_config().unlock()
    config.update(questions=str(items), baselines="constant", probes="", options=False)
    config.update(resamples=2_000, window=8)
    for name, value in changes.items():
        section = config.service if name in config.service else config
        section[name] = value
    return build(Settings, config)


def run(items, out, model, **changes):
    options = {k: changes.pop(k) for k in ("shard", "dry_run") if k in changes}
    given = settings(items, **changes)
    summary = stages.run(given, out, model=model, progress=print, **options)
    return summary and content(summary)


def program(items, out, model, *flags):
    """Return the arguments of the program for subprocess."""
    config = ["--config=configs/eval_tiny.py", f"--config.questions={items}"]
    config += ["--config.probes=", "--config.options=False", "--config.baselines=constant"]
    config += ["--config.resamples=2_000", "--config.window=8", f"--workdir={out}"]
    command = [sys.executable, "-m", "eval.run", *config, f"--model={model}", *flags]
    return dict(args=command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True)


def says_yes(request: dict, n: int) -> bytes:
    return completion("Yes.")


# Endpoints.


def test_an_endpoint_receives_the_image_and_one_request_per_item(tmp_path):
    items = write_items(tmp_path / "data")
    with serving(says_yes) as llm:
        summary = run(items, tmp_path / "out", f"endpoint:m@{llm.url}")
        calls = len(llm.requests)
        again = run(items, tmp_path / "out", f"endpoint:m@{llm.url}")
        assert len(llm.requests) == calls == ITEMS
    image, question = llm.requests[0]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert re.fullmatch(r"Is it number \d+\?", question["text"])
    assert {r["max_tokens"] for r in llm.requests} == {16}
    row = summary["scores"][0]
    assert (row["metric"], row["n"], row["value"]) == ("accuracy", ITEMS, pytest.approx(2 / 3))
    assert again["scores"] == summary["scores"] and summary["spent"]["calls"] == ITEMS
    assert again["spent"]["calls"] == 0


def test_the_chat_prompt_lets_a_chat_model_answer_in_the_format(tmp_path):
    """A server that is verbose unless the question states the format of its answer."""
    items = write_items(tmp_path / "data", 6)

    def behave(request, n):
        question = request["messages"][0]["content"][1]["text"]
        stated = question.endswith("\nAnswer with yes or no only.")
        return completion("yes" if stated else "This is hard to say from a single image.")

    unparsed = {}
    with serving(behave) as llm:
        for prompt in ("sft", "chat"):
            summary = run(items, tmp_path / prompt, f"endpoint:m@{llm.url}", prompt=prompt)
            unparsed[prompt] = summary["scores"][0]["n_unparsed"]
    assert unparsed == {"sft": 6, "chat": 0}
    records = journal.read_jsonl(tmp_path / "chat" / "records.jsonl")
    # what is scored, compared and judged
    assert not any("Answer with" in record["prompt"] for record in records)


def test_refused_requests_are_counted_as_errors(tmp_path):
    items = write_items(tmp_path / "data", 4)

    def behave(request, n):
        return 400 if "number 2" in json.dumps(request) else completion("yes")

    with serving(behave) as llm:
        summary = run(items, tmp_path / "out", f"endpoint:m@{llm.url}")
    assert summary["errors"] == 1 and summary["scores"][0]["n_errors"] == 1
    failed = [r for r in journal.read_jsonl(tmp_path / "out" / "records.jsonl") if r.get("error")]
    assert [r["id"] for r in failed] == ["q2"] and failed[0]["text"] == ""


def test_credentialed_rows_are_not_sent_and_limits_hold(tmp_path):
    items = write_items(tmp_path / "data", 6, data_class="credentialed")
    with serving(says_yes) as llm:
        with pytest.raises(OutgoingError, match="credentialed"):
            run(items, tmp_path / "out", f"endpoint:m@{llm.url}")
        assert llm.connections == 0
        open_ = write_items(tmp_path / "open", 6)
        prices = dict(price_in=1.0, price_out=1.0, max_usd=1e-9)
        with pytest.raises(ValueError, match="max_usd"):
            run(open_, tmp_path / "dear", f"endpoint:m@{llm.url}", **prices)
        assert llm.connections == 0


def test_a_dry_run_sends_and_writes_nothing(tmp_path, capsys):
    items = write_items(tmp_path / "data")
    with serving(says_yes) as llm:
        dry = dict(dry_run=True, price_in=2.0, price_out=2.0)
        assert run(items, tmp_path / "out", f"endpoint:m@{llm.url}", **dry) is None
        assert llm.connections == 0 and not (tmp_path / "out").exists()
    assert f"{ITEMS}" in (output := capsys.readouterr().out) and "USD" in output


def test_the_estimate_includes_the_remaining_probes(tmp_path, capsys):
    items, prices = write_items(tmp_path / "data"), dict(price_in=2.0, price_out=2.0)
    estimates = []
    with serving(says_yes) as llm:
        arguments = dict(out=tmp_path / "out", model=f"endpoint:m@{llm.url}")
        for changes in (
            dict(dry_run=True),
            dict(dry_run=True, probes="blank,swapped"),
            dict(probes="blank,swapped"),
            dict(dry_run=True, probes="blank,swapped"),
        ):
            run(items, **arguments, **prices, **changes)
            output = capsys.readouterr().out
            estimates.append(
                (
                    int(re.search(r"probes: (\d+) requests", output)[1]),
                    int(re.search(r"at most (\d+) out", output)[1]),
                    float(re.search(r"at most about ([\d.]+) USD", output)[1]),
                )
            )
        assert len(llm.requests) == 3 * ITEMS
    bare, with_probes, ran, after = estimates
    assert (bare[0], with_probes[0]) == (0, 2 * ITEMS) and ran == with_probes
    assert with_probes[1] == 3 * bare[1] and with_probes[2] == pytest.approx(3 * bare[2], abs=2e-4)
    assert after == (0, 0, 0)
    with pytest.raises(ValueError, match=f"{ITEMS} requests and {2 * ITEMS} of probes cost about"):
        run(
            items, tmp_path / "dear", arguments["model"], **prices, probes="blank,swapped",
            max_usd=1.5 * bare[2],
        )  # fmt: skip


def test_a_missing_model_gives_an_error_of_one_line(tmp_path):
    items = write_items(tmp_path / "data", 2)
    given = program(items, tmp_path / "out", f"native:{tmp_path / 'nowhere'}")
    done = subprocess.run(**given, capture_output=True)
    assert done.returncode == cli.ERROR
    assert done.stderr.count("\n") == 1 and "nowhere" in done.stderr, done.stderr


def test_a_killed_run_resumes_and_repeats_only_requests_in_flight(tmp_path):
    """SIGKILL of a process, while a server counts its requests."""
    items, out = write_items(tmp_path / "data"), tmp_path / "out"

    with serving(says_yes_after(0.05)) as llm:
        given = program(items, out, f"endpoint:m@{llm.url}", "--config.service.concurrency=2")
        process = subprocess.Popen(
            **given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        while len(llm.requests) < 9 and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        before = len(llm.requests)
        done = subprocess.run(**given, capture_output=True)
        assert done.returncode == cli.DONE, done.stderr
        assert before < ITEMS <= len(llm.requests) <= ITEMS + 2
    records = journal.read_jsonl(out / "records.jsonl")
    assert sorted(r["id"] for r in records) == sorted(f"q{n}" for n in range(ITEMS))
    totals = inference.totals(out)["records.jsonl"]
    assert totals["starts"] == 2 and totals["recorded"] == ITEMS and totals["repeated"] <= 8


# Predictions and baselines.


def test_predictions_are_scored_and_gaps_counted(tmp_path):
    items = write_items(tmp_path / "data", 6)
    path = tmp_path / "answers.jsonl"
    lines = [dict(id=f"q{n}", text="no") for n in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = run(items, tmp_path / "out", f"predictions:{path}", probes="blank,swapped")
    row = summary["scores"][0]
    assert (row["n"], row["n_errors"]) == (6, 1) and row["value"] == pytest.approx(2 / 6)
    # a file has the same answer for another image, which shows nothing about its model
    assert summary["probes"]["rows"] == [] and "recorded" in summary["probes"]["reason"]
    assert not list((tmp_path / "out").glob("probe_*"))
    assert "the answers are recorded" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    "line, message",
    [
        (dict(id="other", text="no"), "1 ids are not items of this evaluation"),
        (dict(id="q0", images=["../../etc/passwd"]), "is not a file under"),
        (dict(id="q0"), "fields 'text' and 'images' are empty"),
    ],
)
def test_invalid_predictions_are_refused(tmp_path, line, message):
    items = write_items(tmp_path / "data", 2)
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(predictions.PredictionsError, match=message):
        run(items, tmp_path / "out", f"predictions:{path}")


ANSWER = """
import json, sys
for line in open(sys.argv[1]):
    item = json.loads(line)
    assert open(item["prompt"][0]["image"], "rb").read(4) == b"\\x89PNG"
    number = int(item["question"].removeprefix("Is it number ").rstrip("?"))
    assert item["answer_format"] == "yes or no" and item["prompt"][1]["text"] == item["question"]
    print(json.dumps({"id": item["id"], "text": "yes" if number % 3 else "no"}))
"""


@pytest.mark.parametrize("data_class, mode", [("open", 0o644), ("credentialed", 0o600)])
def test_exported_items_are_answered_by_a_script_and_scored(tmp_path, data_class, mode):
    items = write_items(tmp_path / "data", 6, data_class=data_class, context="REPORT")
    exported, answers = tmp_path / "items.jsonl", tmp_path / "answers.jsonl"
    exported.touch(0o644)  # an earlier export is replaced, with the mode of this one
    given = program(items, "", "", f"--export_items={exported}")
    given["args"] = [a for a in given["args"] if a not in ("--workdir=", "--model=")]
    umask = os.umask(0o022)
    try:
        done = subprocess.run(**given, capture_output=True)
    finally:
        os.umask(umask)
    assert done.returncode == 0 and done.stdout == f"6 items: {exported}\n", done.stderr
    assert exported.stat().st_mode & 0o777 == mode
    rows = journal.read_jsonl(exported)
    fields = {"id", "task", "family", "question", "options", "images", "prompt", "mode"}
    assert set(rows[0]) == fields | {"answer_format", "max_tokens", "data_class"}
    assert "REPORT" not in exported.read_text() and rows[0]["data_class"] == data_class
    with open(answers, "w") as out:
        subprocess.run([sys.executable, "-c", ANSWER, exported], stdout=out, check=True)
    summary = run(items, tmp_path / "out", f"predictions:{answers}")
    row = summary["scores"][0]
    assert (row["value"], row["n"], row["n_unparsed"], summary["errors"]) == (1, 6, 0, 0)


def test_exported_items_of_the_sample_have_no_references(tmp_path):
    config = build(Settings, eval_tiny.get_config())
    count = stages.export_items(config, out := tmp_path / "new" / "items.jsonl")
    rows = {row["id"]: row for row in journal.read_jsonl(out)}
    items = {item.id: item for item in selection.load_eval_set(config).items}
    assert count == len(rows) == len(items) and set(rows) == set(items)
    for name, row in rows.items():
        item = items[name]
        assert "answer" not in row and item.context not in row.values() or not item.context
        assert row["images"] == (list(item.images) if row["mode"] == "text" else [])
        chosen = row["options"].get(item.answer)
        assert (item.family == "vqa_mcq") == (chosen is not None)
        if item.family in ("captioning", "image_generation", "multimodal"):
            assert item.answer not in json.dumps(row) or not item.answer


def test_the_program_of_the_guide_answers_exported_items(tmp_path):
    guide = (ROOT / "docs" / "guides" / "eval.md").read_text()
    (tmp_path / "answer.py").write_text(re.search(r"```python\n(.*?)```", guide, re.S)[1])
    config = eval_tiny.get_config().unlock()
    for family in config.counts:
        config.counts[family] = 4 if family in ("vqa_closed", "vqa_mcq") else 0
    config.update(baselines="constant", probes="", options=False)
    settings = build(Settings, config)
    assert stages.export_items(settings, tmp_path / "items.jsonl") == 8
    with open(tmp_path / "answers.jsonl", "w") as out:
        command = [sys.executable, tmp_path / "answer.py", tmp_path / "items.jsonl"]
        subprocess.run(command, stdout=out, check=True)
    model = f"predictions:{tmp_path / 'answers.jsonl'}"
    summary = content(stages.run(settings, tmp_path / "out", model=model, progress=print))
    assert summary["adapter"] == "" and summary["errors"] == 0
    for row in summary["scores"]:  # the guide's program answers as the constant baseline does
        assert (row["n"], row["n_unparsed"], row["value"]) == (4, 0, row["baseline"]), row


def test_baselines_are_reproducible(tmp_path):
    items, values = write_items(tmp_path / "data"), {}
    for kind in ("constant", "majority", "random"):
        for time_ in (1, 2):
            summary = run(items, tmp_path / f"{kind}{time_}", f"baseline:{kind}")
            values.setdefault(kind, []).append(summary["scores"][0]["value"])
    assert values["constant"] == values["majority"] == [pytest.approx(2 / 3)] * 2
    assert values["random"][0] == values["random"][1]
    with pytest.raises(ValueError, match="use one of constant, majority, random"):
        run(items, tmp_path / "x", "baseline:best")


@pytest.mark.slow
def test_a_checkpoint_in_another_layout_is_converted_once_and_gives_equal_answers(
    tmp_path, monkeypatch, capsys
):
    source = tmp_path / "theirs"
    convert.convert("medmax_jax/tiny", str(source), layout="hf", say=print)
    items = write_items(tmp_path / "data", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    results = []
    for model in ("native:medmax_jax/tiny", f"hf:{source}", f"hf:{source}"):
        out = tmp_path / str(len(results))
        run(items, out, model, options=True)
        records = {r["id"]: r["text"] for r in journal.read_jsonl(out / "records.jsonl")}
        likely = [r["log_likelihoods"] for r in journal.read_jsonl(out / "options.jsonl")]
        results.append((records, likely, capsys.readouterr().out))
    assert results[0][:2] == results[1][:2] == results[2][:2] and any(results[0][0].values())
    assert "converting" in results[1][2] and "was already converted to" in results[2][2]
    (source / "config.json").unlink()
    with pytest.raises(EvalError, match="theirs"):
        run(items, tmp_path / "broken", f"hf:{source}")


# Parts, locks, folders, disks.


def test_a_full_disk_keeps_the_written_records(tmp_path):
    """A limit on file sizes acts as a full disk: one line, and no request is repeated."""
    items, out = write_items(tmp_path / "data"), tmp_path / "out"
    with serving(says_yes) as llm:
        given = program(items, out, f"endpoint:m@{llm.url}", "--config.service.concurrency=1")
        limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *given.pop("args")]
        full = subprocess.run(limited, **given, capture_output=True)
        assert full.returncode == cli.ERROR and full.stderr.count("\n") == 1, full.stderr
        assert "File too large" in full.stderr and ".jsonl" in full.stderr
        requested = len(llm.requests)
        assert 0 < requested < ITEMS
        done = subprocess.run(limited[4:], **given, capture_output=True)
        assert done.returncode == cli.DONE, done.stderr
        assert ITEMS <= len(llm.requests) <= ITEMS + 1  # at most the reply that was not written
    assert len(journal.read_jsonl(out / "records.jsonl")) == ITEMS


@pytest.mark.slow
def test_shards_in_processes_equal_one_run(tmp_path):
    """1, 2 and 4 processes give the same records and the same scores."""
    items = write_items(tmp_path / "data")
    sets = []
    for count in (1, 2, 4):
        out = tmp_path / f"by{count}"
        if count > 1:
            parts = [
                subprocess.Popen(
                    **program(items, out, "baseline:random", f"--shard={i}/{count}"),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )  # fmt: skip
                for i in range(count)
            ]
            for part in parts:
                output, _ = part.communicate()
                assert part.returncode == cli.DONE, output
        summary = run(items, out, "baseline:random")
        records = [r for path in out.glob("records*.jsonl") for r in journal.read_jsonl(path)]
        assert len(records) == ITEMS
        by_id = {r["id"]: {k: v for k, v in r.items() if k != "seconds"} for r in records}
        sets.append((by_id, summary["scores"]))
    assert sets[0] == sets[1] == sets[2]


def test_a_second_writer_and_another_model_are_refused(tmp_path):
    items, out = write_items(tmp_path / "data"), tmp_path / "out"

    second_ended = threading.Event()

    def behave(request, n):
        second_ended.wait(100)
        return completion("yes")

    with serving(behave) as llm:
        given = program(items, out, f"endpoint:m@{llm.url}", "--config.service.concurrency=1")
        first = subprocess.Popen(**given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while not llm.requests and first.poll() is None:
            time.sleep(0.01)
        second = subprocess.run(**given, capture_output=True)
        second_ended.set()
        assert second.returncode == cli.ERROR and second.stderr.count("\n") == 1, second.stderr
        output, _ = first.communicate()
        assert first.returncode == cli.DONE, output
        assert len(llm.requests) == ITEMS
    with pytest.raises(EvalError, match="holds an evaluation with another model"):
        run(items, out, "baseline:constant")


def test_a_missing_image_is_reported_before_the_first_request(tmp_path):
    items = write_items(tmp_path / "data")
    (tmp_path / "data" / "3.png").unlink()
    with serving(says_yes) as llm:
        with pytest.raises(ValueError, match=r"3\.png"):
            run(items, tmp_path / "out", f"endpoint:m@{llm.url}")
        assert llm.connections == 0


# From Python.


def test_the_example_of_the_readme_runs_as_written(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(from medmax_jax\.eval import .*?)```", text, re.S)[1]
    assert code.count("\n") <= 16
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(code, namespace)  # noqa: S102  the lines of the README
    row = namespace["summary"]["scores"][0]
    assert row["task"] == "vqa_closed" and 0 < row["value"] < 1
    assert (tmp_path / "runs" / "mine" / "report.html").exists()


def test_option_likelihoods_of_a_python_model_are_calibrated(tmp_path):
    class Sure:
        def generate(self, requests):
            return ["yes" for _ in requests]

        def score_options(self, requests, options):
            return [[-0.1 if word == "yes" else -3.0 for word in each] for each in options]

    items = write_items(tmp_path / "data")
    options_ = dict(probes="", options=True, baselines="constant", resamples=2_000, progress=print)
    result = evaluate(Sure(), items, tmp_path / "out", "strict", **options_)
    rows = {(r["task"], r["metric"]): r["value"] for r in result["calibration"]["rows"]}
    assert 0 < rows["vqa_rad_closed", "ece"] < 1


def test_the_folder_of_a_training_run_is_an_adapter(tmp_path):
    settings = build(Settings, eval_tiny.get_config())
    (tmp_path / "checkpoints").mkdir()
    spec = ("native:medmax_jax/tiny", str(tmp_path), False, settings)
    with pytest.raises(ValueError, match="the run has exported no adapter yet"):
        loading.parse_model_spec(*spec, progress=print)
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter.safetensors"):
        (tmp_path / "adapter" / name).write_text("{}")
    resolved = loading.parse_model_spec(*spec, progress=print)
    assert resolved.adapter == str(tmp_path / "adapter") and resolved.adapter_digest


def test_settings_state_the_commits_of_names_of_the_hub(monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = f"/cache/models--org--m/snapshots/{commit}"
    monkeypatch.setitem(hub._located, "hf://org/m", cached)
    monkeypatch.setitem(hub._located, "hf://org/m/items.jsonl", f"{cached}/items.jsonl")
    items = "hf://org/m/items.jsonl,local.jsonl"
    found = pinned(settings(items, model="native:hf://org/m", scorers="biomedclip:hf://org/m"))
    name = f"hf://org/m@{commit}"
    assert found.questions == (f"{name}/items.jsonl", "local.jsonl")
    assert (found.model, found.scorers) == (f"native:{name}", (f"biomedclip:{name}",))
    assert pinned(settings("a", model="endpoint:m@http://h:1/v1")).model.endswith("m@http://h:1/v1")


def test_evaluate_takes_the_name_of_a_model(tmp_path):
    """As --model has it: the same scores as from the program's own function."""

    class Silent:
        def generate(self, requests):
            return []

    items, chosen = write_items(tmp_path / "data"), dict(probes="", options=False, window=8)
    chosen |= dict(baselines="constant", resamples=2_000)
    named = evaluate("baseline:random", items, tmp_path / "named", **chosen)
    assert named["scores"] == run(items, tmp_path / "program", "baseline:random")["scores"]
    with pytest.raises(EvalError, match="name the model as KIND:WHERE and the items by their file"):
        evaluate("baseline:random", [], tmp_path / "out")
    with pytest.raises(EvalError, match="with a list of items or an adapter"):
        evaluate(Silent(), items, tmp_path / "out", adapter="runs/lora")
    with pytest.raises(EvalError, match=r"requires a method generate\(requests\)"):
        evaluate(None, items, tmp_path / "out")
