"""The rule for the next token: text, BOI, exactly K codes, EOI, text again.

The state is one integer per row:

    left = 0         in text       text ids and EOS; in mixed mode also BOI, while an image fits;
                                   no id whose name is barred (vocab.is_barred_name)
    left = K+1 .. 2  in an image   image ids; left - 1 codes are still to come
    left = 1         image full    EOI, and nothing else

    mixed, K = 2:   token   "A"  BOI   c    c   EOI  "b"  EOS
                    left     0    3    2    1    0    0    0      after the token

SEP, the sentinels and the padding are never generated. An image is started only where it
fits, so every sequence of this grammar parses: no image is ever truncated.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from medmax_jax.config import Vocab
from medmax_jax.models import vocab as ids

MODES = ("text", "image", "mixed")


def text_ids(vocab: Vocab, *, mode: str, barred: Sequence[int] = ()) -> Bool[np.ndarray, "V"]:
    """Return a mask of the ids that may appear in text: the BPE ids, EOS, and in mixed mode BOI.

    barred: ids that are excluded by their names; see `vocab.text_mask`.
    """
    allowed = ids.text_mask(vocab, barred)
    allowed[ids.BOI] = check_mode(mode) == "mixed"
    return allowed


def allowed(
    left: Int[Array, "B"],
    length: Int[Array, "B"],
    opens_images: Bool[Array, "B"],
    *,
    vocab: Vocab,
    codes: int,
    context: int,
    barred: Sequence[int] = (),
) -> Bool[Array, "B V"]:
    """Return the complete rule as one mask: what may follow `length` tokens in state `left`.

    opens_images: whether text may open an image, as in mixed mode. codes: K. context: the number of
    tokens that the model can hold. barred: see `text_ids`.
    """
    token_ids = jnp.arange(vocab.size)
    opens = (opens_images & image_fits(length, codes=codes, context=context))[:, None]
    text = text_ids(vocab, mode="mixed", barred=barred) & (opens | (token_ids != ids.BOI))
    image = jnp.asarray(ids.image_mask(vocab))
    closing = token_ids == ids.EOI
    state = left[:, None]
    return jnp.where(state == 0, text, jnp.where(state == 1, closing, image))  # [B, V]


def image_fits(length: Int[Array, "B"], *, codes: int, context: int) -> Bool[Array, "B"]:
    """Return whether BOI, the codes, EOI and one more token fit after `length` tokens.

    The rule of the MedMax release: BOI is blocked from length 3,070 = 4,096 - (1,024 + 2) on.
    """
    return length < context - (codes + 2)


def start(last: Int[Array, "B"], *, codes: int) -> Int[Array, "B"]:
    """Return the state after a prompt whose last token is `last`: in an image if it is BOI."""
    return jnp.where(last == ids.BOI, codes + 1, 0)


def advance(left: Int[Array, "B"], token: Int[Array, "B"], *, codes: int) -> Int[Array, "B"]:
    """Return the state after one more token.

    With K = 2: (0, BOI) -> 3, (3, code) -> 2, (1, EOI) -> 0.
    """
    return jnp.where(left > 0, left - 1, start(token, codes=codes))


def check_mode(mode: str) -> str:
    """Return the mode unchanged; raise ValueError when it does not exist."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
    return mode


def parses(
    tokens: Int[np.ndarray, "T"], vocab: Vocab, *, codes: int, barred: Sequence[int] = ()
) -> bool:
    """Return whether text and complete images alternate as required; checks a finished answer."""
    text, left = ids.text_mask(vocab, barred), 0
    for token in tokens.tolist():
        if left > 1:
            valid = bool(ids.is_image(np.asarray(token), vocab))
        elif left == 1:
            valid = token == ids.EOI
        else:
            valid = bool(text[token]) or token == ids.BOI
        if not valid:
            return False
        left = left - 1 if left else (codes + 1 if token == ids.BOI else 0)
    return left == 0
