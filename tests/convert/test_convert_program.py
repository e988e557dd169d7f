"""The program: its words, JSON and exit codes; check; where a tokenizer is found."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from convert_setup import BASE, SWIN, TINY, read_pth, shards, write_meta, write_pth
from test_convert import convert

from medmax_jax.config import Model, Sample, build
from medmax_jax.configs import base, chameleon_30b, eval_tiny
from medmax_jax.convert import check, inspect_checkpoint
from medmax_jax.convert import convert as conversion
from medmax_jax.convert.__main__ import main
from medmax_jax.convert.state_dict import ConvertError
from medmax_jax.data.image_tokens.encoder import load_encoder
from medmax_jax.generation import api, model_bundle, requests
from medmax_jax.models import vqgan

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def meta(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("meta")
    return write_meta(folder / "m", SWIN, shards(SWIN, dtypes=("F32",), seed=0), vqgan=True)


def test_program_converts_and_reports_it(meta, tmp_path):
    command = [sys.executable, "-m", "medmax_jax.convert"]
    done = subprocess.run(
        [*command, "--from", meta, "--to", tmp_path / "native", "--format", "native"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'native'} (native)" in done.stdout and "MB/s" in done.stdout
    text = (tmp_path / "native" / "README.md").read_text()
    assert "Chameleon Research License" in text and "not for clinical use" in text


def test_inspect_of_every_layout(meta, tmp_path, capsys):
    native = convert(meta, tmp_path / "native", "native")
    hf = convert(native, tmp_path / "hf", "hf")
    output = {}
    for name, path in (("meta", meta), ("native", native), ("hf", hf)):
        assert main(["inspect", str(path), "--json"]) == 0
        output[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert main(["inspect", str(path)]) == 0
        assert f"layout       {name}" in capsys.readouterr().out
        assert output[name]["layout"] == name and output[name]["tokenizer"] is True
        assert output[name]["vqgan"] == "encoder and decoder" and output[name]["lora"] is None
    for field in ("fingerprint", "parameters", "dtypes", "image_rows", "model"):
        assert output["meta"][field] == output["native"][field] == output["hf"][field], field
    assert output["meta"]["shards"] == 4
    assert output["meta"]["settings"]["model"]["qk_norm_shards"] == 4


def test_inspect_recognizes_the_published_sizes():
    for settings, name in ((base.get_config(), "7B"), (chameleon_30b.get_config(), "30B")):
        model = build(Model, settings.model)
        found = dataclasses.replace(
            conversion.read_checkpoint(TINY), model=model, language={}, vqgan={}
        )
        assert inspect_checkpoint.describe(found)["model"] == name


def test_download_with_two_models_is_rejected(meta, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(meta, folder)
    shutil.copytree(folder / "models" / "7b", folder / "models" / "30b")
    with pytest.raises(ConvertError, match="contains 2 models .models/30b, models/7b."):
        conversion.read_checkpoint(folder)
    found = conversion.read_checkpoint(folder / "models" / "30b")
    assert found.tokenizer and found.has_decoder  # from ../../tokenizer
    names = json.loads(
        (convert(folder / "models/7b", tmp_path / "out", "meta")
         / "tokenizer/text_tokenizer_modified.json").read_text()
    )["model"]["vocab"]  # fmt: skip
    assert names["<image>"] == 8711 and "<reserved08707>" not in names


def test_check_finds_differences_from_the_published_files(meta, tmp_path):
    lines: list[str] = []
    status = check.check(str(meta), torch_python=None, scratch=str(tmp_path), say=lines.append)
    text = "\n".join(lines)
    assert status == 1  # random weights: not the published files
    assert text.count("NOT OK") == 3 and "md5 of tokenizer/vqgan.ckpt" in text
    assert "vocabulary ids: text from 8712, 9728 rows ok" in text
    assert "with medmax_jax: special ids [8710] ok" in text
    assert "all values are finite ok" in text
    published = tmp_path / "ok"
    shutil.copytree(meta, published)
    for name in check.PUBLISHED:
        (published / "tokenizer" / name).unlink()
    lines.clear()
    assert check.check(str(published), torch_python=None, scratch="", say=lines.append) == 0
    path = published / "models/7b/consolidated.00.pth"
    state = read_pth(path)
    state["output.weight"][3, 5] = np.nan
    write_pth(path, state, wrap=None)
    with pytest.raises(ConvertError, match="output.weight: 1 of .* values are NaN"):
        check.check(str(published), torch_python=None, scratch="", say=lines.append)


def test_check_detects_a_shifted_vocabulary(meta, tmp_path):
    folder = tmp_path / "shifted"
    shutil.copytree(meta, folder)
    path = folder / "tokenizer" / "text_tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["vocab"]["<eoss>"], spec["model"]["vocab"]["<racm3:break>"] = 8197, 8196
    path.write_text(json.dumps(spec))
    lines: list[str] = []
    assert check.check(str(folder), torch_python=None, scratch="", say=lines.append) == 1
    assert any("<eoss> has id 8197" in line and "NOT OK" in line for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("MEDMAX_TORCH_PYTHON"), reason="MEDMAX_TORCH_PYTHON names no Python"
)
def test_check_against_torch(meta, tmp_path):
    lines: list[str] = []
    python = os.environ["MEDMAX_TORCH_PYTHON"]
    check.check(str(meta), torch_python=python, scratch=str(tmp_path), say=lines.append)
    assert any("logits against torch, float32" in line and "at most ok" in line for line in lines)
    assert "image codes against torch: 100.00% equal ok" in lines


def test_small_disk_is_rejected(meta, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small])
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        done = main(["--from", str(meta), "--to", str(small / "out"), "--format", "hf"])
        assert done == 1 and list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_model_converted_from_hf_generates(tmp_path):
    """tiny -> HF -> native: the same answers; without a decoder images are read, not written."""
    hf = convert(TINY, tmp_path / "hf", "hf")
    native = convert(hf, tmp_path / "native", "native")
    sample = build(Sample, eval_tiny.get_config().sample)
    answers = []
    for folder in (TINY, native):
        loaded = model_bundle.load(folder)
        answers.append(api.generate(loaded, [["A CT?"]], sample, mode="text", seed=0))
    assert answers[0] == answers[1] and answers[0][0][0].text
    bare = convert(convert(TINY, tmp_path / "b", "hf", decoder=False), tmp_path / "bare", "native")
    encoder_only = model_bundle.load(bare)
    image = PIL.Image.new("RGB", (64, 64), (90, 20, 160))
    prompts = [[image, "A CT?"]]
    wrote = [api.generate(g, prompts, sample, mode="text", seed=0) for g in (loaded, encoder_only)]
    assert wrote[0] == wrote[1]
    for mode in ("image", "mixed"):
        with pytest.raises(requests.GenerateError, match="no VQGAN decoder.*with --vqgan"):
            api.generate(encoder_only, prompts, sample, mode=mode, seed=0)
    with pytest.raises(requests.GenerateError, match="no VQGAN decoder.*with --vqgan"):
        model_bundle.decode(encoder_only, model_bundle.encode(encoder_only, [image]))


def test_an_encoder_only_vqgan_tokenizes_images(tmp_path):
    bare = convert(convert(TINY, tmp_path / "b", "hf", decoder=False), tmp_path / "bare", "native")
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    codes = []
    for folder in (TINY, bare):
        encoder = load_encoder(folder)
        size = encoder.vq_config.image_size
        codes.append(np.asarray(vqgan.encode(encoder.vq, pixels[:, :size, :size])))
    np.testing.assert_array_equal(codes[0], codes[1])
    assert not encoder.vq.has_decoder


def test_model_without_vqgan_has_chameleon_settings(tmp_path):
    meta = write_meta(tmp_path / "m", BASE, shards(BASE, dtypes=("F32",), seed=0), vqgan=False)
    found = conversion.read_checkpoint(convert(meta, tmp_path / "n", "native"))
    assert found.vqgan == {} and found.vq.num_codes == 8192
