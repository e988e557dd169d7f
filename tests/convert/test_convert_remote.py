"""Conversions from and to gs://, on a real fake-gcs-server; servers that are gone or silent."""

import time

import jax
import micro_run
import numpy as np
import pytest
from convert_setup import BASE, assert_equal, read_pth, read_safetensors, shards, write_meta
from gs_server import fake_gcs, free_port, silent, use_server
from test_convert import convert

from medmax_jax import train
from medmax_jax.checkpoints import export
from medmax_jax.config import Mesh
from medmax_jax.convert import convert as conversion
from medmax_jax.convert import inspect_checkpoint
from medmax_jax.models import chameleon
from medmax_jax.sharding import make_mesh
from medmax_jax.storage.folder import Folder, StorageError


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with fake_gcs(tmp_path_factory.mktemp("gcs")) as url:
        yield url


@pytest.fixture
def bucket(server, tmp_path, monkeypatch) -> str:
    use_server(monkeypatch, server)
    return f"gs://bucket/{tmp_path.name}"


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    return write_meta(folder / "m", BASE, shards(BASE, dtypes=("F32", "BF16"), seed=0), vqgan=True)


def copy_up(local, remote: str) -> None:
    for path in local.rglob("*"):
        if path.is_file():
            Folder(remote).write(str(path.relative_to(local)), [path.read_bytes()])


def test_every_layout_is_read_from_a_bucket(bucket, meta, tmp_path):
    copy_up(meta, f"{bucket}/meta")
    run = lambda a, b, layout: convert(f"{bucket}/{a}", f"{bucket}/{b}", layout)  # noqa: E731
    run("meta", "native", "native")
    run("native", "hf", "hf")
    run("hf", "again", "native")
    output = [
        inspect_checkpoint.describe(conversion.read_checkpoint(f"{bucket}/{p}"))
        for p in ("meta", "native", "hf", "again")
    ]
    assert len({s["fingerprint"] for s in output}) == 1
    assert {s["vqgan"] for s in output} == {"encoder and decoder"}
    back = convert(f"{bucket}/again", tmp_path / "back", "meta")
    assert_equal(
        read_pth(back / "models/model/consolidated.pth"),
        {k: v for k, v in read_pth(meta / "models/7b/consolidated.pth").items() if "rope" not in k},
    )
    run("native", "out", "meta")
    there = Folder(f"{bucket}/out").read("models/model/consolidated.pth").tobytes()
    assert there == (back / "models/model/consolidated.pth").read_bytes()
    with pytest.raises(StorageError, match="not empty"):
        run("native", "hf", "hf")


def test_a_base_is_loaded_from_a_bucket_onto_a_mesh(bucket, meta, tmp_path):
    there = f"{bucket}/native"
    convert(meta, there, "native")
    here = convert(meta, tmp_path / "native", "native")
    found = conversion.read_checkpoint(here)
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=2, tp=4))):
        like = chameleon.abstract_model(found.model, found.vocab, chameleon.NO_LORA)
        one, two = (jax.tree.leaves(export.load(p, like)) for p in (there, here))
    assert export.base_fingerprint(there) == export.base_fingerprint(here)
    for a, b in zip(one, two, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_interrupted_upload_is_not_a_checkpoint(bucket, meta, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("medmax_jax.convert.native._write_vqgan", broken)
    with pytest.raises(KeyboardInterrupt):
        convert(meta, f"{bucket}/native", "native")
    assert Folder(f"{bucket}/native").names() == []


@pytest.mark.parametrize("where", ["gone", "silent"])
def test_unresponsive_storage_server_is_an_error_in_bounded_time(monkeypatch, where):
    monkeypatch.setenv("MEDMAX_STORAGE_TIMEOUT", "1")
    with silent() as url:
        use_server(monkeypatch, url if where == "silent" else f"http://127.0.0.1:{free_port()}")
        start = time.monotonic()
        with pytest.raises(StorageError, match="gs://bucket/x"):
            conversion.read_checkpoint("gs://bucket/x")
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_lora_trains_on_a_base_in_a_bucket(bucket, tmp_path):
    data = dict(data__train=micro_run.write(tmp_path / "records"))
    whole = micro_run.run(**data, train__trains="full", lora__rank=0, train__steps=1)
    train.run(whole, tmp_path / "whole")
    there, here = f"{bucket}/base", tmp_path / "base"
    for target in (there, here):
        convert(tmp_path / "whole" / "model", target, "native")
    adapters = []
    for name, base in (("a", there), ("b", str(here))):
        tuned = micro_run.run(**data, train__init_from=base, train__steps=2)
        train.run(tuned, tmp_path / name)
        adapters.append(read_safetensors(tmp_path / name / "adapter"))
    assert_equal(*adapters)
    merged = convert(tmp_path / "a", tmp_path / "merged", "hf", base=there)
    assert conversion.read_checkpoint(merged).language
