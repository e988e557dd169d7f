"""Round batch and cache sizes to few values; turn out-of-memory errors into messages.

The message states the allocation and how to reduce it:

JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 257545296 bytes.
  ->  GenerateError: out of memory: 64 rows of 4096 slots ask for ...; take fewer rows (--rows), ...
"""

import contextlib
from collections.abc import Iterator

import jax
from jaxtyping import PyTree

from medmax_jax.config import Sample
from medmax_jax.generation.requests import GenerateError

PIECES = (32, 64, 128, 256)  # prompt tokens per prefill call
SLOT_STEPS = (64, 512)  # cache lengths are multiples of these, up to 512 positions and beyond
SHORTEST_SPAN = 256  # cache positions that are attended to; doubled until it suffices

# Lower-case fragments of an out-of-memory error: XLA's status where it allocates immediately; its
# message where a program allocates later; and the only message of a kernel of its CPU backend that
# was compiled for these shapes and finds no memory when it runs.
_WORDS = ("resource_exhausted", "out of memory", "ynnpack operation failed")


@contextlib.contextmanager
def explain_out_of_memory(what: str, mend: str) -> Iterator[None]:
    """Raise GenerateError in place of an out-of-memory error; pass on every other error."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0].split(": ")[-1]
        full = isinstance(error, MemoryError) or any(w in str(error).lower() for w in _WORDS)
        if not full:
            raise
        raise GenerateError(f"out of memory: {what}; {mend} ({said})") from error


def format_mib(count: int) -> str:
    """Return a number of bytes as text: 16,384 MiB."""
    return f"{count / 2**20:,.0f} MiB"


def tree_bytes(tree: PyTree) -> int:
    """Return the bytes of arrays or of their shapes, over all devices."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def batch_size_for(count: int, most: int) -> int:
    """Return the number of answers to generate at once: a power of two, or `most`."""
    if most < 1:
        raise GenerateError(f"rows is {most}; at least one answer is written at once")
    return min(most, 1 << max(count - 1, 0).bit_length())


def cache_length_for(longest: int, sample: Sample, *, mode: str, codes: int, context: int) -> int:
    """Return the cache length that the longest prompt and its answer require, rounded up."""
    room = {"text": sample.max_gen_len, "mixed": context, "image": 1 + codes}[mode]
    need = min(longest + room, context)
    return min(round_cache_length(need), context)


def round_cache_length(count: int) -> int:
    """Round up to a permitted cache length."""
    step = SLOT_STEPS[count > 512]
    return -(-count // step) * step


def kv_length_bucket(need: int, room: int) -> int:
    """Return how many of `room` positions to attend to where `need` are filled.

    The result is 256, 512, 1024, ..., so that few programs are compiled.
    """
    size = SHORTEST_SPAN
    while size < need:
        size *= 2
    return min(size, room)


def prefill_bucket(longest: int) -> int:
    """Return the number of prompt tokens per prefill call."""
    return next((size for size in PIECES if size >= longest), PIECES[-1])
