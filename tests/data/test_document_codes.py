"""Tokenize, then make records: the same records, and what a folder of codes is refused for."""

import json
import logging
import pathlib
import shutil
import stat

import numpy as np
import pytest
from source_setup import FOLDERS, PICTURES
from test_mimic import DICOM_IDS, SECRETS, logger_as_before, marked_source  # noqa: F401

from medmax_jax.data import prepare
from medmax_jax.data.image_tokens import document_codes
from medmax_jax.data.image_tokens.document_codes import Files, OnlineEncoder, StoredCodes
from medmax_jax.data.image_tokens.encoder import ImageView, PrepareError, load_encoder, open_image
from medmax_jax.data.image_tokens.store import tokenize
from medmax_jax.data.image_tokens.store_reader import digest_of, open_codes
from medmax_jax.data.records import writer

HOW = dict(precision="highest", shard_size=4, batch=2, max_bad=0.5)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """On each of the eight devices of the tests."""
    monkeypatch.setattr(document_codes, "BATCH", 2)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(prepare.TINY)


def program(*words: object) -> int:
    return prepare.main([*map(str, words)])


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def pictures_of(folder: pathlib.Path) -> Files:
    return Files(lambda p: open_image(folder / p, name=p), lambda p: folder / p)


def views(*paths: str) -> list[ImageView]:
    return [ImageView(path, 0, "", False) for path in paths]


@pytest.mark.parametrize("source", ["SLAKE", "PathVQA"])
def test_a_build_with_codes_is_the_build_without(source, tmp_path):
    """Byte for byte; pictures in a parquet file are found by their bytes."""
    (tmp_path / "from").mkdir()
    FOLDERS[source][0](tmp_path / "from")
    folder = tmp_path / "from"
    if source == "PathVQA":
        folder = tmp_path / "unpacked"
        folder.mkdir()
        for n, picture in enumerate(PICTURES):
            (folder / f"x{n}.jpg").write_bytes(pathlib.Path(picture).read_bytes())
    model = ["--model", prepare.TINY]
    made = ["tokenize", "--images", folder, "--out", tmp_path / "codes", *model, "--batch", 2]
    assert program(*made) == 0
    command = ["build", "--source", source, "--from", tmp_path / "from", *model]
    assert program(*command, "--out", tmp_path / "a") == 0
    assert program(*command, "--out", tmp_path / "b", "--codes", tmp_path / "codes") == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    notes = writer.open_records(tmp_path / "a").meta["notes"]
    assert notes["codes"] == dict(precision="highest", agreement=None)


def test_the_sample_through_tokenize_and_the_general_path(tmp_path, capsys):
    """`prepare sample` and texts, codes, documents: the same digest of the same records."""
    texts, codes, sample = tmp_path / "texts.jsonl", tmp_path / "codes", prepare.SAMPLE
    split = ["--split", "validation"]
    assert program("sample", "--out", texts, "--texts", *split) == 0
    listed = ["tokenize", "--images", sample, "--list", texts, "--out", codes, "--batch", 2]
    assert program(*listed, "--model", prepare.TINY) == 0
    general = ["documents", "--from", texts, "--images", sample, "--codes", codes, "--json"]
    assert program(*general, "--out", tmp_path / "a") == 0
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    for more in ([], ["--codes", codes]):
        out = tmp_path / f"b{len(more)}"
        assert program("sample", "--out", out, *split, "--json", *more) == 0
        two = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert one["sha256"] == two["sha256"] and one["shards"] == two["shards"]
    assert program("sample", "--out", tmp_path / "c", "--views", 2, "--codes", codes) == 1
    assert "--codes has one view of each picture; use --views 1" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Four pictures: two whole, one cut off, one that is not listed for tokenize."""
    (tmp_path / "in").mkdir()
    for n in range(4):
        shutil.copyfile(PICTURES[n], tmp_path / "in" / f"{n}.jpg")
    cut = tmp_path / "in" / "2.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    return tmp_path / "in"


@pytest.fixture
def codes(folder, encoder, tmp_path) -> pathlib.Path:
    out = tmp_path / "codes"
    tokenize(out, ["0.jpg", "1.jpg", "2.jpg"], folder=folder, encoder=encoder, **HOW)
    return out


def test_pictures_are_found_by_their_bytes_and_bad_ones_told_alike(folder, codes, encoder):
    stored, made = StoredCodes(codes, encoder, "highest"), OnlineEncoder(encoder, "highest")
    shutil.copyfile(folder / "1.jpg", folder / "elsewhere.jpg")
    asked = views("0.jpg", "elsewhere.jpg", "2.jpg", "gone.jpg")
    one = stored(asked, pictures_of(folder), tell=False)
    two = made(asked, pictures_of(folder), tell=False)
    assert one.unreadable == two.unreadable and set(one.unreadable) == {"2.jpg", "gone.jpg"}
    assert one.codes.keys() == two.codes.keys()
    assert all(np.array_equal(one.codes[k], two.codes[k]) for k in two.codes)


def test_a_picture_that_is_not_in_the_folder_is_no_quarantine(folder, codes, encoder):
    stored = StoredCodes(codes, encoder, "highest")
    with pytest.raises(PrepareError, match=r"--codes .* lacks 3.jpg, or the picture was changed"):
        stored(views("3.jpg"), pictures_of(folder), tell=False)
    shutil.copyfile(PICTURES[5], folder / "0.jpg")
    with pytest.raises(PrepareError, match=r"--codes .* lacks 0.jpg, or the picture was changed"):
        stored(views("0.jpg"), pictures_of(folder), tell=False)


def test_a_folder_of_another_model_or_precision_is_refused(codes, encoder, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(prepare.TINY, other)
    with open(other / "vqgan.safetensors", "r+b") as file:  # one weight is another
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    with pytest.raises(PrepareError, match="has vqgan '.*, and --model or --precision ask for"):
        StoredCodes(codes, load_encoder(other), "highest")
    with pytest.raises(PrepareError, match="has precision 'highest', .* ask for 'bfloat16'"):
        StoredCodes(codes, encoder, "bfloat16")
    with pytest.raises(PrepareError, match="not finished"):
        StoredCodes(tmp_path, encoder, "highest")


def test_records_of_bfloat16_codes_say_how_many_agree(folder, encoder, tmp_path):
    how = HOW | dict(precision="bfloat16")
    meta = tokenize(tmp_path / "low", ["0.jpg", "1.jpg"], folder=folder, encoder=encoder, **how)
    stored, made = (
        StoredCodes(tmp_path / "low", encoder, "bfloat16"),
        OnlineEncoder(encoder, "bfloat16"),
    )
    asked = views("0.jpg", "1.jpg")
    one, two = (source(asked, pictures_of(folder), tell=False) for source in (stored, made))
    assert all(np.array_equal(one.codes[k], two.codes[k]) for k in two.codes)
    assert stored.notes() == made.notes()
    assert stored.notes() == dict(precision="bfloat16", agreement=meta["agreement"])
    assert 0.3 < meta["agreement"] < 1


def test_codes_of_a_credentialed_source_are_private_and_nameless(tmp_path, capsys, caplog, recwarn):
    """Canaries in all tags, paths and names: no hits in what is written or told."""
    source, codes = tmp_path / f"{SECRETS[0]}-folder", tmp_path / "codes"
    marked_source(source)
    model = ["--model", prepare.TINY]
    command = ["tokenize", "--images", source, "--out", codes, *model, "--credentialed"]
    command += ["--batch", 2]
    build = ["build", "--source", "MIMIC-CXR", "--from", source, *model, "--max_bad", 0.6]
    with caplog.at_level(logging.DEBUG):
        assert program(*command) == 1  # half of them cannot be read
        assert program(*command, "--max_bad", 0.6) == 0
        assert program(*build, "--out", tmp_path / "a") == 0
        assert program(*build, "--out", tmp_path / "b", "--codes", codes) == 0
    told = capsys.readouterr()
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert len(writer.open_records(tmp_path / "a")) == 3
    meta = open_codes(codes).meta
    assert meta["unreadable"] == 3 and "BurnedInAnnotation is YES" in str(meta["reasons"])
    written = "".join(f"{p} {p.read_bytes() if p.is_file() else ''}" for p in codes.rglob("*"))
    warned = "".join(str(w.message) for w in recwarn)
    heaps = dict(codes=written, out=told.out, err=told.err, log=caplog.text, warnings=warned)
    assert not [(s, name) for s in SECRETS for name, heap in heaps.items() if s in heap]
    modes = {p.is_dir(): stat.S_IMODE(p.stat().st_mode) for p in [codes, *codes.rglob("*")]}
    assert modes == {True: 0o700, False: 0o600}
    digest = digest_of(next(source.rglob(f"{DICOM_IDS[0]}.dcm")))
    assert digest in open_codes(codes)


def test_open_codes_are_not_taken_for_a_credentialed_source(folder, codes, encoder, tmp_path):
    with pytest.raises(PrepareError, match="tokenize it with --credentialed for this source"):
        StoredCodes(codes, encoder, "highest").check_credentialed(burned_in=False)
    private, rules = tmp_path / "private", dict(credentialed=True, burned_in=True)
    tokenize(private, ["0.jpg"], folder=folder, encoder=encoder, **HOW | rules)
    with pytest.raises(PrepareError, match="tokenize it without --burned_in for this source"):
        StoredCodes(private, encoder, "highest").check_credentialed(burned_in=False)
    StoredCodes(private, encoder, "highest").check_credentialed(burned_in=True)
