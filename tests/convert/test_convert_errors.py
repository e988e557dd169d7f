"""Checkpoints that must not be believed: each ends in one clear error and leaves nothing."""

import json
import os
import pathlib
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from convert_setup import (
    BASE,
    NUMPY,
    SWIN,
    read_pth,
    read_safetensors,
    shards,
    write_meta,
    write_pth,
)
from ml_dtypes import finfo
from safetensors.numpy import save_file
from test_convert import convert

from medmax_jax.checkpoints.torch_unpickler import PthError
from medmax_jax.convert import convert as conversion
from medmax_jax.convert import native
from medmax_jax.convert.__main__ import main
from medmax_jax.convert.state_dict import ConvertError, check_finite
from medmax_jax.storage.folder import Folder, StorageError

ROOT = pathlib.Path(__file__).parents[2]


def meta_of(folder: pathlib.Path, sizes=BASE, **more) -> pathlib.Path:
    options = dict(dtypes=("F32",), seed=0) | more
    return write_meta(folder, sizes, shards(sizes, **options), vqgan=False)


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("hf")
    return convert(meta_of(folder / "meta"), folder / "hf", "hf")


def change_meta(meta: pathlib.Path, change) -> None:
    """`change(state)` edits the state dict of the first file in place."""
    path = sorted(meta.glob("models/7b/*.pth"))[0]
    state = read_pth(path)
    change(state)
    write_pth(path, state, wrap=None)


def nan(state):
    state["layers.1.attention.wo.weight"][3, 5] = np.nan


def integer(state):
    state["norm.weight"] = state["norm.weight"].astype(np.int64)


def double(state):
    state["norm.weight"] = state["norm.weight"].astype(np.float64)


def missing(state):
    del state["layers.0.feed_forward.w3.weight"]


def extra(state):
    state["layers.0.attention.sinks"] = np.ones(3, np.float32)


def narrow(state):
    state["layers.1.feed_forward.w1.weight"] = state["layers.1.feed_forward.w1.weight"][:, :32]


@pytest.mark.parametrize(
    "change, message",
    [
        (nan, r"attention.wo.weight: 1 of 4096 values are NaN or infinite"),
        (integer, r"norm.weight: dtype I64 is not supported; weights must be F32, BF16, F16"),
        (double, r"norm.weight: dtype F64"),
        (missing, r"1 tensors are missing \['layers.0.feed_forward.w3.weight'\], 0 are unexpected"),
        (extra, r"0 tensors are missing \[\], 1 are unexpected \['layers.0.attention.sinks'\]"),
        (narrow, r"w1.weight: shape \(96, 32\), but the config .* requires \(96, 64\)"),
    ],
)
@pytest.mark.parametrize("layout", ["native", "hf"])
def test_wrong_weights_are_rejected(tmp_path, change, message, layout):
    meta = meta_of(tmp_path / "meta")
    change_meta(meta, change)
    with pytest.raises(ConvertError, match=message):
        convert(meta, tmp_path / "out", layout)
    assert sorted(p.name for p in tmp_path.iterdir() if "lock" not in p.name) == ["meta"]


def test_settings_of_another_size_are_rejected(tmp_path):
    meta = meta_of(tmp_path / "meta")
    path = meta / "models/7b/params.json"
    params = json.loads(path.read_text())
    params["model"]["n_layers"] = 3
    path.write_text(json.dumps(params))
    with pytest.raises(ConvertError, match="tensors are missing .*layers.2"):
        convert(meta, tmp_path / "out", "native")
    path.write_text('{"model": {"dim": 64}}')
    with pytest.raises(ConvertError, match="n_heads is missing; not the settings of a Chameleon"):
        convert(meta, tmp_path / "out", "native")


def test_shards_of_different_checkpoints_are_rejected(tmp_path):
    meta = meta_of(tmp_path / "meta", SWIN)
    second = meta / "models/7b/consolidated.01.pth"
    state = read_pth(second)
    state["layers.0.ffn_norm.weight"] += 1
    write_pth(second, state, wrap=None)
    with pytest.raises(ConvertError, match="ffn_norm.weight: differs from its copy"):
        convert(meta, tmp_path / "out", "native")
    second.unlink()
    with pytest.raises(ConvertError, match=r"consolidated.01.pth is missing; copy all shards"):
        convert(meta, tmp_path / "out", "native")
    (meta / "models/7b/consolidated.02.pth").rename(second)
    (meta / "models/7b/consolidated.03.pth").rename(meta / "models/7b/consolidated.02.pth")
    with pytest.raises(ConvertError, match="model_parallel_size 4, but there are 3"):
        convert(meta, tmp_path / "out", "native")


def test_truncated_pth_is_rejected(tmp_path):
    meta = meta_of(tmp_path / "meta")
    path = meta / "models/7b/consolidated.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(PthError, match="consolidated.pth"):
        convert(meta, tmp_path / "out", "native")


def copy_hf(hf: pathlib.Path, tmp_path: pathlib.Path, **config) -> pathlib.Path:
    """A copy in two shards with an index; `config` changes config.json."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in hf.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    arrays = read_safetensors(hf)
    names = sorted(arrays)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, held in parts.items():
        save_file({n: arrays[n] for n in held}, folder / file)
    places = {n: file for file, held in parts.items() for n in held}
    write_index(folder, places)
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def write_index(folder: pathlib.Path, places: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)


def test_an_index_is_read_and_checked(hf, tmp_path):
    folder = copy_hf(hf, tmp_path)
    convert(folder, tmp_path / "whole", "native")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file, message in (
        ("../hf/model.safetensors", "not a plain file name"),
        ("/etc/passwd", "not a plain file name"),
        ("c.safetensors", "c.safetensors is missing"),
        ("b.safetensors", "is in the file or in .*, not in both"),
    ):
        write_index(folder, index | {"lm_head.weight": "a.safetensors"} | {min(index): file})
        with pytest.raises(ConvertError, match=message):
            convert(folder, tmp_path / "out", "native")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ConvertError, match="2 safetensors files, but no"):
        convert(folder, tmp_path / "out", "native")


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(tie_word_embeddings=True), "tie_word_embeddings is True"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(rope_scaling={"type": "linear", "factor": 2}), "rope_scaling"),
        (dict(num_hidden_layers=3), "tensors are missing"),
        (dict(num_attention_heads=0), "num_attention_heads is 0; it must be above 0"),
        (dict(hidden_size="64"), "hidden_size is '64'; it must be an integer"),
        (dict(vocab_size=100), "text begins at"),
        (dict(intermediate_size=128), r"shape \(96, 64\)|shape \(64, 96\)"),
    ],
)
def test_configs_of_other_models_are_rejected(hf, tmp_path, config, message):
    folder = copy_hf(hf, tmp_path, **config)
    with pytest.raises(ConvertError, match=message):
        convert(folder, tmp_path / "out", "native")


def test_tied_head_and_per_head_gains_are_rejected(hf, tmp_path):
    folder = copy_hf(hf, tmp_path)
    arrays = read_safetensors(folder)
    for file in ("a.safetensors", "b.safetensors", "model.safetensors.index.json"):
        (folder / file).unlink()
    save_file({n: a for n, a in arrays.items() if n != "lm_head.weight"}, folder / "m.safetensors")
    with pytest.raises(ConvertError, match="lm_head.weight is missing.*tie_word"):
        convert(folder, tmp_path / "out", "native")
    # gains that a fine-tuning in HF made different from head to head
    arrays["model.layers.1.self_attn.q_norm.weight"][2] += 1
    save_file(arrays, folder / "m.safetensors")
    native_folder = convert(folder, tmp_path / "native", "native")
    assert conversion.read_checkpoint(native_folder).model.qk_norm_shards == 4  # a row a head
    swin = convert(meta_of(tmp_path / "swin", SWIN), tmp_path / "swin_hf", "hf")
    arrays = read_safetensors(swin)
    arrays["model.layers.1.self_attn.q_norm.weight"][1] += 1  # of two that share a key head
    save_file(arrays, swin / "model.safetensors")
    with pytest.raises(ConvertError, match="differ among heads that share a key head"):
        convert(swin, tmp_path / "out", "native")


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes) -> bytes:
    return json.dumps({"w": GOOD | changes}).encode()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"abc", "too short for a header"),
        (struct.pack("<Q", 1 << 60) + b"{}", "a header of 1152921504606846976 bytes"),
        (safetensors(b"{nonsense"), "not JSON"),
        (safetensors(b"[" * 100_000), "nested over 64 levels"),
        (safetensors(b"[1]"), "not a table"),
        (safetensors(entry(), b"\0" * 4), "end at byte"),
        (safetensors(entry(), b"\0" * 12), "end at byte"),
        (safetensors(entry(shape=[3]), b"\0" * 8), "cannot have 8 bytes"),
        (safetensors(entry(shape=[-2]), b"\0" * 8), "has shape"),
        (safetensors(entry(shape=[2.0]), b"\0" * 8), "has shape"),
        (safetensors(entry(shape=[1 << 62, 8]), b"\0" * 8), "has shape"),
        (safetensors(entry(shape=[1 << 40, 8]), b"\0" * 8), "cannot have 8 bytes"),
        (safetensors(entry(dtype="Q8"), b"\0" * 8), "unknown dtype 'Q8'"),
        (safetensors(entry(data_offsets=[4, 12]), b"\0" * 12), "begins at byte"),
        (safetensors(entry(data_offsets=[0, "8"]), b"\0" * 8), "no valid data_offsets"),
        (safetensors(b'{"w": 3}', b"\0" * 8), "no valid data_offsets"),
        (
            safetensors(json.dumps({"w": GOOD, "v": GOOD}).encode(), b"\0" * 8),
            "not at the end of the previous tensor",
        ),
        (safetensors(b'{"w": {}, "w": {}}', b"\0" * 8), "occurs twice"),
    ],
)
def test_invalid_safetensors_headers_are_rejected(hf, tmp_path, content, message):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "config.json").write_bytes((hf / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConvertError, match=message):
        conversion.read_checkpoint(folder)


def test_flipped_bit_in_a_native_base_is_detected(tmp_path):
    folder = convert(meta_of(tmp_path / "meta"), tmp_path / "native", "native")
    path = max((folder / "model.zarr").rglob("c/*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    with pytest.raises(StorageError, match="(?i)digest mismatch|checksum"):
        convert(folder, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    path.unlink()
    with pytest.raises(StorageError, match="missing"):  # and is no block of zeros
        convert(folder, tmp_path / "out", "hf")


def test_missing_and_existing_paths_are_reported(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "is empty or does not exist; it must be a folder of Meta" in capsys.readouterr().err
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("hello")
    assert main(["inspect", str(tmp_path / "x")]) == 1
    assert "contains notes.txt" in capsys.readouterr().err
    meta = meta_of(tmp_path / "meta")
    arguments = ["--from", str(meta), "--to", str(tmp_path / "x"), "--format", "native"]
    assert main(arguments) == 1
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["notes.txt"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments[:4], "--format", "gguf"])
    assert stopped.value.code == 2


def test_killed_conversion_leaves_nothing_readable(tmp_path):
    meta = meta_of(tmp_path / "meta")
    target = tmp_path / "native"
    command = [sys.executable, "-m", "medmax_jax.convert", "--from", str(meta), "--to", str(target)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.Popen([*command, "--format", "native"], cwd=ROOT, env=environment)
    while run.poll() is None and not (tmp_path / "native.partial").exists():
        time.sleep(0.002)
    run.kill()
    assert run.wait() != 0 and not target.exists()
    done = subprocess.run([*command, "--format", "native"], cwd=ROOT, env=environment)
    assert done.returncode == 0 and conversion.read_checkpoint(target).language
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == [
        "meta", "native",
    ]  # fmt: skip


def test_config_with_wrong_dtypes_is_rejected(tmp_path):
    folder = convert(meta_of(tmp_path / "meta"), tmp_path / "native", "native")
    config = json.loads((folder / "config.json").read_text())
    config["weights"]["dtypes"] = {"lm_head.weight": "I8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match="weights.dtypes.lm_head.weight is 'I8'"):
        native.read_checkpoint(Folder(folder))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_single_non_finite_value_is_found_anywhere(dtype, value):
    largest = float(finfo(NUMPY[dtype]).max)
    for place in (0, 300_000, 599_999):
        array = np.full(600_000, largest).astype(NUMPY[dtype])
        assert check_finite(array, "w") is array
        array[place] = value
        with pytest.raises(ConvertError, match="w: 1 of 600000 values"):
            check_finite(array.reshape(600, 1000).T, "w")
