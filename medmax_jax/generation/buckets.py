"""A device without room says so in words: what was asked of it, and the mend.

JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 257545296 bytes.
  ->  GenerateError: out of memory: 64 rows of 4096 slots ask for ...; take fewer rows (--rows), ...
"""

import contextlib
from collections.abc import Iterator

import jax
from jaxtyping import PyTree

from medmax_jax.config import Sample
from medmax_jax.generation.requests import GenerateError

PIECES = (32, 64, 128, 256)  # tokens of a prompt read at once
SLOT_STEPS = (64, 512)  # cache sizes are multiples of these, up to 512 slots and beyond
SHORTEST_SPAN = 256  # slots that are read; doubled until it suffices

# XLA's status where it asks at once; its words where a program asks later; and all that a kernel
# of its CPU backend says that was compiled for these shapes and finds no memory when it runs.
_WORDS = ("resource_exhausted", "out of memory", "ynnpack operation failed")


@contextlib.contextmanager
def explain_out_of_memory(what: str, mend: str) -> Iterator[None]:
    """Raises GenerateError in place of an error that says that memory is full, and no other."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0].split(": ")[-1]
        full = isinstance(error, MemoryError) or any(w in str(error).lower() for w in _WORDS)
        if not full:
            raise
        raise GenerateError(f"out of memory: {what}; {mend} ({said})") from error


def format_mib(count: int) -> str:
    """Bytes in words: 16,384 MiB."""
    return f"{count / 2**20:,.0f} MiB"


def tree_bytes(tree: PyTree) -> int:
    """Of arrays or their shapes, over all devices."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def batch_size_for(count: int, most: int) -> int:
    """Answers to write at once: a power of two, or `most`."""
    if most < 1:
        raise GenerateError(f"rows is {most}; at least one answer is written at once")
    return min(most, 1 << max(count - 1, 0).bit_length())


def cache_length_for(longest: int, sample: Sample, *, mode: str, codes: int, context: int) -> int:
    """Tokens that a lane must hold for the longest prompt, rounded up."""
    room = {"text": sample.max_gen_len, "mixed": context, "image": 1 + codes}[mode]
    need = min(longest + room, context)
    return min(round_cache_length(need), context)


def round_cache_length(count: int) -> int:
    """Up to a size that a cache may have."""
    step = SLOT_STEPS[count > 512]
    return -(-count // step) * step


def kv_length_bucket(need: int, room: int) -> int:
    """Slots to read where `need` are filled, of `room`: 256, 512, 1024 ..., so few programs."""
    size = SHORTEST_SPAN
    while size < need:
        size *= 2
    return min(size, room)


def prefill_bucket(longest: int) -> int:
    """Tokens of a prompt to read at once."""
    return next((size for size in PIECES if size >= longest), PIECES[-1])
