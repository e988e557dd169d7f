"""Tests of building every source from its published files to records with the tiny model."""

import json
import logging
import os
import pathlib
import stat

import numpy as np
import pytest
from source_setup import FOLDERS, IMAGE_FILES, write_json

from medmax_jax.data import mixture, prepare
from medmax_jax.data.analysis import check
from medmax_jax.data.image_tokens import document_codes
from medmax_jax.data.image_tokens.encoder import PrepareError, load_encoder
from medmax_jax.data.records import jsonl, writer
from medmax_jax.data.records.document import RecordsError
from medmax_jax.data.records.row_streams import SourceError
from medmax_jax.data.sources import build
from medmax_jax.models import images, vqgan
from medmax_jax.models.vocab import BOI, IMAGE_START, SEP


@pytest.fixture(autouse=True)
def logger_as_before():
    """Reset the logger: a program's main() gives it a handler of that moment's stderr."""
    log = logging.getLogger("medmax_jax.prepare")
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Use a batch of one image on each of the eight devices of the tests."""
    monkeypatch.setattr(document_codes, "BATCH", 2)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(prepare.TINY)


@pytest.fixture
def make(encoder):
    def make(out, source, folder, **changes):
        defaults = dict(model_folder=prepare.TINY, split="train", seed=0)
        defaults |= dict(vq=encoder.vq, tokenizer=encoder.tokenizer)
        return build.build_source(out, source=source, folder=folder, **(defaults | changes))

    return make


@pytest.fixture
def source(tmp_path):
    def source(name):
        FOLDERS[name][0](tmp_path / "from")
        return tmp_path / "from"

    (tmp_path / "from").mkdir()
    return source


@pytest.mark.parametrize("name", list(build.READERS))
def test_each_source_is_built_from_its_files(name, make, source, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        meta = make(tmp_path / "r", name, source(name))
    records = writer.open_records(tmp_path / "r")
    described, expected = mixture.BY_NAME[name], FOLDERS[name][1]
    assert len(records) == meta["documents"] and expected in (None, len(records))
    assert meta["sources"] == {name: len(records)} and set(meta["tasks"]) <= set(described.tasks)
    assert meta["credentials"] == {"yes" if name == "MIMIC-CXR" else "no": len(records)}
    notes = meta["notes"]
    assert notes["subset"] == "not the released subset" and notes["malformed"] == {}
    assert (notes["seed"], notes["split"], notes["sample"]) == (0, "train", None)
    assert notes["data_class"] == described.data_class and notes["licence"] == described.licence
    for document in records:
        tokens = document.tokens
        assert (tokens == BOI).sum() == 1 and (tokens == SEP).sum() == 2 * document.turns - 1
    assert f"{len(records)} of {len(records)} documents" in caplog.text and "s left" in caplog.text
    assert "Not the released subset" in caplog.text and "fewer" in caplog.text
    assert check.check(tmp_path / "r", tokenizer=None)["documents"] == len(records)


def test_codes_are_those_of_the_image(make, source, encoder, tmp_path):
    make(tmp_path / "r", "SLAKE", source("SLAKE"))
    for n, document in enumerate(writer.open_records(tmp_path / "r")):
        size = encoder.vq_config.image_size
        pixels = images.preprocess(images.load(IMAGE_FILES[n], max_pixels=10**8), size)
        codes = np.asarray(vqgan.encode(encoder.vq, np.repeat(pixels[None], 2, axis=0))[0])
        begin = int(np.flatnonzero(document.tokens == BOI)[0]) + 1
        assert np.array_equal(document.tokens[begin : begin + 64], codes.ravel() + IMAGE_START)
        assert document.image_path == f"imgs/xmlab{n}/source.jpg"
        text = jsonl.to_text(document, encoder.layout, encoder.tokenizer)
        assert text == "<image>What modality is used?<reserved08706>CT"


def test_same_command_gives_same_records(make, source, tmp_path):
    folder = source("PMC-OA")
    metas = [make(tmp_path / n, "PMC-OA", folder) for n in "ab"]
    assert metas[0] == metas[1]
    assert make(tmp_path / "c", "PMC-OA", folder, seed=1)["sha256"] != metas[0]["sha256"]


def test_small_caches_give_the_same_records(make, source, tmp_path, monkeypatch):
    folder = source("PathVQA")
    expected = make(tmp_path / "a", "PathVQA", folder)
    monkeypatch.setattr(build, "CHUNK", 2)
    monkeypatch.setattr(build, "CACHE", 1)
    assert make(tmp_path / "b", "PathVQA", folder)["sha256"] == expected["sha256"]


def test_sample_depends_on_seed_and_not_on_row_order(make, source, tmp_path):
    folder = source("LLaVA-Med-PMC")

    def ids(out, **settings):
        make(tmp_path / out, "LLaVA-Med-PMC", folder, **settings)
        return {d.id for d in writer.open_records(tmp_path / out)}

    everything = ids("all")
    drawn = {n: ids(f"n{n}", sample=n) for n in (1, 2, 3)}
    assert [len(drawn[n]) for n in (1, 2, 3)] == [1, 2, 3] and drawn[1] < drawn[2] < drawn[3]
    assert drawn[3] < everything and ids("more", sample=100) == everything
    assert drawn[2] == set(sorted(everything, key=lambda i: build._rank(0, i))[:2])
    assert len({frozenset(ids(f"s{s}", sample=1, seed=s)) for s in range(8)}) > 1


def test_splits_are_separate(make, source, tmp_path):
    folder = source("VQA-RAD")
    train = make(tmp_path / "a", "VQA-RAD", folder)
    test = make(tmp_path / "b", "VQA-RAD", folder, split="test")
    assert (train["documents"], test["documents"]) == (3, 2)
    assert train["notes"]["left_out"] == {"of another split": 2}
    with pytest.raises(PrepareError, match="VQA-RAD has no row of split validation"):
        make(tmp_path / "c", "VQA-RAD", folder, split="validation")


def test_malformed_rows_are_counted_and_limited(make, source, tmp_path):
    folder = source("SLAKE")
    items = json.loads((folder / "train.json").read_text())
    items[0]["answer"] = None
    write_json(folder / "train.json", items)
    with pytest.raises(PrepareError, match=r"1 of 3 rows.*--max_bad.*train.json, row 1: answer"):
        make(tmp_path / "r", "SLAKE", folder)
    assert not (tmp_path / "r").exists()
    notes = make(tmp_path / "r", "SLAKE", folder, max_bad=0.9)["notes"]
    assert notes["malformed"] == {"answer: missing or not text": 1}
    assert notes["left_out"] == {"a question in Chinese": 1}
    assert notes["first_malformed"] == ["train.json, row 1: answer: missing or not text"]


def test_unreadable_images_are_counted(make, source, tmp_path):
    folder = source("SLAKE")
    (folder / "imgs/xmlab1/source.jpg").write_bytes(b"\xff\xd8 not an image")
    (folder / "imgs/xmlab2/source.jpg").unlink()
    with pytest.raises(PrepareError, match="1 of 3 rows of SLAKE are malformed"):
        make(tmp_path / "r", "SLAKE", folder)
    assert list((tmp_path / "r").glob("*")) == []
    meta = make(tmp_path / "r", "SLAKE", folder, max_bad=0.9)
    assert meta["documents"] == 1 and sum(meta["notes"]["malformed"].values()) == 2
    assert any("no such file" in reason for reason in meta["notes"]["malformed"])


def test_refusals(make, source, tmp_path):
    folder = source("SLAKE")
    with pytest.raises(PrepareError, match="source is 'slake'; use one of PMC-OA"):
        make(tmp_path / "r", "slake", folder)
    with pytest.raises(
        PrepareError, match="--from is .*: no such folder; set it to the unpacked folder of SLAKE"
    ):
        make(tmp_path / "r", "SLAKE", tmp_path / "nowhere")
    for wrong in (dict(caption_share=1.5), dict(max_bad=-1.0)):
        with pytest.raises(PrepareError, match="use a share from 0 to 1"):
            make(tmp_path / "r", "SLAKE", folder, **wrong)
    with pytest.raises(PrepareError, match="sample is 0; use 1 or more"):
        make(tmp_path / "r", "SLAKE", folder, sample=0)
    with pytest.raises(SourceError, match="the folder contains none of test.json"):
        make(tmp_path / "r", "SLAKE", folder, split="test")
    make(tmp_path / "r", "SLAKE", folder)
    with pytest.raises(RecordsError, match="already contains a finished data set"):
        make(tmp_path / "r", "SLAKE", folder)


def test_credentialed_records_are_readable_by_their_owner_only(make, source, tmp_path):
    folder, out = source("MIMIC-CXR"), tmp_path / "r"
    before = os.umask(0o022)
    try:
        make(out, "MIMIC-CXR", folder)
    finally:
        assert os.umask(before) == 0o022
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    modes = {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()}
    assert modes == {0o600} and len(list(out.iterdir())) == 3
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").write_text("")
    with pytest.raises(PrepareError, match="not empty; credentialed records"):
        make(tmp_path / "full", "MIMIC-CXR", folder)


def test_program(source, tmp_path, capsys):
    folder, out = source("SLAKE"), tmp_path / "r"
    command = ["build", "--source", "SLAKE", "--from", str(folder), "--model", str(prepare.TINY)]
    assert prepare.main([*command, "--out", str(out), "--sample", "2", "--json"]) == 0
    captured = capsys.readouterr()
    meta = json.loads(captured.out.splitlines()[-1])
    assert meta["documents"] == 2 and meta["notes"]["sample"] == 2
    assert (
        "2 of 2 documents" in captured.err
        and "0.3 % in the chart is 3,662 to 5,162" in captured.err
    )
    assert prepare.main([*command, "--out", str(tmp_path / "q"), "--split", "test"]) == 1
    assert capsys.readouterr().err.startswith("error: SLAKE: the folder contains none of test.json")
    for wrong in (["--source", "slake"], ["--sample", "x"], ["--split", "dev"]):
        with pytest.raises(SystemExit) as stopped:
            prepare.main([*command, "--out", str(out), *wrong])
        assert stopped.value.code == 2


def test_build_is_compared_with_the_mixture_table():
    comparisons = {n: mixture.compare("PMC-VQA", n) for n in (176_000, 176_948, 180_000)}
    assert comparisons[176_000].endswith(": 532 fewer (99.7% of the lower bound)")
    assert comparisons[176_948].endswith("within rounding") and "12.1 %" in comparisons[176_948]
    assert comparisons[180_000].endswith(": 788 more (100.4% of the upper bound)")
    assert "the notes state 92K" in mixture.compare("MIMIC-CXR", 92_000)


def test_mixture_table_is_complete():
    for described in mixture.SOURCES:
        low, high = described.expected
        assert low < described.instances < high and described.licence and described.weight == 1
        both = mixture.INTERLEAVED in described.tasks  # the notes count less of these two
        assert described.noted is None or both or low - 500 <= described.noted <= high + 500
    assert {s.name for s in mixture.SOURCES if s.data_class == "credentialed"} == {"MIMIC-CXR"}
    assert {s.data_class for s in mixture.SOURCES} == {"open", "licence-bound", "credentialed"}
    page = pathlib.Path(__file__).parents[2] / "docs" / "reference" / "data_sources.md"
    assert mixture.markdown() in page.read_text()
