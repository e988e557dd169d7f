"""Checkpoints that other programs wrote: torch files, one-row gains, ungathered weights, bounds."""

import json
import os
import pathlib
import shutil
import time

import numpy as np
import pytest
import yaml
from convert_setup import (
    BASE,
    SWIN,
    assert_equal,
    read_pth,
    read_safetensors,
    shards,
    write_meta,
    write_pth,
)
from safetensors.numpy import save_file
from test_convert import convert

from medmax_jax.convert import convert as conversion
from medmax_jax.convert import safetensors_stream
from medmax_jax.convert.state_dict import ConvertError
from medmax_jax.io.settings_files import parse_yaml
from medmax_jax.io.text_files import TextFileError
from medmax_jax.storage.folder import Folder

SECONDS = 5.0  # of this process for one error, which takes milliseconds


@pytest.fixture(scope="module")
def meta(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("meta")
    return write_meta(folder / "m", BASE, shards(BASE, dtypes=("F32",), seed=0), vqgan=True)


@pytest.fixture(scope="module")
def hf(meta) -> pathlib.Path:
    return convert(meta, meta.parent / "hf", "hf")


@pytest.fixture
def copy(hf, tmp_path) -> pathlib.Path:
    """An HF folder to change."""
    return pathlib.Path(shutil.copytree(hf, tmp_path / "copy"))


def edit_config(folder: pathlib.Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_torch_files_of_hugging_face_are_read(hf, copy, tmp_path):
    arrays = read_safetensors(copy)
    (copy / "model.safetensors").unlink()
    write_pth(copy / "pytorch_model.bin", arrays, wrap=None)
    (copy / "training_args.bin").write_bytes(b"not read")
    whole = convert(copy, tmp_path / "whole", "native")
    (copy / "pytorch_model.bin").unlink()
    names, places = sorted(arrays), {}
    for number, part in enumerate((names[:20], names[20:]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        write_pth(copy / file, {name: arrays[name] for name in part}, wrap=None)
        places |= dict.fromkeys(part, file)
    index = copy / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    parts = convert(copy, tmp_path / "parts", "native")
    wanted = convert(hf, tmp_path / "wanted", "hf")
    for native in (whole, parts):
        back = convert(native, tmp_path / f"{native.name}_hf", "hf")
        assert_equal(read_safetensors(back), read_safetensors(wanted))
    index.write_text(json.dumps({"weight_map": places | {names[0]: "../x.bin"}}))
    with pytest.raises(ConvertError, match="not a plain file name"):
        conversion.read_checkpoint(copy)
    index.unlink()
    with pytest.raises(ConvertError, match="0 safetensors files.*and no pytorch_model.bin"):
        conversion.read_checkpoint(copy)


def one_row(folder: pathlib.Path) -> dict[str, np.ndarray]:
    arrays = read_safetensors(folder)
    arrays = {n: a[0] if "q_norm" in n or "k_norm" in n else a for n, a in arrays.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return arrays


def test_single_row_of_gains_applies_to_every_head(hf, copy, tmp_path):
    one_row(copy)
    for config in ({}, {"model_parallel_size": None}):
        edit_config(copy, **config)
        found, wanted = conversion.read_checkpoint(copy), conversion.read_checkpoint(hf)
        assert found.fingerprint == wanted.fingerprint and found.model == wanted.model
    native = convert(copy, tmp_path / "native", "native")
    back = convert(native, tmp_path / "back", "hf")
    assert_equal(read_safetensors(back), read_safetensors(hf))


def test_single_row_of_gains_for_several_shards_is_rejected(tmp_path):
    swin = write_meta(tmp_path / "m", SWIN, shards(SWIN, dtypes=("F32",), seed=0), vqgan=False)
    folder = convert(swin, tmp_path / "hf", "hf")
    one_row(folder)
    with pytest.raises(ConvertError, match="one row of gains, but the model has 4 model-parallel"):
        conversion.read_checkpoint(folder)


@pytest.mark.parametrize("zero", ["some", "all", "none there"])
def test_ungathered_weights_are_explained(meta, copy, tmp_path, zero):
    def emptied(arrays):
        if zero == "none there":
            return {}
        return {n: a[:0] if zero == "all" or "up_proj" in n or "w3" in n else a
                for n, a in arrays.items()}  # fmt: skip

    arrays = emptied(read_safetensors(copy))
    save_file(arrays, copy / "model.safetensors")
    with pytest.raises(ConvertError, match="without gathering the weights. Gather them"):
        conversion.read_checkpoint(copy)
    (copy / "model.safetensors").unlink()
    write_pth(copy / "pytorch_model.bin", arrays, wrap=None)
    with pytest.raises(ConvertError, match="without gathering the weights. Gather them"):
        conversion.read_checkpoint(copy)
    other = pathlib.Path(shutil.copytree(meta, tmp_path / "meta"))
    path = other / "models/7b/consolidated.pth"
    write_pth(path, emptied(read_pth(path)), wrap=None)
    with pytest.raises(ConvertError, match="without gathering the weights. Gather them"):
        conversion.read_checkpoint(other)


HUGE = 10**9
VQ_CASES = [
    (dict(num_res_blocks=HUGE), "num_res_blocks is 1000000000; it must be in 1..8"),
    (dict(num_res_blocks=8), r"block.1.conv1 is missing \(14 of 16 blocks"),
    (dict(channel_multiplier=[1] * 10_000), "has 10000 entries; it must have 1 to 8"),
    (dict(channel_multiplier=[]), "has 0 entries"),
    (dict(channel_multiplier=[1, HUGE]), "channel_mult is 1000000000"),
    (dict(channel_multiplier=5), "channel_mult is 5"),
    (dict(attn_resolutions=5), "attention at 5; it must be a list"),
    (dict(attn_resolutions=[[1]]), "attention at .*; it must be a list"),
    (dict(attn_resolutions={"a": 1}), "attention at .*; it must be a list"),
    (dict(resolution=HUGE), "image_size is 1000000000"),
    (dict(resolution=33), "image_size is 33; it must be a multiple of 2"),
    (dict(base_channels=10**4000), "an integer beyond 64 bits"),
    (dict(norm_groups=0), "norm_groups is 0; it must be above 0"),
    (dict(norm_groups=7), "a multiple of vq.norm_groups = 7"),
    (dict(num_embeddings=-1), "num_codes is -1"),
    (dict(embed_dim=None), "embed_dim is None"),
    (dict(latent_channels=True), "z_channels is True"),
]
HF_CASES = [
    (dict(num_hidden_layers=HUGE), "num_hidden_layers is 1000000000; it must be in 1..1024"),
    (dict(num_hidden_layers=10**6), "num_hidden_layers is 1000000; it must be in 1..1024"),
    (dict(num_hidden_layers=1000), "asks for 1000 layers, but the weights have 29 tensors"),
    (dict(num_hidden_layers=0), "num_hidden_layers is 0; it must be above 0"),
    (dict(num_hidden_layers=True), "num_hidden_layers is True; it must be an integer"),
    (dict(hidden_size=HUGE), "hidden_size is 1000000000"),
    (dict(hidden_size=10**4000), "an integer beyond 64 bits"),
    (dict(num_attention_heads=3), "are not divisible"),
    (dict(num_key_value_heads=3), "are not divisible"),
    (dict(intermediate_size=-1), "intermediate_size is -1; it must be above 0"),
    (dict(max_position_embeddings=[4096]), "max_position_embeddings is"),
    (dict(rms_norm_eps=float("nan")), "config.json: .*(NaN|nan)"),
    (dict(rope_theta=float("inf")), "config.json: .*(Infinity|inf)"),
    (dict(rope_theta=0), "rope_theta is 0"),
    (dict(rope_parameters=[1]), "rope_parameters is .*must be a table"),
    (dict(rope_parameters={"rope_type": ["x"]}), "rope_type .*not supported"),
    (dict(model_parallel_size=HUGE), "model_parallel_size is 1000000000"),
    (dict(swin_norm="yes"), "swin_norm is 'yes'; it must be true or false"),
    (dict(vocab_size=HUGE), "size is 1000000000; it must be in 1..4194304"),
    (dict(vocab_size=[1]), r"\[1\] ids"),
    (dict(vocabulary_map=[1]), "vocabulary_map is .*must be a table"),
    (dict(vq_config=[1]), "vq_config is .*must be a table"),
    (dict(hidden_act=["\x1b[2J\n" * 1000]), "hidden_act is"),
    (dict(model_type="chameleon\x1b[2J"), "block.0.conv1 is missing"),
]


def refused(path: pathlib.Path, message: str) -> None:
    """Reading ends in one printable line with `message`, soon."""
    begin = time.process_time()
    with pytest.raises(conversion.ERRORS, match=message) as caught:
        conversion.read_checkpoint(path)
    assert time.process_time() - begin < SECONDS
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 1_000


@pytest.mark.parametrize("changes, message", HF_CASES)
def test_numbers_of_an_hf_config_are_bounded(copy, changes, message):
    edit_config(copy, **changes)
    refused(copy, message)


@pytest.mark.parametrize("changes, message", VQ_CASES)
def test_numbers_of_a_vq_config_are_bounded(copy, changes, message):
    config = json.loads((copy / "config.json").read_text())["vq_config"]
    edit_config(copy, vq_config=config | changes)
    refused(copy, message)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_layers=HUGE), "n_layers is 1000000000; it must be in 1..1024"),
        (dict(n_layers=1000), "asks for 1000 layers, but the weights have 29 tensors"),
        (dict(dim=10**300), "an integer beyond 64 bits"),
        (dict(n_heads=HUGE), "n_heads is 1000000000"),
        (dict(n_kv_heads="4"), "n_kv_heads is '4'"),
        (dict(multiple_of=0), "multiple_of is 0"),
        (dict(ffn_dim_multiplier=1e308), "ffn_dim_multiplier is 1e[+]308"),
        (dict(ffn_dim_multiplier=-1), "ffn_dim_multiplier is -1"),
        (dict(ffn_dim_multiplier=[1]), "ffn_dim_multiplier is"),
        (dict(norm_eps="small"), "norm_eps is 'small'"),
        (dict(vocab_size=HUGE), "size is 1000000000"),
        (dict(context_length=-4), "context_length is -4"),
        (dict(qk_normalization=False), "qk_normalization is false"),
    ],
)
def test_numbers_of_params_json_are_bounded(meta, tmp_path, changes, message):
    folder = pathlib.Path(shutil.copytree(meta, tmp_path / "meta"))
    path = folder / "models/7b/params.json"
    params = json.loads(path.read_text())
    path.write_text(json.dumps({"model": params["model"] | changes}))
    refused(folder, message)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: &x [1]\nb: *x", "has an anchor or alias"),
        ("a: *x", "has an anchor or alias|undefined alias"),
        ("[" * 5_000, "nested more than 32 levels"),
        ("a: [" + "1, " * 15_000 + "]", "more than 10,000 values"),
        ("a: !!python/object/apply:os.system [ls]", "has the tag"),
        ("a: !!int x", "has the tag"),
        ("a: 1\na: 2", "key 'a' occurs twice"),
        ("a: .nan", "contains nan, which is not a finite number"),
        ("a: [-.inf]", "contains -inf"),
        ("a: 2001-01-01", "contains a date"),
        ("a: 2001-99-99", "not YAML"),
        ("a: 0x_", "not YAML"),
        ("a: " + "9" * 5_000, "not YAML"),
        ("1: a", "key '1' is not text"),
        ("? [a]\n: b", "not YAML"),
        ("a: [1", "not YAML"),
        ("a: \x1b", "not YAML"),
        (b"a: \xff", "not UTF-8"),
        ("x" * 70_000, "more than 65,536 bytes"),
    ],
)
def test_yaml_is_read_within_bounds(text, message):
    with pytest.raises(TextFileError, match=f"a.yaml: .*({message})") as caught:
        parse_yaml(text, "a.yaml")
    assert str(caught.value).isprintable()


def test_json_compatible_yaml_is_read_as_by_pyyaml():
    text = "model:\n  params: {a: 1, b: [1, 2.5, true, null, x], c: {d: '1'}}\n"
    assert parse_yaml(text.encode(), "a.yaml") == yaml.safe_load(text)
    assert parse_yaml(b"\xef\xbb\xbfa: 1", "a.yaml") == {"a": 1}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_res_blocks=HUGE), "num_res_blocks is 1000000000"),
        (dict(num_res_blocks=8), r"block.1.conv1 is missing \(14 of 16 blocks"),
        (dict(ch_mult=[1] * 9), "channel_mult has 9 entries"),
        (dict(attn_resolutions=5), "attention at 5"),
        (dict(resolution=1.5), "image_size is 1.5"),
        (dict(double_z=True), "double latents are True"),
    ],
)
def test_numbers_of_vqgan_yaml_are_bounded(meta, tmp_path, changes, message):
    folder = pathlib.Path(shutil.copytree(meta, tmp_path / "meta"))
    path = folder / "tokenizer" / "vqgan.yaml"
    content = yaml.safe_load(path.read_text())
    content["model"]["params"]["ddconfig"] |= changes
    path.write_text(yaml.safe_dump(content))
    refused(folder, message)


@pytest.mark.parametrize("text", ["[]", "a", "model: 5", "model: {params: [1]}", "model: {}", ""])
def test_yaml_of_another_kind_is_refused(meta, tmp_path, text):
    folder = pathlib.Path(shutil.copytree(meta, tmp_path / "meta"))
    (folder / "tokenizer" / "vqgan.yaml").write_text(text)
    refused(folder, "vqgan.yaml: ")


def test_tokenizer_without_a_special_token_is_rejected(meta, tmp_path):
    folder = pathlib.Path(shutil.copytree(meta, tmp_path / "meta"))
    path = folder / "tokenizer" / "text_tokenizer.json"
    spec = json.loads(path.read_text())
    del spec["model"]["vocab"]["<pad>"]
    path.write_text(json.dumps(spec))
    with pytest.raises(ConvertError, match="tokenizer has no <pad>.*published with the weights"):
        convert(folder, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_vqgan_of_integers_is_rejected(meta, tmp_path):
    native = convert(meta, tmp_path / "native", "native")
    arrays = read_safetensors(native)
    name = "quantize.embedding"
    save_file(arrays | {name: arrays[name].astype(np.int32)}, native / "vqgan.safetensors")
    refused(native, "quantize.embedding: dtype I32 is not supported; weights must be F32")


def test_tensors_of_more_than_4_gib_are_read_at_their_place(tmp_path):
    """An fp32 embedding of 30B has 2 GiB. The file is sparse: only its last row is on the disk."""
    rows, width = 65_536, 16_512
    nbytes = rows * width * 4
    entry = dict(dtype="F32", shape=[rows, width], data_offsets=[0, nbytes])
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    last = np.arange(width, dtype=np.float32)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(nbytes - last.nbytes, os.SEEK_CUR)
        file.write(last.tobytes())
    tensors = safetensors_stream.read_file(Folder(tmp_path).file("model.safetensors"))
    block = tensors["model.embed_tokens.weight"].block
    np.testing.assert_array_equal(block(slice(rows - 1, rows), slice(-3, None)), [last[-3:]])
    assert not block(slice(rows - 3, rows - 1), slice(None)).any()
