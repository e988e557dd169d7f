"""From a conversation of text and images to the tokens of a prompt.

    [["You see a scan.", image, "A CT?"], ["yes"], ["Of what?"]]
    ->  BOS "You see a scan." BOI codes EOI "A CT?" SEP "yes" SEP "Of what?" SEP

Turns alternate as in `generation.Chat`. The texts come from a client: unlike in `generation`, a
text is never looked up as a file.
"""

import collections
import hashlib
import threading
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
from jaxtyping import Int

from medmax_jax.generation.model_bundle import ModelBundle
from medmax_jax.generation.requests import GenerateError, check_fits_context, check_text
from medmax_jax.models import vocab as ids
from medmax_jax.models.tokenizer import prompt_ids

Part = str | PIL.Image.Image | np.ndarray  # text, an image, or the VQ codes of one
Codes = Int[np.ndarray, "K"]
KEPT_CODES = 512  # images whose codes are kept: chats send earlier images again


class CodeCache:
    """The VQ codes of the images that were used last; any thread may use it."""

    def __init__(self, encode: Callable[[list[PIL.Image.Image]], list[Codes]]) -> None:
        """Create an empty cache; `encode` computes the codes of new images."""
        self._encode = encode
        self._codes: collections.OrderedDict[str, Codes] = collections.OrderedDict()
        self._lock = threading.Lock()

    def codes(self, images: Sequence[PIL.Image.Image]) -> list[Codes]:
        """Return the codes of each image; equal images are encoded once."""
        keys = [_key(image) for image in images]
        with self._lock:
            found = {key: self._codes[key] for key in keys if key in self._codes}
        new = {k: image for k, image in zip(keys, images, strict=True) if k not in found}
        if new:
            found |= dict(zip(new, self._encode(list(new.values())), strict=True))
        with self._lock:
            for key in keys:
                self._codes[key] = found[key]
                self._codes.move_to_end(key)
            while len(self._codes) > KEPT_CODES:
                self._codes.popitem(last=False)
        return [found[key] for key in keys]


def check_turns(g: ModelBundle, turns: Sequence[Sequence[Part]]) -> None:
    """Raise GenerateError before anything is encoded: no text or image, or too many images."""
    parts = [part for turn in turns for part in turn]
    if not turns or not any(not isinstance(part, str) or part for part in turns[-1]):
        raise GenerateError("the last message is empty; it requires text or an image")
    for part in parts:
        if isinstance(part, str):
            check_text(part, where="the prompt")
        elif isinstance(part, np.ndarray) and part.size != g.vq_config.codes_per_image:
            raise GenerateError(
                f"an image has {part.size} codes; it must have {g.vq_config.codes_per_image}"
            )
    check_image_count(g, sum(not isinstance(part, str) for part in parts))


def check_image_count(g: ModelBundle, count: int) -> None:
    """Raise GenerateError where so many images do not fit into the context."""
    of_image, context = g.vq_config.codes_per_image + 2, g.config.context_length
    if count * of_image + 2 > context:
        raise GenerateError(
            f"the prompt has {count} images of {of_image} tokens each, but the context of the "
            f"model has {context} tokens; pass at most {(context - 2) // of_image}"
        )


def prompt_of_turns(g: ModelBundle, turns: Sequence[Sequence[str | Codes]]) -> Int[np.ndarray, "_"]:
    """Return the tokens of a conversation whose last turn is to be answered.

    Raises GenerateError where no answer fits, TokenizerError for the name of a control token.
    """
    tokens = [prompt_ids(g.tokenizer, turn, g.vocab, True)[1:] for turn in turns]
    prompt = np.concatenate([[ids.BOS], *tokens]).astype(np.int32)
    check_fits_context(
        len(prompt), mode="text", codes=g.vq_config.codes_per_image,
        context=g.config.context_length, where="the prompt",
    )  # fmt: skip
    return prompt


def _key(image: PIL.Image.Image) -> str:
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
