"""The image tokenizer against torch; its names, precision and sizes; mutations are detected."""

import dataclasses
import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from medmax_jax import config
from medmax_jax.checkpoints import safetensors_file
from medmax_jax.configs import base, tiny, tiny_vqgan
from medmax_jax.models import vqgan
from medmax_jax.sharding import make_mesh

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import vqgan_cases as cases  # noqa: E402

SHORT, LONG = cases.CASES["short"], cases.CASES["long"]


def settings(case: cases.Case) -> config.VQ:
    return config.VQ(
        image_size=case.height,
        channels=case.channels,
        channel_mult=case.channel_mult,
        num_res_blocks=case.num_res_blocks,
        z_channels=case.z_channels,
        embed_dim=case.embed_dim,
        num_codes=case.num_codes,
        norm_groups=32,
        view="released",
        answer_view="released",
    )


@functools.cache
def parts(case: cases.Case):
    like = vqgan.abstract(settings(case))
    values = [cases.weight(n, s.shape) for n, s in safetensors_file.flatten_named(like).items()]
    return jax.tree.structure(like), values


def build(case: cases.Case) -> vqgan.VQGAN:
    structure, values = parts(case)
    return jax.tree.unflatten(structure, [jnp.asarray(v) for v in values])


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(PARITY / f"vqgan_{name}.npz") as file:
        return dict(file)


def run(function, *args):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})(*args)


def assert_close(ours, theirs, name):
    theirs = np.asarray(theirs)
    bound = 2e-5 * max(1.0, float(theirs.std()))
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=bound, err_msg=name)


def check_encoder(model, case):
    latents, codes, _ = run(lambda m, x: m.quantized(x), model, cases.pixels(case))
    assert_close(latents, golden(case.name)["latents"], "latents")
    np.testing.assert_array_equal(codes, golden(case.name)["codes"])


def check_decoder(model, case):
    pixels = run(lambda m, c: m.pixels(m.quantize.rows(c)), model, golden(case.name)["codes"])
    assert_close(pixels[:2], golden(case.name)["pixels"], "pixels")
    ours, theirs = (
        np.asarray(vqgan.to_uint8(pixels), np.int16),
        golden(case.name)["uint8"].astype(np.int16),
    )
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("case", cases.CASES.values(), ids=lambda c: c.name)
def test_same_codes_and_images_as_torch(case):
    assert len(np.unique(golden(case.name)["codes"])) >= 200
    model = build(case)
    check_encoder(model, case)
    check_decoder(model, case)
    codes = vqgan.encode(model, cases.pixels(case))
    np.testing.assert_array_equal(codes, golden(case.name)["codes"])
    assert codes.shape[1:] == (case.height // 2 ** (len(case.channel_mult) - 1), codes.shape[2])


def swapped_padding(model):
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv) and module.strides == 2:
            module.padding = ((1, 0), (1, 0))


def other_epsilon(model, eps):
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.GroupNorm):
            module.epsilon = eps


def no_attention(model, side):
    attention = getattr(model, side).mid.attn_1
    attention.proj_out.kernel[...] = jnp.zeros_like(attention.proj_out.kernel[...])
    attention.proj_out.bias[...] = jnp.zeros_like(attention.proj_out.bias[...])


@pytest.mark.parametrize(
    ("check", "mutate"),
    [
        (check_encoder, swapped_padding),
        (check_encoder, lambda m: other_epsilon(m, 1e-5)),
        (check_decoder, lambda m: other_epsilon(m, 1e-3)),
        (check_encoder, lambda m: no_attention(m, "encoder")),
        (check_decoder, lambda m: no_attention(m, "decoder")),
    ],
)
def test_mutated_model_fails(check, mutate):
    model = build(SHORT)
    mutate(model)
    with pytest.raises(AssertionError):
        check(model, SHORT)


def test_bilinear_upsampling_fails(monkeypatch):
    def bilinear(self, x):
        b, i, j, c = x.shape
        return self.conv(jax.image.resize(x, (b, 2 * i, 2 * j, c), "bilinear"))

    monkeypatch.setattr(vqgan.Upsample, "__call__", bilinear)
    with pytest.raises(AssertionError):
        check_decoder(build(SHORT), SHORT)


@pytest.mark.parametrize("case", cases.CASES.values(), ids=lambda c: c.name)
def test_transposed_and_shifted_codes_fail(case):
    codes, model = golden(case.name)["codes"], build(case)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(vqgan.encode(model, cases.pixels(case)) + 4, codes)
    for wrong in (codes.reshape(codes.shape[0], *codes.shape[:0:-1]), (codes + 4) % 4096):
        pixels = vqgan.decode_codes(model, jnp.asarray(wrong)).reshape(
            -1, case.height, case.width, 3
        )
        with pytest.raises(AssertionError):
            assert_close(np.asarray(pixels)[:2], golden(case.name)["pixels"], "pixels")


def test_everything_up_to_the_codes_is_at_highest_precision():
    like = vqgan.abstract(settings(SHORT))
    pixels = jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.float32)
    text = vqgan.encode.lower(like, pixels).as_text()
    products = re.findall(r"stablehlo\.(convolution|dot_general)([^\n]*)", text)
    assert {kind for kind, _ in products} == {"convolution", "dot_general"}
    # conv_in, 2 in each of 5 blocks, shortcut, 2 halvings, q k v proj, conv_out, quant_conv; then
    # scores, mixing, codebook
    assert len(products) == (1 + 2 * 5 + 1 + 2 + 4 + 1 + 1) + 3
    for _, attributes in products:
        assert "HIGHEST, HIGHEST" in attributes.upper().replace(
            "#STABLEHLO<PRECISION ", ""
        ).replace(">", "")
    assert "bf16" not in text


def test_first_of_equal_codes_wins_and_rows_are_returned():
    codebook = vqgan.Codebook(4, 2, rngs=nnx.Rngs(0))
    codebook.embedding[...] = jnp.array([[9.0, 9], [1, 0], [1, 0], [0, 1]])
    codes = codebook.nearest(jnp.array([[[[1.0, 0.1], [0, 2]]]]))
    np.testing.assert_array_equal(codes, [[[1, 3]]])
    np.testing.assert_array_equal(codebook.rows(codes), [[[[1, 0], [0, 1]]]])


def test_uint8_is_clamped_and_truncated():
    values = jnp.array([-7.0, -1, -0.999, 0, 0.999, 1, 3])
    np.testing.assert_array_equal(vqgan.to_uint8(values), [0, 0, 0, 127, 254, 255, 255])


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 8, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)]
)
def test_codes_and_images_are_the_same_on_every_mesh(shape):
    mesh = make_mesh(config.Mesh(data=shape[0], fsdp=shape[1], tp=shape[2]))
    inputs = np.concatenate([cases.pixels(SHORT), cases.pixels(SHORT)[:2]])
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, P(("data", "fsdp")))
        model = jax.device_put(build(SHORT), jax.NamedSharding(mesh, P()))
        codes = vqgan.encode(model, jax.device_put(inputs, sharding))
        pixels = vqgan.decode_codes(model, codes)
    assert codes.sharding.spec[0] == pixels.sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_array_equal(np.asarray(codes)[:6], golden("short")["codes"])
    assert_close(np.asarray(pixels)[:2], golden("short")["pixels"], "pixels")


def test_created_and_loaded_on_the_ambient_mesh(tmp_path):
    vq = dataclasses.replace(settings(SHORT), channel_mult=(1,))
    mesh = make_mesh(config.Mesh(data=1, fsdp=4, tp=2))
    with jax.set_mesh(mesh):
        model = vqgan.create(vq, key=jax.random.key(0))
        like = vqgan.abstract(vq)
        safetensors_file.save(tmp_path / "v.safetensors", model, {})
        loaded = safetensors_file.load(tmp_path / "v.safetensors", like)
    for a, b, c in zip(*map(jax.tree.leaves, (model, like, loaded)), strict=True):
        assert all(x.sharding.mesh == mesh for x in (a, b, c))
        assert all(x.sharding.is_fully_replicated for x in (a, b, c))
        np.testing.assert_array_equal(a, c)


def conv(din, dout, size):
    return din * dout * size * size + dout


def block(din, dout):
    shortcut = conv(din, dout, 1) if din != dout else 0
    return 2 * din + conv(din, dout, 3) + 2 * dout + conv(dout, dout, 3) + shortcut


def mid(width):
    return 2 * block(width, width) + 2 * width + 4 * conv(width, width, 1)


def test_released_size():
    assert config.build(config.VQ, base.get_config().vq) == vqgan.RELEASED
    like = vqgan.abstract(vqgan.RELEASED)
    names = safetensors_file.flatten_named(like)
    count = {part: sum(v.size for n, v in names.items() if n.startswith(part)) for part in PARTS}
    down = 4 * block(128, 128) + block(128, 256) + 3 * block(256, 256)
    down += block(256, 512) + block(512, 512)
    down += 2 * conv(128, 128, 3) + 2 * conv(256, 256, 3)
    encoder = conv(3, 128, 3) + down + mid(512) + 2 * 512 + conv(512, 256, 3)
    up = 3 * block(512, 512) + block(512, 256) + 5 * block(256, 256)
    up += block(256, 128) + 5 * block(128, 128)
    up += conv(512, 512, 3) + 2 * conv(256, 256, 3) + conv(128, 128, 3)
    decoder = conv(256, 512, 3) + mid(512) + up + 2 * 128 + conv(128, 3, 3)
    assert count["encoder"] == encoder and count["decoder"] == decoder
    assert round(decoder / 1e6, 1) == 39.3
    assert count["quantize"] == 8192 * 256
    assert count["quant_conv"] == count["post_quant_conv"] == conv(256, 256, 1)
    assert sum(count.values()) == sum(v.size for v in names.values())
    assert names["decoder.up.4.upsample.conv.kernel"].shape == (3, 3, 512, 512)
    assert names["encoder.down.4.block.0.nin_shortcut.kernel"].shape == (1, 1, 256, 512)
    assert "encoder.down.4.downsample.conv.kernel" not in names
    assert "decoder.up.0.upsample.conv.kernel" not in names
    pixels = jax.ShapeDtypeStruct((2, 512, 512, 3), jnp.float32)
    codes = jax.eval_shape(vqgan.encode, like, pixels)
    assert codes.shape == (2, 32, 32)
    assert jax.eval_shape(vqgan.decode_codes, like, codes).shape == (2, 512, 512, 3)


PARTS = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")


def test_included_vqgan_fits_the_tiny_config():
    vq = config.from_config_dict(tiny.get_config()).vq
    assert config.build(config.VQ, tiny_vqgan.get_config().vq) == vq
    file = Path(vqgan.__file__).parents[1] / "tiny" / "vqgan.safetensors"
    model = safetensors_file.load(file, vqgan.abstract(vq))
    gray = jnp.linspace(-1, 1, 64)[None, :, None, None] * jnp.ones((1, 64, 64, 3))
    pixels = vqgan.decode_codes(model, vqgan.encode(model, gray))
    assert float(jnp.abs(pixels - gray).mean()) < 0.15
    assert file.stat().st_size < 8_000_000
