"""Seeded mutations of every text format that a user or another program may hand over.

A mutated file gives a normal result, a row that is counted as malformed, or the project's own
error in one printable line that is cut short. Anything else, a traceback of another kind or a read
that does not end, fails with the number of the mutation, which reproduces it.
"""

import csv
import gzip
import io
import json
import pathlib
import random
import signal

import micro_run
import numpy as np
import pytest
from source_setup import plan

from medmax_jax.config import Vocab
from medmax_jax.data import prepare
from medmax_jax.data.analysis import eval_set
from medmax_jax.data.image_tokens.encoder import PrepareError
from medmax_jax.data.instruct import captions
from medmax_jax.data.packing import plan_file
from medmax_jax.data.packing.pack import PackError
from medmax_jax.data.records import jsonl, reader
from medmax_jax.data.records.document import Layout, RecordsError
from medmax_jax.data.records.row_streams import SourceError
from medmax_jax.data.release import train_rows
from medmax_jax.data.sources import build
from medmax_jax.data.sources.row import RejectedRow, Row
from medmax_jax.endpoints.egress import OutgoingError
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.models import predictions
from medmax_jax.eval.tasks import items, selection
from medmax_jax.generation import output_files
from medmax_jax.generation.requests import GenerateError
from medmax_jax.io import run_files
from medmax_jax.io.journal import JournalError, parse_jsonl
from medmax_jax.io.text_files import TextFileError
from medmax_jax.models.vocab import BOI, BOS, EOI, EOS, SEP
from medmax_jax.scaling import table
from medmax_jax.scaling.laws import LAWS, ScalingError
from medmax_jax.training import log_writer

DEFAULT, SLOW = 60, 500  # mutations of a format
MAX_MESSAGE = 1_000  # characters, with the path of the file
SECONDS = 20  # of one read, on a busy machine

# What damaged, foreign or hostile files hold where a value or some bytes stood.
VALUES = [
    *(b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"null", b"true", b"[]", b"{}", b'""', b"1.5"),
    *(b"9" * 30, b"9" * 5_000, b"1" * 400, b'"\\ud83d"', b'"\\u0000"', b'"a\\nb"', b'"../../x"'),
    *(b"[" * 70 + b"]" * 70, b"[" * 3_000, b'{"a":' * 100, b'"' + b"x" * 3_000 + b'"'),
]
BYTES = [
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\xff", b"\r\n", b"\r", b"\n", b"\xe2\x80\xa8"),
    *(b'"', b"'", b",", b"}", b"{", b"]", b"[", b":", b"\\", b"\\ud800", b"\x1f\x8b", b"\x1b[2J"),
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to three changes of the kinds that files suffer."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 8, 64)))
        kind = rng.randrange(10)
        if kind == 0:  # a flipped bit
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[end:]
        elif kind == 2:  # the same bytes again
            data = data[:end] + data[at:]
        elif kind == 3:
            data = data[:at] + rng.choice(BYTES) + data[at:]
        elif kind == 4:
            data = data[:at]
        elif kind == 5:
            data = rng.choice((gzip.compress(data), gzip.compress(data)[:-9], b"\x1f\x8b" + data))
        elif kind == 6:
            data = rng.choice((data.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + data, b"[" + data))
        else:
            data = replaced(data, rng)
        data = data or b"\n"
    return data


def replaced(data: bytes, rng: random.Random) -> bytes:
    """One value of JSON or field of CSV is another value."""
    ends = [i for i, byte in enumerate(data) if byte in b",:[]{}\n"]
    if len(ends) < 2:
        return data + rng.choice(VALUES)
    at = rng.randrange(len(ends) - 1)
    return data[: ends[at] + 1] + rng.choice(VALUES) + data[ends[at + 1] :]


def lines_of(*rows: dict) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def csv_of(header: str, *rows: list) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header.split(","), *rows])
    return out.getvalue().encode()


# ---- the formats: (file name, its bytes, how it is read, the errors that say it)

LAYOUT = Layout(
    vocab=Vocab(size=9_000, image_codes=16, text_start=8_712),
    codes_per_image=4,
    tokenizer="",
    vqgan="",
)
TRAIN_ROW = dict(
    text="<image>Is it a CT?<reserved08706>yes",
    tokens=[BOS, BOI, 4, 19, 5, 4, EOI, 8_720, SEP, 8_730, EOS],
    image_path="images/pmc/a.png",
    task="VQA",
    source="pathvqa",
    credential="no",
)
RULES = train_rows.RowRules(
    layout=LAYOUT, separator=True, max_bad=1.0, shard_size=3, tokenizer=None
)
QUESTION = dict(
    task_name="vqa_rad", question_type="closed", prompt="Is it?", answer="yes",
    image_path="0.png", id="q0", slices={"organ": "head"}, group="p1",
)  # fmt: skip
MCQ = QUESTION | dict(
    id="q1", task_name="pmc_vqa", question_type="mcq", prompt="Which?\nA: CT\nB: MR", answer="A"
)
RAD = dict(
    qid=1, image_name="a.jpg", image_organ="HEAD", answer="Yes", answer_type="CLOSED",
    question_type="PRES", question="Is it normal?", phrase_type="freeform",
)  # fmt: skip
OMNI = dict(
    dataset="X", question_id="0", question_type="Modality", question="What?", gt_answer="MR",
    image_path="Images/a.png", option_A="CT", option_B="MR", modality_type="MR",
)  # fmt: skip
TALK = dict(
    id="1", image=["a_1.jpg"],
    conversations=[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A CT."}],
)  # fmt: skip
PMC_VQA = "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split"
QUILT = ",caption,image_path,subset,split,pathology"


def read_manifest(path: pathlib.Path) -> None:
    prepare._manifest(path.parent)


def read_published(path: pathlib.Path) -> None:
    with train_rows._opened(path) as file:
        for _, _, line in train_rows.bounded_lines(file, lambda _: None):
            try:
                train_rows.to_document(train_rows.read_row(line), "n", RULES)
            except train_rows.BadRow as error:
                assert error.reason


def read_source(name: str):
    def read(path: pathlib.Path) -> None:
        for row in build.READERS[name](path.parents[name == "OmniMedVQA" and 2], plan(name)):
            assert isinstance(row, RejectedRow | Row)
            if isinstance(row, Row):  # what the rest of the build takes for granted
                for text in (row.text, row.group, row.id, str(row.image_path)):
                    text.encode()
                assert "nan" not in row.text.lower().split("<reserved08706>")

    return read


def read_questions(path: pathlib.Path) -> None:
    rows = selection.read_rows(path)
    items.from_rows([row for _, row in rows], places=[place for place, _ in rows])


def read_metrics(path: pathlib.Path) -> None:
    rows, damaged = run_files.read_metrics(path)
    assert all(row["step"] >= 0 or row["kind"] for row in rows) and damaged >= 0
    assert log_writer.truncate_after_step(str(path), 2) == damaged
    assert run_files.read_metrics(path)[1] == 0


def read_table(path: pathlib.Path) -> None:
    options = dict(target="loss", columns={}, exclude=["params>1e12"])
    table.read(path, LAWS["chinchilla"], **options)


def read_captions(path: pathlib.Path) -> None:
    captions.read_rows(path)


def read_scores(path: pathlib.Path) -> None:
    captions.read_scores(path)


def read_records(path: pathlib.Path) -> None:
    found = reader.open_records(path.parent)
    assert [found.names(label) for label in ("source", "task")] and len(list(found)) == len(found)


def read_held_out(path: pathlib.Path) -> None:
    eval_set.read(path, None)


FORMATS = {
    "manifest": (
        "manifest.jsonl",
        b"".join((prepare.SAMPLE / "manifest.jsonl").read_bytes().splitlines(keepends=True)[:4]),
        read_manifest,
        (PrepareError,),
    ),
    "metrics": (
        "metrics.jsonl",
        lines_of(*({"kind": "train", "step": n, "loss": 1.5, "lr": None} for n in range(4))),
        read_metrics,
        (TextFileError,),
    ),
    "prompts": (
        "p.jsonl",
        lines_of(
            {"prompt": "Is {a.png} a CT?"},
            {"id": "b", "prompt": [{"text": "x"}, {"image": "a"}]},
        ),
        output_files.read_prompts,
        (GenerateError,),
    ),
    "questions": (
        "q.jsonl",
        lines_of(QUESTION, MCQ),
        read_questions,
        (EvalError, items.TaskError),
    ),
    "published": (
        "train.jsonl",
        lines_of(TRAIN_ROW, TRAIN_ROW | {"credential": "yes", "tokens": None}, TRAIN_ROW),
        read_published,
        (train_rows.PublishedError,),
    ),
    "pmc_vqa": (
        "train_2.csv",
        csv_of(
            PMC_VQA,
            *([n, "P1.jpg", 'c, "d"', "Which?\nOne", "A: 1", "B: 2", "C: 3", "D: 4", "A", "train"]
              for n in range(3)),
        ),
        read_source("PMC-VQA"),
        (SourceError,),
    ),
    "quilt": (
        "quilt_1M_lookup.csv",
        csv_of(QUILT, *([n, "A slide.", "v_image_1.jpg", "x", "train", "[]"] for n in range(3))),
        read_source("Quilt-1M"),
        (SourceError,),
    ),
    "vqa_rad": (
        "VQA_RAD Dataset Public.json",
        json.dumps([RAD, RAD, RAD]).encode(),
        read_source("VQA-RAD"),
        (SourceError,),
    ),
    "omnimed": (
        "QA_information/Open-access/X.json",
        json.dumps([OMNI, OMNI], indent=1).encode(),
        read_source("OmniMedVQA"),
        (SourceError,),
    ),
    "talks": (
        "quilt_instruct_107k.json",
        json.dumps([TALK, TALK]).encode(),
        read_source("Quilt-Instruct"),
        (SourceError,),
    ),
    "pmc_oa": (
        "pmc_oa.jsonl",
        lines_of(*({"image": "P1_F1.jpg", "caption": "A scan.", "pmcid": "P1"} for _ in range(3))),
        read_source("PMC-OA"),
        (SourceError,),
    ),
    "predictions": (
        "a.jsonl",
        lines_of({"id": "q0", "text": "yes"}, {"id": "q1", "images": ["a.png"], "text": ""}),
        predictions._read,
        (predictions.PredictionsError,),
    ),
    "captions": (
        "c.jsonl",
        lines_of(*(
            dict(id=f"P{n}", caption="CT of ..", images=["a.jpg"], source="PMC-OA",
                 data_class="licence-bound", group="P1")
            for n in range(3)
        )),
        read_captions,
        (captions.CaptionsError, OutgoingError),
    ),
    "scores": (
        "s.jsonl",
        lines_of({"id": "a", "score": 0.25}, {"id": "b", "score": None}),
        read_scores,
        (captions.CaptionsError,),
    ),
    "documents": (
        "documents.jsonl",
        lines_of(*(
            dict(id=f"d{n}", text="Is it <image>?<reserved08706>yes", image_path="a.png",
                 task="VQA", source="s", credential="no", group="g", turns=1)
            for n in range(2)
        )),
        jsonl.read_texts,
        (RecordsError, OutgoingError),
    ),
    "held out": (
        "items.jsonl",
        lines_of(QUESTION, QUESTION | {"id": "q1"}),
        read_held_out,
        (RecordsError, OutgoingError),
    ),
    "journal": (
        "calls.jsonl",
        lines_of({"key": "a", "text": "\ud83d", "n": float("nan")}, {"key": "b"}),
        lambda path: parse_jsonl(path.read_bytes(), path),
        (JournalError,),
    ),
    "table": (
        "t.csv",
        csv_of(
            "run,params,tokens,loss,loss_text",
            *([f"r{n}", 1e6 * n, 1e8 * n, 3.0 / n, 2.0] for n in range(1, 6)),
        ),
        read_table,
        (ScalingError,),
    ),
}  # fmt: skip


def check(name: str, number: int, path: pathlib.Path, data: bytes) -> None:
    """Reads one mutation; fails on all but a result and the format's own errors."""
    _, original, read, errors = FORMATS[name] if name in FORMATS else (None, data, *OTHERS[name])
    path.write_bytes(mutated(original, random.Random(f"{name}/{number}")))
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{name} {number}: no end"))
    signal.alarm(SECONDS)
    try:
        read(path)
    except errors as error:
        text = str(error)
        assert text.isprintable() and len(text) <= MAX_MESSAGE, f"{name} {number}: {text[:200]!r}"
    except Exception as error:  # noqa: BLE001
        pytest.fail(f"{name} {number}: {type(error).__name__}: {str(error)[:200]}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(name: str, count: int, folder: pathlib.Path) -> None:
    path = folder / FORMATS[name][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        check(name, number, path, FORMATS[name][1])


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_rows_are_read_counted_or_reported(name, tmp_path):
    path = tmp_path / "whole" / FORMATS[name][0]
    path.parent.mkdir(parents=True)
    path.write_bytes(FORMATS[name][1])
    FORMATS[name][2](path)  # the original is read without an error
    fuzz(name, DEFAULT, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutated_rows_are_read_counted_or_reported(name, tmp_path):
    fuzz(name, SLOW, tmp_path)


# ---- files inside a folder or a container


OTHERS = {
    "dataset.json": (read_records, (RecordsError,)),
    "plan": (plan_file.load, (PackError,)),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> pathlib.Path:
    """A folder of records, and a plan of one epoch of it."""
    folder = tmp_path_factory.mktemp("fuzz") / "records"
    micro_run.write(folder, count=8)
    run = micro_run.run(data__train=str(folder))
    plan_file.save(
        folder.parent / "p.npz", reader.open_records(folder), run.data, run.mixing, epoch=0
    )
    return folder


def fuzz_records(count: int, folder: pathlib.Path) -> None:
    original = (folder / "dataset.json").read_bytes()
    try:
        for number in range(count):
            check("dataset.json", number, folder / "dataset.json", original)
    finally:
        (folder / "dataset.json").write_bytes(original)


def fuzz_plans(count: int, folder: pathlib.Path) -> None:
    """Mutations of the file, and of the header alone, which also has the digest."""
    original = (folder.parent / "p.npz").read_bytes()
    for number in range(count):
        check("plan", number, folder.parent / "mutated.npz", original)
    with np.load(folder.parent / "p.npz") as file:
        arrays = dict(file)
    for number in range(count):
        rng = random.Random(f"header/{number}")
        header = np.frombuffer(mutated(arrays["header"].tobytes(), rng), np.uint8)
        others = {name: arrays[name] for name in plan_file.ARRAYS}
        digest = np.frombuffer(bytes.fromhex(plan_file._digest(header, others)), np.uint8)
        path = folder.parent / "header.npz"
        np.savez(path, header=header, sha256=digest, **others)
        try:
            saved = plan_file.load(path)
            saved.row_documents(0)
        except PackError as error:
            assert str(error).isprintable() and len(str(error)) <= MAX_MESSAGE, number


def test_mutations_of_a_folder_of_records(records):
    fuzz_records(DEFAULT, records)
    fuzz_plans(DEFAULT, records)


@pytest.mark.slow
def test_many_mutations_of_a_folder_of_records(records):
    fuzz_records(SLOW, records)
    fuzz_plans(SLOW, records)
