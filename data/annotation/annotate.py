"""Add pseudo documents to records: images, questions, answers, filters, caps, one folder.

    R -> images -> not in an evaluation set -> questions of the missing kinds -> answers
      -> usable -> three filters (filters.py) -> caps by source and task -> R and the kept documents

The procedure is an interpretation of the pseudo-annotation that IMAX (arXiv 2504.09967) proposes;
its own was not available to us. Every question ends in exactly one outcome:

    unusable       no sample is an answer of its kind: cut off, too long, control tokens
    no_distractor  there is nothing different to compare the answer with
    too_long       a prompt and its options do not fit in the context of the model
    margin, agreement, order      the first filter that rejects it
    contradicts    it passed them, but excludes what a document of the image states
    source_share, task_share      it passed, but is beyond a cap
    kept           it is a document
"""

import dataclasses
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from medmax_jax.data.annotation import evidence, filters
from medmax_jax.data.annotation.filters import FILTERS, Thresholds
from medmax_jax.data.annotation.generators import TOO_LONG
from medmax_jax.data.annotation.kinds import KINDS
from medmax_jax.data.annotation.questions import ImageFacts, Question, view_of
from medmax_jax.data.records.document import Document, Layout
from medmax_jax.data.records.reader import Records
from medmax_jax.data.sample.documents import GENERATE
from medmax_jax.models.tokenizer import IMAGE_NAME, SEP_NAME, Tokenizer, document_ids
from medmax_jax.models.vocab import SEP

OUTCOMES = (
    *("unusable", "no_distractor", "too_long", *FILTERS),
    *("contradicts", "source_share", "task_share", "kept"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caps:
    """`source`: greatest share of pseudo documents among those of a source in the new folder.

    `task`: greatest share of the new folder's documents that are pseudo documents of one task.
    """

    source: float
    task: float


@dataclasses.dataclass
class Verdict:
    """What became of a question. `below`: all filters that reject it.

    `contradicts`: the answer excludes what a document of the image states, whatever the filters do.
    """

    question: Question
    answer: str
    scores: dict[str, float]
    below: list[str]
    contradicts: bool
    outcome: str


def judge(
    questions: Sequence[Question],
    images: Sequence[ImageFacts],
    sampled: Mapping[str, evidence.Line],
    measured: Mapping[str, evidence.Line],
    tokenizer: Tokenizer,
    thresholds: Thresholds,
) -> list[Verdict]:
    """Return the verdict on each question, before the caps."""
    verdicts = []
    for q in questions:
        answer, agreement = evidence.best(q, sampled[q.id]["replies"], tokenizer)
        line, scores, below, contradicts = measured.get(q.id), {}, [], False
        if not answer:
            outcome = "unusable"
        elif line is None:
            outcome = "no_distractor"
        elif TOO_LONG in line["picks"]:
            outcome = "too_long"
        else:
            scores = dict(agreement=agreement, order=filters.order_share(line["picks"]))
            if "likelihoods" in line:
                scores["margin"] = filters.margin(line["likelihoods"])
            scores = {name: round(scores[name], 4) for name in FILTERS if name in scores}
            below = filters.failed(scores, thresholds)
            contradicts = filters.contradicted(q, answer, images[q.image].stated)
            outcome = [*below, *["contradicts"] * contradicts, "kept"][0]
        verdicts.append(Verdict(q, answer, scores, below, contradicts, outcome))
    return verdicts


def apply_caps(
    verdicts: Sequence[Verdict], images: Sequence[ImageFacts], records: Records, caps: Caps
) -> None:
    """Change the outcome of kept documents that are beyond a cap; the best ones stay.

    Of each image the first document of a task comes before the second of another image; then the
    order is that of the scores and of the ids.
    """
    turn: Counter[tuple[int, str]] = Counter()
    ranked = []
    for v in verdicts:
        if v.outcome == "kept":
            key = (v.question.image, KINDS[v.question.kind].task)
            scores = [-v.scores.get(name, 0.0) for name in ("order", "agreement", "margin")]
            ranked.append((turn[key], *scores, v.question.id, v))
            turn[key] += 1
    best = [entry[-1] for entry in sorted(ranked, key=lambda entry: entry[:-1])]
    by_source = defaultdict(list)
    for v in best:
        by_source[images[v.question.image].source].append(v)
    real, old = _sizes(records, "source", pseudo=False), _sizes(records, "source", pseudo=True)
    for source, own in by_source.items():
        for v in own[_most_of_source(real[source], old[source], caps.source) :]:
            v.outcome = "source_share"
    best = [v for v in best if v.outcome == "kept"]
    most = _most_of_task(best, _sizes(records, "task", pseudo=True), len(records), caps.task)
    seen: Counter[str] = Counter()
    for v in best:
        task = KINDS[v.question.kind].task
        seen[task] += 1
        if seen[task] > most[task]:
            v.outcome = "task_share"


def _sizes(records: Records, label: str, *, pseudo: bool) -> Counter[str]:
    """Return the number of documents of each source or task that are pseudo, or that are not."""
    names = records.names(label)
    column = records.index[label][np.asarray(records.index["pseudo"]) == pseudo]
    return Counter(names[n] for n in column.tolist())


def _most_of_source(real: int, pseudo: int, share: float) -> int:
    """Return how many pseudo documents may be added to a source. (30, 0, 0.25)  ->  10."""
    if share >= 1:
        return sys.maxsize
    return max(0, math.floor(share / (1 - share) * real + 1e-9) - pseudo)


def _most_of_task(
    kept: Sequence[Verdict], before: Counter[str], documents: int, share: float
) -> dict[str, int]:
    """Return the most new documents of each task, such that no task exceeds its share of all."""
    wanted = Counter(KINDS[v.question.kind].task for v in kept)
    most = dict(wanted)
    while True:
        limit = math.floor(share * (documents + sum(most.values())) + 1e-9)
        lower = {task: max(0, min(n, limit - before[task])) for task, n in most.items()}
        if lower == most:
            return most
        most = lower


def documents(
    verdicts: Sequence[Verdict],
    images: Sequence[ImageFacts],
    layout: Layout,
    tokenizer: Tokenizer,
    generator: str,
) -> Iterator[Document]:
    """Yield the kept documents, image by image, with the codes that the image already has."""
    kept = (v for v in verdicts if v.outcome == "kept")
    for v in sorted(kept, key=lambda v: v.question.image):
        q, image = v.question, images[v.question.image]
        text = f"{IMAGE_NAME}{q.text}{SEP_NAME}{v.answer}"
        if q.kind == "generation":
            text = f"{GENERATE.format(v.answer)}{SEP_NAME}{IMAGE_NAME}"
        codes = image.codes[view_of(q.kind, layout)].astype(np.int32)
        tokens = document_ids(tokenizer, text, codes, layout.vocab)
        assert (tokens == SEP).sum() == 1, "read_answer accepts no control tokens"
        yield Document(
            tokens=tokens,
            image_path=image.path,
            task=KINDS[q.kind].task,
            source=image.source,
            credential=image.credential,
            turns=1,
            group=image.group,
            id=f"pseudo-{generator[:12]}/{q.id}",
            image_sha256=image.image_sha256,
            view=layout.view,
            answer_view=layout.answer_view,
            pseudo=True,
            generator=generator,
            scores=v.scores,
        )


def counts(
    verdicts: Sequence[Verdict], states: Mapping[str, Counter[str]]
) -> dict[str, dict[str, Any]]:
    """Return the counts of images and questions of each kind; they add up, or this raises.

    `below_FILTER` counts every answer that a filter rejects, also those that another one rejects,
    and `contradicting` all answers that contradict a document, of the `scored` ones.
    """
    table = {}
    for kind, of_images in states.items():
        own = [v for v in verdicts if v.question.kind == kind]
        outcomes = Counter(v.outcome for v in own)
        below = Counter(name for v in own for name in v.below)
        if sum(outcomes[name] for name in OUTCOMES) != len(own):
            raise ValueError(f"outcomes {outcomes} of {len(own)} questions; report this as a bug")
        table[kind] = dict(
            task=KINDS[kind].task,
            images={"missing": of_images.total() - of_images["present"], **of_images},
            questions=len(own),
            outcomes={name: outcomes[name] for name in OUTCOMES},
            scored=sum(bool(v.scores) for v in own),
            **{f"below_{name}": below[name] for name in FILTERS},
            contradicting=sum(v.contradicts for v in own),
        )
    return table
