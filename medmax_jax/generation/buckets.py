"""Round batch and cache sizes to few values; turn out-of-memory errors into messages.

The message states the allocation and how to reduce it:

JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 257545296 bytes.
  ->  GenerateError: out of memory: batch size 64 and cache length 4096 need ...; reduce ...
"""

import contextlib
from collections.abc import Iterator

import jax
from jaxtyping import PyTree

from medmax_jax.config import Sample
from medmax_jax.generation.requests import GenerateError

# Few sizes, because each one is another program to compile.
PREFILL_SIZES = (32, 128, 256)  # prompt tokens per prefill call
CACHE_LENGTH_STEPS = (256, 512)  # cache lengths are multiples of these, up to 512 and beyond
MIN_SPAN = 256  # cache positions that are attended to; doubled until it suffices

# Lower-case fragments of an out-of-memory error: XLA's status where it allocates immediately; its
# message where a program allocates later; and the only message of a kernel of its CPU backend that
# was compiled for these shapes and finds no memory when it runs.
_FRAGMENTS = ("resource_exhausted", "out of memory", "ynnpack operation failed")


@contextlib.contextmanager
def explain_out_of_memory(allocation: str, fix: str) -> Iterator[None]:
    """Raise GenerateError in place of an out-of-memory error; pass on every other error."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = str(error).lower()
        if not isinstance(error, MemoryError) and not any(part in text for part in _FRAGMENTS):
            raise
        cause = (str(error) or type(error).__name__).splitlines()[0].split(": ")[-1]
        raise GenerateError(f"out of memory: {allocation}. To fix: {fix} ({cause})") from error


def format_mib(count: int) -> str:
    """Return a number of bytes as text: 16,384 MiB."""
    return f"{count / 2**20:,.0f} MiB"


def tree_bytes(tree: PyTree) -> int:
    """Return the bytes of arrays or of their shapes, over all devices."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def batch_size_for(count: int, limit: int) -> int:
    """Return the number of answers to generate at once: a power of two, or `limit`."""
    if limit < 1:
        raise GenerateError(f"batch_size (--rows) is {limit}; it must be at least 1")
    return min(limit, 1 << max(count - 1, 0).bit_length())


def cache_length_for(longest: int, sample: Sample, *, mode: str, codes: int, context: int) -> int:
    """Return the cache length that the longest prompt and its answer require, rounded up."""
    answer = {"text": sample.max_gen_len, "mixed": context, "image": 1 + codes}[mode]
    need = min(longest + answer, context)
    return min(round_cache_length(need), context)


def round_cache_length(count: int) -> int:
    """Round up to a permitted cache length."""
    step = CACHE_LENGTH_STEPS[count > 512]
    return -(-count // step) * step


def kv_length_bucket(filled: int, cache_length: int) -> int:
    """Return how many of `cache_length` positions to attend to where `filled` are used.

    The result is 256, 512, 1024, ..., so that few programs are compiled.
    """
    size = MIN_SPAN
    while size < filled:
        size *= 2
    return min(size, cache_length)


def prefill_bucket(longest: int) -> int:
    """Return the number of prompt tokens per prefill call."""
    return next((size for size in PREFILL_SIZES if size >= longest), PREFILL_SIZES[-1])
