"""Tests of the check of records: each kind of finding, its names and counts, exit codes."""

import dataclasses
import json
import shutil

import micro_run
import numpy as np
import PIL.Image
import pytest
from array_record.python import array_record_module
from source_setup import IMAGE_FILES

from medmax_jax.data import prepare
from medmax_jax.data.analysis import check
from medmax_jax.data.image_tokens.encoder import PrepareError
from medmax_jax.data.records import jsonl, staging
from medmax_jax.data.records import writer as records_writer
from medmax_jax.data.records.document import Document, Layout
from medmax_jax.models.vocab import BOI, EOI, IMAGE_START
from medmax_jax.storage.folder import file_sha256

LAYOUT = Layout(vocab=micro_run.run().vocab, codes_per_image=4, tokenizer="", vqgan="")


def write(folder, docs):
    records_writer.write(folder, docs, shard_size=16, layout=LAYOUT, notes={})
    return str(folder)


def lines(capsys):
    """Return (level, kind, where, what) of each finding."""
    out = capsys.readouterr().out
    return [tuple(line.split("\t")) for line in out.splitlines() if line.count("\t") == 3]


def forged(folder, n, **fields):
    """Rewrite the shards with document n changed and a valid CRC, bypassing every check."""
    records = records_writer.open_records(folder)
    docs = list(records)
    docs[n] = dataclasses.replace(docs[n], **fields)
    meta = json.loads((folder / "dataset.json").read_text())
    for shard in meta["shards"]:
        path, start = folder / shard["file"], sum(s["documents"] for s in meta["shards"]
                                                  if s["file"] < shard["file"])  # fmt: skip
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:3")
        for d in docs[start : start + shard["documents"]]:
            writer.write(records_writer.to_bytes(d))
        writer.close()
        shard["bytes"] = path.stat().st_size
    (folder / "dataset.json").write_text(json.dumps(meta))


def test_valid_records_have_no_findings(tmp_path, capsys):
    folder = micro_run.write(tmp_path / "r")
    assert prepare.main(["check", folder]) == 0
    assert lines(capsys) == []
    assert prepare.main(["check", folder, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["errors"] == summary["notes"] == 0 and summary["documents"] == 40


@pytest.mark.parametrize(
    ("kind", "n", "fields", "message"),
    [
        ("schema", 3, dict(credential="maybe"), "credential is neither yes nor no"),
        ("schema", 3, dict(task=""), "task is empty or not text"),
        ("schema", 3, dict(turns=-1), "turns is not an integer of 0"),
        ("schema", 3, dict(image_sha256="abc"), "image_sha256 is neither SHA-256"),
        ("schema", 3, dict(pseudo=True), "pseudo is true, but generator is not SHA-256"),
        ("ids", 20, dict(tokens=np.array([0, 9_999, 2], np.int32)), "token 9999 is outside"),
        (
            "ids",
            20,
            dict(tokens=np.array([0, 8_720, 1], np.int32)),
            "the first token is 0 and the last is 1",
        ),
        ("ids", 20, dict(tokens=np.array([0, 2, 8_720, 2], np.int32)), "control token 2 inside"),
        ("image", 5, dict(tokens=np.array([0, BOI, 4, 5, 6, EOI, 2], np.int32)), "3 image codes"),
        ("image", 5, dict(tokens=np.array([0, BOI, 4, 5, 6, 4_000, EOI, 2], np.int32)), "3 image"),
        ("separator", 0, dict(turns=2), "turns is 2, which requires 3 separators, but there are 1"),
    ],
)
def test_forged_document_is_reported_and_the_others_are_read(
    tmp_path, capsys, kind, n, fields, message
):
    folder = micro_run.write(tmp_path / "r")
    forged(tmp_path / "r", n, **fields)
    assert prepare.main(["check", folder]) == 1
    findings = lines(capsys)
    first = findings[0]
    assert first[:2] == ("error", kind) and message in first[3]
    assert first[2].startswith(
        f"document {n}, 0000{n // 16}-of-00003.array_record, record {n % 16}"
    )
    assert [f[1] for f in findings[1:]] == ["written"]  # and the digest


def test_damaged_record_does_not_hide_the_next_one(tmp_path, capsys):
    folder = micro_run.write(tmp_path / "r")
    forged(tmp_path / "r", 20, credential="maybe")
    shard = tmp_path / "r" / "00000-of-00003.array_record"
    raw = bytearray(shard.read_bytes())
    place = np.flatnonzero(np.frombuffer(raw, np.uint8))[200]
    raw[place] ^= 4
    shard.write_bytes(raw)
    assert prepare.main(["check", folder]) == 1
    kinds = [f[1] for f in lines(capsys)]
    assert kinds.count("damage") >= 1 and "schema" in kinds and kinds[-1] == "written"


def test_index_of_other_documents_is_reported(tmp_path, capsys):
    folder = micro_run.write(tmp_path / "r")
    index = np.load(tmp_path / "r" / staging.INDEX)
    index[7, 2] += 1
    np.save(tmp_path / "r" / staging.INDEX, np.asfortranarray(index))
    meta = json.loads((tmp_path / "r" / "dataset.json").read_text())
    meta["index_sha256"] = file_sha256(tmp_path / "r" / staging.INDEX)
    (tmp_path / "r" / "dataset.json").write_text(json.dumps(meta))
    assert prepare.main(["check", folder]) == 1
    assert lines(capsys) == [
        (
            "error",
            "written",
            "index.npy",
            "the counts or names of 1 documents differ from the index",
        )
    ]


def with_image(n, codes, path, sha="", **fields):
    words = np.arange(2) + micro_run.TEXT_START + n
    tokens = [0, BOI, *(np.asarray(codes) + IMAGE_START), EOI, *words, 2]
    document_fields = dict(task="VQA", source="s", credential="no", turns=0, group=path, id=f"d{n}")
    document_fields |= dict(image_path=path, image_sha256=sha * 64) | fields
    return Document(tokens=np.array(tokens, np.int32), **document_fields)


def test_duplicates_are_reported_as_notes(tmp_path, capsys):
    docs = [
        with_image(0, [0, 1, 2, 3], "a.png", "1"),
        with_image(1, [0, 1, 2, 3], "a.png", "1"),  # a question more about a.png: nothing
        with_image(2, [0, 1, 2, 3], "b.png", "2"),
        with_image(3, [5, 5, 5, 5], "c.png", "1"),  # a view of the same file
        with_image(4, [5, 5, 5, 6], "d.png"),
        dataclasses.replace(with_image(4, [5, 5, 5, 6], "d.png"), id="d5"),
    ]
    assert prepare.main(["check", write(tmp_path / "r", docs)]) == 0
    assert lines(capsys) == [
        ("note", "same_document", "document 4 (d4, d.png)",
         "2 equal: document 4 (d4, d.png); document 5 (d5, d.png)"),
        ("note", "same_codes", "document 0 (d0, a.png)",
         "2 paths: document 0 (d0, a.png); document 2 (d2, b.png)"),
        ("note", "same_bytes", "document 0 (d0, a.png)",
         "2 paths: document 0 (d0, a.png); document 3 (d3, c.png)"),
    ]  # fmt: skip


def test_credentialed_documents_are_named_by_hashes(tmp_path, capsys):
    docs = [
        with_image(n, [1, 2, 3, 4], f"SECRET{n}.png", credential="yes", id=f"SECRET{n}")
        for n in range(3)
    ]
    assert prepare.main(["check", write(tmp_path / "r", docs)]) == 0
    captured = capsys.readouterr()
    assert "document 0 (codes " in captured.out and "SECRET" not in captured.out + captured.err
    assert "credentialed: not shown" in captured.out


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Return two splits of the real sample as records, written by the program."""
    folder = tmp_path_factory.mktemp("sample")
    for split in ("validation", "test"):
        command = ["sample", "--out", str(folder / split), "--split", split]
        assert prepare.main([*command, "--kind", "instruction"]) == 0
    return folder


def items(folder, rows):
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_embedded_splits_do_not_share_images(sample, capsys):
    command = ["check", str(sample / "validation"), "--against", str(sample / "test"), "--json"]
    images = ["--images", str(prepare.SAMPLE), "--eval_images", str(prepare.SAMPLE)]
    assert prepare.main([*command, *images]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    paths = {d.image_path for d in records_writer.open_records(sample / "validation")}
    assert summary["errors"] == 0 and summary["looked_at"] == len(paths) > 3
    compared = summary["compared"]
    assert (
        compared["items"]
        == compared["with_codes"]
        == compared["with_bytes"]
        == compared["with_look"]
        > 100
    )
    assert not {"shared_codes", "shared_bytes", "shared_look"} & set(summary["findings"])


@pytest.fixture
def leaking(sample, tmp_path):
    """Return items with an image of the records, a copy of it, shared text, and clean items."""
    records = records_writer.open_records(sample / "validation")
    first = next(d for d in records if d.image_path)
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(prepare.SAMPLE / first.image_path, folder / "copy.jpg")
    with PIL.Image.open(prepare.SAMPLE / first.image_path) as image:
        image.save(folder / "again.jpg", quality=70)
    used = {d.image_path for d in records}
    other = next(p for p in IMAGE_FILES if f"images/{p.name}" not in used)
    shutil.copy(other, folder / "other.jpg")
    words = " ".join(f"finding{n}" for n in range(13))
    rows = [
        dict(id="bytes", prompt="Is it a CT?", answer="yes", image_path="copy.jpg"),
        dict(id="look", prompt="Is it a CT?", answer="no", image_path="again.jpg"),
        dict(id="clean", prompt="Is it a CT?", answer="no", image_path="other.jpg"),
        dict(id="words", prompt="<image>" + words, answer="no", image_path="gone.jpg"),
    ]
    return items(tmp_path, rows), folder


def test_leak_is_reported_by_bytes_perceptual_hash_and_codes(sample, leaking, capsys):
    path, folder = leaking
    command = ["check", str(sample / "validation"), "--against", path, "--eval_images", str(folder)]
    assert prepare.main(command) == 1
    findings = {f[:3] for f in lines(capsys)}
    assert ("error", "shared_bytes", "bytes") in findings
    assert not [f for f in findings if f[2] == "clean"]
    assert prepare.main([*command, "--images", str(prepare.SAMPLE), "--json"]) == 1
    out = capsys.readouterr().out
    kinds = {tuple(line.split("\t")[:3]) for line in out.splitlines()}
    assert {("note", "shared_look", "bytes"), ("note", "shared_look", "look")} <= kinds
    assert not [k for k in kinds if k[-1] == "clean"]
    # Verbatim: part of the data.
    assert json.loads(out.splitlines()[-1])["compared"]["unread_pictures"] == 1
    assert prepare.main([*command, "--decode"]) == 1
    kinds = {f[:3] for f in lines(capsys)}
    assert ("error", "shared_codes", "bytes") in kinds and ("note", "shared_look", "bytes") in kinds
    assert not [k for k in kinds if k[-1] in ("clean", "words")]


def test_shared_text_is_a_note_or_an_error_when_strict(sample, tmp_path, capsys):
    records = records_writer.open_records(sample / "validation")
    tokenizer = check.resolve_tokenizer(records, None, prepare.TINY)
    texts = [jsonl.plain_text(d, records.layout, tokenizer) for d in records]
    long = max(texts, key=lambda t: len(t.split()))
    rows = [dict(id="seen", prompt=long, answer="", image_path=""),
            dict(id="new", prompt=" ".join(f"w{n}" for n in range(30)), answer="")]  # fmt: skip
    command = ["check", str(sample / "validation"), "--against", items(tmp_path, rows)]
    assert prepare.main(command) == 0
    assert {f[:3] for f in lines(capsys)} >= {("note", "shared_text", "seen")}
    assert prepare.main([*command, "--strict"]) == 1
    assert ("error", "shared_text", "seen") in {f[:3] for f in lines(capsys)}
    assert not [f for f in lines(capsys) if f[2] == "new"]


def test_changed_and_missing_files_are_reported(sample, tmp_path, capsys):
    records = records_writer.open_records(sample / "test")
    names = sorted({d.image_path for d in records if d.image_path})
    shutil.copytree(prepare.SAMPLE / "images", tmp_path / "images")
    (tmp_path / names[0]).unlink()
    with PIL.Image.open(tmp_path / names[1]) as image:
        rotated = image.rotate(180)
    rotated.save(tmp_path / names[1])
    assert prepare.main(["check", str(sample / "test"), "--images", str(tmp_path)]) == 0
    findings = {f[1]: f[2] for f in lines(capsys)}
    assert names[0] in findings["unread_file"] and names[1] in findings["changed_file"]


def test_near_duplicate_images_of_two_paths(tmp_path, capsys):
    (tmp_path / "p").mkdir()
    with PIL.Image.open(IMAGE_FILES[0]) as image:
        for name, quality in (("a.jpg", 95), ("b.jpg", 60)):
            image.convert("RGB").save(tmp_path / "p" / name, quality=quality)
    shutil.copy(IMAGE_FILES[40], tmp_path / "p" / "c.jpg")
    docs = [with_image(n, [n] * 4, f"{name}.jpg") for n, name in enumerate("abc")]
    command = ["check", write(tmp_path / "r", docs), "--images", str(tmp_path / "p")]
    assert prepare.main(command) == 0
    # Verbatim: part of the data.
    assert [f[:3] for f in lines(capsys)] == [("note", "near_pictures", "document 0 (d0, a.jpg)")]


def test_refusals(tmp_path, sample, capsys):
    folder = micro_run.write(tmp_path / "r")
    assert prepare.main(["check", folder, "--against", str(sample / "test")]) == 1
    assert "--against compares text, which requires the tokenizer" in capsys.readouterr().err
    bad = tmp_path / "items.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    assert prepare.main(["check", str(sample / "test"), "--against", str(bad)]) == 1
    assert "items.jsonl, line 1: not an item with prompt" in capsys.readouterr().err
    records = records_writer.open_records(sample / "test")
    vars(records)["layout"] = dataclasses.replace(records.layout, vqgan="0" * 64)
    with pytest.raises(PrepareError, match="its VQGAN did not encode the images"):
        check.resolve_encoder(records, prepare.TINY)
