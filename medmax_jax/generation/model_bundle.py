"""A model folder in memory: text and images to tokens, and tokens back to text and images.

g = load(folder, adapter=...)
prompt_tokens(g, [[image, "A CT?"]])  ->  BOS BOI 64 codes EOI "A CT?" SEP
decode_segments(g, [tokens])          ->  [[Text("yes")]]
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from medmax_jax import sharding
from medmax_jax.checkpoints import export, safetensors_file
from medmax_jax.config import VQ, ConfigError, Lora, Mesh, Model, Vocab, build, check_model
from medmax_jax.generation import buckets
from medmax_jax.generation.requests import (
    GenerateError,
    check_no_path,
    check_text,
    require_local_mesh,
)
from medmax_jax.io.errors import quoted
from medmax_jax.io.text_files import TextFileError, read_json_object
from medmax_jax.models import chameleon, images, vqgan
from medmax_jax.models import vocab as ids
from medmax_jax.models.tokenizer import Tokenizer, prompt_ids, split_segments

# Text, an image file, an image, or the VQ codes of an image.
PromptPart = str | Path | PIL.Image.Image | np.ndarray

VQGAN_BATCH = 8  # images per VQGAN call
MAX_PIXELS = 64_000_000  # of an image in a prompt; a larger file is more likely a mistake


@dataclasses.dataclass(frozen=True)
class Text:
    """A text segment of an answer."""

    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """An image of an answer, and the codes that it was decoded from."""

    image: PIL.Image.Image
    codes: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ModelBundle:
    """A model folder in memory, with or without an adapter."""

    model: chameleon.Chameleon
    vq: vqgan.VQGAN
    tokenizer: Tokenizer
    vocab: Vocab
    config: Model
    vq_config: VQ
    mesh: jax.sharding.Mesh


def load(
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    merge: bool = False,
    dtype: str | None = None,
) -> ModelBundle:
    """Load a model folder, and an adapter that was trained on exactly its weights.

    Args:
        folder: the model folder; medmax_jax/tiny is the shipped one.
        adapter: the folder of the adapter, or of the training run that wrote it;
            medmax_jax/tiny_adapter is the shipped one.
        mesh: None: one device of this host.
        merge: add the product of the adapter's factors to the base once, instead of computing it
            separately in each forward pass.
        dtype: of the weights and of the computation, float32 or bfloat16; None: as config.json
            states.
    """
    mesh = mesh or sharding.local_mesh(Mesh(data=1, fsdp=1, tp=1))
    require_local_mesh(mesh)
    if merge and adapter is None:
        raise GenerateError(
            "merge (--merge) adds an adapter to the base; set adapter (--adapter) too"
        )
    source, folder = export.locate(folder), export.local_copy(folder)
    settings = _json(
        folder / "config.json",
        "a model folder contains config.json, model.safetensors and tokenizer.json",
    )
    try:
        model, vocab, vq = (
            build(cls, settings.get(name))
            for cls, name in ((Model, "model"), (Vocab, "vocab"), (VQ, "vq"))
        )
        check_model(model, vocab, vq)
    except ConfigError as error:
        raise GenerateError(f"{folder / 'config.json'}: {error}") from error
    if dtype is not None:
        if dtype not in ("float32", "bfloat16"):
            raise GenerateError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
        model = dataclasses.replace(model, param_dtype=dtype, compute_dtype=dtype)
    with jax.set_mesh(mesh):
        size = buckets.tree_bytes(chameleon.abstract_model(model, vocab, chameleon.NO_LORA))
        with buckets.explain_out_of_memory(
            f"the weights in {folder} need {buckets.format_mib(size)}",
            "use more devices (--config.mesh.fsdp, --config.mesh.tp) or convert the model with "
            "--quant",
        ):
            weights = jax.block_until_ready(_load_model(source, adapter, model, vocab, merge))
    return from_model(weights, folder, config=model, vocab=vocab, vq=vq, mesh=mesh)


def from_model(
    model: chameleon.Chameleon,
    folder: str | Path,
    *,
    config: Model,
    vocab: Vocab,
    vq: VQ,
    mesh: jax.sharding.Mesh,
) -> ModelBundle:
    """Return a bundle of a model in memory and the tokenizer and VQGAN of a model folder."""
    require_local_mesh(mesh)
    folder = export.local_copy(folder)
    with jax.set_mesh(mesh):
        return ModelBundle(
            model=model,
            vq=_load_vqgan(folder / "vqgan.safetensors", vq),
            tokenizer=Tokenizer.from_file(folder / "tokenizer.json", vocab),
            vocab=vocab,
            config=config,
            vq_config=vq,
            mesh=mesh,
        )


def prompt_tokens(
    g: ModelBundle, prompts: Sequence[Sequence[PromptPart]], *, end_of_turn: bool
) -> list[Int[np.ndarray, "_"]]:
    """Return each prompt as token ids; an image that several prompts contain is encoded once."""
    for index, prompt in enumerate(prompts):
        _check_parts(prompt, g.vq_config.codes_per_image, where=f"prompt {index}")
    image_parts = {
        _key(part): part
        for prompt in prompts
        for part in prompt
        if not isinstance(part, str | np.ndarray)
    }
    codes = dict(zip(image_parts, encode(g, list(image_parts.values())), strict=True))
    return [
        prompt_ids(g.tokenizer, [codes.get(_key(p), p) for p in prompt], g.vocab, end_of_turn)
        for prompt in prompts
    ]


def encode(
    g: ModelBundle, image_parts: Sequence[Path | PIL.Image.Image]
) -> list[Int[np.ndarray, "K"]]:
    """Return the VQ codes of images, row by row from the top left."""
    codes = []
    for start in range(0, len(image_parts), VQGAN_BATCH):
        batch = [
            images.load(part, max_pixels=MAX_PIXELS) if isinstance(part, Path) else part
            for part in image_parts[start : start + VQGAN_BATCH]
        ]
        pixels = np.stack([images.preprocess(image, g.vq_config.image_size) for image in batch])
        with jax.set_mesh(g.mesh), _explain_out_of_memory(g, len(batch)):
            encoded = np.asarray(vqgan.encode(g.vq, _pad_rows(pixels, VQGAN_BATCH)))
        codes += list(encoded[: len(batch)].reshape(len(batch), -1))
    return codes


def decode(g: ModelBundle, codes: Sequence[Int[np.ndarray, "K"]]) -> list[PIL.Image.Image]:
    """Return the images of VQ codes; raise GenerateError if the model folder has no decoder."""
    if len(codes):
        check_decoder(g)
    side, decoded = g.vq_config.codes_per_side, []
    for start in range(0, len(codes), VQGAN_BATCH):
        batch = np.stack(codes[start : start + VQGAN_BATCH]).reshape(-1, side, side)
        with jax.set_mesh(g.mesh), _explain_out_of_memory(g, len(batch)):
            pixels = vqgan.decode_codes(g.vq, _pad_rows(batch, VQGAN_BATCH))
            pixels = np.asarray(vqgan.to_uint8(pixels))[: len(batch)]
        decoded += [PIL.Image.fromarray(image) for image in pixels]
    return decoded


def decode_segments(
    g: ModelBundle, answers: Sequence[Int[np.ndarray, "_"]]
) -> list[list[Text | Image]]:
    """Decode tokens to text segments and codes to images; an empty answer is one empty Text."""
    segments, codes = [], []
    for tokens in answers:
        parts = split_segments(tokens, g.vocab)
        codes += [content for kind, content in parts if kind == "image"]
        segments.append(parts or [("text", tokens[:0])])
    decoded = iter(zip(decode(g, codes), codes, strict=True))
    return [
        [
            Text(g.tokenizer.decode(content)) if kind == "text" else Image(*next(decoded))
            for kind, content in parts
        ]
        for parts in segments
    ]


def _explain_out_of_memory(g: ModelBundle, count: int) -> contextlib.AbstractContextManager[None]:
    size = buckets.tree_bytes((g.model, g.vq))
    return buckets.explain_out_of_memory(
        f"the VQGAN processes {count} images of {g.vq_config.image_size} px at once, in addition "
        f"to weights of {buckets.format_mib(size)}",
        "reduce the batch size, whose cache shares this memory (--rows; --config.rows of an "
        "evaluation), or quantize the base (convert --quant)",
    )


def _check_parts(prompt: Sequence[PromptPart], codes: int, *, where: str) -> None:
    if isinstance(prompt, str):
        raise GenerateError(f"{where} is {prompt[:40]!r}; pass a list of parts: [image, text]")
    if all(isinstance(part, str) and not part for part in prompt):
        raise GenerateError(f"{where} is empty; it requires text or an image")
    for part in prompt:
        match part:
            case str():
                check_text(part, where=where)
                check_no_path(part, where=where, fix=f"write pathlib.Path({part[:80]!r})")
            case np.ndarray():
                if part.size != codes or not np.issubdtype(part.dtype, np.integer):
                    raise GenerateError(
                        f"{where} has an array of shape {part.shape} and dtype {part.dtype}; an "
                        f"array must be {codes} VQ codes; pass an image as PIL.Image or Path"
                    )
            case Path() | PIL.Image.Image():
                pass
            case _:
                raise GenerateError(
                    f"{where} has a part of type {type(part).__name__}; parts are text (str), "
                    "images (Path of a file, PIL.Image) and VQ codes (array)"
                )


def adapter_folder(path: str | Path) -> Path:
    """Return the adapter's local folder: `path`, or `path`/adapter of a training run."""
    given, path = path, export.local_copy(path)
    if (path / "adapter" / "adapter_config.json").exists():
        return path / "adapter"
    run = any((path / name).exists() for name in ("checkpoints", "checkpoints.sha256"))
    if run and not (path / "adapter_config.json").exists():
        raise GenerateError(
            f"{given}: the run has exported no adapter yet; finish it, or export its last "
            f"checkpoint: python -m medmax_jax.convert --from {given} --to D --format native"
        )
    return path


def with_adapter(g: ModelBundle, folder: str | Path, adapter: str | Path) -> ModelBundle:
    """Return a bundle of a base with an adapter; both use the same arrays of the base.

    Args:
        g: the base, without an adapter.
        folder: the model folder that it was loaded from.
        adapter: as for `load`.
    """
    arrays = safetensors_file.flatten_named(g.model)
    of_base = lambda path, _: arrays[safetensors_file.dotted_name(path)]  # noqa: E731
    with jax.set_mesh(g.mesh):
        graph, adapters, base, _ = _read_adapter(
            export.locate(folder), adapter, g.model.config, g.vocab
        )
        model = nnx.merge(graph, adapters, jax.tree_util.tree_map_with_path(of_base, base))
    return dataclasses.replace(g, model=model)


def _load_model(
    folder: str, adapter: str | Path | None, config: Model, vocab: Vocab, merge: bool
) -> chameleon.Chameleon:
    if adapter is None:
        return export.load(folder, chameleon.abstract_model(config, vocab, chameleon.NO_LORA))
    graph, adapters, base, lora = _read_adapter(folder, adapter, config, vocab)
    model = nnx.merge(graph, adapters, export.load(folder, base))
    return merge_adapter(model, vocab, lora) if merge else model


def _read_adapter(
    folder: str, adapter: str | Path, config: Model, vocab: Vocab
) -> tuple[Any, Any, Any, Lora]:
    """Return (graph, adapter's arrays, shapes of the base, its settings), as `nnx.merge` needs."""
    adapter = adapter_folder(adapter)
    file = adapter / "adapter_config.json"
    settings = _json(file, "an adapter folder contains adapter_config.json; training writes it")
    if missing := {"rank", "alpha", "dropout", "base"} - set(settings):
        raise GenerateError(f"{file}: {sorted(missing)[0]} is missing; export the adapter again")
    if settings["base"] != (fingerprint := export.base_fingerprint(folder)):
        base = quoted(str(settings["base"])[:12])
        raise GenerateError(
            f"{file}: trained on base weights {base}, but {folder} has "
            f"{fingerprint[:12]}; use the model folder that it was trained from"
        )
    try:
        lora = build(Lora, {name: settings[name] for name in ("rank", "alpha", "dropout")})
    except ConfigError as error:
        raise GenerateError(f"{file}: {error}; export the adapter again") from error
    if not lora.rank:
        raise GenerateError(f"{file}: rank is 0; export the adapter again")
    graph, adapters, base = chameleon.split_adapters(chameleon.abstract_model(config, vocab, lora))
    return graph, safetensors_file.load(adapter / "adapter.safetensors", adapters), base, lora


def merge_adapter(model: chameleon.Chameleon, vocab: Vocab, lora: Lora) -> chameleon.Chameleon:
    """Replace each W and its adapter by W + alpha/rank A B, added in fp32 and rounded once."""
    if model.config.quant != "none":
        raise GenerateError(
            f"the base is quantized ({model.config.quant}), so an adapter cannot be added to it; "
            "load it with merge=False"
        )
    arrays = safetensors_file.flatten_named(model)

    def merged(path, leaf):
        stem = (name := safetensors_file.dotted_name(path)).removesuffix("kernel")
        if f"{stem}lora_a" not in arrays:
            return arrays[name]
        kernel, a, b = (arrays[f"{stem}{part}"] for part in ("kernel", "lora_a", "lora_b"))
        return _add_product(kernel, a, b, scale=lora.alpha / lora.rank, spec=leaf.sharding.spec)

    like = chameleon.abstract_model(model.config, vocab, chameleon.NO_LORA)
    return jax.tree_util.tree_map_with_path(merged, like)


@functools.partial(jax.jit, static_argnames=("scale", "spec"), donate_argnums=0)
def _add_product(kernel, a, b, *, scale: float, spec):
    """Add the product in place, one layer in fp32 at a time: all would be 6 GB at 7B."""

    def add(i: Int[Array, ""], kernel):
        old = jax.lax.dynamic_index_in_dim(kernel, i, keepdims=False)
        product = jnp.einsum("ir,ro->io", a[i], b[i], out_sharding=P(*spec[1:]))
        new = (old.astype(jnp.float32) + scale * product).astype(kernel.dtype)
        return jax.lax.dynamic_update_index_in_dim(kernel, new, i, axis=0)

    return jax.lax.fori_loop(0, len(kernel), add, kernel)


def _load_vqgan(file: Path, config: VQ) -> vqgan.VQGAN:
    try:
        return vqgan.load(file, config)
    except safetensors_file.WeightsError as error:
        raise GenerateError(
            f"{error}. Prompts with images need a VQGAN: convert the model again with "
            "--vqgan=vqgan.ckpt"
        ) from error


def check_decoder(g: ModelBundle) -> None:
    """Raise GenerateError where images cannot be decoded."""
    if not g.vq.has_decoder:  # Hugging Face checkpoints of this model family have none
        raise GenerateError(
            "this model folder has no VQGAN decoder, so it can read images but generate only text; "
            "to generate images convert the model again with --vqgan=vqgan.ckpt"
        )


def _key(part: PromptPart) -> Path | int:
    return part if isinstance(part, Path) else id(part)


def _pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """Return one row unchanged, or pad to `rows`, so that the VQGAN is compiled for two sizes."""
    return x if len(x) == 1 else np.concatenate([x, np.repeat(x[:1], rows - len(x), axis=0)])


def _json(path: Path, fix: str) -> dict:
    if not path.exists():
        raise GenerateError(f"{path}: no such file; {fix}")
    try:
        return read_json_object(path)
    except TextFileError as error:
        raise GenerateError(f"{error}; {fix}") from error


class IncrementalDetokenizer:
    """Decodes one answer incrementally and tracks what has been yielded."""

    def __init__(self) -> None:
        self._segments = 0  # segments that are yielded completely
        self._characters = 0  # yielded of the segment after them

    def update(self, g: ModelBundle, tokens: np.ndarray, done: bool) -> Iterator[Text | Image]:
        """Yield what is new in `tokens`, which holds the complete answer so far."""
        parts = split_segments(tokens, g.vocab)
        for number in range(self._segments, len(parts)):
            kind, content = parts[number]
            closed = done or number < len(parts) - 1
            if kind == "image":
                if len(content) < g.vq_config.codes_per_image:
                    return
                yield decode_segments(g, [content + ids.IMAGE_START])[0][0]
                closed = True
            else:
                text = g.tokenizer.decode(content)
                if not closed:  # the bytes of a character may still be missing
                    text = text.rstrip("\ufffd")
                if text[self._characters :]:
                    yield Text(text[self._characters :])
                self._characters = len(text)
            if closed:
                self._segments, self._characters = number + 1, 0
