"""Writes the inputs of true_size.py: random models, a tokenizer and a VQGAN in Meta's layout.

weights      the residual stream grows with depth and has a few large channels, as a trained
             model's; q/k-norm gains and biases differ from 1 and 0; logits have a std near 2
tokenizer    65,536 ids in the published layout; text learned from this project's own files and
             filled up with random merges
VQGAN        random kernels, gains and biases; the codebook is latents of real images and noise,
             so that other images use most of it
"""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import yaml

from medmax_jax.checkpoints import safetensors_file, torch_file
from medmax_jax.config import VQ
from medmax_jax.convert import hf
from medmax_jax.convert import vqgan as vqgan_layout
from medmax_jax.data.sample.documents import (
    eval_items,
    instruction_documents,
    pretraining_documents,
)
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.models import images, tokenizer, vocab, vqgan
from medmax_jax.models.vqgan import RELEASED

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
GROWTH = 1.12  # of what a layer adds to the stream, from one layer to the next
LARGE_CHANNELS, LARGE = 2, 60.0  # channels that layers write this much more to
LOGITS_STD = 2.0
CODEBOOK_NOISE = 0.3  # x the latents' std
DOCUMENT_IMAGES, CODEBOOK_IMAGES = 8, 4
EVAL_IMAGES, EVAL_ITEMS = 2, 8
SHORT_TEXTS = 24  # documents without an image
BLOCK = 1 << 24  # numbers drawn at a time

Source = tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of a model in Meta's words, and its VQGAN."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    shards: int
    swin: bool
    vq: VQ


TRUE = Size(
    dim=4_096, layers=32, heads=32, kv_heads=32, ffn=11_008, shards=1, swin=False, vq=RELEASED
)
LARGE_LAYER = Size(  # one layer of the 30B at its widths
    dim=8_192, layers=1, heads=64, kv_heads=8, ffn=22_016, shards=4, swin=True, vq=RELEASED
)
_SMOKE_VQ = dataclasses.replace(
    RELEASED, image_size=64, channels=32, channel_mult=(1, 1, 2, 2), z_channels=32, embed_dim=32,
    num_codes=256, num_res_blocks=1,
)  # fmt: skip
SMOKE = dataclasses.replace(TRUE, dim=128, layers=2, heads=4, kv_heads=4, ffn=384, vq=_SMOKE_VQ)
SMOKE_LAYER = dataclasses.replace(LARGE_LAYER, dim=128, heads=16, kv_heads=4, ffn=384, vq=_SMOKE_VQ)


def write_meta(folder: pathlib.Path, size: Size, *, seed: int) -> int:
    """Write the language model in Meta's layout, without its tokenizer; return its bytes."""
    models = folder / "models" / "7b"
    models.mkdir(parents=True)
    settings = dict(
        dim=size.dim, n_layers=size.layers, n_heads=size.heads, n_kv_heads=size.kv_heads,
        vocab_size=vocab.RELEASED.size, norm_eps=1e-5, rope_theta=1e4, qk_normalization=True,
        swin_norm=size.swin, multiple_of=size.ffn,
        ffn_dim_multiplier=min(1.0, size.ffn / int(8 * size.dim / 3)),
    )  # fmt: skip
    (models / "params.json").write_text(json.dumps({"model": settings}))
    (models / "consolidate_params.json").write_text(
        json.dumps({"model_parallel_size": size.shards})
    )
    total = 0
    for shard in range(size.shards):
        name = "consolidated.pth" if size.shards == 1 else f"consolidated.{shard:02}.pth"
        with open(models / name, "wb") as out:
            torch_file.write(out, _tensors(size, shard, seed), wrap=None)
            out.flush()
            os.fsync(out.fileno())
        total += (models / name).stat().st_size
    return total


def _tensors(size: Size, shard: int, seed: int) -> Iterator[Source]:
    """Yield the tensors of one file; copies are equal in all files, parts are not."""
    d, n, h = size.dim, size.shards, size.dim // size.heads
    wide, narrow, ffn = size.heads * h // n, size.kv_heads * h // n, size.ffn // n
    numbers: dict[str, int] = {}
    large = np.random.default_rng(seed).choice(d, LARGE_CHANNELS, replace=False)

    def tensor(name: str, *shape: int, std: float, mean: float = 0.0, copy=False, rows=None):
        number = numbers.setdefault(name, len(numbers))
        rng = np.random.Generator(np.random.SFC64([seed, number, 0 if copy else shard]))
        return name, shape, "BF16", lambda: _draw(rng, shape, std, mean, rows)

    into, gain = d**-0.5, dict(std=0.2, mean=1.0, copy=True)
    yield tensor("tok_embeddings.weight", vocab.RELEASED.size, d // n, std=1.0)
    for i in range(size.layers):
        at, grown = f"layers.{i}.", 0.5 * GROWTH**i
        yield tensor(f"{at}attention.wq.weight", wide, d, std=into)
        yield tensor(f"{at}attention.wk.weight", narrow, d, std=into)
        yield tensor(f"{at}attention.wv.weight", narrow, d, std=into)
        yield tensor(f"{at}attention.wo.weight", d, wide, std=2 * grown * into, rows=large)
        for each in "qk":
            yield tensor(f"{at}attention.{each}_normalization.weight", h, std=0.2, mean=1.2)
            yield tensor(f"{at}attention.{each}_normalization.bias", h, std=0.2)
        yield tensor(f"{at}attention_norm.weight", d, **gain)
        yield tensor(f"{at}ffn_norm.weight", d, **gain)
        yield tensor(f"{at}feed_forward.w1.weight", ffn, d, std=into)
        yield tensor(f"{at}feed_forward.w3.weight", ffn, d, std=into)
        std = 2 * grown * size.ffn**-0.5
        yield tensor(f"{at}feed_forward.w2.weight", d, ffn, std=std, rows=large)
    yield tensor("norm.weight", d, **gain)
    yield tensor("output.weight", vocab.RELEASED.size // n, d, std=LOGITS_STD * into)


def _draw(rng: np.random.Generator, shape, std: float, mean: float, rows) -> np.ndarray:
    """Return normal numbers in bfloat16; `rows` are LARGE times larger."""
    out = np.empty(int(np.prod(shape)), ml_dtypes.bfloat16)
    for start in range(0, out.size, BLOCK):
        part = rng.standard_normal(min(BLOCK, out.size - start), np.float32)
        out[start : start + BLOCK] = (mean + std * part).astype(ml_dtypes.bfloat16)
    out = out.reshape(shape)
    if rows is not None:
        out[rows] = (out[rows].astype(np.float32) * LARGE).astype(ml_dtypes.bfloat16)
    return out


def write_tokenizer(folder: pathlib.Path) -> None:
    """Write text_tokenizer.json and its modified copy, with every id of the published layout."""
    texts = [p.read_text() for p in sorted((ROOT / "docs").rglob("*.md"))]
    texts += [p.read_text() for p in sorted((ROOT / "medmax_jax").rglob("*.py"))]
    spec = json.loads(tokenizer.train(texts, vocab.RELEASED))
    names, merges = spec["model"]["vocab"], spec["model"]["merges"]
    pieces = [name for name, i in names.items() if i >= vocab.RELEASED.text_start]
    pieces = [p for p in pieces if p.isalpha() and p.isascii()]
    rng, size = np.random.default_rng(0), vocab.RELEASED.size
    while len(names) < size:
        left, right = (pieces[i] for i in rng.integers(len(pieces), size=2))
        if left + right not in names:
            names[left + right] = len(names)
            merges.append([left, right])
            pieces.append(left + right)
    if sorted(names.values()) != list(range(size)):
        raise SystemExit("the ids of the tokenizer have gaps")
    raw = json.dumps(spec, ensure_ascii=False).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text_tokenizer.json").write_bytes(hf.to_meta_tokenizer(raw))
    (folder / "text_tokenizer_modified.json").write_bytes(hf.to_medmax_tokenizer(raw))


def chosen_images() -> dict[str, list[str]]:
    """Return image files of the sample's training split: one of each modality, and others."""
    rows = [r for r in read_manifest(SAMPLE / "manifest.jsonl") if r["split"] == "train"]
    count = collections.Counter(row["modality"] for row in rows)
    first = {row["modality"]: row["file"] for row in reversed(rows)}
    documents = sorted(first[m] for m, _ in count.most_common(DOCUMENT_IMAGES))
    others = [row["file"] for row in rows if row["file"] not in documents]
    return dict(
        documents=documents, codebook=others[:: len(others) // CODEBOOK_IMAGES][:CODEBOOK_IMAGES]
    )


def write_documents(folder: pathlib.Path, files: list[str]) -> None:
    """Write documents.jsonl, one of each task and image and short texts, and the images."""
    rows = [r for r in read_manifest(SAMPLE / "manifest.jsonl") if r["file"] in files]
    texts = {(d["task"], d["image_path"]): d for d in instruction_documents(rows, seed=0)}
    short = [d for d in pretraining_documents(rows, seed=0) if not d["image_path"]]
    lines = [json.dumps(text) + "\n" for text in [*texts.values(), *short[:SHORT_TEXTS]]]
    (folder / "documents.jsonl").write_text("".join(lines))
    for file in files:
        target = folder / "images" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((SAMPLE / file).read_bytes())


def write_items(folder: pathlib.Path) -> None:
    """Write items.jsonl: eight closed and multiple-choice questions about two images."""
    items = eval_items(read_manifest(SAMPLE / "manifest.jsonl"), seed=0)
    asked: dict[str, list[dict]] = {}
    for item in items:
        if item["question_type"] in ("closed", "mcq"):
            asked.setdefault(item["image_path"], []).append(item)
    most = sorted(asked.values(), key=len)[-EVAL_IMAGES:]
    chosen = [item for of_image in most for item in of_image[: EVAL_ITEMS // EVAL_IMAGES]]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in chosen))


def pixels_of(files: list[str], size: int) -> np.ndarray:
    """Return preprocessed images, [b, h, w, 3]."""
    return np.stack(
        [images.preprocess(images.load(SAMPLE / f, max_pixels=10**8), size) for f in files]
    )


def write_vqgan(folder: pathlib.Path, vq: VQ, *, files: list[str], seed: int) -> None:
    """Write vqgan.ckpt and vqgan.yaml; the codebook is of the latents of `files`."""
    rng, state = np.random.default_rng(seed), {}
    for name, shape in vqgan_layout.shapes(vq, decoder=True).items():
        numbers = rng.standard_normal(shape, np.float32)
        if len(shape) == 4:
            state[name] = numbers * np.prod(shape[1:]) ** -0.5
        elif "norm" in name and name.endswith("weight"):
            state[name] = 1 + 0.2 * numbers
        else:
            state[name] = 0.1 * numbers
    model, encode = _native(state, vq), jax.jit(lambda m, x: m.latents(x))
    latents = []
    for file in files:
        latents.append(np.asarray(encode(model, jnp.asarray(pixels_of([file], vq.image_size)))))
        print(f"latents of {file}", flush=True)
    rows = np.resize(
        np.concatenate(latents).reshape(-1, vq.embed_dim), (vq.num_codes, vq.embed_dim)
    )
    rows += CODEBOOK_NOISE * rows.std() * rng.standard_normal(rows.shape, np.float32)
    state["quantize.embedding.weight"] = rows.astype(np.float32)
    state["loss.discriminator.main.0.weight"] = np.ones((2, 3, 4, 4), np.float32)
    entries = [(n, a.shape, "F32", lambda a=a: a.astype(np.float32)) for n, a in state.items()]
    with open(folder / "vqgan.ckpt", "wb") as out:
        torch_file.write(out, entries, wrap="state_dict")
    net = dict(
        double_z=False, z_channels=vq.z_channels, resolution=vq.image_size, in_channels=3, out_ch=3,
        ch=vq.channels, ch_mult=list(vq.channel_mult), num_res_blocks=vq.num_res_blocks,
        attn_resolutions=[], dropout=0.0,
    )  # fmt: skip
    params = dict(embed_dim=vq.embed_dim, n_embed=vq.num_codes, ddconfig=net)
    (folder / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))


def _native(state: dict[str, np.ndarray], vq: VQ) -> vqgan.VQGAN:
    """Return the encoder with these weights of taming's names."""
    like = vqgan.abstract(vq)
    places = {location.name: taming for taming, location in vqgan_layout.key_map(vq).items()}
    leaves = []
    for name in safetensors_file.flatten_named(like):
        array = state[places[name]].astype(np.float32)
        leaves.append(jnp.asarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
