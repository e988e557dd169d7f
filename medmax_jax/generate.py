"""Generates text, an image, or both from prompts of text and images.

python -m medmax_jax.generate --model=medmax_jax/tiny --adapter=medmax_jax/tiny_adapter \
    --prompt="A CT?" --image=a.png --out=runs/x

In --prompt, {a.png} inserts an image: "Is {a.png} older than {b.png}?". --prompts=F.jsonl reads
many prompts, one per line: {"prompt": "..."} or
{"prompt": [{"image": "a.png"}, {"text": "A CT?"}], "id": "7"}. The Python interface is
medmax_jax.generation.
"""

from pathlib import Path

import jax
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
from medmax_jax.io.progress import ItemProgress, report_waiting, report_waits
from medmax_jax.models import kv_cache
from medmax_jax.storage import hub
from medmax_jax.storage.folder import StorageError
from medmax_jax.storage.workdir import Workdir

# ---- The program ----

FLAGS = flags.FLAGS
WAITING = "waiting for answers; the first ones include the compilation"
ERRORS = (ValueError, OSError, StorageError, export.ExportError)  # raised while a model is loaded


def _flags() -> None:
    flags.DEFINE_string("model", None, "model folder", required=True)
    flags.DEFINE_string("adapter", "", "adapter, or the workdir of the training run")
    flags.DEFINE_bool("merge", False, "add the adapter to the base weights once, at load time")
    flags.DEFINE_multi_string("prompt", [], "text; {a.png} inserts an image; may be repeated")
    flags.DEFINE_string("prompts", "", "JSONL file of prompts, instead of --prompt")
    flags.DEFINE_multi_string("image", [], "image that precedes the text of every --prompt")
    flags.DEFINE_enum("mode", "text", grammar.MODES, "kind of output")
    flags.DEFINE_bool("end_of_turn", True, "end the prompt as MedMax's fine-tuning does")
    flags.DEFINE_integer("rows", 32, "number of answers to generate at a time")
    flags.DEFINE_enum(
        "cache",
        "model",
        kv_cache.CACHE_DTYPES,
        'KV-cache dtype: the compute dtype ("model") or int8',
    )


def main(settings: ConfigDict, out: str) -> None:
    """Answer every prompt; the answers that `out` has from an interrupted run are kept."""
    prompt_requests.require_single_process()
    sample, mesh = build(Sample, settings.sample), sharding.make_mesh(build(Mesh, settings.mesh))
    prompts = _read_prompts()
    sampling_params.check_sample(sample)
    buckets.batch_size_for(len(prompts), FLAGS.rows)
    output_files.check_images(prompts)
    with cli.open_workdir(out, "--out", own="request.json") as work:
        _answer(prompts, sample, mesh, work)


def _answer(
    prompts: list[output_files.Prompt], sample: Sample, mesh: jax.sharding.Mesh, work: Workdir
) -> None:
    with report_waiting("loading the model", print):
        g = load(FLAGS.model, adapter=FLAGS.adapter or None, mesh=mesh, merge=FLAGS.merge)
    tokens = prompt_tokens(g, [p.parts for p in prompts], end_of_turn=FLAGS.end_of_turn)
    prompt_requests.make_requests(
        tokens, sample, g.vocab, mode=FLAGS.mode, names=None, codes=g.vq_config.codes_per_image,
        context=g.config.context_length,
    )  # fmt: skip
    request = to_dict(sample) | {name: FLAGS[name].value for name in ("mode", "end_of_turn")}
    request |= {name: hub.pinned(FLAGS[name].value) for name in ("model", "adapter")}
    output = output_files.OutputFolder(work.folder, prompts, request)
    todo = [i for i, prompt in enumerate(prompts) if prompt.id not in output.records]
    names = [
        prompt.id if prompt.named else name
        for prompt, name in zip(prompts, prompt_requests.sample_names(tokens), strict=True)
    ]
    progress = ItemProgress(len(todo), "answers", print, every=5.0)
    answers = api.generate_tokens(
        g, [tokens[i] for i in todo], sample, mode=FLAGS.mode, seed=sample.seed,
        names=[names[i] for i in todo], batch_size=FLAGS.rows, cache_dtype=FLAGS.cache,
    )  # fmt: skip
    with cli.Stop() as stop:
        for batch, batch_tokens in report_waits(answers, WAITING, print):
            for index, answer in zip(batch, decode_segments(g, batch_tokens), strict=True):
                prompt = prompts[todo[index]]
                record = output.add(prompt, answer, FLAGS.mode)
                text = " ".join(next(iter(s.values())) for s in record["segments"])
                print(printable_text(f"{prompt.shown()}\n  -> {text}"))
            progress.tick("generate", len(batch))
            if stop.requested:
                raise cli.Interrupted("interrupted; run the same command to resume")
    print(f"gallery: {work.url(output.gallery().name)}\n{output_files.NOTICE}")


def _read_prompts() -> list[output_files.Prompt]:
    if bool(FLAGS.prompt) == bool(FLAGS.prompts):
        raise GenerateError("set either --prompt or --prompts (a JSONL file of prompts)")
    if FLAGS.prompts and FLAGS.image:
        raise GenerateError("--image requires --prompt; name the images in the file of --prompts")
    if FLAGS.prompts:
        return output_files.read_prompts(FLAGS.prompts)
    return output_files.prompts_from_flags(FLAGS.prompt, FLAGS.image)


if __name__ == "__main__":
    _flags()
    # only its `sample` and `mesh` are used
    default = {"config": str(Path(__file__).parent / "configs" / "base.py")}
    cli.run(main, errors=ERRORS, defaults=default, folder="out")
