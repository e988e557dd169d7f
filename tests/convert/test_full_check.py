"""The ten checks of published weights, rehearsed on the tiny model in the published layouts."""

import copy
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from convert_setup import BASE, TINY, shards, write_meta
from hub_server import SHA, Hub, serving

from medmax_jax.checkpoints.safetensors_file import dotted_name
from medmax_jax.convert import check, convert, full_check, hf, meta, model_card
from medmax_jax.convert.__main__ import main
from medmax_jax.convert.state_dict import Checkpoint
from medmax_jax.models import vqgan
from medmax_jax.storage.folder import Folder, StorageError

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = convert.read_checkpoint(TINY)
HERE = ("checksums", "tensors", "values", "tokenizer", "conversion", "codes", "psnr")  # no process


def checklist(folder: pathlib.Path, names: list[str]) -> None:
    """A checklist.chk as published: MD5, two spaces, name."""
    lines = [f"{hashlib.md5((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "checklist.chk").write_text("".join(lines))


@pytest.fixture(scope="module", name="anole")
def fixture_anole(tmp_path_factory) -> pathlib.Path:
    """The tiny model in the files of GAIR/Anole-7b-v0.1."""
    folder = tmp_path_factory.mktemp("anole")
    meta.write(Folder(folder), SOURCE, progress=lambda _: None)
    (folder / "models" / "model").rename(folder / "models" / "7b")
    names = ["consolidated.pth", "params.json", "consolidate_params.json"]
    checklist(folder / "models" / "7b", names)
    checklist(folder / "tokenizer", ["text_tokenizer.json", "vqgan.ckpt", "vqgan.yaml"])
    return folder


@pytest.fixture(scope="module", name="medmax_hf")
def fixture_medmax_hf(tmp_path_factory) -> pathlib.Path:
    """The tiny model in the files of mint-medmax/medmax_7b_hf: shards, an index, no decoder."""
    folder = tmp_path_factory.mktemp("medmax_hf")
    hf.write(Folder(folder), SOURCE, shard_bytes=5_000_000, decoder=False, progress=lambda _: None)
    assert len(list(folder.glob("model-*-of-00004.safetensors"))) == 4
    return folder


@pytest.fixture(scope="module", name="rehearsed")
def fixture_rehearsed(anole, tmp_path_factory) -> full_check.Subject:
    """After all checks that start no process, with its results; codes were not supplied."""
    done = subject(anole, tmp_path_factory.mktemp("results"))
    assert full_check.run(done, HERE) == 0
    return done


def subject(path, out, **options) -> full_check.Subject:
    """The full_check on a stand-in, whose published facts are those of the tiny model."""
    published = full_check.Published(
        md5={}, models=("unknown size",), vocab_size=SOURCE.vocab.size, vq=SOURCE.vq, min_psnr=18.0,
        question="The capital of France is", answer="MRI",
    )  # fmt: skip
    return full_check.Subject(str(path), out, published=published, say=lambda _: None, **options)


def again(done: full_check.Subject, out, **changes) -> full_check.Subject:
    """The same with what it has read and computed, except for these attributes."""
    other = copy.copy(done)
    for name, value in (changes | {"out": out}).items():
        setattr(other, name, value)
    return other


def rows(out) -> dict[str, dict]:
    content = json.loads((out / full_check.RESULTS).read_text())
    found = {row["name"]: row for row in content["checks"]}
    results = [row["result"] for row in found.values()]
    assert content["counts"] == {r: results.count(r) for r in content["counts"]}
    return found


def copied(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(folder, tmp_path / "copy")


def failures(path, tmp_path, names) -> dict[str, str]:
    """What each failed check measured; the exit code agrees."""
    out = tmp_path / "out"
    status = full_check.run(subject(path, out), names)
    failed = {n: r["measured"] for n, r in rows(out).items() if r["result"] == full_check.FAILED}
    assert status == bool(failed)
    return failed


def test_ten_checks_in_the_order_of_the_page():
    assert len(full_check.CHECKS) == 10 and set(HERE) < set(full_check.CHECKS)


def test_stand_in_passes_and_the_page_says_what_to_attach(anole, rehearsed):
    found = rows(rehearsed.out)
    assert {n: r["result"] for n, r in found.items()} == dict.fromkeys(HERE, full_check.PASSED) | {
        "codes": full_check.NOT_RUN
    }
    assert found["checksums"]["measured"] == "6 files, 0 differ"
    assert found["conversion"]["measured"] == "236 of 236 tensors equal in dtype and bits"
    assert found["psnr"]["measured"].startswith("19.8 dB")
    for row in found.values():
        assert row["seconds"] >= 0 and 0.05 < row["peak_gb"] < 24 and row["limit"] is not None
        assert f"--only {row['name']} --out" in row["command"]
    page = (rehearsed.out / full_check.PAGE).read_text()
    assert "6 passed, 0 failed, 1 not run" in page and full_check.ISSUES in page
    assert page.count("<figure>") == 6
    with pytest.raises(StorageError, match="results of .*; use another --out"):
        full_check.run(subject(anole / "models" / "7b", rehearsed.out), ["tensors"])


def test_recorded_codes_equal_or_swapped(rehearsed, tmp_path):
    recorded = rehearsed.out / full_check.CODES
    shutil.copy(rehearsed.out / full_check.RESULTS, tmp_path)
    done = again(rehearsed, tmp_path, codes=str(recorded))
    assert full_check.run(done, ["codes"]) == 0
    found = rows(tmp_path)
    assert found["codes"]["result"] == full_check.PASSED and list(found) == list(HERE)
    assert f"--codes {recorded}" in found["codes"]["command"]
    content = json.loads(recorded.read_text())
    a, b, _ = content["images"]
    content["images"] |= {a: content["images"][b], b: content["images"][a]}
    done.codes = str(tmp_path / "swapped.json")
    pathlib.Path(done.codes).write_text(json.dumps(content))
    assert full_check.run(done, ["codes"]) == 1
    assert rows(tmp_path)["codes"]["result"] == full_check.FAILED
    pathlib.Path(done.codes).write_text(json.dumps({"tool": "x", "images": {a: [1, 2]}}))
    assert full_check.run(done, ["codes"]) == 1
    assert f'images."{a}" must be 64 integers' in rows(tmp_path)["codes"]["measured"]
    done.codes = str(tmp_path / "none.json")
    assert full_check.run(done, ["codes"]) == 1
    assert "none.json" in rows(tmp_path)["codes"]["measured"]


def test_released_facts_reject_a_stand_in(rehearsed, tmp_path):
    real = again(rehearsed, tmp_path, published=full_check.RELEASED)
    assert full_check.run(real, ["checksums", "tensors"]) == 1
    wrong = rows(tmp_path)["tensors"]["details"]
    assert any("sizes of no published model" in line for line in wrong)
    assert any("published 65536" in line for line in wrong)
    assert full_check.RELEASED.vq == vqgan.RELEASED and full_check.RELEASED.md5 == check.PUBLISHED


# ---- Damage to the files, each found by the check that is for it ----


def test_one_flipped_byte_of_a_shard(anole, tmp_path):
    path = copied(anole, tmp_path) / "models/7b/consolidated.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    failed = failures(tmp_path / "copy", tmp_path, ["checksums"])
    assert failed == {"checksums": "6 files, 1 differ"}
    assert "consolidated.pth: md5 " in rows(tmp_path / "out")["checksums"]["details"][0]
    path.unlink()
    assert failures(tmp_path / "copy", tmp_path, ["checksums"])
    assert "md5 of no file" in rows(tmp_path / "out")["checksums"]["details"][0]


def test_missing_tensor_of_an_index(medmax_hf, tmp_path):
    path = copied(medmax_hf, tmp_path) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    path.write_text(json.dumps(index))
    failed = failures(tmp_path / "copy", tmp_path, ["checksums", "tensors", "psnr"])
    assert list(failed) == ["tensors"] and "model.layers.1.mlp.up_proj.weight" in failed["tensors"]
    others = {n: r for n, r in rows(tmp_path / "out").items() if n != "tensors"}
    assert {r["result"] for r in others.values()} == {full_check.NOT_RUN}
    assert "see the check `tensors`" in others["psnr"]["measured"]
    assert "no published digest" in others["checksums"]["measured"]


def test_index_of_another_checkpoint(medmax_hf, tmp_path):
    path = copied(medmax_hf, tmp_path) / "model.safetensors.index.json"
    folder = Folder(path.parent)
    assert full_check.index_problems(folder) == []
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 4
    path.write_text(json.dumps(index))
    assert "but the index states" in full_check.index_problems(folder)[0]


def test_tokenizer_of_another_model(anole, tmp_path):
    path = copied(anole, tmp_path) / "tokenizer/text_tokenizer.json"
    spec = json.loads(path.read_text())
    names = spec["model"]["vocab"]
    names["<eoss>"], names["<racm3:break>"] = names["<racm3:break>"], names["<eoss>"]
    path.write_text(json.dumps(spec))
    failed = failures(tmp_path / "copy", tmp_path, ["checksums", "tokenizer"])
    assert set(failed) == {"checksums", "tokenizer"}
    assert "<eoss> has id 8197" in failed["tokenizer"]


# ---- Damage to what was read ----


def changed(source: Checkpoint, name: str, change) -> Checkpoint:
    """The checkpoint with one tensor changed in place by `change`."""
    tensor = source.language[name]
    array = tensor.read().copy()
    change(array)
    block = lambda rows, columns: array[rows, columns] if array.ndim > 1 else array[rows]  # noqa: E731
    language = source.language | {name: dataclasses.replace(tensor, block=block)}
    return dataclasses.replace(source, language=language)


def test_values_that_cannot_be(rehearsed, tmp_path):
    codes = slice(4, 4 + SOURCE.vocab.image_codes)
    zero = changed(rehearsed.source, "lm_head.weight", lambda a: a[codes].fill(0))
    assert full_check.run(again(rehearsed, tmp_path, source=zero), ["values"]) == 1
    assert "image rows of the head: std 0.0" in rows(tmp_path)["values"]["measured"]
    nan = changed(rehearsed.source, "lm_head.weight", lambda a: a[3].fill(np.nan))
    assert full_check.run(again(rehearsed, tmp_path, source=nan), ["values"]) == 1
    assert "output.weight: 128 of" in rows(tmp_path)["values"]["measured"]


def test_conversion_compares_every_bit(rehearsed, tmp_path):
    name = "model.layers.2.mlp.gate_proj.weight"

    def change(array):  # not in the blocks of the fingerprint
        array[200, 50] = np.nextafter(array[200, 50], 1, dtype=np.float32)

    other = changed(rehearsed.native, name, change)
    assert other.fingerprint == rehearsed.source.fingerprint
    assert full_check.run(again(rehearsed, tmp_path, native=other), ["conversion"]) == 1
    row = rows(tmp_path)["conversion"]
    assert row["measured"] == "235 of 236 tensors equal in dtype and bits"
    assert row["details"] == [name]


def test_decoder_of_another_vqgan(rehearsed, tmp_path):
    def negated(path, leaf):
        return -leaf if dotted_name(path) == "decoder.conv_out.kernel" else leaf

    other = jax.tree_util.tree_map_with_path(negated, rehearsed.network)
    assert full_check.run(again(rehearsed, tmp_path, network=other), ["psnr"]) == 1


# ---- What cannot run ----


def test_what_cannot_run_says_why(rehearsed, tmp_path, monkeypatch):
    monkeypatch.setattr(full_check, "MEMORY_FACTOR", 1e9)
    native = again(rehearsed, tmp_path, source=SOURCE)
    assert full_check.run(native, ["conversion", "torch", "answer"]) == 0
    reasons = {name: row["measured"] for name, row in rows(tmp_path).items()}
    assert {row["result"] for row in rows(tmp_path).values()} == {full_check.NOT_RUN}
    assert "this project's layout already" in reasons["conversion"]
    assert "set --torch_python" in reasons["torch"]
    assert "GB of memory, but" in reasons["answer"]


def test_wrong_usage_of_the_flags(capsys):
    for words in (["--full"], ["--out", "d"], ["--only", "psnr"], ["--full", "--only", "x"]):
        with pytest.raises(SystemExit) as end:
            main(["check", "p", *words])
        assert end.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_program_from_the_hub(medmax_hf, tmp_path):
    files = {p.name: p.read_bytes() for p in medmax_hf.iterdir()}
    command = [sys.executable, "-m", "medmax_jax.convert", "check", "hf://mint-medmax/medmax_7b_hf"]
    command += ["--full", "--out", str(tmp_path / "out")]
    command += [f"--only={name}" for name in ("checksums", "tensors", "psnr", "image")]
    with serving(Hub({"mint-medmax/medmax_7b_hf": files})) as url:
        own = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hub"), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 1, done.stderr  # the stand-in has no published size
    found = rows(tmp_path / "out")
    assert found["checksums"]["result"] == full_check.PASSED
    assert found["checksums"]["measured"] == f"{len(files)} files, 0 differ"
    assert found["tensors"]["result"] == full_check.FAILED
    for name in ("psnr", "image"):
        assert found[name]["result"] == full_check.NOT_RUN
        assert "no VQGAN decoder" in found[name]["measured"]
    pinned = f"hf://mint-medmax/medmax_7b_hf@{SHA}"
    assert f"weights: {pinned}" in done.stdout and "MB" not in done.stderr.split("\n")[0]
    assert json.loads((tmp_path / "out" / full_check.RESULTS).read_text())["weights"] == pinned
    blob = next(p for p in (tmp_path / "hub").rglob("model-00002*")).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    damaged = [d for d in check.digests(str(next((tmp_path / "hub").rglob(SHA))), {})
               if d.found != d.published]  # fmt: skip
    assert [d.name for d in damaged] == ["model-00002-of-00004.safetensors"]


def test_model_card_names_the_commit_but_no_local_path():
    snapshot = f"/cache/models--GAIR--Anole-7b-v0.1/snapshots/{SHA}"
    for path, named in ((snapshot, True), ("/cache/anole", False)):
        source = dataclasses.replace(SOURCE, path=path)
        card = model_card.render_model_card("m", source, None, "", {})
        assert (f"layout of `hf://GAIR/Anole-7b-v0.1@{SHA}`." in card) is named
        assert "/cache" not in card


@pytest.mark.slow
def test_all_ten_by_the_program_on_the_tiny_model(anole, tmp_path):
    status = full_check.run(subject(anole, tmp_path))
    found = rows(tmp_path)
    assert status == 0 and list(found) == list(full_check.CHECKS), found
    not_run = {n for n, r in found.items() if r["result"] == full_check.NOT_RUN}
    assert not_run == {"codes", "torch"}
    assert "MRI" in found["answer"]["measured"]
    assert (tmp_path / "images" / "generated.png").exists()
    (tmp_path / "native" / "model.zarr" / "norm.scale" / "zarr.json").unlink()
    assert full_check.run(subject(anole, tmp_path), ["answer"]) == 1
    assert rows(tmp_path)["answer"]["result"] == full_check.FAILED


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("MEDMAX_TORCH_PYTHON"), reason="MEDMAX_TORCH_PYTHON names no Python"
)
def test_against_torch(tmp_path):
    """A random model: the VQGAN of the tiny one has other norm groups than torch's."""
    random = write_meta(tmp_path / "m", BASE, shards(BASE, dtypes=("F32",), seed=0), vqgan=True)
    python = os.environ["MEDMAX_TORCH_PYTHON"]
    assert full_check.run(subject(random, tmp_path, torch_python=python), ["torch"]) == 0
    row = rows(tmp_path)["torch"]
    assert row["result"] == full_check.PASSED and "100.00% equal" in row["measured"]
    assert f"--torch_python {python}" in row["command"]
