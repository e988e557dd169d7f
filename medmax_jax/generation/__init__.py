"""Generation of text and images from prompts.

api              Generate text and images from prompts of text and images; the Python API.
buckets          Round batch and cache sizes to few values; turn out-of-memory errors into messages.
decode_loop      The compiled half of generation: five programs over one KV cache.
engine           A model with a KV cache: prefill with reuse of common prefixes, and scoring of
                 options.
grammar          The rule for the next token: text, BOI, exactly K codes, EOI, text again.
jacobi           Speculative Jacobi decoding of images: drafts, what replaces them, and which codes
                 are settled.
model_bundle     A model folder in memory: text and images to tokens, and tokens back to text and
                 images.
output_files     Read prompts from flags or a file; write answers to JSONL, PNG files and a gallery.
requests         The host half of generation before anything runs: validates prompts and creates
                 requests.
sampling         From logits to one token per row: the logit processors of Chameleon's inference
                 code, in order.
sampling_params  Validates the sampling options of a request and resolves them to settings of the
                 decode loop.
scheduler        Continuous batching: run a queue of requests through the rows of an engine.
slots            Bookkeeping for KV-cache slots: contents, use, and prefixes that can be reused.
"""

from medmax_jax.generation.api import (
    Chat,
    Score,
    as_completed,
    defaults,
    generate,
    generate_tokens,
    score,
    stream_chunks,
)
from medmax_jax.generation.model_bundle import (
    Image,
    ModelBundle,
    Text,
    decode,
    decode_segments,
    encode,
    from_model,
    load,
    prompt_tokens,
)
from medmax_jax.generation.requests import GenerateError

__all__ = [
    "Chat",
    "GenerateError",
    "Image",
    "ModelBundle",
    "Score",
    "Text",
    "as_completed",
    "decode",
    "decode_segments",
    "defaults",
    "encode",
    "from_model",
    "generate",
    "generate_tokens",
    "load",
    "prompt_tokens",
    "score",
    "stream_chunks",
]
