"""Defines the token streams that guidance compares where an image is generated.

    sequence        BOS BOI p p EOI text SEP BOI c c      its open image begins at the second BOI
    FULL            BOS BOI p p EOI text SEP BOI c c
    UNCONDITIONAL   BOS                      BOI c c
    IMAGE_ONLY      BOS BOI p p EOI          BOI c c
    TEXT_ONLY       BOS             text SEP BOI c c

Decoding feeds the first three to the model and combines their logits (generation/sampling.py).
Training with data.condition_dropout replaces documents by the last three, so that the model is
trained on what guidance asks it. TEXT_ONLY is the full stream of a prompt without images.
"""

import numpy as np
from jaxtyping import Int

from medmax_jax.config import Vocab
from medmax_jax.models.vocab import BOI, BOS, EOI, is_image

STREAMS = ("full", "unconditional", "image_only", "text_only")
FULL, UNCONDITIONAL, IMAGE_ONLY, TEXT_ONLY = range(len(STREAMS))


def guidance_stream(
    tokens: Int[np.ndarray, "T"], opened: int, stream: int, vocab: Vocab
) -> Int[np.ndarray, "_"]:
    """Return what a stream holds of a sequence whose last image opens at index `opened`.

    `opened` is the index of BOI, or the length of the sequence if BOI is the next token.
    """
    if stream == UNCONDITIONAL:
        return np.append(tokens[:1], tokens[opened:])
    of_image = np.isin(tokens, (BOI, EOI)) | is_image(tokens, vocab)
    if stream == IMAGE_ONLY:
        return tokens[of_image | (tokens == BOS)]
    if stream == TEXT_ONLY:
        return tokens[~of_image | (np.arange(len(tokens)) >= opened)]
    return tokens
