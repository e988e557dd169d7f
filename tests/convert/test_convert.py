"""Conversions are exact: bit for bit in round trips, and in what the models compute."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_setup import (
    BASE,
    NUMPY,
    SWIN,
    TINY,
    Sizes,
    assert_equal,
    params,
    random_vqgan,
    read_pth,
    read_safetensors,
    shards,
    write_meta,
    write_pth,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import meta_reference

from medmax_jax.checkpoints import export, safetensors_file
from medmax_jax.config import Mesh
from medmax_jax.convert import __main__ as program
from medmax_jax.convert import convert as conversion
from medmax_jax.convert import inspect_checkpoint, state_dict
from medmax_jax.models import chameleon, vqgan
from medmax_jax.models.tokenizer import Tokenizer, prompt_ids
from medmax_jax.sharding import make_mesh

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "parity" / "convert.npz")
IDS = np.random.default_rng(0).integers(0, BASE.vocab, (2, 24)).astype(np.int32)
CASES = {"base": BASE, "swin": SWIN}
MIXED = ("F32", "BF16", "BF16", "F16")


def convert(source, target, layout, **more) -> pathlib.Path:
    terms = program.data_sources()
    quiet = dict(say=lambda _: None, data_sources=terms)
    conversion.convert(str(source), str(target), layout=layout, **quiet, **more)
    return target


def logits(folder) -> np.ndarray:
    """fp32 logits of a native model folder."""
    found = conversion.read_checkpoint(folder)
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        like = chameleon.abstract_model(found.model, found.vocab, chameleon.NO_LORA)
        model = export.load(folder, like)
        positions = np.tile(np.arange(IDS.shape[1], dtype=np.int32), (2, 1))
        rows = (jnp.asarray(IDS), jnp.ones_like(IDS), jnp.asarray(positions))
        return np.asarray(model.logits(model.hidden(*rows, key=None)))


def meta_files(folder) -> list[dict[str, np.ndarray]]:
    return [read_pth(p) for p in sorted(pathlib.Path(folder).glob("models/*/consolidated*.pth"))]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(name, sizes, state dicts, Meta folder in fp32, its native and HF conversions)."""
    folder, sizes = tmp_path_factory.mktemp(request.param), CASES[request.param]
    states = shards(sizes, dtypes=("F32",), seed=0)
    meta = write_meta(folder / "meta", sizes, states, vqgan=True)
    native = convert(meta, folder / "native", "native")
    return request.param, sizes, states, meta, native, convert(native, folder / "hf", "hf")


def test_logits_match_meta_and_hf(case):
    name, sizes, states, _, native, _ = case
    wanted, found = meta_reference.logits(states, params(sizes), IDS), logits(native)
    tolerance = 2e-5 * max(1.0, float(wanted.std()))
    assert wanted.std() > 1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        found[..., GOLDEN["columns"]], GOLDEN[f"{name}_logits"], rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("mutation", ["rope", "gain", "shard"])
def test_logits_reveal_a_wrong_conversion(case, mutation, tmp_path):
    """The comparison above can fail: rows of a head, gains or shards in another order."""
    name, sizes, states, *_ = case
    wrong = [dict(state) for state in states]
    for state in wrong:
        for i in range(sizes.layers):
            if mutation == "rope":
                key = f"layers.{i}.attention.wk.weight"
                halves = state[key].reshape(-1, 2, sizes.head_dim // 2, sizes.dim)
                state[key] = halves.swapaxes(1, 2).reshape(state[key].shape)
            elif mutation == "gain":
                key = f"layers.{i}.attention.q_normalization.bias"
                state[key] = state[key][::-1].copy()
    if mutation == "shard":
        if sizes.shards == 1:
            pytest.skip("one shard has no order")
        for key in [k for k in wrong[0] if "q_normalization.weight" in k]:
            wrong[0][key], wrong[1][key] = wrong[1][key], wrong[0][key]
    meta = write_meta(tmp_path / "meta", sizes, wrong, vqgan=False)
    found = logits(convert(meta, tmp_path / "native", "native"))
    wanted = meta_reference.logits(states, params(sizes), IDS)
    assert np.abs(found - wanted).max() > 100 * 2e-5 * wanted.std(), name


def test_meta_round_trip_is_exact(case, tmp_path):
    _, sizes, states, meta, native, hf = case
    for source in (native, hf):
        back = convert(source, tmp_path / source.name, "meta")
        for wanted, found in zip(states, meta_files(back), strict=True):
            assert_equal(wanted, found)
        vqgan_tensors = read_pth(back / "tokenizer" / "vqgan.ckpt")
        assert_equal(random_vqgan(seed=1), vqgan_tensors)
    found = json.loads((tmp_path / "native/models/model/params.json").read_text())["model"]
    assert {**params(sizes), **found} == found | {
        k: v for k, v in params(sizes).items() if k in ("multiple_of", "ffn_dim_multiplier")
    }
    one, two = (p / "tokenizer/text_tokenizer.json" for p in (meta, tmp_path / "native"))
    assert one.read_bytes() == two.read_bytes()


def test_hf_round_trip_is_exact(case, tmp_path):
    _, sizes, states, _, _, hf = case
    wanted = read_safetensors(hf)
    native = convert(hf, tmp_path / "native", "native")
    assert_equal(wanted, read_safetensors(convert(native, tmp_path / "hf", "hf")))
    # and what HF holds is Meta's, in the order that HF turns: half of a head, then the other half
    layer = "model.layers.1.self_attn."
    q = np.concatenate([s["layers.1.attention.wq.weight"] for s in states])
    for head in range(sizes.heads):
        rows = q[head * sizes.head_dim : (head + 1) * sizes.head_dim]
        start = head * sizes.head_dim
        ours = wanted[layer + "q_proj.weight"][start : start + sizes.head_dim]
        np.testing.assert_array_equal(ours, np.concatenate([rows[0::2], rows[1::2]]))
        shard = states[head * sizes.shards // sizes.heads]
        gain = shard["layers.1.attention.q_normalization.weight"]
        np.testing.assert_array_equal(
            wanted[layer + "q_norm.weight"][head], np.concatenate([gain[0::2], gain[1::2]])
        )


def test_dtypes_are_kept_per_tensor_and_cast_once_on_load(tmp_path):
    states = shards(SWIN, dtypes=MIXED, seed=3)
    meta = write_meta(tmp_path / "meta", SWIN, states, vqgan=False)
    native = convert(meta, tmp_path / "native", "native")
    for wanted, found in zip(
        states, meta_files(convert(native, tmp_path / "back", "meta")), strict=True
    ):
        assert_equal(wanted, found)
    output = inspect_checkpoint.describe(conversion.read_checkpoint(native))
    assert set(output["dtypes"]) == {"F32", "BF16", "F16"}
    assert (
        output["dtypes"] == inspect_checkpoint.describe(conversion.read_checkpoint(meta))["dtypes"]
    )
    model = conversion.read_checkpoint(native).model
    assert model.param_dtype == "bfloat16"
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        like = chameleon.abstract_model(
            model, conversion.read_checkpoint(native).vocab, chameleon.NO_LORA
        )
        loaded = safetensors_file.flatten_named(export.load(native, like))
    head = np.concatenate([s["output.weight"] for s in states])
    np.testing.assert_array_equal(
        np.asarray(loaded["lm_head.kernel"]), head.astype(NUMPY["BF16"]).T
    )


def test_fingerprint_is_the_same_in_every_layout_and_dtype(case, tmp_path):
    _, sizes, states, meta, native, hf = case
    found = {conversion.read_checkpoint(p).fingerprint for p in (meta, native, hf)}
    rounded = [{n: a.astype(NUMPY["BF16"]) for n, a in s.items()} for s in states]
    half = write_meta(tmp_path / "half", sizes, rounded, vqgan=False)
    found.add(conversion.read_checkpoint(half).fingerprint)
    found.add(export.base_fingerprint(native))
    assert len(found) == 1
    states = [dict(s) for s in states]
    states[0]["layers.1.feed_forward.w2.weight"] = (
        states[0]["layers.1.feed_forward.w2.weight"] * 1.01
    ).astype(np.float32)
    other = write_meta(tmp_path / "other", sizes, states, vqgan=False)
    assert conversion.read_checkpoint(other).fingerprint not in found


def test_vqgan_alone_round_trips(tmp_path):
    meta = write_meta(tmp_path / "meta", BASE, shards(BASE, dtypes=("F32",), seed=0), vqgan=True)
    native = convert(meta / "tokenizer" / "vqgan.ckpt", tmp_path / "native", "native")
    assert conversion.read_checkpoint(native).language == {}
    hf = convert(native, tmp_path / "hf", "hf")
    assert set(read_safetensors(hf)) == set(random_vqgan(seed=1))
    back = convert(hf, tmp_path / "back", "meta")
    assert_equal(read_pth(back / "tokenizer/vqgan.ckpt"), random_vqgan(seed=1))
    vq = conversion.read_checkpoint(native).vq
    model = safetensors_file.load(native / "vqgan.safetensors", vqgan.abstract(vq))
    assert vqgan.encode(model, jnp.zeros((1, 32, 32, 3))).shape == (1, 16, 16)


def test_hf_without_a_decoder_takes_one_from_meta(case, tmp_path):
    *_, meta, native, _ = case
    hf = convert(native, tmp_path / "hf", "hf", decoder=False)
    assert not any(".decoder." in name for name in read_safetensors(hf))
    assert inspect_checkpoint.describe(conversion.read_checkpoint(hf))["vqgan"] == "encoder only"
    with pytest.raises(state_dict.ConvertError, match="no VQGAN decoder.*--vqgan"):
        convert(hf, tmp_path / "none", "meta")
    ckpt = meta / "tokenizer" / "vqgan.ckpt"
    back = convert(hf, tmp_path / "back", "meta", vqgan=str(ckpt))
    assert_equal(read_pth(back / "tokenizer/vqgan.ckpt"), random_vqgan(seed=1))


def test_fused_matrices_of_metas_loader_are_split(case, tmp_path):
    _, sizes, states, _, native, _ = case
    fused = []
    for state in states:
        state = dict(state)
        for i in range(sizes.layers):
            for whole, parts in (
                ("attention.wqkv", ("attention.wq", "attention.wk", "attention.wv")),
                ("feed_forward.w13", ("feed_forward.w1", "feed_forward.w3")),
            ):
                arrays = [state.pop(f"layers.{i}.{p}.weight") for p in parts]
                state[f"layers.{i}.{whole}.weight"] = np.concatenate(arrays)
        fused.append(state)
    meta = write_meta(tmp_path / "meta", sizes, fused, vqgan=False)
    back = convert(meta, tmp_path / "back", "meta")
    for wanted, found in zip(states, meta_files(back), strict=True):
        assert_equal(wanted, found)


def test_hf_processor_produces_the_same_prompt(tmp_path):
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    import PIL.Image
    import transformers

    hf = convert(TINY, tmp_path / "hf", "hf")
    processor = transformers.ChameleonProcessor.from_pretrained(hf)
    image = PIL.Image.new("RGB", (40, 50), (200, 10, 10))
    ids = processor(text="<image>Is it a CT?", images=image, return_tensors="np")
    vocab = conversion.read_checkpoint(TINY).vocab
    ours = prompt_ids(
        Tokenizer.from_file(hf / "tokenizer.json", vocab),
        [np.zeros(64, np.int32), "Is it a CT?"],
        vocab,
        True,
    )
    theirs = np.where(ids["input_ids"][0] == 8711, 4, ids["input_ids"][0])
    np.testing.assert_array_equal(theirs, ours)
    assert ids["pixel_values"].shape == (1, 3, 64, 64)
    config = json.loads((hf / "config.json").read_text())
    assert config["vocabulary_map"]["<image>"] == 8711 and config["image_token_id"] == 8711
    assert (hf / "preprocessor_config.json").exists()


@st.composite
def sizes_of_models(draw) -> Sizes:
    shards_ = draw(st.sampled_from([1, 2, 4]))
    kv_heads = shards_ * draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 4))
    dim = heads * head_dim
    ffn = shards_ * draw(st.integers(1, 9))
    return Sizes(
        dim=dim, layers=draw(st.integers(1, 3)), heads=heads, kv_heads=kv_heads, ffn=ffn,
        shards=shards_, swin=draw(st.booleans()), vocab=9_728,
    )  # fmt: skip


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=sizes_of_models(),
    dtypes=st.lists(st.sampled_from(["F32", "BF16", "F16"]), min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
def test_any_small_model_round_trips_exactly(sizes, dtypes, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    states = shards(sizes, dtypes=tuple(dtypes), seed=seed)
    meta = write_meta(folder / "meta", sizes, states, vqgan=False)
    native = convert(meta, folder / "native", "native")
    hf = convert(native, folder / "hf", "hf")
    again = convert(hf, folder / "again", "native")
    assert_equal(read_safetensors(hf), read_safetensors(convert(again, folder / "hf2", "hf")))
    for wanted, found in zip(
        states, meta_files(convert(again, folder / "back", "meta")), strict=True
    ):
        assert_equal(wanted, found)


def test_vqgan_of_a_ckpt_with_a_wrong_shape_is_refused(tmp_path):
    meta = write_meta(tmp_path / "m", BASE, shards(BASE, dtypes=("F32",), seed=0), vqgan=True)
    state = random_vqgan(seed=1)
    state["quant_conv.weight"] = np.ones((8, 4, 1, 1), np.float32)
    write_pth(meta / "tokenizer" / "vqgan.ckpt", state, wrap="state_dict")
    with pytest.raises(state_dict.ConvertError, match=r"quant_conv.weight.*shape \(8, 4, 1, 1\)"):
        convert(meta, tmp_path / "native", "native")
    assert not (tmp_path / "native").exists()
