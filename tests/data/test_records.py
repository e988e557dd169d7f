"""Tests of records: round trip, valid documents only, atomic folders, damage by shard."""

import json

import numpy as np
import pytest
from gs_server import fixture_small_disk  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_jax.config import Vocab
from medmax_jax.data.records import document as records_document
from medmax_jax.data.records import jsonl, synthetic, writer
from medmax_jax.data.records.document import Document, Layout, RecordsError
from medmax_jax.models.vocab import BOI, BOS, EOI, EOS, IMAGE, PAD, SEP

VOCAB = Vocab(size=9_000, image_codes=16, text_start=8_712)
LAYOUT = Layout(vocab=VOCAB, codes_per_image=4, tokenizer="t" * 64, vqgan="v" * 64)
IMAGE_SPAN = [BOI, 4, 19, 5, 4, EOI]
Q, A = [8_720, 8_721], [8_730]


def document(tokens, n=0, turns=0, **fields):
    defaults = dict(image_path="a.png", task="VQA", source="sample", credential="no", group=f"g{n}")
    return Document(
        tokens=np.asarray(tokens, np.int32), turns=turns, id=f"d{n}", **(defaults | fields)
    )


def simple(n):
    return document([BOS, *IMAGE_SPAN, *Q, SEP, *A * (1 + n % 5), EOS], n, turns=1)


def write(folder, docs, shard_size=3):
    return writer.write(folder, docs, shard_size=shard_size, layout=LAYOUT, notes={})


def same(a, b):
    fields = [f for f in vars(a) if f != "tokens"]
    return np.array_equal(a.tokens, b.tokens) and all(
        getattr(a, f) == getattr(b, f) for f in fields
    )


def test_round_trip(tmp_path):
    docs = [simple(n) for n in range(8)]
    meta = write(tmp_path / "r", docs)
    records = writer.open_records(tmp_path / "r")
    assert len(records) == 8 and all(same(a, b) for a, b in zip(records, docs, strict=True))
    assert all(same(records[i], docs[i]) for i in (7, 0, 3))
    assert [d.id for d in records.read([5, 1, 7, 1])] == ["d5", "d1", "d7", "d1"]
    assert records.layout == LAYOUT and records.fingerprint == meta["sha256"]
    with pytest.raises(IndexError, match="of 8"):
        records[8]
    names = sorted(p.name for p in (tmp_path / "r").iterdir())
    shards = [f"0000{n}-of-00003.array_record" for n in range(3)]
    assert names == [*shards, "dataset.json", "index.npy"]


def test_counts(tmp_path):
    docs = [
        document([BOS, *Q, SEP, *IMAGE_SPAN, EOS], 0, turns=1, task="Image Generation"),
        document([BOS, *Q, SEP, *A, SEP, *Q, SEP, *A, EOS], 1, turns=2, credential="YES"),
        document([BOS, *IMAGE_SPAN, *A, EOS], 2, group="g1"),
    ]
    meta = write(tmp_path / "r", docs)
    assert meta["documents"] == 3 and meta["groups"] == 2
    assert meta["tokens"] == sum(len(d.tokens) for d in docs) and meta["image_tokens"] == 8
    assert meta["text_tokens"] == meta["tokens"] - 8 and meta["longest"] == 11
    assert meta["tasks"] == {"Image Generation": 1, "VQA": 2}
    assert meta["credentials"] == {"YES": 1, "no": 2}
    # answers: 6 + EOS; A SEP and A EOS; all 8 but BOS. release: the second document keeps Q SEP.
    assert meta["scored"] == {"answers": 7 + 4 + 8, "release": 7 + 7 + 8}
    index = writer.open_records(tmp_path / "r").index
    assert index["answers"].tolist() == [7, 4, 8] and index["answers_image"].tolist() == [4, 0, 4]


def test_labels(tmp_path):
    docs = [
        document([BOS, *A, EOS], 0, source="B", image_path="x.png"),
        document([BOS, *A, EOS], 1, source="A", image_path="", task="Visual Chat"),
        document([BOS, *A, EOS], 2, source="B", image_path="a.png"),
    ]
    write(tmp_path / "r", docs)
    records = writer.open_records(tmp_path / "r")
    assert records.index["source"].tolist() == [1, 0, 1] and records.names("source") == ["A", "B"]
    assert records.index["task"].tolist() == [0, 1, 0] and records.names("task")[1] == "Visual Chat"
    assert records.index["image_path"].tolist() == [1, -1, 0]
    labels = writer.LabelColumns()
    for path in "bab":
        labels.add("s", "t", path)
    assert labels.table().tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 1]]


def test_loss_mask():
    turns2 = np.array([BOS, 8_720, SEP, 8_730, SEP, 8_721, SEP, 8_731, EOS], np.int32)
    answers = records_document.loss_mask(turns2, "answers", 2)
    assert answers.astype(int).tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1]
    release = records_document.loss_mask(turns2, "release", 2)
    assert release.astype(int).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert np.array_equal(records_document.loss_mask(turns2, "answers", 0), release)
    plain = np.array([BOS, 8_720, EOS], np.int32)
    assert records_document.loss_mask(plain, "answers", 0).tolist() == [False, True, True]
    with pytest.raises(RecordsError, match="'all'; use answers or release"):
        records_document.loss_mask(plain, "all", 0)


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.sampled_from([Q, A, IMAGE_SPAN, []]), min_size=2, max_size=8).filter(
        lambda p: len(p) % 2 == 0
    )
)
def test_answers_partition_the_document(pieces):
    """Every token but BOS belongs to a question or an answer; `release` contains `answers`."""
    tokens = [BOS]
    for i, piece in enumerate(pieces):
        tokens += [*piece, SEP if i + 1 < len(pieces) else EOS]
    turns = len(pieces) // 2
    d = document(tokens, turns=turns)
    records_document.check_document(d, LAYOUT)
    answers = records_document.loss_mask(d.tokens, "answers", turns)
    assert answers.sum() == sum(len(p) + 1 for p in pieces[1::2])
    assert not (answers & ~records_document.loss_mask(d.tokens, "release", turns)).any()


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.integers(8_712, 8_999), min_size=1),
    name=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_bytes_round_trip(text, name):
    d = document([BOS, *text, EOS], source=name, image_path=name)
    assert same(records_document.from_bytes(writer.to_bytes(d), "here"), d)


@pytest.mark.parametrize(
    "tokens, turns, message",
    [
        ([BOS, 9_000, EOS], 0, "token 9000 is outside"),
        ([8_720, 8_721, EOS], 0, "expected BOS 0 and EOS 2"),
        ([BOS, 8_720, 8_721], 0, "expected BOS 0 and EOS 2"),
        ([BOS, EOS], 0, "T >= 3"),
        ([BOS, *A, EOS, *A, EOS], 0, "control token 2 inside"),
        ([BOS, *A, PAD, EOS], 0, "control token 1 inside"),
        ([BOS, IMAGE, *A, EOS], 0, "control token 8711 inside"),
        ([BOS, BOI, 4, 5, EOS], 0, "cut off"),
        ([BOS, BOI, 4, 5, 6, EOI, EOS], 0, "BOI, 4 codes, EOI"),
        ([BOS, EOI, 4, 5, 6, 7, BOI, EOS], 0, "BOI, 4 codes, EOI"),
        ([BOS, *IMAGE_SPAN, 4, EOS], 0, "5 image codes"),
        ([BOS, BOI, 4, 8_720, 5, 6, EOI, EOS], 0, "3 image codes"),
        ([BOS, 20, *A, EOS], 0, "outside the codebook of 16"),
        ([BOS, *Q, SEP, *A, SEP, *Q, EOS], 1, "requires 1 separators, but there are 2"),
        ([BOS, *Q, *A, EOS], 1, "requires 1 separators, but there are 0"),
    ],
)
def test_invalid_documents_are_rejected(tmp_path, tokens, turns, message):
    docs = [simple(0), document(tokens, 7, turns=turns)]
    with pytest.raises(RecordsError, match=message) as error:
        write(tmp_path / "r", docs)
    assert "'d7'" in str(error.value)
    assert list((tmp_path / "r").iterdir()) == []  # nothing half-written stays


def test_folders_are_written_once(tmp_path):
    write(tmp_path / "r", [simple(0)])
    with pytest.raises(RecordsError, match="already contains a finished data set"):
        write(tmp_path / "r", [simple(0)])


def test_killed_run_can_be_repeated(tmp_path):
    write(tmp_path / "r", map(simple, range(9)))
    (tmp_path / "r" / "dataset.json").unlink()  # as if killed just before the end
    (tmp_path / "r" / "00003.partial").write_bytes(b"half")
    with pytest.raises(RecordsError, match="never finished"):
        writer.open_records(tmp_path / "r")
    write(tmp_path / "r", map(simple, range(2)))
    assert len(writer.open_records(tmp_path / "r")) == 2
    assert len(list((tmp_path / "r").iterdir())) == 3


def test_same_documents_have_same_fingerprint(tmp_path):
    a = write(tmp_path / "a", map(simple, range(5)), shard_size=2)
    b = write(tmp_path / "b", map(simple, range(5)), shard_size=5)
    c = write(tmp_path / "c", map(simple, range(4)))
    assert a["sha256"] == b["sha256"] != c["sha256"]


def test_write_errors(tmp_path):
    with pytest.raises(RecordsError, match="no documents"):
        write(tmp_path / "r", [])
    with pytest.raises(RecordsError, match="'d0' occurs twice"):
        write(tmp_path / "r", [simple(0), simple(0)])
    with pytest.raises(RecordsError, match="shard_size is 0"):
        write(tmp_path / "r", [simple(0)], shard_size=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordsError, match="cannot be written"):
        write(tmp_path / "file" / "r", [simple(0)])


def test_open_errors(tmp_path):
    with pytest.raises(RecordsError, match="no such folder"):
        writer.open_records(tmp_path / "absent")
    write(tmp_path / "r", [simple(0)])
    path = tmp_path / "r" / "dataset.json"
    good = json.loads(path.read_text())
    for bad, message in [
        (json.dumps(good)[:-9], "damaged"),
        (json.dumps(good | {"format": 99}), "not of format 2"),
        (json.dumps(good | {"layout": {}}), "field layout is missing or invalid"),
        (json.dumps(good | {"index_sha256": "0"}), "index.npy: missing or damaged"),
    ]:
        path.write_text(bad)
        with pytest.raises(RecordsError, match=message):
            writer.open_records(tmp_path / "r")


OLD_SHA256 = "8ad7bffe672d8e9f91cc0c4ba78ccae6c5901a446525ed6db98c579fe42bded6"
OLD_INDEX_SHA256 = "2f5bc2c3de6b01e91980394ff4a69e5dd80fec0916cf0a68f303cc92c1a6b677"
GENERATED = dict(pseudo=True, generator="a1" * 32, scores={"margin": 0.25, "agreement": 1.0})


def test_pseudo_documents_are_stored_and_counted(tmp_path):
    docs = [simple(n) for n in range(5)]
    docs += [document([BOS, *Q, SEP, *A, EOS], n, turns=1, **GENERATED) for n in (5, 6)]
    meta = write(tmp_path / "r", docs)
    records = writer.open_records(tmp_path / "r")
    assert all(same(a, b) for a, b in zip(records, docs, strict=True))
    assert meta["pseudo"] == 2 and records.index["pseudo"].tolist() == [0] * 5 + [1, 1]
    assert records.index["image_path"].tolist() == [0] * 7  # the other columns are where they were


def test_folders_without_pseudo_documents_keep_their_bytes(tmp_path):
    """Digests of the commit before the fields existed, for the same documents."""
    meta = write(tmp_path / "r", [simple(n) for n in range(8)])
    assert "pseudo" not in meta
    assert meta["sha256"] == OLD_SHA256 and meta["index_sha256"] == OLD_INDEX_SHA256
    assert writer.open_records(tmp_path / "r").index["pseudo"].tolist() == [0] * 8
    header = writer.to_bytes(simple(0))
    assert not any(name in header for name in (b"pseudo", b"generator", b"scores"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(pseudo=1), "pseudo is neither true nor false"),
        (dict(pseudo=False), "generator is set without pseudo"),
        (dict(pseudo=False, generator=""), "scores are set without pseudo"),
        (dict(generator=""), "pseudo is true, but generator is not SHA-256"),
        (dict(generator="A1" * 32), "generator is not SHA-256"),
        (dict(generator="a1" * 32 + "\n"), "generator is not SHA-256"),
        (dict(generator=None), "generator is not text"),
        (dict(scores=[1.0]), "scores is not an object"),
        (dict(scores={"a": float("nan")}), "a value in scores is not a finite number"),
        (dict(scores={"a": float("inf")}), "a value in scores is not a finite number"),
        (dict(scores={"a": 10**400}), "a value in scores is not a finite number"),
        (dict(scores={"a": True}), "a value in scores is not a finite number"),
        (dict(scores={"a": "1"}), "a value in scores is not a finite number"),
        (dict(scores={"": 1.0}), "a name in scores is not printable"),
        (dict(scores={"a\n": 1.0}), "a name in scores is not printable"),
        (dict(scores={"a" * 65: 1.0}), "a name in scores is not printable"),
        (dict(scores={str(n): 1.0 for n in range(17)}), "scores has 17 names; at most 16"),
    ],
)
def test_invalid_pseudo_fields_are_refused(tmp_path, fields, message):
    with pytest.raises(RecordsError, match=f"'d0' of 'sample': .*{message}"):
        write(tmp_path / "r", [document([BOS, *A, EOS], **(GENERATED | fields))])
    row = dict(id="d", text="a", image_path="", task="t", source="s", credential="no", group="g")
    row |= dict(turns=0) | GENERATED | fields
    with pytest.raises(RecordsError, match="row 1|cannot be read"):  # NaN is no JSON
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        jsonl.read_texts(tmp_path / "rows.jsonl")


def test_forged_pseudo_fields_are_refused_on_reading(tmp_path, monkeypatch):
    write(tmp_path / "r", [document([BOS, *A, EOS], **GENERATED)])
    path = tmp_path / "r" / "dataset.json"
    good = json.loads(path.read_text())
    without = {k: v for k, v in good.items() if k != "pseudo"}
    for bad, message in [
        (good | {"pseudo": 0}, "field pseudo is missing or invalid"),
        (good | {"pseudo": True}, "field pseudo is missing or invalid"),
        (good | {"pseudo": 2}, "field pseudo is missing or invalid"),
        (without, "shape is .1, 10."),
    ]:
        path.write_text(json.dumps(bad))
        with pytest.raises(RecordsError, match=message):
            writer.open_records(tmp_path / "r")
    monkeypatch.setattr(writer, "check_document", lambda *_, **__: None)
    write(tmp_path / "forged", [document([BOS, *A, EOS], **(GENERATED | dict(generator="x")))])
    with pytest.raises(RecordsError, match="generator is not SHA-256"):
        writer.open_records(tmp_path / "forged")[0]


def test_truncated_or_missing_shard(tmp_path):
    write(tmp_path / "r", map(simple, range(9)))
    shard = tmp_path / "r" / "00001-of-00003.array_record"
    original = shard.read_bytes()
    shard.write_bytes(original[: len(original) // 2])
    with pytest.raises(RecordsError, match="00001-of-00003.array_record.*cut off"):
        writer.open_records(tmp_path / "r")
    shard.unlink()
    with pytest.raises(RecordsError, match="00001-of-00003.array_record: size is 0 bytes"):
        writer.open_records(tmp_path / "r")


def test_flipped_bits_are_detected(tmp_path):
    """A flipped bit gives an error that names the shard, or the correct documents."""
    docs = [simple(n) for n in range(6)]
    write(tmp_path / "r", docs, shard_size=6)
    shard = tmp_path / "r" / "00000-of-00001.array_record"
    original = shard.read_bytes()
    used = np.flatnonzero(np.frombuffer(original, np.uint8))
    caught = 0
    for place in used[:: max(1, len(used) // 60)]:
        shard.write_bytes(original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :])
        try:
            records = list(writer.open_records(tmp_path / "r"))
        except RecordsError as error:
            assert "00000-of-00001.array_record" in str(error)
            caught += 1
        else:
            assert all(same(a, b) for a, b in zip(records, docs, strict=True))
    assert caught > 20


def test_damaged_bytes():
    good = writer.to_bytes(simple(0))
    for bad in (b"", good[:8], b"XXXX" + good[4:], good[:-1], good[:20] + b"?" + good[21:]):
        with pytest.raises(RecordsError, match="shard 3, record 4"):
            records_document.from_bytes(bad, "shard 3, record 4")


def test_full_disk_is_reported(small_disk):
    """ArrayRecord reports it when a shard is closed."""
    with pytest.raises(
        RecordsError, match="cannot be written .*No space left.*; free disk space, or"
    ):
        documents = synthetic.documents(2_000, seed=0)
        writer.write(small_disk / "r", documents, shard_size=500, layout=synthetic.LAYOUT, notes={})
    assert not list((small_disk / "r").iterdir())
