"""Fixtures of the generation tests: a micro model, and generation by its definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from medmax_jax.checkpoints import safetensors_file
from medmax_jax.config import VQ, Lora, Model, Sample, Vocab
from medmax_jax.generation import grammar
from medmax_jax.models import vocab as ids

VOCAB = Vocab(size=8_712 + 264, image_codes=16, text_start=8_712)
MODEL = Model(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    context_length=64,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    qk_norm_eps=1e-5,
    qk_norm_shards=1,
    swin_norm=False,
    param_dtype="float32",
    quant="none",
    compute_dtype="float32",
    remat="none",
    attention="xla",
)
VQ_CONFIG = VQ(  # 2 x 2 codes
    image_size=4,
    channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    z_channels=8,
    embed_dim=8,
    num_codes=16,
    norm_groups=32,
    view="released",
    answer_view="released",
)
CODES = 4
SAMPLE = Sample(
    text_temperature=1.0,
    text_top_p=0.9,
    text_greedy=True,
    repetition_penalty=1.2,
    image_temperature=0.7,
    image_top_p=0.9,
    image_greedy=False,
    guidance_scale_text=3.0,
    guidance_scale_image=1.2,
    max_gen_len=12,
    budget="answer",
    boi_ends=False,
    jacobi_window=0,
    jacobi_rule="gumbel",
    jacobi_init="vertical",
    seed=0,
)
DRAWN = dataclasses.replace(SAMPLE, text_greedy=False, text_temperature=1.3)
LORA = Lora(rank=2, alpha=4.0, dropout=0.0)


def noise(like, *, std):
    """Return random weights by name; gains are about 1."""
    rng = np.random.default_rng(3)
    return {
        name: (rng.normal(0, std, x.shape) + name.endswith("scale")).astype(np.float32)
        for name, x in safetensors_file.flatten_named(like).items()
    }


def prompts(count=5):
    """Return token prompts of different lengths; the odd ones contain an image."""
    rng, tokens = np.random.default_rng(0), []
    for i in range(count):
        text = rng.integers(VOCAB.text_start, VOCAB.size, 3 + 4 * i)
        image = np.r_[ids.BOI, rng.integers(4, 20, CODES), ids.EOI]
        parts = [[ids.BOS], image if i % 2 else [], text, [ids.SEP]]
        tokens.append(np.concatenate(parts).astype(np.int32))
    return tokens


class Plain:
    """Generation by its definition: a full forward for each token, numpy processors."""

    def __init__(self, g):
        self.g = g

        @jax.jit
        def forward(model, tokens, real):
            positions = jnp.arange(MODEL.context_length)[None]
            hidden = model.hidden(tokens, real.astype(np.int32), positions, key=None)
            return model.logits(hidden)

        self.forward = forward

    def logits(self, tokens):
        row = np.zeros((1, MODEL.context_length), np.int32)
        row[0, : len(tokens)] = tokens
        real = np.arange(MODEL.context_length)[None] < len(tokens)
        with jax.set_mesh(self.g.mesh):
            return np.asarray(self.forward(self.g.model, row, real))[0, len(tokens) - 1]

    def text(self, tokens, sample, mode, key):
        scores = self.logits(tokens)
        allowed = grammar.text_ids(VOCAB, mode=mode).copy()
        if len(tokens) >= MODEL.context_length - (CODES + 2):
            allowed[ids.BOI] = False
        scores = np.where(allowed, scores, -np.inf)
        for token in set(tokens):
            p = sample.repetition_penalty
            scores[token] = scores[token] * p if scores[token] < 0 else scores[token] / p
        if sample.text_greedy:
            return int(scores.argmax())
        return draw(scores / sample.text_temperature, sample.text_top_p, key)

    def code(self, tokens, sample, key):
        kept = (ids.BOS, ids.BOI, ids.EOI)
        last = len(tokens) - 1 - tokens[::-1].index(ids.BOI)
        full = self.logits(tokens)
        image = self.logits([t for t in tokens if t in kept or 4 <= t < 20])
        none = self.logits([ids.BOS, *tokens[last:]])
        scores = none + sample.guidance_scale_image * (image - none)
        scores = (scores + sample.guidance_scale_text * (full - image))[4:20]
        if sample.image_greedy:
            return 4 + int(scores.argmax())
        return 4 + draw(scores / sample.image_temperature, sample.image_top_p, key)

    def answer(self, prompt, sample, mode, number):
        tokens, out, left, spent = prompt.tolist(), [], 0, 0
        if mode == "image":
            tokens, left = [*tokens, ids.BOI], CODES + 1
        row = jax.random.fold_in(jax.random.key(7), number)
        while True:
            key = jax.random.fold_in(row, len(out))
            if left == 0:
                token, spent = self.text(tokens, sample, mode, key), spent + 1
                left = CODES + 1 if token == ids.BOI else 0
                if left and sample.boi_ends:
                    return [*out, token]
            else:
                token = ids.EOI if left == 1 else self.code(tokens, sample, key)
                left -= 1
                spent = 0 if left == 0 and sample.budget == "segment" else spent
            tokens, out = [*tokens, token], [*out, token]
            if mode == "image" and left == 1:
                return out
            full = spent >= sample.max_gen_len or len(tokens) >= MODEL.context_length
            if left == 0 and mode != "image" and (token == ids.EOS or full):
                return out


def draw(scores, p, key):
    order = np.argsort(-scores)
    probabilities = np.exp(scores - scores.max())
    mass = np.cumsum((probabilities / probabilities.sum())[order])
    dropped = order[1:][mass[:-1] >= p]
    scores = scores.copy()
    scores[dropped] = -np.inf
    return int(jax.random.categorical(key, scores.astype(np.float32)))
