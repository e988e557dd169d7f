"""Text, an image, or both from prompts of text and images, many at a time.

python -m medmax_jax.generate --model=medmax_jax/tiny --prompt="A CT?" --image=a.png --out=runs/x

    g = load(folder, adapter=...)
    generate(g, [[image, "A CT?"], ["An MRI?"]], sample, mode="text", seed=0)  ->  [[Text], [Text]]

    mode    writes                                             stops at
    text    words                                              EOS, max_gen_len, full context
    image   exactly one image                                  its last code
    mixed   words, and images where the model opens them       as text; an image is never cut

A prompt becomes BOS, its parts in order, and END-OF-TURN, as in MedMax's fine-tuning. What a sample
draws depends on `seed` and its name alone, not on what else is in the batch. max_gen_len counts
tokens of text over the whole answer; codes are not counted.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import PIL.Image
from absl import flags
from flax import nnx
from jaxtyping import Int
from ml_collections import ConfigDict

from medmax_jax import batching, chameleon, cli, decoding, export, grammar, images, vqgan, weights
from medmax_jax import mesh as meshes
from medmax_jax import vocab as ids
from medmax_jax.batching import GenerateError
from medmax_jax.config import VQ, ConfigError, Lora, Mesh, Model, Sample, Vocab, build
from medmax_jax.storage import StorageError
from medmax_jax.tokenizer import Tokenizer, prompt_ids, segments_of

Part = str | Path | PIL.Image.Image | np.ndarray  # words, a picture's file, a picture, its VQ codes

SIDE_BY_SIDE = 8  # pictures through the VQGAN at once
MAX_PIXELS = 64_000_000  # of a prompt's picture; a larger file is more likely an accident


@dataclasses.dataclass(frozen=True)
class Text:
    """Words of an answer."""

    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """A picture of an answer, and the codes it was decoded from."""

    image: PIL.Image.Image
    codes: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Generator:
    """A model folder in memory, with or without an adapter."""

    model: chameleon.Chameleon
    vq: vqgan.VQGAN
    tokenizer: Tokenizer
    vocab: Vocab
    config: Model
    vq_config: VQ
    mesh: jax.sharding.Mesh


def load(
    folder: str | Path, *, adapter: str | Path | None = None, mesh: jax.sharding.Mesh | None = None
) -> Generator:
    """A model folder, and an adapter trained on exactly its weights. `mesh` None: one device."""
    folder = Path(folder)
    settings = _json(folder / "config.json", "a model folder has config.json, weights, tokenizer")
    try:
        model, vocab, vq = (
            build(kind, settings.get(name))
            for kind, name in ((Model, "model"), (Vocab, "vocab"), (VQ, "vq"))
        )
    except ConfigError as error:
        raise GenerateError(f"{folder / 'config.json'}: {error}") from error
    mesh = mesh or meshes.make_mesh(Mesh(data=1, fsdp=1, tp=1))
    with jax.set_mesh(mesh):
        held = _load_model(folder, adapter, model, vocab)
    return around(held, folder, config=model, vocab=vocab, vq=vq, mesh=mesh)


def around(
    model: chameleon.Chameleon,
    folder: str | Path,
    *,
    config: Model,
    vocab: Vocab,
    vq: VQ,
    mesh: jax.sharding.Mesh,
) -> Generator:
    """A model that is in memory, with the tokenizer and the VQGAN of a model folder."""
    folder = Path(folder)
    with jax.set_mesh(mesh):
        return Generator(
            model=model,
            vq=_load_vqgan(folder / "vqgan.safetensors", vq),
            tokenizer=Tokenizer.from_file(folder / "tokenizer.json", vocab),
            vocab=vocab,
            config=config,
            vq_config=vq,
            mesh=mesh,
        )


def generate(
    g: Generator,
    prompts: Sequence[Sequence[Part]],
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None = None,
    end_of_turn: bool = True,
    rows: int = 32,
) -> list[list[Text | Image]]:
    """The answers, in the order of the prompts. See `stream` for the arguments."""
    answers: list[list[Text | Image]] = [[] for _ in prompts]
    request = dict(mode=mode, seed=seed, names=names, end_of_turn=end_of_turn, rows=rows)
    for index, answer in stream(g, prompts, sample, **request):
        answers[index] = answer
    return answers


def stream(
    g: Generator,
    prompts: Sequence[Sequence[Part]],
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None = None,
    end_of_turn: bool = True,
    rows: int = 32,
) -> Iterator[tuple[int, list[Text | Image]]]:
    """(index of the prompt, answer) as batches of `rows` get ready, like lengths together.

    names: the samples' ids, for their random numbers; None: a digest of the prompt, and for the
    second of two equal prompts its count. end_of_turn False: the bare parts, for a base model.
    """
    tokens = prompt_tokens(g, prompts, end_of_turn=end_of_turn)
    for batch, written in write(g, tokens, sample, mode=mode, seed=seed, names=names, rows=rows):
        yield from zip(batch, segments(g, written), strict=True)


def prompt_tokens(
    g: Generator, prompts: Sequence[Sequence[Part]], *, end_of_turn: bool
) -> list[Int[np.ndarray, "_"]]:
    """Each prompt as token ids; a picture that several prompts show is encoded once."""
    pictures = {
        _key(part): part
        for prompt in prompts
        for part in prompt
        if not isinstance(part, str | np.ndarray)
    }
    codes = dict(zip(pictures, encode(g, list(pictures.values())), strict=True))
    return [
        prompt_ids(g.tokenizer, [codes.get(_key(p), p) for p in prompt], g.vocab, end_of_turn)
        for prompt in prompts
    ]


def encode(g: Generator, pictures: Sequence[Path | PIL.Image.Image]) -> list[Int[np.ndarray, "K"]]:
    """The VQ codes of pictures, row by row from the top left."""
    codes = []
    for start in range(0, len(pictures), SIDE_BY_SIDE):
        part = [
            images.load(p, max_pixels=MAX_PIXELS) if isinstance(p, Path) else p
            for p in pictures[start : start + SIDE_BY_SIDE]
        ]
        pixels = np.stack([images.preprocess(p, g.vq_config.image_size) for p in part])
        with jax.set_mesh(g.mesh):
            found = vqgan.encode(g.vq, _filled(pixels, SIDE_BY_SIDE))
        codes += list(np.asarray(found)[: len(part)].reshape(len(part), -1))
    return codes


def decode(g: Generator, codes: Sequence[Int[np.ndarray, "K"]]) -> list[PIL.Image.Image]:
    """The pictures of VQ codes."""
    side, pictures = g.vq_config.codes_per_side, []
    for start in range(0, len(codes), SIDE_BY_SIDE):
        part = np.stack(codes[start : start + SIDE_BY_SIDE]).reshape(-1, side, side)
        with jax.set_mesh(g.mesh):
            pixels = vqgan.decode_codes(g.vq, _filled(part, SIDE_BY_SIDE))
            found = np.asarray(vqgan.to_uint8(pixels))[: len(part)]
        pictures += [PIL.Image.fromarray(picture) for picture in found]
    return pictures


def write(
    g: Generator,
    prompts: Sequence[Int[np.ndarray, "_"]],
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None,
    rows: int,
) -> Iterator[tuple[list[int], list[Int[np.ndarray, "_"]]]]:
    """(indices of a batch, the tokens that each of them writes, EOS included) by token ids."""
    grammar.check_mode(mode)
    knobs, numbers = batching.knobs(sample), batching.numbers(prompts, names)
    if mode == "image":
        prompts = [np.append(p, ids.BOI).astype(np.int32) for p in prompts]
    for batch, streams in batching.batches(prompts, g.vocab, mode=mode, rows=rows):
        plan = batching.plan(
            [len(prompts[i]) for i in batch],
            sample,
            g.vocab,
            mode=mode,
            streams=streams,
            codes=g.vq_config.codes_per_image,
            context=g.config.context_length,
        )
        split = g.mesh.shape["data"] * g.mesh.shape["fsdp"]
        prompt = batching.batch(
            [prompts[i] for i in batch],
            numbers[batch],
            plan,
            split=split,
            least=rows if len(prompts) > rows else 1,
        )
        with jax.set_mesh(g.mesh):
            key = jax.random.key(seed)
            out, count = decoding.write(g.model, prompt, knobs, key, plan=plan)
        out, count = np.asarray(out), np.asarray(count)
        yield batch, [out[row, : count[row]] for row in range(len(batch))]


def _load_model(
    folder: Path, adapter: str | Path | None, config: Model, vocab: Vocab
) -> chameleon.Chameleon:
    if adapter is None:
        return export.load(folder, chameleon.abstract(config, vocab, chameleon.NO_LORA))
    where = Path(adapter) / "adapter_config.json"
    settings = _json(where, "an adapter folder has adapter_config.json; training writes it")
    if missing := {"rank", "alpha", "dropout", "base"} - set(settings):
        raise GenerateError(f"{where}: {sorted(missing)[0]} is missing; export the adapter again")
    if settings["base"] != (found := export.identity(folder)):
        raise GenerateError(
            f"{where}: trained on base weights {settings['base'][:12]}, but {folder} has "
            f"{found[:12]}; name the model folder that it was trained from"
        )
    lora = build(Lora, {name: settings[name] for name in ("rank", "alpha", "dropout")})
    graph, adapters, base = chameleon.split(chameleon.abstract(config, vocab, lora))
    adapters = weights.load(Path(adapter) / "adapter.safetensors", adapters)
    return nnx.merge(graph, adapters, export.load(folder, base))


def _load_vqgan(file: Path, config: VQ) -> vqgan.VQGAN:
    try:
        return weights.load(file, vqgan.abstract(config))
    except weights.WeightsError as error:  # HF's checkpoints of this family have no decoder
        raise GenerateError(
            f"{error}. Generation needs encoder and decoder: convert again with --vqgan=vqgan.ckpt"
        ) from error


def segments(g: Generator, written: Sequence[np.ndarray]) -> list[list[Text | Image]]:
    """Words decoded, codes to pictures; an empty answer is one empty Text."""
    answers, codes = [], []
    for tokens in written:
        parts = segments_of(tokens, g.vocab)
        codes += [held for kind, held in parts if kind == "image"]
        answers.append(parts or [("text", tokens[:0])])
    pictures = iter(zip(decode(g, codes), codes, strict=True))
    return [
        [
            Text(g.tokenizer.decode(held)) if kind == "text" else Image(*next(pictures))
            for kind, held in parts
        ]
        for parts in answers
    ]


def _key(part: Part) -> Path | int:
    return part if isinstance(part, Path) else id(part)


def _filled(x: np.ndarray, rows: int) -> np.ndarray:
    """One row alone or `rows` of them, so that the VQGAN is compiled for two sizes only."""
    return x if len(x) == 1 else np.concatenate([x, np.repeat(x[:1], rows - len(x), axis=0)])


def _json(path: Path, mend: str) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise GenerateError(f"{path}: no such file; {mend}") from error
    except ValueError as error:
        raise GenerateError(f"{path}: not JSON ({error}); {mend}") from error


# The program.

FLAGS = flags.FLAGS


def _flags() -> None:
    flags.DEFINE_string("model", None, "model folder", required=True)
    flags.DEFINE_string("adapter", "", "adapter folder that training wrote")
    flags.DEFINE_multi_string(
        "prompt", None, "words of a prompt; repeat for several", required=True
    )
    flags.DEFINE_multi_string("image", [], "picture before the words of every prompt")
    flags.DEFINE_enum("mode", "text", grammar.MODES, "what to write")
    flags.DEFINE_bool("end_of_turn", True, "close the prompt as MedMax's fine-tuning does")


def main(settings: ConfigDict, out: str) -> None:
    """Answers every prompt; writes answers.jsonl and one PNG for each picture to `out`."""
    mesh = meshes.make_mesh(build(Mesh, settings.mesh))
    sample, folder = build(Sample, settings.sample), cli.open_workdir(out, "--out")
    pictures = [images.load(Path(p), max_pixels=MAX_PIXELS) for p in FLAGS.image]
    g = load(FLAGS.model, adapter=FLAGS.adapter or None, mesh=mesh)
    prompts = [[*pictures, words] for words in FLAGS.prompt]
    request = dict(mode=FLAGS.mode, seed=sample.seed, end_of_turn=FLAGS.end_of_turn)
    answers = generate(g, prompts, sample, **request)
    with open(folder / "answers.jsonl", "w") as file:
        for index, (words, answer) in enumerate(zip(FLAGS.prompt, answers, strict=True)):
            segments = [
                _saved(part, folder / f"{index:04d}_{i}.png") for i, part in enumerate(answer)
            ]
            record = dict(prompt=words, images=FLAGS.image, mode=FLAGS.mode, segments=segments)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            print(f"{words}\n  -> {' '.join(next(iter(s.values())) for s in segments)}")


def _saved(part: Text | Image, path: Path) -> dict[str, str]:
    if isinstance(part, Text):
        return {"text": part.text}
    part.image.save(path)
    return {"image": path.name}


if __name__ == "__main__":
    _flags()
    # its `sample` and `mesh` are used
    default = {"config": str(Path(__file__).parent.parent / "configs" / "base.py")}
    errors = (ValueError, OSError, StorageError, export.ExportError)
    cli.run(main, errors=errors, defaults=default, folder="out")
