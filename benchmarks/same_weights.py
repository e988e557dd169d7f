"""The same random weights on both sides without a file: each entry is a hash of its place.

    entry i of layer l of `name`  =  ((hash(i, crc32("name.l")) >> 8) / 2**24 - 1/2) * width

In integers and powers of two, so exact in numpy, JAX and torch alike, whatever the device; one
rounding at the end. Norms have gain 1 and bias 0, an adapter's B is 0. Names and shapes are those
of this project, [in, out]; only the standard library is imported.
"""

import zlib
from collections.abc import Callable
from typing import Any

STD = 0.02  # of matrices and embeddings, as at a model's birth
ROOT_12 = 12**0.5  # width of a uniform distribution over its standard deviation


def salt(name: str, layer: int) -> int:
    """What tells one tensor from another."""
    return zlib.crc32(f"{name}.{layer}".encode())


def bits(place: Any, salt: Any, const: Callable[[int], Any]) -> Any:
    """24 pseudo-random bits an entry (Wellons' lowbias32).

    `place` and `salt` hold integers below 2**32, in uint32 or something wider; `const` makes a
    number of their kind.
    """
    low = const(0xFFFFFFFF)
    x = (place ^ salt) & low
    x = ((x ^ (x >> const(16))) * const(0x7FEB352D)) & low
    x = ((x ^ (x >> const(15))) * const(0x846CA68B)) & low
    return (x ^ (x >> const(16))) >> const(8)


def width(name: str, fan_in: int) -> float | None:
    """Of a tensor's uniform distribution; None where it is no random one."""
    if name.endswith(("kernel", "embedding")):
        return STD * ROOT_12
    return 2 * fan_in**-0.5 if name.endswith("lora_a") else None


def constant(name: str) -> float:
    """The value of every entry of what is not random."""
    return 1.0 if name.endswith("scale") else 0.0
