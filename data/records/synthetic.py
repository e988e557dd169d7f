"""Make records as long as MedMax's, any number, from random ids: for benchmarks and tests.

    BOS BOI 1024 codes EOI question SEP answer EOS       at least 1,034 tokens, 1,156 on average

The mixture's lengths are not published. Known are its mean (1.7 B tokens in 1.47 M documents) and
that an image has 1,026 tokens. The length model assumes nothing more: above the minimum, every
further token is equally likely to be the last (geometric distribution). Sources and tasks have the
published shares, and an image has two documents (1.47 M with 725 K images).
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from medmax_jax.data.mixture import SOURCES
from medmax_jax.data.records.document import Document, Layout
from medmax_jax.models.vocab import BOI, BOS, EOI, EOS, IMAGE_START, RELEASED, SEP

LEAST, MEAN = 1_034, 1_156  # tokens of a document
LAYOUT = Layout(
    vocab=RELEASED,
    codes_per_image=1_024,
    tokenizer="synthetic",
    vqgan="synthetic",
)


def lengths(count: int, *, seed: int) -> Int[np.ndarray, "n"]:
    """Return the number of tokens of `count` documents."""
    rng = np.random.default_rng(seed)
    return LEAST - 1 + rng.geometric(1 / (MEAN - LEAST + 1), count)


def documents(count: int, *, seed: int) -> Iterator[Document]:
    """Yield `count` documents of those lengths."""
    vocab, rng = LAYOUT.vocab, np.random.default_rng([seed, 1])
    shares = np.array([source.percent for source in SOURCES])
    sources = rng.choice(len(SOURCES), count, p=shares / shares.sum())
    for n, length in enumerate(lengths(count, seed=seed)):
        image_path = f"{n // 2:07d}.png"
        codes = np.random.default_rng([seed, 2, n // 2]).integers(0, vocab.image_codes, 1_024)
        text = rng.integers(vocab.text_start, vocab.size, length - 1_029).astype(np.int32)
        question, answer = np.split(text, [len(text) // 3])
        image = [BOI], codes + IMAGE_START, [EOI]
        tokens = np.concatenate([[BOS], *image, question, [SEP], answer, [EOS]])
        source = SOURCES[sources[n]]
        yield Document(
            tokens=tokens.astype(np.int32),
            image_path=image_path,
            task=source.tasks[n % len(source.tasks)],
            source=source.name,
            credential="no",
            turns=1,
            group=image_path,
            id=f"synthetic-{seed}-{n}",
        )
