"""Tests of `prepare pseudo`: what is written, interruptions, the overlap gate, endpoints."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from llm_server import completion, serving, short_waits  # noqa: F401

from medmax_jax.data import prepare
from medmax_jax.data.analysis import check, near_duplicates
from medmax_jax.data.annotation import cli, evidence, filters, kinds, overlap, questions
from medmax_jax.data.annotation.generators import Choice
from medmax_jax.data.image_tokens.encoder import load_encoder
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import check_document
from medmax_jax.data.records.jsonl import to_text
from medmax_jax.data.records.reader import open_records
from medmax_jax.io import journal

ROOT = pathlib.Path(__file__).parents[2]
ADAPTER = ROOT / "medmax_jax" / "tiny_adapter"
TASKS = ("Image Generation", "Image Captioning", "VQA")


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(prepare.TINY)


@pytest.fixture(scope="module")
def tokenizer(encoder):
    return encoder.tokenizer


@pytest.fixture(scope="module", autouse=True)
def computed_once(encoder):
    """Compute with the VQGAN what all runs have in common once: hashes, and evaluation images."""
    patch = pytest.MonkeyPatch()
    looks, real_looks = {}, near_duplicates.hash_codes

    def hash_codes(encoder, codes):
        codes = [np.asarray(c) for c in codes]
        new = [c for c in codes if c.tobytes() not in looks]
        looks.update(zip([c.tobytes() for c in new], real_looks(encoder, new), strict=True))
        yield from (looks[c.tobytes()] for c in codes)

    patch.setattr(near_duplicates, "hash_codes", hash_codes)
    items = overlap._sample_items()
    patch.setattr(overlap, "_sample_items", lambda: (items[0], items[1][:8], items[2]))
    read = functools.cache(overlap.read_evaluation)
    patch.setattr(overlap, "read_evaluation", lambda a, *rest: read(tuple(a), *rest))
    patch.setattr(check, "resolve_encoder", lambda records, model: encoder)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encoder):
    """Six real images, each with the documents of one task: a DMAX."""
    pool = tmp_path_factory.mktemp("pool")
    loaded = dict(vq=encoder.vq, tokenizer=encoder.tokenizer)
    prepare.prepare_sample(pool / "all", split="validation", **loaded)
    records = open_records(pool / "all")
    paths = sorted({d.image_path for d in records})
    task = {path: TASKS[n % len(TASKS)] for n, path in enumerate(paths)}
    chosen = (d for d in records if d.task == task[d.image_path])
    writer.write(
        pool / "dmax", chosen, shard_size=64, layout=records.layout, notes=dict(split="validation")
    )
    return pool / "dmax"


def text_of(document, tokenizer):
    return to_text(document, SimpleNamespace(vocab=tokenizer.vocab), tokenizer)


# ---- The command, with a generator in place of a model ----


class Oracle:
    """Answers as scripted: right about what a question names, in one of two ways otherwise."""

    digest = hashlib.sha256(b"oracle").hexdigest()
    last_error = ""

    def __init__(self, stop_after=None):
        self.calls, self.stop_after, self.asked = 0, stop_after, []

    def _call(self):
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise KeyboardInterrupt

    def samples(self, prompts, count):
        self._call()
        self.asked += [prompt.name for prompt in prompts]
        return [[self.answer(prompt)] * count for prompt in prompts]

    def answer(self, prompt):
        q = prompt.question
        if q.kind == "mcq":
            return kinds.LETTERS[q.options.index(q.stated)]
        if q.kind == "closed":
            return q.stated or "yes"
        return q.options[0] if q.options else f"The image {q.image} shows tissue {q.id[-18:-2]}."

    def choose(self, prompts, texts):
        self._call()
        return [
            Choice(pick=0, likelihoods=(-0.5, *[-1.0 - len(t) / 64 for t in own[1:]]))
            for own in texts
        ]


@pytest.fixture
def run(folder, monkeypatch, tmp_path, capsys):
    """Run the command with an Oracle; return (exit code, last line of stderr)."""

    def run(*flags, oracle=None, records=folder, out=tmp_path / "out"):
        monkeypatch.setattr(cli, "_generator", lambda *_: oracle or Oracle())
        code = prepare.main(["pseudo", str(records), "--out", str(out), *map(str, flags)])
        return code, capsys.readouterr().err.strip().splitlines()[-1]

    run.out = tmp_path / "out"
    return run


def read_report(out):
    return json.loads((out / cli.REPORT).read_text())


def test_the_folder_has_all_records_and_the_kept_documents(run, folder, tokenizer):
    assert run()[0] == 0
    before, after, report = open_records(folder), open_records(run.out), read_report(run.out)
    added = [after[n] for n in range(len(before), len(after))]
    for n, document in enumerate(before):
        assert writer.to_bytes(after[n]) == writer.to_bytes(document)
    assert len(added) == report["outcomes"]["kept"] == after.index["pseudo"].sum() > 6
    assert report["pseudo_documents_checked"] == len(added)
    codes = {d.image_path: d for d in before}
    for document in added:
        check_document(document, after.layout)
        original = codes[document.image_path]
        for name in ("group", "source", "credential", "image_sha256"):
            assert getattr(document, name) == getattr(original, name)
        is_code = (document.tokens >= 4) & (document.tokens < 260)
        assert (document.tokens[is_code] == original.tokens[
            (original.tokens >= 4) & (original.tokens < 260)]).all()  # fmt: skip
        assert document.generator == Oracle.digest and set(document.scores) == set(filters.FILTERS)
        assert document.turns == 1 and document.task in TASKS + ("Report Understanding",)
    texts = {d.id.split("/")[1]: text_of(d, tokenizer) for d in added}
    assert texts["generation"].startswith("Generate an image. The image ")
    assert texts["generation"].endswith("<reserved08706><image>")
    assert texts["caption"].startswith(f"<image>{kinds.DESCRIBE['caption']}<reserved08706>The ")
    assert report["per_image"]["before"]["tasks"] == 1 < report["per_image"]["after"]["tasks"]
    assert report["per_image"]["IMAX (published)"] == dict(tasks=4.1, entries=7.46)


def test_counts_add_up(run):
    run("--max_source_share", 0.3, "--max_task_share", 0.05)
    report = read_report(run.out)
    assert sum(report["outcomes"].values()) == report["questions"]
    assert report["outcomes"]["source_share"] + report["outcomes"]["task_share"] > 0
    for row in report["kinds"].values():
        images = row["images"]
        parts = ("overlap", "other_view", "unsupported", "asked")
        assert sum(images[name] for name in parts) == images["missing"]
        assert images["missing"] + images["present"] == report["images"] == 6
        assert sum(row["outcomes"].values()) == row["questions"]
    kept = report["documents"]["after"] - report["documents"]["before"]
    assert kept == report["outcomes"]["kept"]


def test_each_filter_rejects_and_is_counted_separately(run):
    class Doubtful(Oracle):
        """Unsure of closed questions, inconsistent in captions, and wrong in another order."""

        def samples(self, prompts, count):
            replies = super().samples(prompts, count)
            if prompts[0].question.kind == "caption":
                return [[r, "x", "y", "z"] for r, *_ in replies]
            return replies

        def choose(self, prompts, texts):
            choices = super().choose(prompts, texts)
            if prompts[0].question.kind == "closed":
                return [Choice(pick=0, likelihoods=(-2.0, -1.9)) for _ in choices]
            if prompts[0].question.kind == "generation":
                return [
                    c if p.image_first else Choice(pick=1, likelihoods=c.likelihoods)
                    for p, c in zip(prompts, choices, strict=True)
                ]
            return choices

    assert run(oracle=Doubtful())[0] == 0
    report = read_report(run.out)
    for kind, name in (("closed", "margin"), ("caption", "agreement"), ("generation", "order")):
        row = report["kinds"][kind]
        assert row["outcomes"][name] == row["questions"] == row[f"below_{name}"] > 0
        others = set(filters.FILTERS) - {name}
        assert not any(row[f"below_{other}"] for other in others) and not row["outcomes"]["kept"]
    assert report["kinds"]["mcq"]["outcomes"]["kept"] > 0


def contents(out):
    names = ("dataset.json", "index.npy", cli.REPORT, evidence.SAMPLES, evidence.EVIDENCE)
    files = [*(out / name for name in names), *sorted(out.glob("*.array_record"))]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("calls", [3, 14])
def test_an_interrupted_run_ends_with_the_same_bytes(run, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(evidence, "BATCH", 3)
    assert run()[0] == 0
    again = tmp_path / "again"
    code, line = run(oracle=Oracle(stop_after=calls), out=again)
    assert code == 75 and "rerun the same command" in line
    assert not (again / "dataset.json").exists()
    done = {row["id"] for row in journal.read_jsonl(again / evidence.SAMPLES)}
    rest = Oracle()
    assert run(oracle=rest, out=again)[0] == 0
    assert not done & set(rest.asked)  # each question is answered exactly once
    assert contents(again) == contents(run.out)


def test_a_batch_that_was_journaled_in_part_is_completed(run, tmp_path):
    assert run()[0] == 0
    again = tmp_path / "again"
    run(oracle=Oracle(stop_after=9), out=again)
    path = again / evidence.SAMPLES
    path.write_bytes(path.read_bytes()[:-30])  # a kill while a line was written
    assert run(out=again)[0] == 0
    assert contents(again)["dataset.json"] == contents(run.out)["dataset.json"]


def test_other_thresholds_need_no_new_answers(run):
    code, line = run("--min_agreement", 1, "--min_margin", 50)
    assert code == 1 and "none of" in line and "margin" in line and "no records were" in line
    assert not (run.out / "dataset.json").exists()
    oracle = Oracle()
    assert run(oracle=oracle)[0] == 0 and oracle.calls == 0
    code, line = run()
    assert code == 1 and "already contains a finished data set" in line


def test_a_generator_that_agrees_with_nothing(run):
    class Random(Oracle):
        def samples(self, prompts, count):
            replies = [None, "\x00", "<image>", "�"]
            return [replies[:count] for _ in prompts]

    code, line = run(oracle=Random())
    assert code == 1 and "unusable" in line and not (run.out / "dataset.json").exists()


def test_other_flags_are_not_mixed_with_earlier_answers(run):
    run("--min_margin", 50)
    code, line = run("--seed", 1)
    assert code == 1 and "was started with other seed" in line


def test_no_missing_kind_writes_nothing(run, folder, tmp_path):
    records = open_records(folder)
    of_task = (d for d in records if d.task == "Image Captioning")
    writer.write(tmp_path / "one", of_task, shard_size=64, layout=records.layout, notes={})
    code, line = run("--tasks", "caption", records=tmp_path / "one")
    assert code == 1 and "no document to add" in line and "caption: 2 present" in line
    assert not run.out.exists()


def test_unknown_task_and_few_samples(folder, tmp_path, capsys):
    for flags, text in (
        (["--tasks", "captions"], "'captions' is unknown; did you mean caption?"),
        (["--samples", "1"], "1 samples cannot agree; use 2 or more"),
        (["--min_order", "2"], "2 is not a share; use 0 to 1"),
    ):
        with pytest.raises(SystemExit):
            prepare.main(["pseudo", str(folder), "--out", str(tmp_path / "x"), *flags])
        assert text in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# ---- Evaluation images ----


def test_images_of_an_evaluation_set_are_excluded(run, folder, tmp_path):
    records = open_records(folder)
    path = records[0].image_path
    other = dict(image_sha256="", id="e", image_path="renamed.png")
    document = dataclasses.replace(records[0], **other)
    writer.write(tmp_path / "eval", [document], shard_size=4, layout=records.layout, notes={})
    assert run("--against", tmp_path / "eval")[0] == 0
    report, written = read_report(run.out), open_records(run.out)
    assert report["overlap"]["same_codes"] == report["overlap"]["images"] == 1
    assert path not in {d.image_path for d in written if d.pseudo}
    assert path in {d.image_path for d in written}  # the records themselves are unchanged
    assert report["kinds"]["caption"]["images"]["overlap"] == 1


def test_items_with_the_files_of_training_images_are_excluded_by_bytes(run, folder, tmp_path):
    path = open_records(folder)[0].image_path
    row = dict(id="1", prompt="?", answer="!", image_path=path, data_class="open")
    (tmp_path / "items.jsonl").write_text(json.dumps(row) + "\n")
    flags = ("--against", tmp_path / "items.jsonl")
    code, line = run(*flags)
    assert code == 1 and "1 images cannot be read; set --eval_images" in line
    assert run(*flags, "--eval_images", prepare.SAMPLE)[0] == 0
    overlap_counts = read_report(run.out)["overlap"]
    assert overlap_counts["images"] == 1 and overlap_counts["evaluation_images"] == 1


@pytest.mark.parametrize(("bits", "excluded"), [(0, True), (15, True), (16, False)])
def test_near_duplicates_are_excluded_up_to_15_bits(folder, encoder, bits, excluded):
    records = open_records(folder)
    images = questions.read_images(records, encoder.tokenizer)
    first = next(iter(images[0].variants.values()))
    (look,) = near_duplicates.hash_codes(encoder, [first])
    changed = look.copy()
    changed[: bits // 8] ^= np.uint32(0xFF)
    changed[7] ^= np.uint32((1 << bits % 8) - 1)
    evaluation = overlap.EvalImages(
        codes=frozenset(), files=frozenset(), looks=changed[None], count=1
    )
    gate = overlap.compare(images, evaluation, encoder, lambda line: None)
    assert gate.excluded == ({0: "look"} if excluded else {})
    assert set(images[0].variants).isdisjoint(gate.compared) == excluded
    assert set(images[1].variants) <= gate.compared


def test_the_written_folder_is_checked_again(run, monkeypatch):
    """A gate that misses an image while the questions are made is found before it is used."""
    real = overlap.compare

    def blind(*args):
        gate = real(*args)
        return dataclasses.replace(gate, excluded={}, compared=frozenset())

    monkeypatch.setattr(overlap, "compare", blind)
    code, line = run()
    assert code == 1 and "shows an image of an evaluation set" in line


# ---- Credentialed images ----


@pytest.fixture
def credentialed(folder, tmp_path):
    records = open_records(folder)
    first = records[0].image_path
    changed = (
        dataclasses.replace(d, credential="yes") if d.image_path == first else d for d in records
    )
    writer.write(tmp_path / "c", changed, shard_size=64, layout=records.layout, notes={})
    return tmp_path / "c", first


def test_pseudo_documents_of_credentialed_images_are_credentialed(run, credentialed):
    records, path = credentialed
    assert run(records=records)[0] == 0
    for document in open_records(run.out):
        assert (document.credential == "yes") == (document.image_path == path)
    assert {p.stat().st_mode & 0o77 for p in [run.out, *run.out.iterdir()]} == {0}
    page = (run.out / cli.PAGE).read_text()
    assert path not in page and "credentialed images: not shown" in page
    for name in (evidence.SAMPLES, evidence.EVIDENCE, cli.REPORT, cli.RUN):
        assert path not in (run.out / name).read_text()


# ---- An endpoint ----


def reply(request, n):
    text = request["messages"][0]["content"]
    text = next(part["text"] for part in text if part["type"] == "text")
    if "yes or no" in text:
        return completion("Yes.")
    if "letter only" in text:
        return completion("A" if "\nA: MRI" in text else "B")
    seed = request.get("seed", 0)
    return completion(f"An image with the words {hash(text) % 7} and seed {seed % 2}.")


def endpoint_flags(llm, *flags):
    command = ["--endpoint", f"m@{llm.url}", "--min_margin", "off", "--timeout", "5"]
    return [*command, "--images", str(prepare.SAMPLE), *map(str, flags)]


def test_an_endpoint_answers_and_no_call_is_repeated(folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["pseudo", str(folder), "--out", str(out), "--samples", "2", "--tasks", "closed"]
    with serving(reply) as llm:
        flags = endpoint_flags(llm)
        assert prepare.main([*command, *flags, "--dry_run"]) == 0 and not llm.requests
        assert prepare.main([*command, *flags, "--min_agreement", "0.9"]) == 0
        calls = len(llm.requests)
        report = read_report(out)
        assert calls == report["questions"] * (2 + 2)  # two samples, two orders
        (out / "dataset.json").unlink()
        assert prepare.main([*command, *flags]) == 0 and len(llm.requests) == calls
    first = llm.requests[0]
    assert first["messages"][0]["content"][0]["image_url"]["url"].startswith(
        "data:image/png;base64"
    )
    parts = [[p["type"] for p in r["messages"][0]["content"]] for r in llm.requests]
    assert ["text", "image_url"] in parts and {r["temperature"] for r in llm.requests} == {0, 0.7}
    assert report["thresholds"]["margin"] is None and report["outcomes"]["kept"] > 0
    digest = hashlib.sha256(json.dumps([llm.url, "m"]).encode()).hexdigest()
    assert report["generator"] == digest
    assert all(set(d.scores) == {"agreement", "order"} for d in open_records(out) if d.pseudo)


def test_an_endpoint_has_no_likelihoods(folder, tmp_path, capsys):
    command = ["pseudo", str(folder), "--out", str(tmp_path / "x")]
    command += ["--endpoint", "m@http://127.0.0.1:9/v1"]
    assert prepare.main(command) == 1
    error = capsys.readouterr().err
    assert "returns no likelihoods" in error and "set --min_margin off" in error
    assert prepare.main([*command, "--min_margin", "off"]) == 1
    assert "--images is None; set it to the folder" in capsys.readouterr().err
    assert prepare.main([*command, "--min_margin", "off", "--adapter", str(ADAPTER)]) == 1
    assert "an endpoint has no adapter" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_credentialed_images_are_not_sent(credentialed, tmp_path, capsys):
    command = ["pseudo", str(credentialed[0]), "--out", str(tmp_path / "x"), "--samples", "2"]
    with serving(reply) as llm:
        assert prepare.main([*command, *endpoint_flags(llm)]) == 1
        assert "credentialed data may not be sent" in capsys.readouterr().err
        assert not llm.connections and not (tmp_path / "x").exists()
        host = llm.url.removeprefix("http://").removesuffix("/v1")
        flags = endpoint_flags(llm, "--credentialed_host", host, "--tasks", "closed")
        assert prepare.main([*command, *flags]) == 0
        assert llm.requests
    assert (tmp_path / "x" / cli.CALLS).stat().st_mode & 0o77 == 0


def test_questions_without_a_reply_are_asked_again(folder, tmp_path, capsys):
    down = {"on": True}

    def behave(request, n):
        is_second = request["seed"] == 1
        return 500 if down["on"] and is_second else reply(request, n)

    command = ["pseudo", str(folder), "--out", str(tmp_path / "x"), "--samples", "2"]
    command += ["--tasks", "closed", "--retries", "1", "--min_agreement", "0"]
    with serving(behave) as llm:
        flags = endpoint_flags(llm)
        assert prepare.main([*command, *flags]) in (1, 75)
        assert not (tmp_path / "x" / "dataset.json").exists()
        before = Counter(json.dumps(r) for r in llm.requests if r["seed"] == 0)
        down["on"] = False
        assert prepare.main([*command, *flags]) == 0
        after = Counter(json.dumps(r) for r in llm.requests if r["seed"] == 0)
    assert all(after[request] == n for request, n in before.items())


# ---- The shipped model ----


def test_the_tiny_model_answers_in_batches(folder, tmp_path):
    out = tmp_path / "out"
    command = [
        "pseudo",
        str(folder),
        "--adapter",
        str(ADAPTER),
        "--out",
        str(out),
        "--samples",
        "2",
    ]
    thresholds = ["--min_margin", "-9", "--min_agreement", "0", "--min_order", "0"]
    assert prepare.main([*command, *thresholds, "--tasks", "closed"]) == 0
    report = read_report(out)
    assert report["questions"] == sum(report["outcomes"].values())
    lines = journal.read_jsonl(out / evidence.EVIDENCE)
    assert len(lines) >= report["outcomes"]["kept"] > 0
    for line in lines:
        scores = line["likelihoods"]
        assert len(scores) == 1 + len(line["distractors"]) and max(scores) < 0
        assert (line["picks"][0] == 0) == (scores[0] == max(scores))
    added = [d for d in open_records(out) if d.pseudo]
    assert {d.task for d in added} == {"VQA"} and all(d.scores["order"] >= 0 for d in added)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [evidence.SAMPLES, evidence.EVIDENCE])
def test_a_killed_process_resumes_to_the_same_bytes(folder, tmp_path, stage, monkeypatch):
    """SIGKILL after the first batches of a stage, with the real model and batches of 4."""
    program = (
        "import sys; from medmax_jax.data import prepare; from medmax_jax.data.annotation import "
        "evidence; evidence.BATCH = 4; sys.exit(prepare.main(sys.argv[1:]))"
    )

    def command(out):
        words = ["pseudo", folder, "--adapter", ADAPTER, "--out", out, "--samples", "2"]
        words += ["--min_agreement", "0", "--tasks", "closed", "open", "caption"]
        return [sys.executable, "-c", program, *map(str, words)]

    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    assert subprocess.run(command(tmp_path / "a"), cwd=ROOT, env=environment).returncode == 0
    child = subprocess.Popen(command(tmp_path / "b"), cwd=ROOT, env=environment)
    path = tmp_path / "b" / stage
    for _ in range(6_000):
        if path.exists() and path.read_bytes().count(b"\n") >= 4:
            break
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    lines = path.read_bytes().count(b"\n")
    total = (tmp_path / "a" / stage).read_bytes().count(b"\n")
    assert 4 <= lines < total and not (tmp_path / "b" / "dataset.json").exists()
    assert subprocess.run(command(tmp_path / "b"), cwd=ROOT, env=environment).returncode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
