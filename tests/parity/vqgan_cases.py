"""The two tiny VQGANs of the parity goldens; numpy only, so both sides make the same weights.

No weight is stored: each comes from a generator seeded with its dotted name, and the golden files
hold outputs alone. Every gain and bias is random, so that a forgotten one shows.
"""

import dataclasses
import zlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Fields of medmax_jax.config.VQ; images are not square, so that a transpose is detected."""

    name: str
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    height: int
    width: int
    channels: int = 32
    z_channels: int = 16
    embed_dim: int = 4
    num_codes: int = 4096
    num_images: int = 6


CASES = {
    case.name: case
    for case in (Case("short", (1, 2, 2), 1, 32, 48), Case("long", (1, 1, 2, 4), 2, 64, 80))
}


def image_arrays(case: Case) -> np.ndarray:
    """[n h w 3] uint8: blocks of every color under waves of every slope, with grain."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    blocks = rng.uniform(0, 255, (case.num_images, case.height // 4, case.width // 4, 3))
    blocks = blocks.repeat(4, 1).repeat(4, 2)
    rows, columns, _ = np.mgrid[: case.height, : case.width, :1]
    slope = rng.uniform(-0.5, 0.5, (2, case.num_images, 1, 1, 3))
    waves = 100 * np.sin(slope[0] * rows + slope[1] * columns)
    values = (blocks + waves + 128) / 2 + rng.normal(0, 15, blocks.shape)
    return np.clip(values, 0, 255).astype(np.uint8)


def pixels(case: Case) -> np.ndarray:
    """The same in [-1, 1], float32."""
    return image_arrays(case).astype(np.float32) / np.float32(255) * 2 - 1


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 weight of a dotted name in our layout (kernels HWIO).

    The first convolutions are small: their outputs have a variance near 1e3 of GroupNorm's epsilon,
    so that another epsilon is seen.
    """
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("kernel"):
        gain = 0.05 if "conv_in" in name else 0.3 if name == "decoder.conv_out.kernel" else 1.0
        values *= gain * np.prod(shape[:-1]) ** -0.5
    elif name.endswith("scale"):
        values = 1 + 0.3 * values
    elif name.endswith("bias"):
        values *= 0.005 if "conv_in" in name else 0.2
    return values.astype(np.float32)
