"""Collect the evidence on every question in two stages, each in a journal: exactly once.

    samples.jsonl     id, replies       k sampled answers
    evidence.jsonl    id, answer, distractors, likelihoods, picks: of each question with an answer

Questions are answered in batches of one kind with fixed bounds. A batch that was journaled in part
is computed again as a whole, and its missing lines are added: so numbers do not depend on where a
run was killed. No line depends on a threshold.
"""

import dataclasses
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medmax_jax.cli import STOPPED, Interrupted
from medmax_jax.data.annotation import filters
from medmax_jax.data.annotation.generators import EndpointGenerator, EngineGenerator, Prompt
from medmax_jax.data.annotation.kinds import ATTRIBUTES, KINDS, LETTERS
from medmax_jax.data.annotation.questions import Question, spread
from medmax_jax.data.image_tokens.encoder import PrepareError
from medmax_jax.data.sample.phrases import exclude
from medmax_jax.data.sample.questions import with_options
from medmax_jax.io.journal import open_journal
from medmax_jax.io.progress import ItemProgress
from medmax_jax.models.tokenizer import Tokenizer

SAMPLES, EVIDENCE = "samples.jsonl", "evidence.jsonl"
FIELDS = {SAMPLES: ("id", "replies"), EVIDENCE: ("id", "answer", "distractors", "picks")}
BATCH = 128  # questions of one kind that are journaled together
SECONDS = 5.0  # between two lines of progress
DISTRACTORS = len(LETTERS) - 1
SAME = 0.8  # F1 of words from which a text of another image says the same, so is no distractor
TRIED = 64  # texts of other images that are tried as distractors
Line = dict[str, Any]


class Order(NamedTuple):
    """One order of a question: its text, and whether the image precedes it."""

    text: str
    image_first: bool


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What both stages use. `prompt_of`: the prompt of a question in one order."""

    out: Path
    generator: EngineGenerator | EndpointGenerator
    tokenizer: Tokenizer
    samples: int
    seed: int
    prompt_of: Callable[[Question, Order], Prompt]
    progress: Callable[[str], None]
    stopped: Callable[[], bool]


def collect(questions: Sequence[Question], work: Work) -> tuple[dict[str, Line], dict[str, Line]]:
    """Return the lines of both stages by the id of the question.

    Raises Interrupted where the run was stopped, or an endpoint did not answer everything.
    """
    sampled = _stage(SAMPLES, questions, work, lambda batch: _sample(batch, work))
    answers = {q.id: best(q, sampled[q.id]["replies"], work.tokenizer)[0] for q in questions}
    answered = [q for q in questions if answers[q.id]]
    chosen = choose_distractors(answered, answers, seed=work.seed)
    asked = [q for q in answered if chosen[q.id]]
    evidence = _stage(EVIDENCE, asked, work, lambda batch: _measure(batch, answers, chosen, work))
    return sampled, evidence


def best(
    question: Question, replies: Sequence[str | None], tokenizer: Tokenizer
) -> tuple[str, float]:
    """Return (answer, agreement) of the samples; ("", 0) if none is usable."""
    answers = [filters.read_answer(question, reply, tokenizer) for reply in replies]
    return filters.agreement(question, answers)


def _stage(
    name: str,
    questions: Sequence[Question],
    work: Work,
    ask: Callable[[list[Question]], list[Line | None]],
) -> dict[str, Line]:
    with open_journal(work.out / name) as journal:
        if any(set(FIELDS[name]) - set(line) for line in journal.rows):
            raise PrepareError(f"{journal.path}: a line has other fields; use another --out")
        lines = {line["id"]: line for line in journal.rows}
        todo = sum(q.id not in lines for q in questions)
        clock = ItemProgress(todo, "questions", work.progress, every=SECONDS)
        for batch in batches(questions):
            new = [q.id not in lines for q in batch]
            if not any(new):
                continue
            if work.stopped():
                raise Interrupted(f"{STOPPED}: {len(questions) - len(lines)} questions are left")
            results = zip(batch, ask(batch), new, strict=True)
            added = [{"id": q.id} | line for q, line, is_new in results if is_new and line]
            if added:
                journal.append(*added)
                lines |= {line["id"]: line for line in added}
                clock.tick(name.removesuffix(".jsonl"), len(added))
    lines = {q.id: lines[q.id] for q in questions if q.id in lines}
    if left := len(questions) - len(lines):
        if work.stopped():
            raise Interrupted(f"{STOPPED}: {left} questions are left")
        raise Interrupted(
            f"{left} of {len(questions)} questions had no reply; rerun the same command to ask "
            f"them again. Last error: {work.generator.last_error}"
        )
    return lines


def batches(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Yield questions of one kind, BATCH at a time, in their order."""
    for _, of_kind in itertools.groupby(questions, key=lambda q: q.kind):
        of_kind = list(of_kind)
        for start in range(0, len(of_kind), BATCH):
            yield of_kind[start : start + BATCH]


def _sample(batch: list[Question], work: Work) -> list[Line | None]:
    prompts = [work.prompt_of(q, orders(q)[0][0]) for q in batch]
    replies = work.generator.samples(prompts, work.samples)
    return [None if r is None else dict(replies=r) for r in replies]


def _measure(
    batch: list[Question],
    answers: Mapping[str, str],
    chosen: Mapping[str, list[str]],
    work: Work,
) -> list[Line | None]:
    """Return the evidence on each answer; None where an endpoint did not reply."""
    prompts, options = [], []
    for q in batch:
        for prompt, letters in orders(q):
            prompts.append(work.prompt_of(q, prompt))
            texts = [answers[q.id], *chosen[q.id]]
            options.append([letters.get(text, text) for text in texts])
    results = iter(work.generator.choose(prompts, options))
    lines: list[Line | None] = []
    for q in batch:
        own = [next(results) for _ in orders(q)]
        line = dict(answer=answers[q.id], distractors=chosen[q.id])
        if None in own:
            lines.append(None)
            continue
        line["picks"] = [choice.pick for choice in own]
        if own[0].likelihoods:
            line["likelihoods"] = list(own[0].likelihoods)
        lines.append(line)
    return lines


def orders(question: Question) -> list[tuple[Order, dict[str, str]]]:
    """Return the orders in which a question is asked, first its own, with letter -> letter shown.

    Of a multiple-choice question each option is once in each place:
        Which ..? A: MRI B: CT   {A: A, B: B}      Which ..? A: CT B: MRI   {A: B, B: A}
    Other questions are asked after the image and before it.
    """
    if question.kind != "mcq":
        return [(Order(question.text, True), {}), (Order(question.text, False), {})]
    n, own = len(question.options), list(question.options)
    stem = question.text.rsplit("\n", n)[0]
    return [
        (
            Order(with_options(stem, own[r:] + own[:r]), True),
            {LETTERS[i]: LETTERS[(i - r) % n] for i in range(n)},
        )
        for r in range(n)
    ]


def choose_distractors(
    questions: Sequence[Question], answers: Mapping[str, str], *, seed: int
) -> dict[str, list[str]]:
    """Return up to three distractors of each answer, none where there is no different one."""
    pools: dict[str, list[str]] = defaultdict(list)
    for q in questions:
        if KINDS[q.kind].is_free_text:
            pools[q.kind].append(answers[q.id])
    pools = {kind: sorted(set(texts)) for kind, texts in pools.items()}
    chosen = {}
    for q in questions:
        rng = random.Random(f"{seed} distractors {q.id}")
        if q.kind in pools:
            chosen[q.id] = _other_texts(answers[q.id], pools[q.kind], rng)
        else:
            chosen[q.id] = _other_options(q, answers[q.id], rng)
    return chosen


def _other_texts(answer: str, pool: list[str], rng: random.Random) -> list[str]:
    drawn: list[str] = []
    for text in rng.sample(pool, min(TRIED, len(pool))):
        if len(drawn) < DISTRACTORS and filters.word_f1(answer, text) <= SAME:
            drawn.append(text)
    return drawn


def _other_options(question: Question, answer: str, rng: random.Random) -> list[str]:
    if question.kind == "mcq":
        return [x for x in LETTERS[: len(question.options)] if x != answer]
    others = [option for option in question.options if option != answer]
    if question.kind != "open":
        return rng.sample(others, min(DISTRACTORS, len(others)))
    stated = ATTRIBUTES[question.attribute].values(answer)
    others = [value for value in others if all(exclude(value, own) for own in stated)]
    return spread(others, rng, DISTRACTORS)
