"""Defines every id of the Chameleon vocabulary and its meaning.

| ids               | meaning                                                          |
|-------------------|------------------------------------------------------------------|
| 0 / 1 / 2 / 3     | BOS <s>, PAD <pad>, EOS </s>, UNK <unk>                          |
| 4 .. 8195         | image codes, IMGIMG...Z; id = VQ code + 4                        |
| 8196 / 8197       | EOI <eoss> closes an image, BOI <racm3:break> opens one          |
| 8198 .. 8709      | <sentinel:0> .. <sentinel:511>                                   |
| 8710              | SEP <reserved08706>, end of turn                                 |
| 8711              | IMAGE <image> (<reserved08707> in the unmodified tokenizer)      |
| 8712 .. text_start-1 | <reservedN>, id = N + 4 (release: up to 16383; tiny: none)    |
| text_start .. size-1 | text BPE (release: 16384 .. 65535, "!" = 16384; tiny: from 8712) |

"release" is the MedMax release. Sources: Meta's Chameleon vocabulary and MedMax's tokenization
script. (HF config.json has bos_token_id 1, which is a stale default.)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from medmax_jax.config import Vocab

BOS, PAD, EOS, UNK = 0, 1, 2, 3
IMAGE_START = 4  # VQGAN code 0 is token 4
EOI, BOI = 8196, 8197
SENTINEL_START, NUM_SENTINELS = 8198, 512
SEP = 8710
IMAGE = 8711  # a placeholder in text; never a token of a finished document
RELEASED = Vocab(size=65_536, image_codes=8_192, text_start=16_384)
RELEASED_END = 8712  # ids below this are the release's in every vocabulary of the family
MAX_IMAGE_CODES = 8192


def image_token_name(code: int) -> str:
    """Return the checkpoint's name of a VQ code: decimal digits as A=0 .. J=9. 53 -> IMGIMGFDZ."""
    return "IMGIMG" + "".join(chr(ord("A") + int(d)) for d in str(code)) + "Z"


def special_names(text_start: int) -> dict[str, int]:
    """Map name to id for all ids below `text_start`, the first text id; with the image codes."""
    names = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<unk>": UNK}
    names |= {image_token_name(c): c + IMAGE_START for c in range(MAX_IMAGE_CODES)}
    names |= {"<eoss>": EOI, "<racm3:break>": BOI}
    names |= {f"<sentinel:{i}>": SENTINEL_START + i for i in range(NUM_SENTINELS)}
    names |= {"<reserved08706>": SEP, "<image>": IMAGE}
    names |= {f"<reserved{i - 4:05d}>": i for i in range(RELEASED_END, text_start)}
    return names


def is_image(ids: Int[Any, "*T"], vocab: Vocab) -> Bool[Any, "*T"]:
    """Return True at image codes (BOI and EOI are not codes), for NumPy and JAX arrays."""
    return (ids >= IMAGE_START) & (ids < IMAGE_START + vocab.image_codes)


def image_mask(vocab: Vocab) -> Bool[np.ndarray, "V"]:
    """Return True at the ids that are image codes of this family member."""
    return is_image(np.arange(vocab.size), vocab)


def is_barred_name(name: str) -> bool:
    """Return whether the MedMax release excludes a token of this name from generated text.

    Its `special_tokens` are all names that begin with "<", except "<" itself: this includes real
    tokens of the text BPE, such as "</" or "<sub>".
    """
    return name.startswith("<") and name != "<"


def text_mask(vocab: Vocab, barred: Sequence[int] = ()) -> Bool[np.ndarray, "V"]:
    """Return True at the ids that a text decoder may generate: EOS and unbarred BPE ids.

    barred: ids whose names are barred (`Tokenizer.barred`); () where there is no tokenizer.
    """
    ids = np.arange(vocab.size)
    allowed = (ids >= vocab.text_start) | (ids == EOS)
    allowed[list(barred)] = False
    return allowed


def codes_to_ids(codes: Int[np.ndarray, "*K"], vocab: Vocab) -> Int[np.ndarray, "*K"]:
    """Convert VQ codes to token ids; raise ValueError on a code outside the codebook."""
    codes = np.asarray(codes)
    if codes.size and (codes.min() < 0 or codes.max() >= vocab.image_codes):
        raise ValueError(
            f"VQ codes {codes.min()}..{codes.max()} are outside 0..{vocab.image_codes - 1}; "
            "use the VQGAN that belongs to this vocabulary"
        )
    return codes + IMAGE_START


def ids_to_codes(ids: Int[np.ndarray, "*K"], vocab: Vocab) -> Int[np.ndarray, "*K"]:
    """Convert token ids to VQ codes; raise ValueError on an id that is not an image code."""
    ids = np.asarray(ids)
    if not is_image(ids, vocab).all():
        invalid = ids[~is_image(ids, vocab)][0]
        raise ValueError(f"token {invalid} is not an image code (4..{vocab.image_codes + 3})")
    return ids - IMAGE_START


def check_ids(ids: Int[np.ndarray, "*T"], vocab: Vocab, *, where: str) -> None:
    """Raise ValueError when an id is outside the vocabulary; `where` is the document's name."""
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab.size):
        invalid = ids[(ids < 0) | (ids >= vocab.size)][0]
        raise ValueError(
            f"{where}: token {invalid} is outside 0..{vocab.size - 1}: "
            "the tokenizer does not belong to this model, or the record is damaged"
        )
