"""Tests of the TFDS data set: the same documents through both readers, without TensorFlow."""

import dataclasses
import json
import stat
import subprocess
import sys

import numpy as np
import pytest

from medmax_jax.config import Vocab
from medmax_jax.data import prepare, tfds_builders
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Document, Layout, RecordsError
from medmax_jax.io import progress
from medmax_jax.models.vocab import BOI, BOS, EOI, EOS, SEP

LAYOUT = Layout(
    vocab=Vocab(size=65_536, image_codes=8_192, text_start=16_384),
    codes_per_image=4,
    tokenizer="",
    vqgan="",
)


def document(n, credential):
    tokens = [BOS, BOI, 4, 8_195, 5, 4, EOI, *[16_384] * (n % 7), SEP, 65_535 - n, EOS]
    return Document(
        tokens=np.asarray(tokens, np.int32),
        image_path=f"images/é {n}.png" if n % 2 else "",
        task="VQA",
        source="sample",
        credential=credential,
        turns=n % 2,
        group=f"g{n // 2}",
        id=f"d{n}",
        **(dict(pseudo=True, generator="b2" * 32, scores={"margin": n / 3}) if n % 3 else {}),
    )


def folder_of(path, count, credential="no"):
    docs = (document(n, credential) for n in range(count))
    writer.write(path, docs, shard_size=10, layout=LAYOUT, notes={"maker": "test"})
    return path


@pytest.fixture
def folders(tmp_path):
    return {s: folder_of(tmp_path / s, n) for s, n in (("train", 35), ("validation", 4))}


def same(a, b):
    names = [f.name for f in dataclasses.fields(a) if f.name != "tokens"]
    tokens = a.tokens.dtype == b.tokens.dtype and np.array_equal(a.tokens, b.tokens)
    return tokens and all(getattr(a, n) == getattr(b, n) for n in names)


# What a user of TFDS writes, in a process that has never seen the builder.
READER = """
import json, sys, warnings
warnings.simplefilter("error")
import tensorflow_datasets as tfds
target, data_dir, split = sys.argv[1:]
one = tfds.builder_from_directory(target).as_data_source(split=split)
from medmax_jax.data import tfds_builders
two = tfds.data_source("medmax_records/mine", data_dir=data_dir, split=split)
assert len(one) == len(two)
for a, b in zip(one, two):
    assert str(a["tokens"].dtype) == "int32" and (a["tokens"] == b["tokens"]).all()
part = tfds.builder_from_directory(target).as_data_source(split=split + "[:3]")
assert "tensorflow" not in sys.modules
print(json.dumps([len(part), [[a["id"].decode(), a["tokens"].tolist()] for a in one]]))
"""


def test_tfds_reads_the_same_documents(folders, tmp_path):
    target = tfds_builders.write(folders, tmp_path / "d", name="mine", say=lambda _: None)
    assert target == tmp_path / "d" / "medmax_records" / "mine" / "1.0.0"
    for split, folder in folders.items():
        command = [sys.executable, "-c", READER, str(target), str(tmp_path / "d"), split]
        root = prepare.TINY.parents[1]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        sliced, fields = json.loads(done.stdout.splitlines()[-1])
        expected = [[d.id, d.tokens.tolist()] for d in writer.open_records(folder)]
        assert fields == expected and sliced == 3


def test_every_field_is_restored(folders, tmp_path):
    target = tfds_builders.write(folders, tmp_path / "d", name="mine", say=lambda _: None)
    builder = tfds_builders.tfds.builder_from_directory(target)
    source, records = builder.as_data_source(split="train"), writer.open_records(folders["train"])
    for n in (0, 34, 7, 8):
        assert same(tfds_builders.document(source[n]), records[n])
    metadata = json.loads((target / "metadata.json").read_text())
    assert metadata["train"]["sha256"] == records.fingerprint
    assert metadata["validation"]["layout"] == records.meta["layout"]


def test_credentialed_documents_are_separate(folders, tmp_path):
    secret = folder_of(tmp_path / "secret", 3, "yes")
    mixed = folders | {"report": secret}
    with pytest.raises(
        RecordsError, match="must not be stored with others; create a separate data set"
    ):
        tfds_builders.write(mixed, tmp_path / "d", name="mine", say=print)
    assert not (tmp_path / "d").exists()
    target = tfds_builders.write({"train": secret}, tmp_path / "d", name="closed", say=print)
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in target.iterdir()} == {0o600}


def test_data_set_is_written_atomically(folders, tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    out = tmp_path / "d"
    leftover = out / "medmax_records" / "mine" / "incomplete.ABC_1.0.0"
    leftover.mkdir(parents=True)  # of a run that was killed
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(progress.ByteProgress, "__call__", lambda *_: stop(0))
        tfds_builders.write(folders, out, name="mine", say=print)
    assert list(leftover.parent.iterdir()) == []
    tfds_builders.write(folders, out, name="mine", say=print)
    with pytest.raises(RecordsError, match="exists; use another --name"):
        tfds_builders.write(folders, out, name="mine", say=print)


def test_program_and_refusals(folders, tmp_path, capsys):
    command = ["--from", f"train={folders['train']}", "--out", str(tmp_path / "d"), "--name"]
    assert tfds_builders.main([*command, "mine"]) == 0 and "tensorflow" not in sys.modules
    assert capsys.readouterr().out.strip().endswith("medmax_records/mine/1.0.0")
    for name, message in (
        ("mine", "exists"),
        ("../x", "not a valid name of a data set"),
        ("A", "not a valid name"),
    ):
        assert tfds_builders.main([*command, name]) == 1
        assert message in capsys.readouterr().err
    nowhere = ["--from", f"train={tmp_path / 'no'}", "--out", str(tmp_path / "e"), "--name", "x"]
    assert tfds_builders.main(nowhere) == 1 and "no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        tfds_builders.main(["--from", "train", "--out", "d", "--name", "x"])
    assert stopped.value.code == 2
