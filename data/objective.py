"""python -m data.objective [--records D] [--mask answers]: compute task shares of the objective.

    document   the mean of each document's mean: a task weighs as many documents as it has
    token      the mean over scored tokens: it weighs as many tokens as its answers have

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
import sys

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
QUESTION = 15  # tokens of a question; not published, so a flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentGroup:
    """A group of similar documents: its percentage of all, and the scored tokens of one."""

    task: str
    percent: float
    text: float
    image: int


def published_groups(*, question: float, caption_share: float) -> list[DocumentGroup]:
    """Return MedMax's document groups. `caption_share`: captions among captions and generations."""
    both = TASKS[CAPTION] + TASKS[GENERATION]
    percent = TASKS | {CAPTION: both * caption_share, GENERATION: both * (1 - caption_share)}
    total = sum(percent.values())
    text = (MEAN - IMAGE - CONTROL) * total  # of all documents, questions included
    asked = question * (total - percent[GENERATION])  # generation: the text is the question
    long = (text - asked - VQA_ANSWER * percent[VQA]) / (total - percent[VQA])
    if long <= VQA_ANSWER:
        raise ValueError(
            f"--question is {question}; with {MEAN} tokens a document on average it leaves "
            f"{long:.0f} for the text of an answer: choose a smaller one"
        )
    found = []
    for task, share in percent.items():
        halves = task == REPORT
        if task != GENERATION:
            words = VQA_ANSWER if task == VQA else long
            drawn = 0 if task != INTERLEAVED else CODES
            frame = 2 if drawn else 0  # BOI and EOI
            part = share / 2 if halves else share
            found.append(
                DocumentGroup(task=task, percent=part, text=words + 1 + frame, image=drawn)
            )
        if halves or task == GENERATION:
            part = share / 2 if halves else share
            found.append(
                DocumentGroup(task=task, percent=part, text=3, image=CODES)
            )  # BOI, EOI, EOS
    return found


def groups_in_records(folder: str, mask: str) -> list[DocumentGroup]:
    """Return one group for each document of a folder of records."""
    found = open_records(folder)
    image = found.index[f"{mask}_image"]
    text = found.index[mask] - image
    names, percent = found.names("task"), 100 / len(found)
    rows = zip(found.index["task"].tolist(), text.tolist(), image.tolist(), strict=True)
    return [
        DocumentGroup(task=names[task], percent=percent, text=t, image=i) for task, t, i in rows
    ]


def shares(kinds: list[DocumentGroup]) -> dict[str, dict[str, float]]:
    """Return, by task, the percent of the objective under both choices, and the image codes' part.

    VQA 50 %: 1 text; Image Generation 50 %: 1 text, 2 image
        {"VQA": {"document": 50, "document_image": 0, "token": 25, "token_image": 0},
         "Image Generation": {50, 33.3, 75, 50}}
    """
    all_percent = sum(k.percent for k in kinds)
    all_tokens = sum(k.percent * (k.text + k.image) for k in kinds)
    table: dict[str, dict[str, float]] = {}
    for k in kinds:
        names = ("document", "document_image", "token", "token_image")
        row = table.setdefault(k.task, dict.fromkeys(names, 0.0))
        document = 100 * k.percent / all_percent
        row["document"] += document
        row["document_image"] += document * k.image / (k.text + k.image)
        row["token"] += 100 * k.percent * (k.text + k.image) / all_tokens
        row["token_image"] += 100 * k.percent * k.image / all_tokens
    return table


def markdown(kinds: list[DocumentGroup]) -> str:
    """Return the table of docs/explanation/objective.md."""
    table = shares(kinds)
    lines = [
        "| task | `document` (image codes) | `token` (image codes) | ratio |",
        "|---|---|---|---|",
    ]
    for task, row in sorted(table.items(), key=lambda item: -item[1]["document"]):
        times = row["document"] / row["token"]
        lines.append(f"| {task} | {_percentages(row)} | {float(f'{times:.2g}'):g} |")
    total = {name: sum(row[name] for row in table.values()) for name in table[task]}
    lines.append(f"| all | {_percentages(total)} | |")
    return "\n".join(lines)


def _percentages(row: dict[str, float]) -> str:
    return " | ".join(
        f"{row[name]:.1f}% ({row[f'{name}_image']:.1f}%)" for name in ("document", "token")
    )


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", default="", help="a folder of records to count instead")
    parser.add_argument("--mask", default="answers", choices=("answers", "release"))
    parser.add_argument("--question", type=float, default=QUESTION, help="tokens, of the model")
    parser.add_argument(
        "--captions", type=float, default=CAPTION_SHARE,
        help="captions among captions and image generations, of the model: the published chart's "
        "share, or 0.5 as a summary of the paper has it",
    )  # fmt: skip
    args = parser.parse_args()
    try:
        if args.records:
            kinds = groups_in_records(args.records, args.mask)
        else:
            kinds = published_groups(question=args.question, caption_share=args.captions)
    except ValueError as error:  # RecordsError is a subclass
        sys.exit(str(error))
    print(markdown(kinds))


if __name__ == "__main__":
    main()
