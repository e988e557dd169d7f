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
from typing import Any

from medmax_jax.cli import STOPPED, Interrupted
from medmax_jax.data.annotation import filters
from medmax_jax.data.annotation.generators import EndpointGenerator, EngineGenerator, Prompt
from medmax_jax.data.annotation.kinds import ATTRIBUTES, KINDS, LETTERS
from medmax_jax.data.annotation.questions import Question, spread, with_options
from medmax_jax.data.image_tokens.encoder import PrepareError
from medmax_jax.data.sample.phrases import exclude
from medmax_jax.io.journal import open_journal
from medmax_jax.io.progress import ItemProgress
from medmax_jax.models.tokenizer import Tokenizer

SAMPLES, EVIDENCE = "samples.jsonl", "evidence.jsonl"
FIELDS = {SAMPLES: ("id", "replies"), EVIDENCE: ("id", "answer", "distractors", "picks")}
BATCH = 128  # questions of one kind that are journaled together
SECONDS = 5.0  # between two lines of progress
SHOWN = len(LETTERS)  # options at most: the answer and its distractors
DISTRACTORS = SHOWN - 1
SAME = 0.8  # F1 of words from which a text of another image says the same, so is no distractor
TRIED = 64  # texts of other images that are tried as distractors
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What both stages use. `prompt_of`: of a question, with another text and kind."""

    out: Path
    generator: EngineGenerator | EndpointGenerator
    tokenizer: Tokenizer
    samples: int
    seed: int
    prompt_of: Callable[[Question, str, str, str], Prompt]
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
            journal.append(*added)
            lines |= {line["id"]: line for line in added}
            clock.tick(name.removesuffix(".jsonl"), len(added))
    lines = {q.id: lines[q.id] for q in questions if q.id in lines}
    if left := len(questions) - len(lines):
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
    prompts = [work.prompt_of(q, q.text, q.kind, "") for q in batch]
    replies = work.generator.samples(prompts, work.samples)
    return [None if r is None else dict(replies=r) for r in replies]


def _measure(
    batch: list[Question],
    answers: Mapping[str, str],
    chosen: Mapping[str, list[str]],
    work: Work,
) -> list[Line | None]:
    """Return the evidence on each answer; None where an endpoint did not reply."""
    lines: list[Line | None] = [dict(answer=answers[q.id], distractors=chosen[q.id]) for q in batch]
    if work.generator.has_likelihoods:
        prompts = [work.prompt_of(q, q.text, q.kind, "") for q in batch]
        options = [[answers[q.id], *chosen[q.id]] for q in batch]
        scores = work.generator.likelihoods(prompts, options)
        for line, score in zip(lines, scores, strict=True):
            line["likelihoods"] = score
    shown = [rotations(q, answers[q.id], chosen[q.id]) for q in batch]
    prompts = [
        work.prompt_of(q, text, "mcq", f"/order{r}")
        for q, texts in zip(batch, shown, strict=True)
        for r, text in enumerate(texts)
    ]
    counts = [len(texts) for texts in shown for _ in texts]
    picks = iter(work.generator.picks(prompts, counts))
    for n, texts in enumerate(shown):
        own = [next(picks) for _ in texts]
        if any(pick is False for pick in own):
            lines[n] = None
        else:  # option `pick` of rotation r is option `pick + r` of the answer and its distractors
            lines[n]["picks"] = [
                (pick + r) % len(own) if isinstance(pick, int) else pick
                for r, pick in enumerate(own)
            ]
    return lines


def rotations(question: Question, answer: str, distractors: Sequence[str]) -> list[str]:
    """Return the question with the answer and its distractors as options, once in each place.

    "Which ..?", "MRI", ["CT"]  ->  Which ..? A: MRI B: CT   and   Which ..? A: CT B: MRI
    """
    stem, options = question.text, [answer, *distractors]
    if question.kind == "mcq":
        stem = stem.rsplit("\n", len(question.options))[0]
        options = [question.options[LETTERS.index(letter)] for letter in options]
    options = [" ".join(option.split()) for option in options]
    return [with_options(stem, options[r:] + options[:r]) for r in range(len(options))]


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
