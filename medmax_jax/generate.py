"""Text, an image, or both from prompts of text and images, many at a time.

python -m medmax_jax.generate --model=medmax_jax/tiny --prompt="A CT?" --image=a.png --out=runs/x

    g = load(folder, adapter=...)
    generate(g, [[image, "A CT?"], ["An MRI?"]], sample, mode="text", seed=0)  ->  [[Text], [Text]]

    mode    writes                                             stops at
    text    words                                              EOS, max_gen_len, full context
    image   exactly one image                                  its last code
    mixed   words, and images where the model opens them       as text; an image is never cut

A prompt becomes BOS, its parts in order, and END-OF-TURN, as in MedMax's fine-tuning. What a sample
draws depends on `seed` and its name alone, not on what else is in the batch. `sample` is a
config.Sample; `defaults` has those of the released programs by name.

In --prompt, {a.png} stands for a picture: "Is {a.png} older than {b.png}?". --prompts=F.jsonl asks
many: {"prompt": "..."} or {"prompt": [{"image": "a.png"}, {"text": "A CT?"}], "id": "7"} a line.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import Int
from ml_collections import ConfigDict

from configs.sampling import SETS
from medmax_jax import answers, batching, cached, cli, engine, export, grammar, serving
from medmax_jax import mesh as meshes
from medmax_jax.batching import GenerateError
from medmax_jax.config import Mesh, Sample, build, to_dict
from medmax_jax.generator import (
    Generator,
    Image,
    Part,
    Text,
    around,
    check_decoder,
    decode,
    encode,
    load,
    prompt_tokens,
    segments,
)
from medmax_jax.io.errors import printable_text
from medmax_jax.progress import Items
from medmax_jax.storage import StorageError
from medmax_jax.tokenizer import prompt_ids

__all__ = [
    "GenerateError", "Generator", "Image", "Score", "Text", "around", "decode", "defaults",
    "encode", "generate", "load", "pieces", "prompt_tokens", "score", "segments", "stream", "write",
]  # fmt: skip

Asked = Sequence[Sequence[Part]]


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely an option is after its prompt, in natural logarithms."""

    total: float
    tokens: int
    greedy: bool  # each of its tokens is the likeliest of the vocabulary

    @property
    def mean(self) -> float:
        """A token's share: for options of different lengths."""
        return self.total / self.tokens


def defaults(name: str) -> Sample:
    """The sampling settings of a released program: meta, medmax or medmax_eval."""
    if name not in SETS:
        raise GenerateError(f"no settings are called {name!r}; use one of {', '.join(SETS)}")
    return Sample(**SETS[name])


def generate(
    g: Generator,
    prompts: Asked,
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None = None,
    end_of_turn: bool = True,
    rows: int = 32,
    kind: str = "model",
) -> list[list[Text | Image]]:
    """The answers, in the order of the prompts. See `stream` for the arguments."""
    found: list[list[Text | Image]] = [[] for _ in prompts]
    request = dict(names=names, end_of_turn=end_of_turn, rows=rows, kind=kind)
    for index, answer in stream(g, prompts, sample, mode=mode, seed=seed, **request):
        found[index] = answer
    return found


def stream(
    g: Generator,
    prompts: Asked,
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None = None,
    end_of_turn: bool = True,
    rows: int = 32,
    kind: str = "model",
) -> Iterator[tuple[int, list[Text | Image]]]:
    """(index of the prompt, answer) as they get ready, `rows` being written at a time.

    names: the samples' ids, for their random numbers; None: a digest of the prompt, and for the
    second of two equal prompts its count. end_of_turn False: the bare parts, for a base model.
    kind: of the cache, "model" or "int8".
    """
    tokens = prompt_tokens(g, prompts, end_of_turn=end_of_turn)
    fixed = dict(mode=mode, seed=seed, names=names, rows=rows, kind=kind)
    for batch, written in write(g, tokens, sample, **fixed):
        yield from zip(batch, segments(g, written), strict=True)


def pieces(
    g: Generator,
    prompts: Asked,
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None = None,
    end_of_turn: bool = True,
    rows: int = 32,
    kind: str = "model",
) -> Iterator[tuple[int, Text | Image | None]]:
    """(index, words as they come, or a whole picture); (index, None) where an answer ends.

    The words of an answer, put together, are those of `stream`. Characters wait until their bytes
    are whole.
    """
    tokens = prompt_tokens(g, prompts, end_of_turn=end_of_turn)
    fixed = dict(mode=mode, names=names, rows=rows, kind=kind)
    served = _served(g, tokens, sample, seed=seed, **fixed)
    told = [answers.Telling() for _ in prompts]
    for news in served:
        for each in news:
            for part in told[each.index].more(g, each.tokens, each.done):
                yield each.index, part
            if each.done:
                yield each.index, None


def write(
    g: Generator,
    prompts: Sequence[Int[np.ndarray, "_"]],
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None,
    rows: int,
    kind: str = "model",
) -> Iterator[tuple[list[int], list[Int[np.ndarray, "_"]]]]:
    """(indices, the tokens that each of them writes, EOS included) of what is done, by ids."""
    fixed = dict(mode=mode, names=names, rows=rows, kind=kind)
    for news in _served(g, prompts, sample, seed=seed, **fixed):
        done = [each for each in news if each.done]
        if done:
            yield [each.index for each in done], [each.tokens for each in done]


def score(
    g: Generator,
    prompts: Asked,
    options: Sequence[Sequence[str]],
    *,
    end_of_turn: bool = True,
    rows: int = 32,
    kind: str = "model",
) -> list[list[Score]]:
    """How likely each of a prompt's options is to follow it; nothing is drawn.

    The words of an option are tokenised by themselves, as an answer is in training.
    """
    tokens = prompt_tokens(g, prompts, end_of_turn=end_of_turn)
    if len(options) != len(prompts):
        raise GenerateError(f"{len(prompts)} prompts but {len(options)} lists of options")
    asked = [_options(g, each, f"prompt {index}") for index, each in enumerate(options)]
    context, codes, longest = g.config.context_length, g.vq_config.codes_per_image, 0
    for index, (prompt, each) in enumerate(zip(tokens, asked, strict=True)):
        where = f"prompt {index}"
        batching.check_prompt(prompt, g.vocab, codes=codes, where=where)
        longest = max(longest, len(prompt) + max(map(len, each)))
        if longest > context:
            raise GenerateError(
                f"{where} and an option have {longest} tokens, the model holds {context}; "
                "shorten them"
            )
    if not tokens:
        return []
    count = batching.rows(len(tokens), rows)
    slots = min(batching.rounded(longest), context)
    e = _engine(g, rows=count, lanes=count, slots=slots, kind=kind)
    return [
        [
            Score(total=float(one.sum()), tokens=len(one), greedy=bool(best.all()))
            for one, best in each
        ]
        for each in engine.likelihoods(e, tokens, asked)
    ]


def _options(g: Generator, options: Sequence[str], where: str) -> list[Int[np.ndarray, "_"]]:
    """The tokens of each; raises GenerateError, or TokenizerError where one is not words alone."""
    if isinstance(options, str):
        raise GenerateError(f"the options of {where} are {options!r}; write a list of them")
    for option in options:
        batching.check_words(option, where=f"an option of {where}")
    found = [prompt_ids(g.tokenizer, [o], g.vocab, False)[1:] for o in options]
    if not found or not all(map(len, found)):
        raise GenerateError(f"{where} has no options, or an empty one; give it words")
    return found


def _served(
    g: Generator, prompts, sample: Sample, *, mode: str, seed: int, names, rows: int, kind: str
) -> Iterator[list[serving.Written]]:
    """An engine as large as these requests need, and what it writes chunk by chunk."""
    batching.knobs(sample)  # settings that make no sense, before anything is made
    if mode != "text":
        check_decoder(g)
    codes, context = g.vq_config.codes_per_image, g.config.context_length
    requests = batching.requests(
        prompts, sample, g.vocab, mode=mode, names=names, codes=codes, context=context
    )
    count = batching.rows(len(requests), rows)
    if not requests:
        return
    longest = max(len(request.tokens) for request in requests)
    streams = 1 + batching.guidance(requests, sample, g.vocab, mode=mode)
    slots = batching.slots(longest, sample, mode=mode, codes=codes, context=context)
    e = _engine(g, rows=count, lanes=streams * count, slots=slots, kind=kind)
    yield from serving.serve(e, requests, sample, mode=mode, seed=seed)


def _engine(g: Generator, *, rows: int, lanes: int, slots: int, kind: str) -> engine.Engine:
    codes = g.vq_config.codes_per_image
    sizes = dict(codes=codes, rows=rows, lanes=lanes, slots=slots, kind=kind)
    sizes["barred"] = g.tokenizer.barred
    return engine.make(g.model, g.vocab, g.mesh, **sizes)


# The program.

FLAGS = flags.FLAGS
ERRORS = (ValueError, OSError, StorageError, export.ExportError)  # of whoever loads a model


def _flags() -> None:
    flags.DEFINE_string("model", None, "model folder", required=True)
    flags.DEFINE_string("adapter", "", "adapter folder that training wrote")
    flags.DEFINE_bool("merge", False, "add the adapter to the base, instead of beside it")
    flags.DEFINE_multi_string("prompt", [], "words, {a.png} for a picture; repeat for several")
    flags.DEFINE_string("prompts", "", "JSONL file of prompts, in place of --prompt")
    flags.DEFINE_multi_string("image", [], "picture before the words of every --prompt")
    flags.DEFINE_enum("mode", "text", grammar.MODES, "what to write")
    flags.DEFINE_bool("end_of_turn", True, "close the prompt as MedMax's fine-tuning does")
    flags.DEFINE_integer("rows", 32, "answers that are written at a time")
    flags.DEFINE_enum("cache", "model", cached.KINDS, "keys and values: as computed, or in bytes")


def main(settings: ConfigDict, out: str) -> None:
    """Answers every prompt; what `out` has from an interrupted run is kept."""
    batching.one_process()
    sample, mesh = build(Sample, settings.sample), meshes.make_mesh(build(Mesh, settings.mesh))
    questions = _questions()
    batching.knobs(sample)
    batching.rows(len(questions), FLAGS.rows)
    answers.check_pictures(questions)
    folder = cli.open_workdir(out, "--out")
    g = load(FLAGS.model, adapter=FLAGS.adapter or None, mesh=mesh, merge=FLAGS.merge)
    fixed = dict(mode=FLAGS.mode, end_of_turn=FLAGS.end_of_turn)
    prompts = prompt_tokens(g, [q.parts for q in questions], end_of_turn=FLAGS.end_of_turn)
    sizes = dict(codes=g.vq_config.codes_per_image, context=g.config.context_length)
    batching.requests(prompts, sample, g.vocab, mode=FLAGS.mode, names=None, **sizes)
    settings = to_dict(sample) | fixed | dict(model=FLAGS.model, adapter=FLAGS.adapter)
    book = answers.Answers(folder, questions, settings)
    todo = [i for i, q in enumerate(questions) if q.id not in book.records]
    names = [
        q.id if q.named else n for q, n in zip(questions, batching.names(prompts), strict=True)
    ]
    clock = Items(len(todo), "answers", print, every=5.0)
    written = write(
        g, [prompts[i] for i in todo], sample, mode=FLAGS.mode, seed=sample.seed,
        names=[names[i] for i in todo], rows=FLAGS.rows, kind=FLAGS.cache,
    )  # fmt: skip
    with cli.Stop() as stop:
        for batch, tokens in written:
            for index, answer in zip(batch, segments(g, tokens), strict=True):
                question = questions[todo[index]]
                record = book.add(question, answer, FLAGS.mode)
                said = " ".join(next(iter(s.values())) for s in record["segments"])
                print(printable_text(f"{question.shown()}\n  -> {said}"))
            clock.tick("generate", len(batch))
            if stop.asked:
                raise cli.Interrupted("interrupted; the same command goes on from here")
    print(f"gallery: {book.gallery()}\n{answers.NOTICE}")


def _questions() -> list[answers.Question]:
    if bool(FLAGS.prompt) == bool(FLAGS.prompts):
        raise GenerateError("give --prompt, or a file of them by --prompts: one of the two")
    if FLAGS.prompts and FLAGS.image:
        raise GenerateError("--image goes with --prompt; name pictures in the file of --prompts")
    if FLAGS.prompts:
        return answers.from_file(FLAGS.prompts)
    return answers.from_words(FLAGS.prompt, FLAGS.image)


if __name__ == "__main__":
    _flags()
    # its `sample` and `mesh` are used
    default = {"config": str(Path(__file__).parent.parent / "configs" / "base.py")}
    cli.run(main, errors=ERRORS, defaults=default, folder="out")
