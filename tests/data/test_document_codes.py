"""Tests of records from stored codes: equal to records without, and rejected folders."""

import json
import logging
import pathlib
import shutil
import stat

import numpy as np
import pytest
from source_setup import FOLDERS, IMAGE_FILES
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
    """Use a batch of one image on each of the eight devices of the tests."""
    monkeypatch.setattr(document_codes, "BATCH", 2)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(prepare.TINY)


def program(*arguments: object) -> int:
    return prepare.main([*map(str, arguments)])


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def image_files(folder: pathlib.Path) -> Files:
    return Files(lambda p: open_image(folder / p, name=p), lambda p: folder / p)


def views(*paths: str) -> list[ImageView]:
    return [ImageView(path, 0, "", False) for path in paths]


@pytest.mark.parametrize("source", ["SLAKE", "PathVQA"])
def test_build_with_stored_codes_equals_build_without(source, tmp_path):
    """Records are equal byte by byte; images in a parquet file are looked up by their bytes."""
    (tmp_path / "from").mkdir()
    FOLDERS[source][0](tmp_path / "from")
    folder = tmp_path / "from"
    if source == "PathVQA":
        folder = tmp_path / "unpacked"
        folder.mkdir()
        for n, image in enumerate(IMAGE_FILES):
            (folder / f"x{n}.jpg").write_bytes(pathlib.Path(image).read_bytes())
    model = ["--model", prepare.TINY]
    tokenize = ["tokenize", "--images", folder, "--out", tmp_path / "codes", *model, "--batch", 2]
    assert program(*tokenize) == 0
    command = ["build", "--source", source, "--from", tmp_path / "from", *model]
    assert program(*command, "--out", tmp_path / "a") == 0
    assert program(*command, "--out", tmp_path / "b", "--codes", tmp_path / "codes") == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    notes = writer.open_records(tmp_path / "a").meta["notes"]
    assert notes["codes"] == dict(precision="highest", agreement=None)


def test_sample_through_tokenize_and_documents_equals_prepare_sample(tmp_path, capsys):
    """`prepare sample`, and texts, codes and documents give records of the same digest."""
    texts, codes, sample = tmp_path / "texts.jsonl", tmp_path / "codes", prepare.SAMPLE
    split = ["--split", "validation"]
    assert program("sample", "--out", texts, "--texts", *split) == 0
    listed = ["tokenize", "--images", sample, "--list", texts, "--out", codes, "--batch", 2]
    assert program(*listed, "--model", prepare.TINY) == 0
    general = ["documents", "--from", texts, "--images", sample, "--codes", codes, "--json"]
    assert program(*general, "--out", tmp_path / "a") == 0
    documents = json.loads(capsys.readouterr().out.splitlines()[-1])
    for flags in ([], ["--codes", codes]):
        out = tmp_path / f"b{len(flags)}"
        assert program("sample", "--out", out, *split, "--json", *flags) == 0
        two = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert documents["sha256"] == two["sha256"] and documents["shards"] == two["shards"]
    assert program("sample", "--out", tmp_path / "c", "--views", 2, "--codes", codes) == 1
    assert "--codes has one view of each image; use --views 1" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Return a folder of four images: two valid, one truncated, one not listed for tokenize."""
    (tmp_path / "in").mkdir()
    for n in range(4):
        shutil.copyfile(IMAGE_FILES[n], tmp_path / "in" / f"{n}.jpg")
    cut = tmp_path / "in" / "2.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    return tmp_path / "in"


@pytest.fixture
def codes(folder, encoder, tmp_path) -> pathlib.Path:
    out = tmp_path / "codes"
    tokenize(out, ["0.jpg", "1.jpg", "2.jpg"], folder=folder, encoder=encoder, **HOW)
    return out


def test_images_are_looked_up_by_bytes_and_unreadable_ones_reported_equally(folder, codes, encoder):
    stored, online = StoredCodes([codes], encoder, "highest"), OnlineEncoder(encoder, "highest")
    shutil.copyfile(folder / "1.jpg", folder / "elsewhere.jpg")
    requested = views("0.jpg", "elsewhere.jpg", "2.jpg", "gone.jpg")
    expected = stored(requested, image_files(folder), log_progress=False)
    two = online(requested, image_files(folder), log_progress=False)
    assert expected.unreadable == two.unreadable and set(expected.unreadable) == {
        "2.jpg",
        "gone.jpg",
    }
    assert expected.codes.keys() == two.codes.keys()
    assert all(np.array_equal(expected.codes[k], two.codes[k]) for k in two.codes)


def test_image_missing_from_the_codes_is_an_error(folder, codes, encoder):
    stored = StoredCodes([codes], encoder, "highest")
    with pytest.raises(
        PrepareError, match=r"--codes .* 3.jpg is missing, or the image was changed"
    ):
        stored(views("3.jpg"), image_files(folder), log_progress=False)
    shutil.copyfile(IMAGE_FILES[5], folder / "0.jpg")
    with pytest.raises(
        PrepareError, match=r"--codes .* 0.jpg is missing, or the image was changed"
    ):
        stored(views("0.jpg"), image_files(folder), log_progress=False)


def test_codes_of_another_model_or_precision_are_rejected(codes, encoder, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(prepare.TINY, other)
    with open(other / "vqgan.safetensors", "r+b") as file:  # one weight is another
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    with pytest.raises(PrepareError, match="vqgan is '.*, but --model or --precision requires"):
        StoredCodes([codes], load_encoder(other), "highest")
    with pytest.raises(PrepareError, match="precision is 'highest', .* requires 'bfloat16'"):
        StoredCodes([codes], encoder, "bfloat16")
    with pytest.raises(PrepareError, match="not finished"):
        StoredCodes([tmp_path], encoder, "highest")


def test_records_of_bfloat16_codes_store_the_agreement(folder, encoder, tmp_path):
    how = HOW | dict(precision="bfloat16")
    meta = tokenize(tmp_path / "low", ["0.jpg", "1.jpg"], folder=folder, encoder=encoder, **how)
    stored, online = (
        StoredCodes([tmp_path / "low"], encoder, "bfloat16"),
        OnlineEncoder(encoder, "bfloat16"),
    )
    requested = views("0.jpg", "1.jpg")
    expected, two = (
        source(requested, image_files(folder), log_progress=False) for source in (stored, online)
    )
    assert all(np.array_equal(expected.codes[k], two.codes[k]) for k in two.codes)
    assert stored.notes() == online.notes()
    assert stored.notes() == dict(precision="bfloat16", agreement=meta["agreement"])
    assert 0.3 < meta["agreement"] < 1


def test_codes_of_a_credentialed_source_are_private_and_without_names(
    tmp_path, capsys, caplog, recwarn
):
    """Canaries in all tags, paths and names do not occur in files, output or logs."""
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
    captured = capsys.readouterr()
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert len(writer.open_records(tmp_path / "a")) == 3
    meta = open_codes(codes).meta
    assert meta["unreadable"] == 3 and "BurnedInAnnotation is YES" in str(meta["reasons"])
    written = "".join(f"{p} {p.read_bytes() if p.is_file() else ''}" for p in codes.rglob("*"))
    warned = "".join(str(w.message) for w in recwarn)
    heaps = dict(
        codes=written, out=captured.out, err=captured.err, log=caplog.text, warnings=warned
    )
    assert not [(s, name) for s in SECRETS for name, heap in heaps.items() if s in heap]
    modes = {p.is_dir(): stat.S_IMODE(p.stat().st_mode) for p in [codes, *codes.rglob("*")]}
    assert modes == {True: 0o700, False: 0o600}
    digest = digest_of(next(source.rglob(f"{DICOM_IDS[0]}.dcm")))
    assert digest in open_codes(codes)


def test_open_codes_are_rejected_for_a_credentialed_source(folder, codes, encoder, tmp_path):
    with pytest.raises(PrepareError, match="this source requires .* with --credentialed"):
        StoredCodes([codes], encoder, "highest").check_credentialed(burned_in=False)
    private, rules = tmp_path / "private", dict(credentialed=True, burned_in=True)
    tokenize(private, ["0.jpg"], folder=folder, encoder=encoder, **HOW | rules)
    with pytest.raises(PrepareError, match="this source requires .* without --burned_in"):
        StoredCodes([private], encoder, "highest").check_credentialed(burned_in=False)
    StoredCodes([private], encoder, "highest").check_credentialed(burned_in=True)
