"""Generates text, an image, or both from prompts of text and images.

python -m medmax_jax.generate --model=medmax_jax/tiny --prompt="A CT?" --image=a.png --out=runs/x

In --prompt, {a.png} inserts an image: "Is {a.png} older than {b.png}?". --prompts=F.jsonl reads
many prompts, one per line: {"prompt": "..."} or
{"prompt": [{"image": "a.png"}, {"text": "A CT?"}], "id": "7"}. The Python interface is
medmax_jax.generation.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from medmax_jax import cli, sharding
from medmax_jax.checkpoints import export
from medmax_jax.config import Mesh, Sample, build, to_dict
from medmax_jax.generation import api, buckets, grammar, output_files, sampling_params
from medmax_jax.generation import requests as prompt_requests
from medmax_jax.generation.model_bundle import decode_segments, load, prompt_tokens
from medmax_jax.generation.requests import GenerateError
from medmax_jax.io.errors import printable_text
from medmax_jax.io.progress import ItemProgress
from medmax_jax.io.storage import StorageError
from medmax_jax.models import kv_cache

# ---- The program ----

FLAGS = flags.FLAGS
ERRORS = (ValueError, OSError, StorageError, export.ExportError)  # raised while a model is loaded


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
    flags.DEFINE_enum(
        "cache", "model", kv_cache.CACHE_DTYPES, "keys and values: as computed, or in bytes"
    )


def main(settings: ConfigDict, out: str) -> None:
    """Answer every prompt; the answers that `out` has from an interrupted run are kept."""
    prompt_requests.require_single_process()
    sample, mesh = build(Sample, settings.sample), sharding.make_mesh(build(Mesh, settings.mesh))
    questions = _questions()
    sampling_params.sampling_params(sample)
    buckets.batch_size_for(len(questions), FLAGS.rows)
    output_files.check_images(questions)
    folder = cli.open_workdir(out, "--out")
    g = load(FLAGS.model, adapter=FLAGS.adapter or None, mesh=mesh, merge=FLAGS.merge)
    fixed = dict(mode=FLAGS.mode, end_of_turn=FLAGS.end_of_turn)
    prompts = prompt_tokens(g, [q.parts for q in questions], end_of_turn=FLAGS.end_of_turn)
    sizes = dict(codes=g.vq_config.codes_per_image, context=g.config.context_length)
    prompt_requests.make_requests(prompts, sample, g.vocab, mode=FLAGS.mode, names=None, **sizes)
    settings = to_dict(sample) | fixed | dict(model=FLAGS.model, adapter=FLAGS.adapter)
    book = output_files.OutputFolder(folder, questions, settings)
    todo = [i for i, q in enumerate(questions) if q.id not in book.records]
    names = [
        q.id if q.named else n
        for q, n in zip(questions, prompt_requests.sample_names(prompts), strict=True)
    ]
    clock = ItemProgress(len(todo), "answers", print, every=5.0)
    written = api.generate_tokens(
        g, [prompts[i] for i in todo], sample, mode=FLAGS.mode, seed=sample.seed,
        names=[names[i] for i in todo], rows=FLAGS.rows, kind=FLAGS.cache,
    )  # fmt: skip
    with cli.Stop() as stop:
        for batch, tokens in written:
            for index, answer in zip(batch, decode_segments(g, tokens), strict=True):
                question = questions[todo[index]]
                record = book.add(question, answer, FLAGS.mode)
                said = " ".join(next(iter(s.values())) for s in record["segments"])
                print(printable_text(f"{question.shown()}\n  -> {said}"))
            clock.tick("generate", len(batch))
            if stop.requested:
                raise cli.Interrupted("interrupted; the same command goes on from here")
    print(f"gallery: {book.gallery()}\n{output_files.NOTICE}")


def _questions() -> list[output_files.Prompt]:
    if bool(FLAGS.prompt) == bool(FLAGS.prompts):
        raise GenerateError("give --prompt, or a file of them by --prompts: one of the two")
    if FLAGS.prompts and FLAGS.image:
        raise GenerateError("--image goes with --prompt; name pictures in the file of --prompts")
    if FLAGS.prompts:
        return output_files.read_prompts(FLAGS.prompts)
    return output_files.prompts_from_flags(FLAGS.prompt, FLAGS.image)


if __name__ == "__main__":
    _flags()
    # its `sample` and `mesh` are used
    default = {"config": str(Path(__file__).parent / "configs" / "base.py")}
    cli.run(main, errors=ERRORS, defaults=default, folder="out")
