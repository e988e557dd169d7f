"""Prompts to text and images.

api              Generation from Python: prompts of text and images to text, images or both, many
                 at a time.
buckets          A device without room says so in words: what was asked of it, and the mend.
decode_loop      The compiled half of generation: five programs over one cache of keys and values.
engine           A model with a cache of lanes: token lists into them without computing anything
                 twice; scoring.
grammar          Which token may come next: text, BOI, exactly K codes, EOI, text again; one
                 integer a row.
model_bundle     A model folder in memory: words and pictures to tokens, tokens back to words and
                 pictures.
output_files     Prompts from the shell or a file, and answers to files: JSONL, PNGs, a gallery; or
                 as they come.
requests         The host half of generation before anything runs: prompts to checked requests,
                 sizes to few.
sampling         From logits to one token a row: the processors of the Chameleon inference code, in
                 its order.
sampling_params  The sampling options of a request, checked: numbers and the static plan of the
                 decode loop.
scheduler        Continuous batching: a queue of requests through the rows of an engine.
slots            The book of a cache's lanes: which tokens each holds, who uses it, and what can be
                 taken over.
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
