"""Defines the card of a task, and the row that a reader of a benchmark's files yields.

{"task_name": "slake", "question_type": "closed", "prompt": "Is it a CT?", "answer": "yes",
 "image_path": "imgs/xmlab1/source.jpg", "id": "slake-test-0000002", "group": "xmlab1",
 "slices": {"modality": "CT", "organ": "Lung"}, "data_class": "open"}
"""

import dataclasses
from typing import Any

from medmax_jax.data.records.row_streams import RowLocation
from medmax_jax.endpoints.egress import LICENCE_BOUND
from medmax_jax.eval.metrics.question_sets import OwnRule, OwnScores, QuestionSets

# Why rows of a benchmark are left out by a rule; its counts include them.
YES_NO = "closed, but not answered by yes or no"
ONE_ANSWER = "of multiple choice, but all answers are the same"
NO_NUMBER = "numeric, but not answered by one number"
KIND_OF_RULE = {YES_NO: "closed", ONE_ANSWER: "mcq", NO_NUMBER: "numeric"}  # of the task's name
Item = dict[str, Any]  # "image_bytes": where the format embeds them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """Holds a published score. `metric`: its metric, which may differ from this suite's."""

    model: str
    value: float
    metric: str
    read: str


def published_scores(metric: str, read: str, *scores: tuple[str, float]) -> tuple[Published, ...]:
    """Return the scores of several models, (model, value), on one metric from one source."""
    return tuple(Published(model=m, value=v, metric=metric, read=read) for m, v in scores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Describes one task: its card.

    counts: of its rows, in its own form; None: not published. counted: the source of the numbers.
    left_out: rows that the benchmark assigns to the task and the suite leaves out, because they are
    called closed and are not answered by yes or no. metric: what published scores are compared
    with, as summary.json names it; the headline, unless it is a score of `sets`. differs: how the
    published evaluation differs from this suite's strict mode. own_correct: the benchmark's own
    rule, by a complete text and its record; None: it gives the answer no score. The summary has its
    share of correct answers next to the strict metric. own_scores: where it is more than that
    share, the benchmark's own scores of the records of the task, by metric. own_scorer: the
    benchmark's code that these were compared with, at its commit, and on how many outputs they
    agree. sets: questions that count together. run_by: other frameworks that run it.
    """

    task: str
    title: str
    family: str
    source: str
    licence: str
    metric: str
    revision: str = "not pinned: its publisher tags no revision"
    split: str = "test"
    counts: int | None = None
    counted: str = ""
    left_out: int = 0
    data_class: str = LICENCE_BOUND
    prompt: str = "the row's"
    differs: str = ""
    published: tuple[Published, ...] = ()
    own_correct: OwnRule | None = None
    own_scorer: str = ""
    own_scores: OwnScores | None = None
    sets: QuestionSets | None = None
    run_by: str = ""

    def fields(self) -> dict[str, Any]:
        """Return what a page states of the card, for files: all but its sets and functions."""
        left_out = ("sets", "own_correct", "own_scores")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}


def item_row(name: str, place: RowLocation, kind: str, **fields: Any) -> Item:
    """Return an item in the MedMax schema; empty slices are left out, fields replace defaults.

    The value of a slice is a text, or a list of texts where the item belongs to several slices.
    """
    fields.setdefault("slices", {})
    fields["slices"] = {
        k: v if isinstance(v, list) else str(v)
        for k, v in fields["slices"].items()
        if v not in (None, "", [])
    }
    id_ = place.id(name).replace("/", "-")
    return dict(task_name=name, question_type=kind, id=id_, data_class=LICENCE_BOUND) | fields
