"""Tests of published rows to records: valid rows, reasons for others, credentialed rows."""

import itertools
import json
import stat
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from medmax_jax.config import Vocab
from medmax_jax.data import prepare
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Layout
from medmax_jax.data.release import cli, train_rows
from medmax_jax.data.release.train_rows import BadRow, PublishedError, RowRules
from medmax_jax.models import tokenizer
from medmax_jax.models.vocab import BOI, BOS, EOI, EOS, IMAGE, PAD, SEP

VOCAB = Vocab(size=9_000, image_codes=16, text_start=8_712)
LAYOUT = Layout(vocab=VOCAB, codes_per_image=4, tokenizer="", vqgan="")
IMAGE_SPAN = [BOI, 4, 19, 5, 4, EOI]
VALID_TOKENS = [BOS, *IMAGE_SPAN, 8_720, SEP, 8_730, EOS]


def rules(**changes):
    defaults = dict(layout=LAYOUT, separator=True, max_bad=0.01, shard_size=3, tokenizer=None)
    return RowRules(**(defaults | changes))


def row(**changes):
    """Return a row as published; a value of ... omits the column."""
    columns = dict(
        text="<image>Is it a CT?<reserved08706>yes",
        tokens=VALID_TOKENS,
        image_path="images/pmc/a.png",
        task="VQA",
        source="pathvqa",
        credential="no",
    )
    return {name: value for name, value in (columns | changes).items() if value is not ...}


def waiting(**changes):
    return row(tokens=..., image_path=..., credential="YES", source="mimic_cxr") | changes


def file_of(tmp_path, rows, name="train.jsonl"):
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return tmp_path / name


def bring(tmp_path, rows, out="out", **changes):
    path = file_of(tmp_path, rows)
    return train_rows.import_rows(path, tmp_path / out, rules=rules(**changes), say=lambda _: None)


def quarantined(folder):
    lines = (folder / train_rows.QUARANTINE).read_text().splitlines()
    return [(r["line"], r["reason"]) for r in map(json.loads, lines)]


def test_rows_become_documents(tmp_path):
    plain = [BOS, 8_720, SEP, 8_730, EOS]
    counts = bring(
        tmp_path, [row(), row(tokens=plain, image_path=..., credential="No"), row(task="Chat")]
    )
    assert counts["documents"] == 3 and counts["quarantined"] == 0 and counts["reasons"] == {}
    first, second, third = writer.open_records(tmp_path / "out")
    assert first.tokens.tolist() == VALID_TOKENS and second.tokens.tolist() == plain
    assert (first.image_path, first.group) == ("images/pmc/a.png", "a.png")
    assert (second.image_path, second.group) == ("", "train-0000002")
    assert (first.task, first.source, first.credential) == ("VQA", "pathvqa", "no")
    assert [d.id for d in (first, second, third)] == [f"train-000000{n}" for n in (1, 2, 3)]
    assert {first.turns, second.turns} == {0} and second.credential == "no"
    notes = writer.open_records(tmp_path / "out").meta["notes"]
    assert notes["file"] == "train.jsonl" and notes["rows"] == 3 and len(notes["sha256"]) == 64
    assert quarantined(tmp_path / "out") == []
    assert not (tmp_path / "out-credentialed").exists()


BAD = {
    "not JSON": b"{'text': 1}",
    "column twice": b'{"text": "a", "text": "b"}',
    "column text": row(text=...),
    "column task": row(task="two\nlines"),
    "column source": row(source=["pathvqa"]),
    "column image_path": row(image_path="../a.png"),
    "credential": row(credential="maybe"),
    "tokens missing": row(tokens=...),
    "tokens not integers": row(tokens=[BOS, SEP, 1.0, EOS]),
    "token outside the vocabulary": row(tokens=[BOS, SEP, 9_000, EOS]),
    "tokens without ends": row(tokens=VALID_TOKENS[:-1]),
    "control token inside": row(tokens=[BOS, SEP, IMAGE, EOS]),
    "no separator": row(tokens=[BOS, *IMAGE_SPAN, EOS]),
    "image span": row(tokens=[BOS, *IMAGE_SPAN[:-2], EOI, SEP, EOS]),
    "line too long": b" " * train_rows.MAX_LINE + json.dumps(row()).encode(),
}


@pytest.mark.parametrize("reason", BAD)
def test_invalid_row_is_quarantined(tmp_path, reason):
    counts = bring(tmp_path, [row(), BAD[reason], row(text="later")], max_bad=0.5)
    assert counts["documents"] == 2 and counts["reasons"] == {reason: 1}
    assert quarantined(tmp_path / "out") == [(2, reason)]
    ids = [d.id for d in writer.open_records(tmp_path / "out")]
    assert ids == ["train-0000001", "train-0000003"]


@pytest.mark.parametrize(
    "wrong",
    [
        *(b"[" * 100_000, b"[]", b"\xff\xfe{}", b'{"text": ' + b"9" * 5_000 + b"}", b"null"),
        *(row(tokens=v) for v in ([], "0 1 2", [BOS, True, EOS], [BOS, 2**70, EOS], {"a": 1})),
        *(row(tokens=[BOS, SEP, v, EOS]) for v in (-1, PAD, EOS, None, 20)),  # 20: no such code
        *(row(image_path=v) for v in ("/a.png", "a/../b", "a\\b", 7, "a\x00b", "a" * 2_000)),
        row(text="\ud800"),
        row(text=""),
    ],
    ids=map(str, itertools.count()),
)
def test_invalid_values_are_rejected(wrong):
    line = wrong if isinstance(wrong, bytes) else json.dumps(wrong).encode()
    with pytest.raises(BadRow):
        train_rows.to_document(train_rows.read_row(line), "n", rules())


def test_mutated_tokens_are_valid_or_rejected():
    """If a token is replaced, dropped or repeated, any accepted row is a valid document."""
    rng, passed = np.random.default_rng(0), 0
    for _ in range(500):
        tokens = list(VALID_TOKENS)
        place, kind = rng.integers(len(tokens)), rng.integers(3)
        new = [int(rng.choice([0, 1, 2, 4, 19, 20, BOI, EOI, SEP, IMAGE, 8_720]))]
        tokens[place : place + 1] = [new, [], [tokens[place]] * 2][kind]
        try:
            document = train_rows.to_document(row(tokens=tokens), "n", rules())
        except BadRow:
            continue
        passed += 1
        begins = np.flatnonzero(document.tokens == BOI)
        assert document.tokens[0] == BOS and document.tokens[-1] == EOS and SEP in document.tokens
        assert all(document.tokens[b + 5] == EOI for b in begins)
    assert 0 < passed < 300


def test_too_many_bad_rows_are_an_error(tmp_path):
    bad = row(tokens=[BOS, EOS])
    with pytest.raises(
        PublishedError, match=r"2 of 102 rows .*max_bad.* 0.01: tokens without ends 2; .*line 101"
    ):
        bring(tmp_path, [row()] * 100 + [bad] * 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.jsonl"]
    assert bring(tmp_path, [row()] * 100 + [bad])["quarantined"] == 1


def test_wrong_file_is_rejected_early(tmp_path):
    with pytest.raises(PublishedError, match="of 1000 rows are invalid"):
        bring(tmp_path, [row(tokens=[1])] * 5_000)


def test_credentialed_rows_are_pending_or_stored_separately(tmp_path):
    secret = "SECRET REPORT"
    credentialed = row(credential="YES", image_path=..., text=secret, source="mimic_cxr")
    broken = row(credential="yes", text=secret, tokens=[BOS, 5, EOS])
    counts = bring(tmp_path, [row(), credentialed, waiting(text=secret), broken], max_bad=0.5)
    assert counts["documents"] == 1 and counts["credentialed"] == 1
    assert counts["credentialed_without_tokens"] == 1 and counts["quarantined"] == 1
    assert counts["folders"] == [str(tmp_path / "out"), str(tmp_path / "out-credentialed")]
    closed = writer.open_records(tmp_path / "out-credentialed")
    assert [(d.id, d.credential) for d in closed] == [("train-0000002", "yes")]
    assert [d.credential for d in writer.open_records(tmp_path / "out")] == ["no"]
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in closed.folder.iterdir()}
    assert stat.S_IMODE(closed.folder.stat().st_mode) == 0o700 and set(modes.values()) == {0o600}
    assert len(modes) == 4
    listed = [(3, "credentialed: no tokens"), (4, "no separator")]
    assert quarantined(tmp_path / "out") == quarantined(closed.folder) == listed
    for folder in (tmp_path / "out", closed.folder):
        assert not any(secret.encode() in p.read_bytes() for p in folder.iterdir())


def test_invalid_credential_is_not_shown(tmp_path):
    """If columns are shifted, the value is the report itself."""
    bring(tmp_path, [row(), row(credential="No acute findings."), row(credential="n")], max_bad=0.9)
    lines = (tmp_path / "out" / train_rows.QUARANTINE).read_text().splitlines()
    details = [json.loads(line)["detail"] for line in lines]
    assert details == ["is longer; expected yes or no", "is 'n'; expected yes or no"]


def test_only_credentialed_rows(tmp_path):
    counts = bring(tmp_path, [row(credential="yes")])
    assert counts["folders"] == [str(tmp_path / "out-credentialed")]
    assert not (tmp_path / "out").exists()
    with pytest.raises(PublishedError, match="no row becomes a document: credentialed: no tokens"):
        bring(tmp_path, [waiting()], out="other")


def test_pending_rows_are_not_failures(tmp_path):
    counts = bring(tmp_path, [row()] + [waiting()] * 9)
    assert counts["credentialed_without_tokens"] == 9 and counts["quarantined"] == 0


def test_killed_run_resumes(tmp_path, monkeypatch):
    rows = [row(), row(credential="yes")]

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_rows, "_write_credentialed", die)
        with pytest.raises(KeyboardInterrupt):
            bring(tmp_path, rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.jsonl"]
    bring(tmp_path, rows)
    for path in (tmp_path / "out").iterdir():  # as if it had died between the two folders
        path.unlink()
    (tmp_path / "out").rmdir()
    assert len(bring(tmp_path, rows)["folders"]) == 2
    with pytest.raises(PublishedError, match="out: exists and is not empty"):
        bring(tmp_path, rows)
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(
        PublishedError, match="out-credentialed: exists and was written from another file"
    ):
        bring(tmp_path, [*rows, row()])


def test_truncated_file_is_rejected(tmp_path):
    path = file_of(tmp_path, [row()] * 200)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(PublishedError, match="ends inside line 200: cut off"):
        train_rows.import_rows(path, tmp_path / "out", rules=rules(), say=print)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(PublishedError, match="no such file"):
        train_rows.import_rows(tmp_path / "none", tmp_path / "out", rules=rules(), say=print)


def test_text_is_compared_with_the_tokens(tmp_path):
    fits = tokenizer.train(["Is it a CT? yes no"] * 3, VOCAB)
    (tmp_path / "tokenizer.json").write_text(fits)
    ours = tokenizer.Tokenizer.from_file(tmp_path / "tokenizer.json", VOCAB)
    codes = np.array([0, 15, 1, 0])
    texts = ["<image>Is it a CT?<reserved08706>yes", "Is it?<reserved08706><image>no<image>"]
    right = [
        row(text=t, tokens=tokenizer.document_ids(ours, t, codes, VOCAB).tolist()) for t in texts
    ]
    other = [right[0] | dict(text="<image>Is it a CT?<reserved08706>no"), right[0] | dict(text="a")]
    counts = bring(tmp_path, right + other, tokenizer=ours)
    assert counts["text_disagrees"] == 2 and counts["text_disagrees_first"] == [3, 4]
    assert counts["documents"] == 4 and counts["quarantined"] == 0
    assert bring(tmp_path, right, out="b")["text_disagrees"] == "not compared"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for n in (300, 3_000):
        rows = [row(text="word " * 2_000)] * n  # 10 kB each
        tracemalloc.start()
        bring(tmp_path, rows[:1], out=f"warm{n}")
        path = file_of(tmp_path, rows)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        row_rules = rules(shard_size=10**6)
        train_rows.import_rows(path, tmp_path / str(n), rules=row_rules, say=lambda _: None)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2_700 * 500  # what records.write holds of a row


def test_released_layout():
    layout = cli.layout_of("released")
    assert (layout.vocab.size, layout.vocab.image_codes) == (65_536, 8_192)
    assert layout.codes_per_image == 1_024
    tokens = [0, 8197, *range(4, 1028), 8196, 16_384, 8710, 65_535, 2]
    document = train_rows.to_document(row(tokens=tokens), "n", rules(layout=layout))
    assert len(document.tokens) == 1_031
    with pytest.raises(BadRow, match="image span"):
        train_rows.to_document(row(tokens=[t for t in tokens if t != 7]), "n", rules(layout=layout))


def test_program(tmp_path):
    """With the layout of the tiny model, `check` and `stats` can read the records."""
    layout = cli.layout_of(str(prepare.TINY))
    tiny = tokenizer.Tokenizer.from_file(prepare.TINY / "tokenizer.json", layout.vocab)
    text = "<image>Is it a CT?<reserved08706>yes"
    tokens = tokenizer.document_ids(tiny, text, np.zeros(64, np.int32), layout.vocab).tolist()
    path = file_of(tmp_path, [row(text=text, tokens=tokens)] * 3)

    def program(*args):
        command = [sys.executable, "-m", "data.prepare", *map(str, args)]
        return subprocess.run(command, cwd=prepare.TINY.parents[1], capture_output=True, text=True)

    out, model = tmp_path / "out", ("--model_layout", prepare.TINY)
    command = ("import", "--from", path, "--out", out, *model)
    done = program(*command, "--tokenizer", prepare.TINY / "tokenizer.json", "--json")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["documents"] == 3 and counts["text_disagrees"] == 0
    assert "3 rows of train.jsonl" in done.stderr and "MB/s" in done.stderr
    done = program("check", out, "--json")
    assert json.loads(done.stdout.splitlines()[-1])["text"] == text
    again = program(*command)
    assert again.returncode == 1 and "error: " in again.stderr and "not empty" in again.stderr
    assert program("import", "--from", path).returncode == 2
