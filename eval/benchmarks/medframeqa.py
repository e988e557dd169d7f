"""Reads and scores MedFrameQA: questions about 2 to 5 frames of a medical video.

    test-*.parquet   question_id, question, options (list), correct_answer (letter), image_1 ..
                     image_5 ({bytes, path} or null), system, organ, keyword, modality, video_id,
                     reasoning_chain

Read at: huggingface.co/datasets/SuhaoYu1020/MedFrameQA, README.md (fields, counts, license), and
github.com/haojinw0027/MedFrameQA at e83fbe3, src/eval_process.py (scoring). Questions of one video
share its frames, so the video is the group.
"""

import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from medmax_jax.data.records.row_streams import RowLocation, parquet_rows
from medmax_jax.data.sources.row import RejectedRow, RowError, collect_rows, field_text
from medmax_jax.eval.benchmarks import fields
from medmax_jax.eval.benchmarks.card import Item, TaskSpec, published_scores
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.records import EvalRecord

NAME = "medframeqa"
IMAGES = tuple(f"image_{number}" for number in range(1, 6))
SLICES = ("system", "organ", "modality")
COLUMNS = ("question_id", "question", "options", "correct_answer", *IMAGES, *SLICES, "video_id")
MARKERS = ("Answer:", "Answer*", "Final Answer", "final answer")  # in this order


def read(folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    """Yield the items of the test split, which is the only one."""
    paths = fields.split_files(folder, "test", "MedFrameQA")
    yield from collect_rows(parquet_rows(paths, COLUMNS, "test.parquet", batch=8), _row)


def _row(place: RowLocation, row: dict[str, Any]) -> Item:
    given = [name for name in IMAGES if row[name] is not None]
    if given != list(IMAGES[: len(given)]) or len(given) < 2:
        raise RowError("image_1 to image_5: not two or more, the first ones")
    images = [fields.image_of_parquet(row[name], name) for name in given]
    return fields.choice_row(
        NAME,
        place,
        question=field_text(row, "question"),
        choices=fields.options(row["options"], "options"),
        answer=row["correct_answer"],
        group=field_text(row, "video_id"),
        slices={name: row[name] for name in SLICES} | {"frames": len(images)},
        **fields.embedded(images, "images"),
    )


def own_correct(text: str, record: EvalRecord) -> bool | None:
    """Return whether the published evaluation reads the right letter; it skips empty responses."""
    if not text:
        return None
    options = text_metrics.options(record.prompt)
    return _parsed(text, options) == record.answer


def _parsed(response: str, options: Mapping[str, str]) -> str:
    """Return the letter that the published evaluation reads, "" for none.

    In this order: \\boxed{B}; the first letter after the last mark, of the first mark that occurs;
    the last of the "(B)", else of the "B."; in more than five words the last option's text. Letters
    after a mark may be part of a word.
    """
    for letter in re.findall(r"boxed\{([A-Z])\}", response):
        if letter in options:
            return letter
    if after := _after_marker(response):
        found = [letter for letter in options if letter in after]
        if found:
            return min(found, key=after.find)
    response = functools.reduce(str.strip, ",.!?;:'", response)
    response = f" {response} "
    for form in ("({})", "{}."):
        marks = {letter: form.format(letter) for letter in options}
        if found := [letter for letter in options if marks[letter] in response]:
            return max(found, key=lambda letter: response.rfind(marks[letter]))
    if len(response.split()) <= 5:
        return ""
    # Its options are compared up to a period with a space.
    texts = {letter: text.split(". ")[0].lower() for letter, text in options.items()}
    lowered = response.lower()
    found = [letter for letter, text in texts.items() if text in lowered]
    return max(found, key=lambda letter: lowered.rfind(texts[letter]), default="")


def _after_marker(response: str) -> str:
    for marker in MARKERS:
        before, found, after = response.rpartition(marker)
        if found:
            return after.strip()
    return ""


TABLE = "images/System_acc.png of github.com/haojinw0027/MedFrameQA at e83fbe3, column Avg"
CARDS = (
    TaskSpec(
        task=f"{NAME}_mcq",
        title="MedFrameQA, 2 to 5 frames",
        family="vqa_mcq",
        source="huggingface.co/datasets/SuhaoYu1020/MedFrameQA",
        licence="CC BY 4.0; the frames belong to the videos' publishers",
        metric="accuracy",
        counts=2_851,
        counted="README.md of the source; 9,237 frames",
        differs="MedFrameQA: a system prompt asks for reasoning and 'Answer:', the options are a "
        "list in one line; empty responses are left out of the mean",
        published=published_scores(
            "MedFrameQA accuracy, %",
            TABLE,
            *(("o1", 47.91), ("o3", 50.18), ("o4-mini", 49.40), ("Gemini-2.5-Flash", 54.75)),
            *(("Claude-3.7-Sonnet", 49.67), ("QvQ-72B-Preview", 46.59), ("GPT-4o", 45.67)),
            *(("GPT-4o-mini", 34.55), ("GPT-4-Turbo-V", 46.69)),
            ("Qwen2.5-VL-72B-Instruct", 40.89),
        ),
        own_correct=own_correct,
        own_scorer="src/eval_process.py of github.com/haojinw0027/MedFrameQA at e83fbe3: agrees on "
        "1,200 of 1,200 outputs",
        run_by="MedEvalKit",
    ),
)
