"""python -m data.objective [--records D] [--text 1 --image 1]: print the shares of the loss.

The mask itself is made by `loss_mask` in data/records/document.py.

    document   the mean of each document's mean: a task weighs as many documents as it has
    token      the mean over scored tokens: it weighs as many tokens as its answers have

--text, --image, --tasks and --pseudo are config.loss.weights: factors of these weights, whose sum
is then made 1 again. Without them the factors are 1. --pseudo 0 gives the shares of a run with
mixing.pseudo = False, too.

The share of a task is the sum of the loss weights of its targets. It equals the task's share of the
gradient if each target's own gradient has the same size. For a folder of records the shares are
counted. Without one they are MedMax's, computed from the published percentages and a length model
that agrees with the published mean of 1,156 tokens per document:

    every document     BOS, SEP and EOS, one image of 1,026 tokens, a question of --question tokens
    VQA                an answer of one token; the rest of the text is spread evenly over the others
    reports            half of them write the text, half the radiograph
    image generation   its text is the question
"""

import argparse
import dataclasses
import math
import sys

from medmax_jax import arguments
from medmax_jax.config import LossWeights, check_loss_weights, task_weights
from medmax_jax.data.mixture import (
    CAPTION,
    CAPTION_SHARE,
    GENERATION,
    INTERLEAVED,
    REPORT,
    TASKS,
    VQA,
)
from medmax_jax.data.records.reader import open_records

IMAGE, MEAN = 1_026, 1_156  # tokens of an image with BOI and EOI, and of a document
CODES = 1_024  # of an image; BOI and EOI are text targets
CONTROL = 3  # BOS, SEP and EOS
VQA_ANSWER = 1  # the evaluation allows one token for closed and multiple-choice answers
CHOICES = ("document", "token")  # of config.train.loss_weight
QUESTION = 15  # tokens of a question; not published, so a flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentGroup:
    """A class of similar documents: its percentage of all, and the scored tokens of one."""

    task: str
    percent: float
    text: float
    image: int
    pseudo: bool = False  # a model generated the answer


def published_groups(*, question: float, caption_share: float) -> list[DocumentGroup]:
    """Return the classes of documents of MedMax.

    `caption_share`: captions among captions and generations.
    """
    both = TASKS[CAPTION] + TASKS[GENERATION]
    percent = TASKS | {CAPTION: both * caption_share, GENERATION: both * (1 - caption_share)}
    total = sum(percent.values())
    text = (MEAN - IMAGE - CONTROL) * total  # of all documents, questions included
    questions = question * (total - percent[GENERATION])  # generation: the text is the question
    answer = (text - questions - VQA_ANSWER * percent[VQA]) / (total - percent[VQA])
    if answer <= VQA_ANSWER:
        raise ValueError(
            f"--question is {question}; with a mean of {MEAN} tokens per document this leaves "
            f"{answer:.0f} tokens for the text of an answer; use a smaller value"
        )
    groups = []
    for task, share in percent.items():
        halves = task == REPORT
        part = share / 2 if halves else share
        if task != GENERATION:
            answer_tokens = VQA_ANSWER if task == VQA else answer
            codes = 0 if task != INTERLEAVED else CODES
            markers = 2 if codes else 0  # BOI and EOI
            tokens = answer_tokens + 1 + markers
            groups.append(DocumentGroup(task=task, percent=part, text=tokens, image=codes))
        if halves or task == GENERATION:  # 3: BOI, EOI, EOS
            groups.append(DocumentGroup(task=task, percent=part, text=3, image=CODES))
    return groups


def groups_in_records(folder: str, mask: str) -> list[DocumentGroup]:
    """Return one entry for each document of a folder of records."""
    records = open_records(folder)
    image = records.index[f"{mask}_image"]
    text = records.index[mask] - image
    names, percent = records.names("task"), 100 / len(records)
    columns = (records.index["task"], text, image, records.index["pseudo"] == 1)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        DocumentGroup(task=names[task], percent=percent, text=t, image=i, pseudo=pseudo)
        for task, t, i, pseudo in rows
    ]


def shares(
    groups: list[DocumentGroup], weights: LossWeights, by: str = "task"
) -> dict[str, dict[str, float]]:
    """Return, by task, the percent of the objective under both choices, and the image codes' part.

    `by`: task, or pseudo for the names "True" and "False".

    VQA 50 %: 1 text; Image Generation 50 %: 1 text, 2 image; all weights 1
        {"VQA": {"document": 50, "document_image": 0, "token": 25, "token_image": 0},
         "Image Generation": {50, 33.3, 75, 50}}
    """
    table: dict[str, dict[str, float]] = {}
    factors, totals = task_weights(weights), dict.fromkeys(CHOICES, 0.0)
    for group in groups:
        names = (name for choice in CHOICES for name in (choice, f"{choice}_image"))
        row = table.setdefault(str(getattr(group, by)), dict.fromkeys(names, 0.0))
        for choice in CHOICES:
            scored = group.text + group.image if choice == "document" else 1
            factor = factors.get(group.task, 1.0) * (weights.pseudo if group.pseudo else 1.0)
            each = group.percent * factor / scored
            text, image = each * weights.text * group.text, each * weights.image * group.image
            row[choice] += text + image
            row[f"{choice}_image"] += image
            totals[choice] += text + image
    if unknown := sorted(factors.keys() - (tasks := {group.task for group in groups})):
        raise ValueError(
            f"--tasks is {weights.tasks!r}: no document has the task {unknown[0]!r}; use names "
            f"from {', '.join(sorted(tasks))}"
        )
    if not all(totals.values()):
        raise ValueError(
            "all targets have weight 0; increase --text, --image, --pseudo or a number of --tasks"
        )
    return {
        task: {name: 100 * x / totals[name.partition("_")[0]] for name, x in row.items()}
        for task, row in table.items()
    }


def markdown(groups: list[DocumentGroup], weights: LossWeights) -> str:
    """Return the table of docs/explanation/objective.md."""
    table = shares(groups, weights)
    lines = [
        "| task | `document` (image codes) | `token` (image codes) | ratio |",
        "|---|---|---|---|",
    ]
    for task, row in sorted(table.items(), key=lambda item: -item[1]["document"]):
        ratio = row["document"] / row["token"] if row["token"] else math.nan  # weight 0
        lines.append(f"| {task} | {_percentages(row)} | {float(f'{ratio:.2g}'):g} |")
    total = {name: sum(row[name] for row in table.values()) for name in table[task]}
    lines.append(f"| all | {_percentages(total)} | |")
    for name, sign in (("text, with BOI and EOI", -1), ("image codes", 1)):
        parts = [total[f"{choice}_image"] for choice in CHOICES]
        parts = [part if sign > 0 else 100 - part for part in parts]
        lines.append(f"| {name} | {parts[0]:.1f}% | {parts[1]:.1f}% | |")
    if generated := shares(groups, weights, by="pseudo").get("True"):
        lines.append(f"| pseudo documents | {_percentages(generated)} | |")
    return "\n".join(lines)


def _percentages(row: dict[str, float]) -> str:
    return " | ".join(
        f"{row[name]:.1f}% ({row[f'{name}_image']:.1f}%)" for name in ("document", "token")
    )


def main() -> None:
    """Run the program."""
    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--records", default="", help="folder of records whose tokens are counted instead"
    )
    parser.add_argument(
        "--mask", default="answers", choices=("answers", "release"), help="loss mask, for --records"
    )
    parser.add_argument(
        "--question", type=float, default=QUESTION, help="tokens of a question in the length model"
    )
    parser.add_argument(
        "--captions", type=float, default=CAPTION_SHARE,
        help="share of captioning among captioning and image generation in the length model: that "
        "of the published chart by default, or 0.5 as in a summary of the paper",
    )  # fmt: skip
    answers = "documents with a generated answer"
    for name, what in (("text", "text targets"), ("image", "image codes"), ("pseudo", answers)):
        parser.add_argument(
            f"--{name}", type=float, default=1.0, help=f"config.loss.weights.{name}, of {what}"
        )
    parser.add_argument(
        "--tasks", default="", metavar="'VQA=2, ...'", help="config.loss.weights.tasks"
    )
    args = parser.parse_args()
    weights = LossWeights(text=args.text, image=args.image, tasks=args.tasks, pseudo=args.pseudo)
    try:
        check_loss_weights(weights)
        if args.records:
            groups = groups_in_records(args.records, args.mask)
        else:
            groups = published_groups(question=args.question, caption_share=args.captions)
        table = markdown(groups, weights)
    except ValueError as error:  # RecordsError and ConfigError are subclasses
        sys.exit(str(error))
    print(table)


if __name__ == "__main__":
    main()
