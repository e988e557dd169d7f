"""The tokenizer's training: crops, the codebook's life, and the same curve after a stop."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from medmax_jax import config, train_vqgan
from medmax_jax.checkpoints import safetensors_file
from medmax_jax.configs import tiny_vqgan
from medmax_jax.training import lpips

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import lpips_cases  # noqa: E402


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Four training images, one for validation, a network of two levels, six steps."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(5):
        blocks = rng.integers(0, 255, (8, 10, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(blocks).save(tmp_path / f"{n}.png")
        split = "validation" if n == 4 else "train"
        rows.append(dict(file=f"{n}.png", modality="MRI" if n else "CT", split=split))
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = lpips.from_tree(lpips_cases.tree("alexnet"), net="alexnet")
    monkeypatch.setattr(lpips, "load", lambda path, *, net: made)
    given = tiny_vqgan.get_config()
    given.vq.update(
        image_size=32, channel_mult=(1, 1), z_channels=8, embed_dim=4, num_codes=16, norm_groups=32
    )
    given.train.update(
        manifest=str(tmp_path / "manifest.jsonl"),
        steps=6,
        plain_steps=2,
        batch_size=2,
        log_every=1,
        restart_every=3,
        eval_every=100,
        checkpoint_every=3,
    )
    return config.build(train_vqgan.Run, given)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}


def test_a_batch_is_a_function_of_seed_and_step(settings):
    train = train_vqgan.load_images(settings.train.manifest, "train")
    assert len(train.originals) == 4  # the fifth is held out
    np.testing.assert_allclose(train.chance, np.array([1, 3**-0.5, 3**-0.5, 3**-0.5]) / 2.7320508)
    one, same, other = (train_vqgan.batch(train, settings, step) for step in (7, 7, 8))
    np.testing.assert_array_equal(one, same)
    assert one.shape == (2, 32, 32, 3) and np.abs(one).max() <= 1 and (one != other).any()
    again = dataclasses.replace(settings, train=dataclasses.replace(settings.train, seed=1))
    assert (train_vqgan.batch(train, again, 7) != one).any()
    with pytest.raises(config.ConfigError, match="no image of split 'tset'"):
        train_vqgan.load_images(settings.train.manifest, "tset")


def test_saturation_changes_colors_and_not_grays(settings):
    vivid = dataclasses.replace(settings, train=dataclasses.replace(settings.train, saturation=0.9))
    for colour, differs in (((90, 90, 90), False), ((200, 40, 90), True)):
        image = Image.new("RGB", (64, 64), colour)
        made = train_vqgan.crop(image, vivid, np.random.default_rng(3))
        assert (np.ptp(made.mean((0, 1))) > 1e-6) == differs


def test_fast_kernel_gradient_matches_the_gradient():
    rng = np.random.default_rng(0)
    x, kernel, up = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 64, 66, 3), (3, 3, 3, 5), (2, 64, 66, 5))
    )
    names = ("NHWC", "HWIO", "NHWC")

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names)

    def ours(x, kernel):
        return train_vqgan.conv_with_matmul_grad(x, kernel, (1, 1), "SAME", dimension_numbers=names)

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        (value, back), (expected, expected_back) = (jax.vjp(f, x, kernel) for f in (ours, plain))
        np.testing.assert_array_equal(value, expected)
        for a, b in zip(back(up), expected_back(up), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_the_config_of_the_tiny_tokenizer_builds():
    run = config.build(train_vqgan.Run, tiny_vqgan.get_config())
    assert run.vq.codes_per_image == 64
    assert run.train.batch_size % (run.mesh.data * run.mesh.fsdp) == 0


@pytest.mark.slow
def test_stopped_run_resumes_bit_for_bit(settings, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = train_vqgan.run(settings, whole)
    step = train_vqgan.Log.step

    def stop(log, done, *rest):
        if done == 5:
            raise KeyboardInterrupt
        step(log, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_vqgan.Log, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            train_vqgan.run(settings, cut)
    assert set(losses(cut)) == {1, 2, 3, 4}
    assert train_vqgan.run(settings, cut) == result
    assert losses(cut) == losses(whole)
    assert (cut / "vqgan.safetensors").read_bytes() == (whole / "vqgan.safetensors").read_bytes()
    assert safetensors_file.metadata(whole / "checkpoint.safetensors") == {"step": "6"}
    assert result["train"].keys() == result["validation"].keys() >= {"l1", "lpips", "psnr"}
    for name in ("reconstructions.png", "curve.png", "train.log", "config.json"):
        assert (whole / name).stat().st_size > 0
