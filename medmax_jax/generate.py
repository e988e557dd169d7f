"""Generates text, an image, or both from prompts of text and images.

python -m medmax_jax.generate --model=medmax_jax/tiny --adapter=medmax_jax/tiny_adapter \
    --prompt="A CT?" --image=a.png --out=runs/x

In --prompt, {a.png} inserts an image: "Is {a.png} older than {b.png}?". --prompts=F.jsonl reads
many prompts, one per line: {"prompt": "..."} or
{"prompt": [{"image": "a.png"}, {"text": "A CT?"}], "id": "7"}. Started on every host of a run, each
answers a part of the prompts on its own devices (--out is shared). The Python interface is
medmax_jax.generation; `generate` below is this program as a function.
"""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
import PIL.Image
from absl import flags
from ml_collections import ConfigDict

from medmax_jax import cli, make_callable, sharding
from medmax_jax.checkpoints import export
from medmax_jax.checkpoints.barriers import SHARE_TIMEOUT, barrier, first_host_first
from medmax_jax.config import VIEWS, Mesh, Sample, build, to_dict
from medmax_jax.configs import base
from medmax_jax.generation import api, buckets, grammar, output_files, sampling_params
from medmax_jax.generation import requests as prompt_requests
from medmax_jax.generation.model_bundle import (
    MAX_PIXELS,
    ModelBundle,
    decode_segments,
    load,
    prompt_tokens,
)
from medmax_jax.generation.requests import GenerateError
from medmax_jax.io.errors import printable_text
from medmax_jax.io.progress import ItemProgress, report_waiting, report_waits
from medmax_jax.models import images as model_images
from medmax_jax.models import kv_cache
from medmax_jax.storage import hub
from medmax_jax.storage.folder import StorageError
from medmax_jax.storage.workdir import Workdir, local_file

WAITING = "waiting for answers; the first ones include the compilation"
ERRORS = (ValueError, OSError, StorageError, export.ExportError)  # raised while a model is loaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """Holds the answer to a prompt: its text, and the files of the generated images."""

    text: str
    files: tuple[str, ...]  # local paths or gs://

    @property
    def images(self) -> list[PIL.Image.Image]:
        """Return the generated images, read from their files."""
        return [model_images.load(local_file(path), max_pixels=MAX_PIXELS) for path in self.files]


def generate(
    model: str | os.PathLike[str],
    prompts: Sequence[str] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    images: Sequence[str | os.PathLike[str]] = (),
    adapter: str | os.PathLike[str] = "",
    mode: str = "text",
    settings: ConfigDict | None = None,
    merge: bool = False,
    end_of_turn: bool = True,
    rows: int = 32,
    cache: str = "model",
    view: str = "",
) -> list[Answer]:
    """Answer every prompt, as the program does; the answers that `out` already has are kept.

    Args:
        model: the model folder; medmax_jax/tiny is the shipped one.
        prompts: texts, in which {a.png} inserts an image; or a JSONL file of prompts.
        out: the folder of answers.jsonl, the images and gallery.html.
        images: images that precede the text of every prompt.
        adapter: an adapter, or the workdir of the training run.
        mode: "text", "image" or "mixed".
        settings: a config, of which `sample` and `mesh` are used; None: configs/base.py.
        merge: add the adapter to the base weights once, at load time.
        end_of_turn: end the prompt as MedMax's fine-tuning does.
        rows: the number of answers to generate at a time.
        cache: the KV-cache dtype, "model" or "int8".
        view: of the images, "released" or "pad"; "": the one that the model was trained on.
    """
    cli.skip_absent_tpu()
    settings = settings or base.get_config()
    sample, mesh = build(Sample, settings.sample), sharding.local_mesh(build(Mesh, settings.mesh))
    asked = _read_prompts(prompts, images)
    sampling_params.check_sample(sample)
    buckets.batch_size_for(len(asked), rows)
    output_files.check_images(asked)
    request = to_dict(sample) | dict(mode=mode, end_of_turn=end_of_turn)
    request |= dict(model=hub.pinned(os.fspath(model)), adapter=hub.pinned(os.fspath(adapter)))
    with cli.open_workdir(out, "--out", own="request.json", shared=True) as work:
        with report_waiting("loading the model", print):
            g = load(model, adapter=adapter or None, mesh=mesh, merge=merge, view=view)
        if g.vq_config.view != "released":  # older requests do not state it
            request["view"] = g.vq_config.view
        tokens = prompt_tokens(g, [p.parts for p in asked], end_of_turn=end_of_turn)
        prompt_requests.make_requests(
            tokens, sample, g.vocab, mode=mode, names=None, codes=g.vq_config.codes_per_image,
            context=g.config.context_length,
        )  # fmt: skip
        output = output_files.OutputFolder(work.folder, asked, request)
        _answer_all(g, asked, tokens, output, sample, mode=mode, rows=rows, cache=cache)
        _merge(output, work)
        return [_answer(output.records[prompt.id]["segments"], work) for prompt in asked]


def _answer_all(
    g: ModelBundle,
    asked: Sequence[output_files.Prompt],
    tokens: Sequence[np.ndarray],
    output: output_files.OutputFolder,
    sample: Sample,
    *,
    mode: str,
    rows: int,
    cache: str,
) -> None:
    """Answer this host's part of the prompts, except those that the folder has answers to."""
    own = range(len(asked))[jax.process_index() :: jax.process_count()]
    todo = [i for i in own if asked[i].id not in output.records]
    names = [
        prompt.id if prompt.named else name
        for prompt, name in zip(asked, prompt_requests.sample_names(tokens), strict=True)
    ]
    answers = api.generate_tokens(
        g, [tokens[i] for i in todo], sample, mode=mode, seed=sample.seed,
        names=[names[i] for i in todo], batch_size=rows, cache_dtype=cache,
    )  # fmt: skip
    _write_answers(g, [asked[i] for i in todo], answers, output, mode)


def _write_answers(
    g: ModelBundle,
    prompts: Sequence[output_files.Prompt],
    answers: Iterable[tuple[list[int], list[np.ndarray]]],
    output: output_files.OutputFolder,
    mode: str,
) -> None:
    """Write each answer when it is complete; raise Interrupted after a signal."""
    progress = ItemProgress(len(prompts), "answers", print, every=5.0)
    with cli.Stop(together=False) as stop:
        for batch, batch_tokens in report_waits(answers, WAITING, print):
            for index, answer in zip(batch, decode_segments(g, batch_tokens), strict=True):
                record = output.add(prompts[index], answer, mode)
                text = " ".join(next(iter(s.values())) for s in record["segments"])
                print(printable_text(f"{prompts[index].shown()}\n  -> {text}"))
            progress.tick("generate", len(batch))
            if stop.requested:
                raise cli.Interrupted("interrupted; run the same command to resume")


def _merge(output: output_files.OutputFolder, work: Workdir) -> None:
    """Wait until all hosts have answered; the first one merges and writes the gallery."""
    work.flush()
    barrier("all prompts are answered", SHARE_TIMEOUT)
    with first_host_first("the answers are merged"):
        work.refresh()
        output.merge()
        work.flush()
    if not jax.process_index():
        print(f"gallery: {work.url(output.gallery().name)}\n{output_files.NOTICE}")


def _answer(segments: Sequence[dict[str, str]], work: Workdir) -> Answer:
    text = "".join(segment.get("text", "") for segment in segments)
    files = tuple(work.url(segment["image"]) for segment in segments if "image" in segment)
    return Answer(text=text, files=files)


def _read_prompts(
    prompts: Sequence[str] | str | os.PathLike[str], images: Sequence[str | os.PathLike[str]]
) -> list[output_files.Prompt]:
    if isinstance(prompts, str | os.PathLike):
        if images:
            raise GenerateError(
                "--image requires --prompt; name the images in the file of --prompts"
            )
        return output_files.read_prompts(prompts)
    return output_files.prompts_from_flags(prompts, images)


make_callable(__name__)

# ---- The program ----

FLAGS = flags.FLAGS


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
    flags.DEFINE_enum("view", "", ("", *VIEWS), "view of the images; empty: the model's own")


def main(settings: ConfigDict, out: str) -> None:
    """Read the flags and generate."""
    if bool(FLAGS.prompt) == bool(FLAGS.prompts):
        raise GenerateError("set either --prompt or --prompts (a JSONL file of prompts)")
    generate(
        FLAGS.model, FLAGS.prompts or FLAGS.prompt, out, images=FLAGS.image, adapter=FLAGS.adapter,
        mode=FLAGS.mode, settings=settings, merge=FLAGS.merge, end_of_turn=FLAGS.end_of_turn,
        rows=FLAGS.rows, cache=FLAGS.cache, view=FLAGS.view,
    )  # fmt: skip


if __name__ == "__main__":
    _flags()
    # only its `sample` and `mesh` are used
    default = {"config": str(Path(__file__).parent / "configs" / "base.py")}
    cli.run(main, errors=ERRORS, defaults=default, folder="out")
