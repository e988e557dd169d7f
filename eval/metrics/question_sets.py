"""Scores questions that count together, and defines a benchmark's own score of a task.

    ProbMed         the questions of one type about an image    paired_accuracy, by question type
    MediConfusion   one question about two images               set_accuracy, confusion

A set is right only if all of its questions are. It is confused if all of its answers are the same
option, which for MediConfusion means that the images were not distinguished. A set with an answer
that cannot be parsed counts as confused in `value`, and as not confused in `best`.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from medmax_jax.eval.metrics import per_record, strict
from medmax_jax.eval.metrics.per_record import ScoringInputs
from medmax_jax.eval.metrics.strict import ItemScore
from medmax_jax.eval.records import EvalRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionSets:
    """Describes the sets of a task. `metric`: the name of their score.

    key: fields or slices of a record that together name its set. by: the one of them by which the
    score is also given. confusion: whether the share of confused sets is also given. size: of a
    complete set; others, of a sample of the items, are not counted. 0: sets have any size.
    """

    metric: str
    key: tuple[str, ...]
    by: str = ""
    confusion: bool = False
    size: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnScore:
    """Holds a score as the benchmark's own code computes it, over `n` items or sets."""

    own: float | None
    own_n: int


# Of a complete text and its record, whether it is correct; None: it has no score.
OwnRule = Callable[[str, EvalRecord], bool | None]
# Of the records of a task, the scores by metric.
OwnScores = Callable[[Sequence[EvalRecord]], Mapping[str, OwnScore]]


class Card(Protocol):
    """Defines what scoring reads of a task's card."""

    @property
    def sets(self) -> QuestionSets | None: ...

    @property
    def own_correct(self) -> OwnRule | None: ...

    @property
    def own_scores(self) -> OwnScores | None: ...


def own_scores(
    card: Card | None, records: Sequence[EvalRecord], headline: str
) -> Mapping[str, OwnScore]:
    """Return metric -> the benchmark's own score of a task's records; {} where it has none.

    The rule of a card gives the share of correct answers, next to the headline; answers that it
    gives no score are not counted. It reads the complete text, as the benchmark's code does.
    """
    if card and card.own_scores:
        return card.own_scores(records)
    if not card or not card.own_correct:
        return {}
    return {headline: share([card.own_correct(record.text, record) for record in records])}


def share(verdicts: Iterable[float | None]) -> OwnScore:
    """Return the mean of verdicts, without None."""
    known = [float(verdict) for verdict in verdicts if verdict is not None]
    return OwnScore(own=sum(known) / len(known) if known else None, own_n=len(known))


def set_scores(
    records: Sequence[EvalRecord], inputs: ScoringInputs, sets: QuestionSets
) -> dict[str, list[tuple[EvalRecord, ItemScore]]]:
    """Return metric -> (first record, score) of each set; "METRIC VALUE" for each value of `by`."""
    sizes = collections.Counter(_key(record, sets) for record in records)
    records = [r for r in records if not sets.size or sizes[_key(r, sets)] == sets.size]
    if not records:
        return {}
    keys = [_key(record, sets) for record in records]
    item_scores = [per_record.record_scores(r, inputs)["accuracy"] for r in records]
    first = {key: r for key, r in reversed(list(zip(keys, records, strict=True)))}
    right = strict.all_correct_by_key(item_scores, keys)
    rows = {sets.metric: [(first[key], score) for key, score in right.items()]}
    if sets.by:
        place = sets.key.index(sets.by)
        for value in sorted({key[place] for key in right if key[place]}):
            rows[f"{sets.metric} {value}"] = [
                (first[key], score) for key, score in right.items() if key[place] == value
            ]
    if sets.confusion:
        by_key: dict[tuple[str, ...], list[EvalRecord]] = {}
        for key, record in zip(keys, records, strict=True):
            by_key.setdefault(key, []).append(record)
        rows["confusion"] = [(first[key], _confusion(members)) for key, members in by_key.items()]
    return rows


def _key(record: EvalRecord, sets: QuestionSets) -> tuple[str, ...]:
    fields: Mapping[str, Any] = dict(record.slices) | vars(record)
    return tuple(fields.get(name, "") for name in sets.key)


def _confusion(records: Sequence[EvalRecord]) -> ItemScore:
    """Return 1 if all answers are the same option; lower is better, so 1 is also the worst."""
    failed = next((r.error for r in records if r.error), "")
    if failed:
        return strict.unscored(failed, low=1.0, high=0.0)
    parsed = {strict.parse_answer(r.family, per_record.answer_text(r), r.prompt) for r in records}
    if len(parsed - {None}) > 1:
        return strict.scored(0.0)
    if None in parsed:
        return dataclasses.replace(strict.unparsed("an answer is unparsed"), low=1.0, high=0.0)
    return strict.scored(1.0)
