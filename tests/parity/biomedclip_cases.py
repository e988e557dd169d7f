"""Sizes, weights, images and texts of the BiomedCLIP golden; numpy only, so both sides agree."""

import zlib

import numpy as np

TINY = dict(
    embed_dim=24,
    image=dict(size=32, patch=8, width=32, layers=2, heads=4, mlp=96),
    text=dict(
        vocab=48, positions=20, context=16, width=40, layers=3, heads=2, mlp=64, head=32
    ),
)  # fmt: skip
WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] chest x ray - of the left lung ##s no ##rm ##al & < > ' . , 3 "
    "5 cm a b c d e resume naive ##d ( ) 肺 mri brain with without lesion ##e ##n ##t ##i ##o fi"
).split()
TEXTS = (
    "Chest X-ray of the left lungs, normal.",
    "",
    "Na\u00efve  R\u00e9sum\u00e9\n\t3.5 cm &amp;amp; &lt;b&gt;",
    "the lung\u2019s lesion \u80ba (brain MRI) zzz qqq",
    "brain mri with lesion without lesion " * 9,  # longer than the context
    "\ufb01 [MASK] the \u00e2\u20ac\u2122 left",  # a ligature, a special by name, a wrong encoding
)
IMAGE_NAMES = ("wide", "tall", "exact", "tiny", "grey", "palette", "bit", "deep", "rgba")


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random float32 weights of one name: gains about 1, biases and tables not zero.

    What feeds a tower's first norm is small, so that the norm's epsilon shows in the embedding.
    """
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    values = rng.standard_normal(shape)
    if "norm" in key.lower() or len(shape) < 2:
        values = values * 0.2 + (1.0 if key.endswith("weight") else 0.0)
    else:
        values *= np.prod(shape[1:]) ** -0.5
    first = "embed" in key and "norm" not in key.lower() or "cls_token" in key
    return np.asarray(values * (0.05 if first else 1.0), np.float32)


def pixels(size: int, count: int) -> np.ndarray:
    """Normalized images [b, 3, h, w]."""
    return np.random.default_rng(1).standard_normal((count, 3, size, size)).astype(np.float32)


def ids(vocab: int, context: int) -> np.ndarray:
    """Rows of ids [b, T] without and with padding."""
    found = np.random.default_rng(2).integers(1, vocab, (3, context))
    found[1, context // 2 :] = 0
    found[2, 2:] = 0
    return found


def image_array(name: str) -> tuple[str, np.ndarray]:
    """A Pillow mode and its array."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    sides = dict(wide=(45, 71), tall=(81, 40), exact=(32, 32), tiny=(9, 11))
    high, wide = sides.get(name, (50, 41))
    smooth = np.add.outer(np.linspace(0, 120, high), np.linspace(0, 120, wide))
    if name in ("grey", "palette"):
        return ("L", (smooth + rng.integers(0, 15, smooth.shape)).astype(np.uint8))
    if name == "bit":
        return ("1", rng.integers(0, 2, smooth.shape).astype(bool))
    if name == "deep":
        return ("I;16", (smooth * 200).astype(np.uint16))
    channels = 4 if name == "rgba" else 3
    noise = rng.integers(0, 15, (high, wide, channels))
    return ("RGBA" if name == "rgba" else "RGB", (smooth[..., None] + noise).astype(np.uint8))
