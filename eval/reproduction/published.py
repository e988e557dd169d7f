"""Lists every published number of a paper as a cell: its value, source, and metric of this suite.

    eval/tasks/catalog.py  ->  PAPERS["medmax"]  ->  cells(paper, "MedMax 7B")

A cell belongs to a table and is a number of one model; `others` has the numbers of the other models
in the same place. `tolerance`: half the last printed digit, or the error of reading a chart by eye.
"""

import dataclasses
from collections.abc import Sequence

from medmax_jax.eval.benchmarks.card import Published
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.tasks import catalog

PERCENT = 100.0
PRINTED, CHART_COSINE, CHART_SCORE = 0.05, 0.01, 0.5  # tolerances, in published units
AVERAGE, CHAT_OVERALL = "vqa_average", "visual_chat_overall"  # cells over several tasks
ACCURACY_TASKS = catalog.COLUMNS
OTHER_METRICS = {"BiomedCLIP image-image cosine": "clip_image_image"}  # not the headline
MODEL = "MedMax 7B"  # the model of the paper
PROMPTS = {MODEL: "sft", "Chameleon 7B": "chameleon"}  # wording of the published evaluation
TABLES = {
    "vqa": "Visual question answering, %",
    "images": "Captions and generated images, BiomedCLIP cosine",
    "visual_chat": "Visual chat, judge's relative score, %",
    "multimodal": "Interleaved generation",
}
_TABLE_OF_FAMILY = {
    **dict.fromkeys(("vqa_closed", "vqa_mcq", "vqa_open"), "vqa"),
    **dict.fromkeys(("captioning", "image_generation"), "images"),
    **{"visual_chat": "visual_chat", "multimodal": "multimodal"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """Describes one published number. `metric`: of this suite; `scale`: published unit of a share.

    rows: the number of rows of the task in its own benchmark, None where it is not published.
    """

    table: str
    task: str
    title: str
    family: str
    metric: str
    scale: float
    tolerance: float
    published: Published
    others: tuple[Published, ...]
    rows: int | None = None

    @property
    def key(self) -> str:
        """Return the name of the cell; a task may have two, of its text and of its image."""
        return f"{self.task} {self.metric}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unreproduced:
    """Describes a published result that this program never computes, and why."""

    what: str
    published: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paper:
    """Describes a paper: its title, and the results that no evaluation can reproduce."""

    title: str
    unreproduced: tuple[Unreproduced, ...]


_NEEDS_TRAINING = "requires training runs on the complete mixture (docs/guides/training.md)"
_SECONDARY = "(from a reader's summary)"
PAPERS = {
    "medmax": Paper(
        title="MedMax: Mixed-Modal Instruction Tuning for Training Biomedical Assistants",
        unreproduced=(
            Unreproduced(
                what="VQA accuracy with 25, 50, 75 and 100 % of the data",
                published=f"rises; no numbers are published {_SECONDARY}",
                reason=_NEEDS_TRAINING,
            ),
            Unreproduced(
                what="VQA accuracy without the VQA data",
                published=f"-23 % {_SECONDARY}",
                reason=_NEEDS_TRAINING,
            ),
            Unreproduced(
                what="visual chat without the visual chat data",
                published=f"-17 % {_SECONDARY}",
                reason=_NEEDS_TRAINING,
            ),
            Unreproduced(
                what="VQA accuracy with a fine-tuned VQGAN",
                published=f"about -3 % {_SECONDARY}",
                reason=f"the fine-tuned VQGAN is not published; {_NEEDS_TRAINING}",
            ),
        ),
    )
}


def families(table: str) -> list[str]:
    """Return the families of tasks whose numbers are in a table."""
    return [family for family, name in _TABLE_OF_FAMILY.items() if name == table]


def models() -> list[str]:
    """Return the models and references that have published numbers."""
    return list(dict.fromkeys(one.model for *_, scores in _places() for one in scores))


def cells(model: str) -> list[Cell]:
    """Return the published numbers of a model, by table; raise EvalError for an unknown one."""
    if model not in models():
        raise EvalError(
            f"--published is {model!r}, which has no published numbers; use one of "
            f"{', '.join(models())}"
        )
    found = []
    for task, title, family, scores in _places():
        own = [one for one in scores if one.model == model]
        if not own:
            continue
        spec, metric = catalog.task_spec(task, family), own[0].metric
        cosine, chart = "cosine" in metric, own[0].read.startswith(catalog.CHART)
        found.append(
            Cell(
                table=_TABLE_OF_FAMILY[family],
                task=task,
                title=title,
                family=family,
                metric=OTHER_METRICS.get(metric) or _metric(task, family),
                scale=1.0 if cosine else PERCENT,
                tolerance=(CHART_COSINE if cosine else CHART_SCORE) if chart else PRINTED,
                published=own[0],
                others=tuple(one for one in scores if one.model != model),
                rows=spec.counts if spec and task in catalog.TASKS else None,
            )
        )
    return sorted(found, key=lambda cell: list(TABLES).index(cell.table))


def _places() -> list[tuple[str, str, str, Sequence[Published]]]:
    """Return (task, title, family, scores) of each place that has a published number."""
    places = [
        (task, spec.title, spec.family, [one for one in spec.published if one.metric == metric])
        for task, spec in catalog.TASKS.items()
        for metric in dict.fromkeys(one.metric for one in spec.published)
    ]
    average = f"Mean of the {len(ACCURACY_TASKS)} tasks"
    order = {task: number for number, task in enumerate(ACCURACY_TASKS)}
    places.sort(key=lambda place: order.get(place[0], len(order)))
    places.append((AVERAGE, average, "vqa_closed", catalog.AVERAGES))
    places.append((CHAT_OVERALL, "LLaVA-Med bench, overall", "visual_chat", catalog.CHAT_OVERALL))
    return places


def _metric(task: str, family: str) -> str:
    if task == AVERAGE:
        return "mean"
    spec = catalog.task_spec(task, family)
    return spec.metric if spec else "judge_relative"
