"""The check of records: each kind of finding is made, found, named and counted; exit codes."""

import dataclasses
import json
import shutil

import micro_run
import numpy as np
import PIL.Image
import pytest
from array_record.python import array_record_module
from source_setup import PICTURES

from medmax_jax.data import prepare
from medmax_jax.data.analysis import check
from medmax_jax.data.image_tokens.encoder import PrepareError
from medmax_jax.data.records import jsonl, staging
from medmax_jax.data.records import writer as records_writer
from medmax_jax.data.records.document import Document, Layout
from medmax_jax.io import storage
from medmax_jax.models.vocab import BOI, EOI, IMAGE_START

LAYOUT = Layout(vocab=micro_run.run().vocab, codes_per_image=4, tokenizer="", vqgan="")


def write(folder, docs):
    records_writer.write(folder, docs, shard_size=16, layout=LAYOUT, notes={})
    return str(folder)


def lines(capsys):
    """(level, kind, where, what) of each finding."""
    out = capsys.readouterr().out
    return [tuple(line.split("\t")) for line in out.splitlines() if line.count("\t") == 3]


def forged(folder, n, **fields):
    """Rewrites the shards with document n changed, whole CRC and all, past every check."""
    found = records_writer.open_records(folder)
    docs = list(found)
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


def test_sound_records_have_no_findings(tmp_path, capsys):
    folder = micro_run.write(tmp_path / "r")
    assert prepare.main(["check", folder]) == 0
    assert lines(capsys) == []
    assert prepare.main(["check", folder, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["errors"] == told["notes"] == 0 and told["documents"] == 40


@pytest.mark.parametrize(
    ("kind", "n", "fields", "said"),
    [
        ("schema", 3, dict(credential="maybe"), "credential is neither yes nor no"),
        ("schema", 3, dict(task=""), "task is no text, or empty"),
        ("schema", 3, dict(turns=-1), "turns is no number of 0 or more"),
        ("schema", 3, dict(image_sha256="abc"), "image_sha256 is no SHA-256"),
        ("ids", 20, dict(tokens=np.array([0, 9_999, 2], np.int32)), "token 9999 is outside"),
        ("ids", 20, dict(tokens=np.array([0, 8_720, 1], np.int32)), "goes from 0 to 1"),
        ("ids", 20, dict(tokens=np.array([0, 2, 8_720, 2], np.int32)), "control token 2 inside"),
        ("image", 5, dict(tokens=np.array([0, BOI, 4, 5, 6, EOI, 2], np.int32)), "3 image codes"),
        ("image", 5, dict(tokens=np.array([0, BOI, 4, 5, 6, 4_000, EOI, 2], np.int32)), "3 image"),
        ("separator", 0, dict(turns=2), "turns is 2 but there are 1 separators, not 3"),
    ],
)
def test_a_forged_document_is_found_and_the_rest_is_read(tmp_path, capsys, kind, n, fields, said):
    folder = micro_run.write(tmp_path / "r")
    forged(tmp_path / "r", n, **fields)
    assert prepare.main(["check", folder]) == 1
    found = lines(capsys)
    first = found[0]
    assert first[:2] == ("error", kind) and said in first[3]
    assert first[2].startswith(
        f"document {n}, 0000{n // 16}-of-00003.array_record, record {n % 16}"
    )
    assert [f[1] for f in found[1:]] == ["written"]  # and the digest


def test_a_damaged_record_does_not_hide_the_next_one(tmp_path, capsys):
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


def test_an_index_of_other_documents_is_found(tmp_path, capsys):
    folder = micro_run.write(tmp_path / "r")
    index = np.load(tmp_path / "r" / staging.INDEX)
    index[7, 2] += 1
    np.save(tmp_path / "r" / staging.INDEX, np.asfortranarray(index))
    meta = json.loads((tmp_path / "r" / "dataset.json").read_text())
    meta["index_sha256"] = storage.file_sha256(tmp_path / "r" / staging.INDEX)
    (tmp_path / "r" / "dataset.json").write_text(json.dumps(meta))
    assert prepare.main(["check", folder]) == 1
    assert lines(capsys) == [
        ("error", "written", "index.npy", "1 documents have other counts or names than it says")
    ]


def with_image(n, codes, path, sha="", **fields):
    words = np.arange(2) + micro_run.TEXT_START + n
    tokens = [0, BOI, *(np.asarray(codes) + IMAGE_START), EOI, *words, 2]
    about = dict(task="VQA", source="s", credential="no", turns=0, group=path, id=f"d{n}")
    about |= dict(image_path=path, image_sha256=sha * 64) | fields
    return Document(tokens=np.array(tokens, np.int32), **about)


def test_what_comes_twice_is_noted(tmp_path, capsys):
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
         "2 alike: document 4 (d4, d.png); document 5 (d5, d.png)"),
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
    told = capsys.readouterr()
    assert "document 0 (codes " in told.out and "SECRET" not in told.out + told.err
    assert "credentialed: not shown" in told.out


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Records of the real sample, made by the program: two splits."""
    folder = tmp_path_factory.mktemp("sample")
    for split in ("validation", "test"):
        command = ["sample", "--out", str(folder / split), "--split", split]
        assert prepare.main([*command, "--kind", "instruction"]) == 0
    return folder


def items(folder, rows):
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_embedded_splits_do_not_share_pictures(sample, capsys):
    command = ["check", str(sample / "validation"), "--against", str(sample / "test"), "--json"]
    images = ["--images", str(prepare.SAMPLE), "--eval_images", str(prepare.SAMPLE)]
    assert prepare.main([*command, *images]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    paths = {d.image_path for d in records_writer.open_records(sample / "validation")}
    assert told["errors"] == 0 and told["looked_at"] == len(paths) > 3
    held = told["compared"]
    assert held["items"] == held["with_codes"] == held["with_bytes"] == held["with_look"] > 100
    assert not {"shared_codes", "shared_bytes", "shared_look"} & set(told["findings"])


@pytest.fixture
def leaking(sample, tmp_path):
    """Items with a picture of the records, a copy of it, words, and clean ones."""
    found = records_writer.open_records(sample / "validation")
    first = next(d for d in found if d.image_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(prepare.SAMPLE / first.image_path, folder / "copy.jpg")
    with PIL.Image.open(prepare.SAMPLE / first.image_path) as picture:
        picture.save(folder / "again.jpg", quality=70)
    used = {d.image_path for d in found}
    other = next(p for p in PICTURES if f"images/{p.name}" not in used)
    shutil.copy(other, folder / "other.jpg")
    words = " ".join(f"finding{n}" for n in range(13))
    rows = [
        dict(id="bytes", prompt="Is it a CT?", answer="yes", image_path="copy.jpg"),
        dict(id="look", prompt="Is it a CT?", answer="no", image_path="again.jpg"),
        dict(id="clean", prompt="Is it a CT?", answer="no", image_path="other.jpg"),
        dict(id="words", prompt="<image>" + words, answer="no", image_path="gone.jpg"),
    ]
    return items(tmp_path, rows), folder


def test_a_leak_is_found_by_bytes_look_and_codes(sample, leaking, capsys):
    path, folder = leaking
    command = ["check", str(sample / "validation"), "--against", path, "--eval_images", str(folder)]
    assert prepare.main(command) == 1
    found = {f[:3] for f in lines(capsys)}
    assert ("error", "shared_bytes", "bytes") in found
    assert not [f for f in found if f[2] == "clean"]
    assert prepare.main([*command, "--images", str(prepare.SAMPLE), "--json"]) == 1
    out = capsys.readouterr().out
    kinds = {tuple(line.split("\t")[:3]) for line in out.splitlines()}
    assert {("note", "shared_look", "bytes"), ("note", "shared_look", "look")} <= kinds
    assert not [k for k in kinds if k[-1] == "clean"]
    assert json.loads(out.splitlines()[-1])["compared"]["unread_pictures"] == 1
    assert prepare.main([*command, "--decode"]) == 1
    kinds = {f[:3] for f in lines(capsys)}
    assert ("error", "shared_codes", "bytes") in kinds and ("note", "shared_look", "bytes") in kinds
    assert not [k for k in kinds if k[-1] in ("clean", "words")]


def test_shared_words_are_notes_and_errors_when_strict(sample, tmp_path, capsys):
    found = records_writer.open_records(sample / "validation")
    tokenizer = check.resolve_tokenizer(found, None, prepare.TINY)
    texts = [jsonl.plain_text(d, found.layout, tokenizer) for d in found]
    long = max(texts, key=lambda t: len(t.split()))
    rows = [dict(id="said", prompt=long, answer="", image_path=""),
            dict(id="new", prompt=" ".join(f"w{n}" for n in range(30)), answer="")]  # fmt: skip
    command = ["check", str(sample / "validation"), "--against", items(tmp_path, rows)]
    assert prepare.main(command) == 0
    assert {f[:3] for f in lines(capsys)} >= {("note", "shared_text", "said")}
    assert prepare.main([*command, "--strict"]) == 1
    assert ("error", "shared_text", "said") in {f[:3] for f in lines(capsys)}
    assert not [f for f in lines(capsys) if f[2] == "new"]


def test_files_that_changed_or_went_are_noted(sample, tmp_path, capsys):
    found = records_writer.open_records(sample / "test")
    names = sorted({d.image_path for d in found if d.image_path})
    shutil.copytree(prepare.SAMPLE / "images", tmp_path / "images")
    (tmp_path / names[0]).unlink()
    with PIL.Image.open(tmp_path / names[1]) as picture:
        rotated = picture.rotate(180)
    rotated.save(tmp_path / names[1])
    assert prepare.main(["check", str(sample / "test"), "--images", str(tmp_path)]) == 0
    told = {f[1]: f[2] for f in lines(capsys)}
    assert names[0] in told["unread_file"] and names[1] in told["changed_file"]


def test_near_pictures_of_two_paths(tmp_path, capsys):
    (tmp_path / "p").mkdir()
    with PIL.Image.open(PICTURES[0]) as picture:
        for name, quality in (("a.jpg", 95), ("b.jpg", 60)):
            picture.convert("RGB").save(tmp_path / "p" / name, quality=quality)
    shutil.copy(PICTURES[40], tmp_path / "p" / "c.jpg")
    docs = [with_image(n, [n] * 4, f"{name}.jpg") for n, name in enumerate("abc")]
    command = ["check", write(tmp_path / "r", docs), "--images", str(tmp_path / "p")]
    assert prepare.main(command) == 0
    assert [f[:3] for f in lines(capsys)] == [("note", "near_pictures", "document 0 (d0, a.jpg)")]


def test_refusals(tmp_path, sample, capsys):
    folder = micro_run.write(tmp_path / "r")
    assert prepare.main(["check", folder, "--against", str(sample / "test")]) == 1
    assert "--against compares words; name the records' model folder" in capsys.readouterr().err
    bad = tmp_path / "items.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    assert prepare.main(["check", str(sample / "test"), "--against", str(bad)]) == 1
    assert "items.jsonl, line 1: no item with prompt" in capsys.readouterr().err
    found = records_writer.open_records(sample / "test")
    vars(found)["layout"] = dataclasses.replace(found.layout, vqgan="0" * 64)
    with pytest.raises(PrepareError, match="its VQGAN did not make the codes"):
        check.resolve_encoder(found, prepare.TINY)
