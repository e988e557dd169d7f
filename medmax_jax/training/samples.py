"""Writes samples of the model in training for held-out prompts: D/samples/000300.html.

    held-out document   BOS question [image] SEP | answer EOS     the page shows all three:
    sample              BOS question [image] SEP | what the model writes

Tasks alternate; documents without a separator have no prompt and are skipped. The settings are
config.sample, with the same prompts and random numbers each time, so that pages can be compared.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from medmax_jax.config import Run
from medmax_jax.endpoints import egress
from medmax_jax.generation import api, model_bundle
from medmax_jax.io import html_page
from medmax_jax.io.atomic_folder import private_umask
from medmax_jax.models.vocab import EOS, SEP, is_image
from medmax_jax.training.batch import DocumentSource

NOTICE = "Samples of a research model in training, on held-out documents. Not for clinical use."
CREDENTIALED = (
    "Some of these documents are credentialed: keep this page where the documents may be kept."
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
        some = bool(run.train.samples) and records is not None
        self.asked = select_prompts(records, run.train.samples, run) if some else []

    def __call__(
        self, trainable: PyTree, frozen: PyTree, *, step: int, folder: pathlib.Path
    ) -> pathlib.Path:
        run = self._run
        model = nnx.merge(self._graph, trainable, frozen)
        sizes = dict(config=run.model, vocab=run.vocab, vq=run.vq, mesh=self._mesh)
        g = model_bundle.from_model(model, run.train.init_from, **sizes)
        return write(g, self.asked, run, step=step, folder=folder)


def select_prompts(records: DocumentSource, count: int, run: Run) -> list[SamplePrompt]:
    """Return at most `count` documents with a prompt, alternating tasks, first documents first."""
    by_task: dict[int, list[int]] = {}
    for number, task in enumerate(records.index["task"].tolist()):
        by_task.setdefault(task, []).append(number)
    found: list[SamplePrompt] = []
    for turn in range(max(map(len, by_task.values()), default=0)):
        for numbers in by_task.values():
            if turn < len(numbers) and len(found) < count:
                found += _case(records[numbers[turn]], run)
        if len(found) >= count:
            break
    return found


def write(
    g: model_bundle.ModelBundle,
    asked: Sequence[SamplePrompt],
    run: Run,
    *,
    step: int,
    folder: pathlib.Path,
) -> pathlib.Path:
    """Answer every prompt and write the page of this step; return its path."""
    answers: dict[int, list[model_bundle.Text | model_bundle.Image]] = {}
    for mode in ("text", "image"):
        of_mode = [i for i, case in enumerate(asked) if case.mode == mode]
        prompts, names = [asked[i].prompt for i in of_mode], [asked[i].name for i in of_mode]
        for batch, written in api.generate_tokens(
            g, prompts, run.sample, mode=mode, seed=run.sample.seed, names=names,
            batch_size=min(8, max(len(of_mode), 1)),
        ):  # fmt: skip
            for i, answer in zip(batch, model_bundle.decode_segments(g, written), strict=True):
                answers[of_mode[i]] = answer
    secret = any(egress.is_credentialed(case.credential) for case in asked)
    body = html_page.paragraph(NOTICE) + (html_page.paragraph(CREDENTIALED) if secret else "")
    for i, case in enumerate(asked):
        shown = {"prompt": case.prompt[:-1], "answer of the document": case.answer}
        parts = {
            name: model_bundle.decode_segments(g, [tokens])[0] for name, tokens in shown.items()
        }
        body += html_page.section(case.name, _shown(parts | {f"after step {step}": answers[i]}))
    path = folder / f"{step:06d}.html"
    with private_umask() if secret else contextlib.nullcontext():  # readable by its owner only
        folder.mkdir(exist_ok=True)
        path.write_text(html_page.document(f"Samples after step {step}", body), encoding="utf-8")
    return path


def _case(document: Any, run: Run) -> list[SamplePrompt]:
    """Return the document as a prompt, in a list; [] when it has no separator."""
    t = document.tokens
    ends = np.flatnonzero(t == SEP)
    if not ends.size:
        return []
    cut = int(ends[0]) + 1
    stop = int(ends[1]) if ends.size > 1 else len(t) - 1
    answer = t[cut:stop]
    pictured = bool(is_image(answer, run.vocab).any())
    name = f"{document.task}: {document.source}/{document.id}"
    mode = "image" if pictured else "text"
    return [SamplePrompt(name, document.credential, t[:cut], np.append(answer, EOS), mode)]


def _shown(parts: dict[str, list[model_bundle.Text | model_bundle.Image]]) -> str:
    said = {
        name: " ".join(p.text for p in part if isinstance(p, model_bundle.Text))
        for name, part in parts.items()
    }
    words = [(name, text) for name, text in said.items() if text]
    pictures = [
        (html_page.png(p.image), name)
        for name, part in parts.items()
        for p in part
        if isinstance(p, model_bundle.Image)
    ]
    return html_page.table(["", ""], words) + (html_page.figures(pictures) if pictures else "")
