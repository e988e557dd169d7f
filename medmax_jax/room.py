"""A device without room says so in words: what was asked of it, and the mend.

JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 257545296 bytes.
  ->  GenerateError: out of memory: 64 rows of 4096 slots ask for ...; take fewer rows (--rows), ...
"""

import contextlib
from collections.abc import Iterator

import jax
from jaxtyping import PyTree

from medmax_jax.batching import GenerateError

# XLA's status where it asks at once; its words where a program asks later; and all that a kernel
# of its CPU backend says that was compiled for these shapes and finds no memory when it runs.
_WORDS = ("resource_exhausted", "out of memory", "ynnpack operation failed")


@contextlib.contextmanager
def asked(what: str, mend: str) -> Iterator[None]:
    """Raises GenerateError in place of an error that says that memory is full, and no other."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0].split(": ")[-1]
        full = isinstance(error, MemoryError) or any(w in str(error).lower() for w in _WORDS)
        if not full:
            raise
        raise GenerateError(f"out of memory: {what}; {mend} ({said})") from error


def mib(count: int) -> str:
    """Bytes in words: 16,384 MiB."""
    return f"{count / 2**20:,.0f} MiB"


def bytes_of(tree: PyTree) -> int:
    """Of arrays or their shapes, over all devices."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
