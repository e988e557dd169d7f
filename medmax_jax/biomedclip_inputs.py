"""What BiomedCLIP reads: pictures as open_clip's eval transform makes them, texts as WordPiece ids.

    picture -> short side = size, the other int(size * long / short), BICUBIC
            -> centre crop at round((side - size) / 2), halves to even -> / 255, normalised
    text    -> ftfy, HTML entities twice, spaces -> lower-case WordPiece -> CLS .. SEP, cut

Two orders of conversion to RGB. The right one converts first (images.to_rgb). `released` is what
MedMax's evaluation did: only RGBA is converted first, and alpha dropped; every other mode is
resized as it is, so a palette is resized by nearest neighbour and 16-bit grey saturates to white.
"""

import html
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Float32, Int32
from PIL import Image
from tokenizers import normalizers, pre_tokenizers, processors

from medmax_jax import images
from medmax_jax.biomedclip import PAD

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's, as in open_clip_config.json
STD = (0.26862954, 0.26130258, 0.27577711)
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD = 100  # characters; a longer word is [UNK], as in BERT


class InputError(ValueError):
    """A vocabulary or a text that cannot be used; the message says why and what to change."""


def pixels(image: Image.Image, *, size: int, released: bool) -> Float32[np.ndarray, "h w 3"]:
    """The normalised centre square; raises ImageError on a picture too narrow to be scaled."""
    if not released:
        image = images.to_rgb(image)
    elif image.mode == "RGBA":
        image = image.convert("RGB")
    short, long = min(image.size), max(image.size)
    scaled = tuple(size if side == short else int(size * long / short) for side in image.size)
    if scaled[0] * scaled[1] > images.MAX_PIXELS:
        raise images.ImageError(
            f"too narrow ({image.width} x {image.height} pixels); crop the picture"
        )
    if image.size != scaled:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in scaled)
    square = image.crop((left, top, left + size, top + size)).convert("RGB")
    values = np.asarray(square, np.float32) / np.float32(255)
    return (values - np.float32(MEAN)) / np.float32(STD)


class WordPiece:
    """The published vocabulary as a tokenizer of texts to rows of `context` ids."""

    def __init__(self, vocab: str | Path, *, size: int, context: int):
        """`size`: ids that the model has rows for."""
        words = _words(Path(vocab), size)
        self.context = context
        self._backend = tokenizers.Tokenizer(
            tokenizers.models.WordPiece(words, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD)
        )
        self._backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._backend.post_processor = processors.BertProcessing(
            ("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"])
        )
        self._backend.add_special_tokens(list(SPECIALS))
        self._backend.enable_truncation(context)
        self._backend.enable_padding(length=context, pad_id=PAD, pad_token="[PAD]")

    def ids(self, texts: Sequence[str]) -> Int32[np.ndarray, "n T"]:
        """A row each, cut or padded to `context`."""
        found = self._backend.encode_batch([clean(text) for text in texts])
        return np.array([row.ids for row in found], np.int32).reshape(len(texts), self.context)


def clean(text: str) -> str:
    """As open_clip: wrong encodings mended, entities, spaces. "a &amp;lt; b \\n c" -> "a < b c"."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _words(vocab: Path, size: int) -> dict[str, int]:
    try:
        lines = vocab.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{vocab}: cannot be read ({error}); name the vocab.txt of the published repository"
        ) from error
    words = {word: n for n, word in enumerate(lines)}
    if missing := [name for name in SPECIALS if name not in words]:
        raise InputError(f"{vocab}: has no {missing[0]}; name a vocab.txt of BERT, a word a line")
    if words["[PAD]"] != PAD:
        raise InputError(
            f"{vocab}: [PAD] is word {words['[PAD]']}, the model masks {PAD}; use the vocab.txt "
            "that was published with these weights"
        )
    if len(lines) != size or len(words) != size:
        raise InputError(
            f"{vocab}: {len(lines)} lines, {len(words)} words; the model has {size}; use the "
            "vocab.txt that was published with these weights"
        )
    return words
