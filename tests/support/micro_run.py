"""A run small enough for any test: two layers of width 32, images of 2 x 2 codes."""

import pathlib

import numpy as np

from medmax_jax import config
from medmax_jax.configs import base
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Document, Layout
from medmax_jax.models.vocab import BOI, BOS, EOI, EOS, IMAGE_START, SEP

TEXT_START = 8_712


def settings(**changes: object):
    """A ConfigDict; `changes` are dotted names with double underscores: train__steps=3."""
    c = base.get_config()
    c.vocab.update(size=TEXT_START + 64, image_codes=16, text_start=TEXT_START)
    c.model.update(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=64,
        context_length=64,
        param_dtype="float32",
        quant="none",
        compute_dtype="float32",
        remat="none",
    )
    c.vq.update(image_size=4, channels=32, channel_mult=(1, 1), num_codes=16, norm_groups=32)
    c.lora.update(rank=4, alpha=4.0, dropout=0.1)
    c.data.update(train="", validation="", document_limit=32, seq_len=32, batch_size=8)
    c.optim.update(peak_lr=1e-2)
    c.train.update(steps=5, log_every=1, eval_every=0, checkpoint_every=2, keep=2)
    for name, value in changes.items():
        section, field = name.split("__")
        c[section][field] = value
    return c


def run(**changes: object) -> config.Run:
    return config.from_config_dict(settings(**changes))


def documents(count: int, seed: int) -> list[Document]:
    """Text, images and turns in turn: lengths of 6 to 24 tokens, every id below the vocabulary."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        question, answer = (
            rng.integers(TEXT_START, TEXT_START + 64, rng.integers(2, 9)) for _ in "qa"
        )
        image = [BOI, *(rng.integers(0, 16, 4) + IMAGE_START), EOI]
        parts = {
            0: [*question, SEP, *answer],
            1: [*image, *question, SEP, *answer],
            2: [*question, SEP, *answer[:2], *image],
            3: [*image, *answer],  # pretraining: no separator
        }[n % 4]
        tokens = np.array([BOS, *parts, EOS], np.int32)
        made.append(
            Document(
                tokens=tokens,
                image_path="",
                task="VQA",
                source="generated",
                credential="no",
                turns=int(n % 4 != 3),
                group=str(n),
                id=f"{seed}-{n}",
            )  # fmt: skip
        )
    return made


def write(folder: pathlib.Path, count: int = 40, seed: int = 0) -> str:
    """A folder of records; returns its path for config.data."""
    layout = Layout(vocab=run().vocab, codes_per_image=4, tokenizer="", vqgan="")
    writer.write(folder, documents(count, seed), shard_size=16, layout=layout, notes={})
    return str(folder)
