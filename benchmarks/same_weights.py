"""Generates the same random weights on both sides without a file: each entry hashes its position.

    entry i of layer l of `name`  =  ((hash(i, crc32("name.l")) >> 8) / 2**24 - 1/2) * width

In integers and powers of two, so exact in numpy, JAX and torch alike, whatever the device; one
rounding at the end. Norms have gain 1 and bias 0, an adapter's B is 0. Names and shapes are those
of this project, [in, out]; only the standard library is imported.
"""

import zlib
from collections.abc import Callable
from typing import Any

STD = 0.02  # of matrices and embeddings, as at initialization
ROOT_12 = 12**0.5  # width of a uniform distribution over its standard deviation


def salt(name: str, layer: int) -> int:
    """Return a number that distinguishes one tensor from another."""
    return zlib.crc32(f"{name}.{layer}".encode())


def bits(index: Any, salt: Any, const: Callable[[int], Any]) -> Any:
    """Return 24 pseudo-random bits per entry (Wellons' lowbias32).

    `index` and `salt` hold integers below 2**32, in uint32 or something wider; `const` makes a
    number of their kind.
    """
    low = const(0xFFFFFFFF)
    x = (index ^ salt) & low
    x = ((x ^ (x >> const(16))) * const(0x7FEB352D)) & low
    x = ((x ^ (x >> const(15))) * const(0x846CA68B)) & low
    return (x ^ (x >> const(16))) >> const(8)


def width(name: str, fan_in: int) -> float | None:
    """Return the width of a tensor's uniform distribution; None where it is not random."""
    if name.endswith(("kernel", "embedding")):
        return STD * ROOT_12
    return 2 * fan_in**-0.5 if name.endswith("lora_a") else None


def constant(name: str) -> float:
    """Return the value of every entry of a tensor that is not random."""
    return 1.0 if name.endswith("scale") else 0.0
