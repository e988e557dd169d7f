"""Random weights and images of the EfficientNet-Lite0 golden; numpy only."""

import zlib

import numpy as np


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Kernels that keep the scale, gains and variances about 1, small shifts."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith(("running_var", "bn0.weight", "bn1.weight", "bn2.weight")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = 0.1 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def pixels() -> np.ndarray:
    """Two images [2, 3, 64, 72] in [-1, 1]; their sizes are odd after some strides."""
    return np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 72)).astype(np.float32)
