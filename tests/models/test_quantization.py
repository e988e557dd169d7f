"""Quantized bases: equal to qwix, on any mesh, in the logits, under adapters in training."""

import dataclasses
import functools
import pathlib

import chameleon_setup as setup
import jax
import jax.numpy as jnp
import micro_run
import numpy as np
import pytest
import qwix
from convert_setup import BASE, Sizes, shards, write_meta
from jax.sharding import PartitionSpec as P
from test_convert import IDS, convert, logits
from test_zarr_arrays import named

from medmax_jax import config, train
from medmax_jax.checkpoints import export
from medmax_jax.config import Mesh
from medmax_jax.convert import convert as conversion
from medmax_jax.convert import inspect_checkpoint, native
from medmax_jax.convert.state_dict import ConvertError
from medmax_jax.models import chameleon, quantization
from medmax_jax.sharding import make_mesh

KINDS = ("int8", "int4", "nf4")
MEASURED = {"int8": 0.0076, "int4": 0.111, "nf4": 0.091}  # mean error of a matrix, measured here
WEIGHT = 0.05 * np.random.default_rng(0).standard_normal((256, 96)).astype(np.float32)


def matrix(kind: str) -> quantization.QuantizedMatrix:
    """Return WEIGHT, quantized, on the ambient mesh."""
    like = quantization.QuantizedMatrix(*WEIGHT.shape, spec=P("fsdp", "tp"), kind=kind)
    return jax.tree.map(
        lambda leaf, value: jax.device_put(value, leaf.sharding),
        like,
        _with_values(like, native.quantize(WEIGHT, kind)),
    )


def _with_values(
    like: quantization.QuantizedMatrix, values: dict[str, np.ndarray]
) -> quantization.QuantizedMatrix:
    structure = jax.tree.structure(like)
    names = [str(path[0].name) for path, _ in jax.tree_util.tree_leaves_with_path(like)]
    return jax.tree.unflatten(structure, [values[n] for n in names])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_dequantize_equals_qwix(kind, sizes):
    tiles = {0: quantization.TILE} if kind in quantization.PACKED else {}
    with jax.set_mesh(make_mesh(Mesh(**named(sizes)))):
        dense = jax.jit(lambda m: m.dequantize(jnp.float32))(matrix(kind))
        assert dense.sharding.spec == P("fsdp", "tp")
    theirs = qwix.dequantize(
        qwix.quantize(jnp.asarray(WEIGHT), kind, channelwise_axes=(1,), tiled_axes=tiles)
    )
    np.testing.assert_allclose(np.asarray(dense), np.asarray(theirs), rtol=1e-6, atol=0)
    error = np.abs(np.asarray(dense) - WEIGHT).mean() / np.abs(WEIGHT).mean()
    assert error == pytest.approx(MEASURED[kind], rel=0.05)


@pytest.fixture(scope="module")
def meta(tmp_path_factory) -> pathlib.Path:
    sizes = Sizes(dim=128, heads=8, kv_heads=8, ffn=128)  # two tiles of nf4 along every axis
    folder = tmp_path_factory.mktemp("meta")
    return write_meta(folder / "m", sizes, shards(sizes, dtypes=("BF16",), seed=0), vqgan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_base_computes_nearly_the_same(meta, tmp_path, kind):
    exact = convert(meta, tmp_path / "exact", "native")
    small = convert(meta, tmp_path / "small", "native", quant=kind)
    facts = inspect_checkpoint.describe(conversion.read_checkpoint(small))
    assert facts["quant"] == kind
    assert facts["fingerprint"] == export.base_fingerprint(exact) == export.base_fingerprint(small)
    expected, quantized = logits(exact), logits(small)
    error = np.abs(quantized - expected).mean() / expected.std()
    assert 1e-4 < error < {"int8": 0.02, "int4": 0.3, "nf4": 0.2}[kind]
    with pytest.raises(ConvertError, match=f"its matrices are quantized to {kind}"):
        convert(small, tmp_path / "out", "hf")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_on_every_mesh(meta, tmp_path, kind):
    small = convert(meta, tmp_path / "small", "native", quant=kind)
    checkpoint = conversion.read_checkpoint(small)
    model = dataclasses.replace(checkpoint.model, compute_dtype="float32")
    ids = jnp.asarray(np.tile(IDS, (4, 1)))
    rows = (ids, jnp.ones_like(ids), jnp.tile(jnp.arange(24, dtype=jnp.int32), (8, 1)))
    answers = []
    for sizes in ((1, 1, 1), (2, 2, 2), (8, 1, 1)):
        with jax.set_mesh(make_mesh(Mesh(**named(sizes)))):
            like = chameleon.abstract_model(model, checkpoint.vocab, chameleon.NO_LORA)
            net = export.load(small, like)
            answer = setup.jit(lambda n, r: n.logits(n.hidden(*r, key=None)))(net, rows)
            answers.append(np.asarray(answer))
    for other in answers[1:]:
        np.testing.assert_allclose(other, answers[0], rtol=0, atol=2e-5 * answers[0].std())


def test_lora_trains_on_a_quantized_base(tmp_path):
    data = dict(data__train=micro_run.write(tmp_path / "records"))
    size = dict(model__hidden_size=64, model__head_dim=16)
    full = micro_run.run(**data, **size, train__trains="full", lora__rank=0, train__steps=1)
    train.run(full, tmp_path / "full")
    small = convert(tmp_path / "full" / "model", tmp_path / "small", "native", quant="nf4")
    tuned = micro_run.run(
        **data, **size, model__quant="nf4", train__init_from=str(small), train__steps=6,
        lora__dropout=0.0,
    )  # fmt: skip
    last = train.run(tuned, tmp_path / "run")
    assert np.isfinite(last["loss"]) and last["step"] == 6
    merged = convert(
        tmp_path / "run", tmp_path / "merged", "native", base=str(tmp_path / "full" / "model"),
        merge_native=True,
    )  # fmt: skip
    assert conversion.read_checkpoint(merged).quant == "none"


def test_invalid_settings_raise(meta, tmp_path):
    build = functools.partial(micro_run.run, model__quant="int8")
    with pytest.raises(config.ConfigError, match="train.init_from is ''; it must be set"):
        build()
    with pytest.raises(config.ConfigError, match="model.quant is 'int8'.*none when train.trains"):
        build(train__trains="full", lora__rank=0)
    with pytest.raises(config.ConfigError, match="model.hidden_size is 32.*multiple of 64"):
        micro_run.run(model__quant="nf4", train__init_from="x")
    with pytest.raises(config.ConfigError, match="model.quant is 'int3'"):
        micro_run.run(model__quant="int3", train__init_from="x")
    odd = write_meta(tmp_path / "odd", BASE, shards(BASE, dtypes=("F32",), seed=0), vqgan=False)
    with pytest.raises(ConvertError, match="96 columns are not a multiple of 64"):
        convert(odd, tmp_path / "out", "native", quant="nf4")
    with pytest.raises(ConvertError, match="only for a model with --format native"):
        convert(meta, tmp_path / "out", "hf", quant="int8")
