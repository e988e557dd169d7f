"""Defines the result of an evaluation: summary.json, and the row of one metric in it.

    Summary(model="tiny", scores=(MetricRow(task="slake_closed", metric="accuracy", value=0.7, ..),
            ..), probes={"reason": "", "rows": [..]}, ..)

JSON is read and written here only. A summary of an earlier version may lack fields: they have the
defaults below.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from medmax_jax.io import journal
from medmax_jax.io.text_files import read_json_object

SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricRow:
    """Holds one metric of one task.

    value: what could not be parsed or judged counts as wrong, in `best` as right; `scored_only` is
    the value if it were dropped. n_judge_read: answers that only a judge could read; value_parsed:
    the value with these wrong, None where there are none. ci_low, ci_high: the 95 % interval over
    groups, None with one group. mde: minimum detectable effect. paper, paper_n, paper_why: the
    score of the MedMax release. own, own_n: that of the benchmark's own rule, and of how many
    answers. headline: the first metric of a task. baseline: the best one, and its name. judge_sd:
    the spread over repeated judging. mean_of_ratios, win, tie, loss: of a judge's comparisons.
    """

    task: str
    family: str = ""
    metric: str
    mode: str = ""
    n: int = 0
    groups: int = 0
    few_groups: bool = False
    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    best: float | None = None
    n_unparsed: int | None = None
    n_unscored: int | None = None
    n_errors: int | None = None
    scored_only: float | None = None
    n_judge_read: int = 0
    value_parsed: float | None = None
    judge_sd: float | None = None
    mde: float | None = None
    mean_of_ratios: float | None = None
    win: int | None = None
    tie: int | None = None
    loss: int | None = None
    paper: float | None = None
    paper_n: int | None = None
    paper_why: str = ""
    own: float | None = None
    own_n: int | None = None
    headline: bool = False
    baseline: float | None = None
    baseline_name: str = ""

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Return the row of a JSON object; fields that are not known are ignored."""
        return cls(**{name: row[name] for name in _names(cls) if name in row})

    def to_json(self) -> dict[str, Any]:
        """Return the columns; those of comparisons only where there are any."""
        row = dict(vars(self))
        return row if self.win is not None else {k: row[k] for k in row if k not in _COMPARISON}


_COMPARISON = ("mean_of_ratios", "win", "tie", "loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineScores:
    """Holds the scores of one baseline. `says`: what it answers, in words."""

    name: str
    says: str
    scores: tuple[MetricRow, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Holds everything that an evaluation found, and what computed it.

    view, trained_view: of the images that a local model was shown, and of those that it was trained
    on. floors: the scores of the baselines. baselines: paired comparisons with answers to the same
    items, {name, says, scores}. cards: of the user's own tasks. not_run: {task, why}. recorded: how
    many rows of another program's predictions are of items, and why not. image_sets: KID and
    diversity. probes, calibration, verbalized, contamination: {reason, rows, ..} of the stage of
    that name; None where it was not requested. modality_ceiling: the upper bound of modality_match.
    spent: on an endpoint.
    """

    model: str
    scores: tuple[MetricRow, ...]
    adapter: str = ""
    kind: str = ""
    view: str = "released"
    trained_view: str = "released"
    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    floors: tuple[BaselineScores, ...] = ()
    baselines: tuple[Mapping[str, Any], ...] = ()
    cards: tuple[Mapping[str, Any], ...] = ()
    not_run: tuple[Mapping[str, str], ...] = ()
    recorded: Mapping[str, Any] | None = None
    judge: Mapping[str, Any] | None = None
    not_judged: tuple[str, ...] = ()
    not_scored: tuple[str, ...] = ()
    scorers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    image_sets: tuple[Mapping[str, Any], ...] = ()
    probes: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    verbalized: Mapping[str, Any] | None = None
    contamination: Mapping[str, Any] | None = None
    errors: int = 0
    modality_ceiling: Mapping[str, Any] | None = None
    history: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    spent: Mapping[str, Any] | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the summary of a JSON object; fields that are not known are ignored."""
        names = {name: _KEYS.get(name, name) for name in _names(cls)}
        known = {name: content[key] for name, key in names.items() if key in content}
        rows = tuple(map(MetricRow.from_json, content["scores"]))
        floors = tuple(
            BaselineScores(**entry | {"scores": tuple(map(MetricRow.from_json, entry["scores"]))})
            for entry in content.get("floors", ())
        )
        return cls(**known | {"scores": rows, "floors": floors})

    def to_json(self) -> dict[str, Any]:
        """Return the content of summary.json."""
        content = {_KEYS.get(name, name): value for name, value in vars(self).items()}
        floors = [vars(f) | {"scores": [row.to_json() for row in f.scores]} for f in self.floors]
        return content | {"scores": [row.to_json() for row in self.scores], "floors": floors}


# Verbatim: part of the data.
_KEYS = {"image_sets": "picture_sets"}  # in the file


def read_summary(workdir: str | Path) -> Summary:
    """Read summary.json; raise TextFileError where it is missing or damaged."""
    return Summary.from_json(read_json_object(Path(workdir) / SUMMARY))


def write_summary(workdir: str | Path, summary: Summary) -> None:
    """Write summary.json atomically."""
    journal.write_json(Path(workdir) / SUMMARY, summary.to_json())


def _names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))
