"""Writes samples of the model in training for held-out prompts: D/samples/000300.html.

    held-out document   BOS question [image] SEP | answer EOS     the page shows all three:
    sample              BOS question [image] SEP | what the model writes

Tasks alternate; documents without a separator have no prompt and are skipped. The settings are
config.sample, with the same prompts and random numbers each time, so that pages can be compared.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from medmax_jax.config import Run
from medmax_jax.endpoints import egress
from medmax_jax.environment import environment
from medmax_jax.generation import api, model_bundle
from medmax_jax.io import html_page
from medmax_jax.models.vocab import EOS, SEP, is_image
from medmax_jax.storage.atomic_folder import private_umask
from medmax_jax.training.batch import DocumentSource

NOTICE = "Samples of a research model in training, on held-out documents. Not for clinical use."
PARTS = (
    "“prompt” is a held-out document up to its first separator, “reference answer” is what follows "
    "there, and “generated” is what the model answers to the same prompt. All images are decoded "
    "from their codes, so details of the original files are lost in each."
)
CREDENTIALED = (
    "Some of these documents are credentialed: store this page only where they may be stored."
)


@dataclasses.dataclass(frozen=True, eq=False)
class SamplePrompt:
    """Holds one held-out document, split after its first separator."""

    name: str
    credential: str
    prompt: np.ndarray  # int32, ends with SEP
    answer: np.ndarray  # int32, up to the next separator or EOS
    mode: str  # text | image


class Sampler:
    """Holds the prompts of a run, and writes the page of each step that requests one."""

    def __init__(
        self, run: Run, records: DocumentSource | None, *, graph: Any, mesh: jax.sharding.Mesh
    ) -> None:
        self._run, self._graph, self._mesh = run, graph, mesh
        self.prompts, self._facts = [], {}
        if run.train.samples and records is not None:
            self.prompts = select_prompts(records, run.train.samples, run)
            self._facts = {
                "model": run.train.init_from, "trains": run.train.trains,
                "data": run.data.validation, "digest": records.fingerprint[:16],
                "seed": run.sample.seed,
            } | environment(devices=jax.devices())  # fmt: skip

    def __call__(
        self, trainable: PyTree, frozen: PyTree, *, step: int, folder: pathlib.Path
    ) -> pathlib.Path:
        run = self._run
        model = nnx.merge(self._graph, trainable, frozen)
        g = model_bundle.from_model(
            model, run.train.init_from,
            config=run.model, vocab=run.vocab, vq=run.vq, mesh=self._mesh,
        )  # fmt: skip
        return write(g, self.prompts, run, step=step, folder=folder, facts=self._facts)


def select_prompts(records: DocumentSource, count: int, run: Run) -> list[SamplePrompt]:
    """Return at most `count` documents with a prompt, alternating tasks, first documents first."""
    by_task: dict[int, list[int]] = {}
    for document, task in enumerate(records.index["task"].tolist()):
        by_task.setdefault(task, []).append(document)
    prompts: list[SamplePrompt] = []
    for round_number in range(max(map(len, by_task.values()), default=0)):
        for documents in by_task.values():
            if round_number < len(documents) and len(prompts) < count:
                prompts += _as_prompt(records[documents[round_number]], run)
        if len(prompts) >= count:
            break
    return prompts


def write(
    g: model_bundle.ModelBundle,
    samples: Sequence[SamplePrompt],
    run: Run,
    *,
    step: int,
    folder: pathlib.Path,
    facts: Mapping[str, Any],
) -> pathlib.Path:
    """Answer every prompt and write the page of this step; return its path.

    facts: of the run, for `html_page.provenance`.
    """
    answers: dict[int, list[model_bundle.Text | model_bundle.Image]] = {}
    for mode in ("text", "image"):
        of_mode = [i for i, sample in enumerate(samples) if sample.mode == mode]
        generated = api.generate_tokens(
            g,
            [samples[i].prompt for i in of_mode],
            run.sample,
            names=[samples[i].name for i in of_mode],
            mode=mode,
            seed=run.sample.seed,
            batch_size=min(8, max(len(of_mode), 1)),
        )
        for batch, tokens in generated:
            for i, answer in zip(batch, model_bundle.decode_segments(g, tokens), strict=True):
                answers[of_mode[i]] = answer
    credentialed = any(egress.is_credentialed(sample.credential) for sample in samples)
    body = html_page.provenance({"step": step} | facts) + html_page.paragraph(NOTICE)
    body += html_page.paragraph(CREDENTIALED) if credentialed else ""
    body += html_page.paragraph(PARTS, note=True)
    for i, sample in enumerate(samples):
        token_lists = {"prompt": sample.prompt[:-1], "reference answer": sample.answer}
        parts = {
            name: model_bundle.decode_segments(g, [tokens])[0]
            for name, tokens in token_lists.items()
        }
        body += html_page.section(sample.name, _segments_html(parts | {"generated": answers[i]}))
    path = folder / f"{step:06d}.html"
    # Credentialed pages are readable by their owner only.
    with private_umask() if credentialed else contextlib.nullcontext():
        folder.mkdir(exist_ok=True)
        path.write_text(html_page.document(f"Samples after step {step}", body), encoding="utf-8")
    return path


def _as_prompt(document: Any, run: Run) -> list[SamplePrompt]:
    """Return the document as a prompt, in a list; [] when it has no separator."""
    t = document.tokens
    ends = np.flatnonzero(t == SEP)
    if not ends.size:
        return []
    prompt_length = int(ends[0]) + 1
    stop = int(ends[1]) if ends.size > 1 else len(t) - 1
    answer = t[prompt_length:stop]
    has_image = bool(is_image(answer, run.vocab).any())
    name = f"{document.task}: {document.source}/{document.id}"
    mode = "image" if has_image else "text"
    return [
        SamplePrompt(name, document.credential, t[:prompt_length], np.append(answer, EOS), mode)
    ]


def _segments_html(segments: dict[str, list[model_bundle.Text | model_bundle.Image]]) -> str:
    texts = {
        name: " ".join(p.text for p in part if isinstance(p, model_bundle.Text))
        for name, part in segments.items()
    }
    rows = [(name, text) for name, text in texts.items() if text]
    images = [
        (html_page.png(p.image), name)
        for name, part in segments.items()
        for p in part
        if isinstance(p, model_bundle.Image)
    ]
    return html_page.table(["", ""], rows) + (html_page.figures(images) if images else "")
