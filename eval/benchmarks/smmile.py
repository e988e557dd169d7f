"""Reads and scores SMMILE and SMMILE++: questions with in-context examples of their own.

    data/train-*.parquet   problem_id, order, question, answer, image {bytes, path}, image_url,
                           speciality, flag_*: one row per example; the last `order` of a problem is
                           its question, those before it are its shots

Each problem gives an open question and one of multiple choice, whose options are the distinct
answers of the problem; the shots have no options in either. SMMILE++ has permutations of SMMILE's
problems ("02de.._perm_3"): those of one problem are one group. config.shots=-1 shows all shots of a
problem, as published (ICL), and 0 none (0-shot). Read at: github.com/eth-medical-ai-lab/smmile at
ab004d2f, README.md, inference_and_evaluation/ (evaluate_EM.py, inference_openai.py, utils.py),
results/.
"""

import functools
import pathlib
import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medmax_jax.data.records.row_streams import RowLocation, SourceError, parquet_rows
from medmax_jax.data.sources.row import (
    ExcludedRow,
    RejectedRow,
    RowError,
    collect_rows,
    field_text,
)
from medmax_jax.eval.benchmarks import fields
from medmax_jax.eval.benchmarks.card import ONE_ANSWER, Item, Published, TaskSpec, item_row
from medmax_jax.eval.config import MAX_SHOTS
from medmax_jax.eval.metrics import question_sets
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.metrics.question_sets import OwnScore
from medmax_jax.eval.records import EvalRecord

NAMES = ("smmile", "smmile_plus_plus")
COLUMNS = ("problem_id", "order", "question", "answer", "image", "speciality")
FLAG = "flag_"
MAX_BYTES = 4 << 30  # of the distinct images of all problems, which are in memory together

Problem = list[dict[str, Any]]


def read(name: str, folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    """Yield the open and the multiple choice question of each problem."""
    import pyarrow.parquet  # here: the import is slow, and other formats do not need it

    paths = fields.split_files(folder, "train", name)
    flags = [c for c in pyarrow.parquet.read_schema(paths[0]).names if c.startswith(FLAG)]
    images: dict[str, bytes] = {}
    problems: dict[str, Problem] = {}
    for place, row in parquet_rows(paths, (*COLUMNS, *flags), "train.parquet"):
        _keep_image(row, images)
        problems.setdefault(str(row["problem_id"]), []).append(row | {"place": place})
        if sum(map(len, images.values())) > MAX_BYTES:
            raise SourceError(f"{name}: more than {MAX_BYTES >> 30} GiB of images")
    rows = [(problem[0]["place"], dict(id=key, rows=problem)) for key, problem in problems.items()]
    for kind in ("open", "mcq"):
        yield from collect_rows(rows, functools.partial(_item, name, kind, images))


def _keep_image(row: dict[str, Any], images: dict[str, bytes]) -> None:
    """Replace the image of a row by the name of its file, or by the reason why it has none."""
    try:
        embedded = fields.embedded([fields.image_of_parquet(row["image"], "image")], "image")
    except RowError as error:
        row["image"] = error
        return
    (name,), (data,) = embedded["image_path"], embedded["image_bytes"]
    images.setdefault(name, data)
    row["image"] = name


def _item(
    name: str, kind: str, images: Mapping[str, bytes], place: RowLocation, problem: dict[str, Any]
) -> Item:
    rows = problem["rows"]
    orders = [row["order"] for row in rows]
    if not all(type(order) is int for order in orders) or len(set(orders)) < len(orders):
        raise RowError("order: not a different number in each row of a problem")
    if len(rows) > MAX_SHOTS + 1:
        raise RowError(f"more than {MAX_SHOTS} examples in a problem")
    *shots, query = (_triplet(row, images) for row in sorted(rows, key=lambda row: row["order"]))
    last = max(rows, key=lambda row: row["order"])
    slices = {"speciality": last["speciality"], "shots": len(shots)}
    slices |= {c.removeprefix(FLAG): v for c, v in last.items() if c.startswith(FLAG)}
    item = item_row(
        name,
        place,
        kind,
        **query | dict(shots=shots, slices=slices),
        id=f"{place.id(name).replace('/', '-')}-{kind}",
        group=re.sub(r"_perm_\d+$", "", problem["id"]),
    )
    return _with_options(item, problem["id"]) if kind == "mcq" else item


def _triplet(row: dict[str, Any], images: Mapping[str, bytes]) -> dict[str, Any]:
    if isinstance(row["image"], RowError):
        raise RowError(f"{row['image']} (a problem needs all of its images)")
    return dict(
        prompt=field_text(row, "question"),
        answer=field_text(row, "answer"),
        image_path=row["image"],
        image_bytes=images[row["image"]],
    )


def _with_options(item: Item, problem_id: str) -> Item:
    """Return the question with the distinct answers of the problem, in a seeded order."""
    texts = list(dict.fromkeys(shot["answer"] for shot in (*item["shots"], item)))
    if len(texts) < 2:
        raise ExcludedRow(ONE_ANSWER)
    random.Random(f"{NAMES[0]} {problem_id}").shuffle(texts)
    letter = string.ascii_uppercase[texts.index(item["answer"])]
    return item | dict(options=list(fields.options(texts, "answer").values()), answer=letter)


# ---- The published scoring ----

# What pandas reads from the published CSV files as missing, and the scoring then as "nan".
MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_END = r"(?:\.\s*\w+|\.|\s+|$)"
STATEMENTS = tuple(  # in the order in which they are tried; letters in any case
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"answer is:?\s*([A-Z])[.\s]",
        r"\banswer:?\s*([A-Z])[.\s]",
        rf"\*\*Answer:\*\*\s*([A-Z]){_END}",
        rf"\*\*Answer\*\*:\s*([A-Z]){_END}",
        rf"\*Answer\*:\s*([A-Z]){_END}",
        rf"Answer:\s*([A-Z]){_END}",
        rf"The correct answer is\s*([A-Z]){_END}",
        rf"The answer(?:\s+is)?:?\s*([A-Z]){_END}",
        rf"The correct answer(?:\s+is)?:?\s*([A-Z]){_END}",
        rf"answer\s*is\s*([A-Z]){_END}",
        r"([A-Z])\s*is the (?:correct )?answer",
        *(rf"{verb}\s*([A-Z])\b" for verb in ("option", "choice", "select")),
        *(rf"{verb}\s*([A-Z])[.\s]" for verb in ("chose", "choose")),
        r"final answer:?\s*([A-Z])",
        r"[*_]([A-Z])[*_]",
    )
)


def normalized(text: str) -> str:
    """Return the text as the published exact match compares it."""
    text = "nan" if text in MISSING else text
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def own_correct_open(text: str, record: EvalRecord) -> bool:
    """Return whether an answer matches by the published exact match."""
    return normalized(text) == normalized(record.answer)


def selected_option(text: str, options: Mapping[str, str]) -> str:
    """Return the letter that the published code reads from a response; "" for none."""
    tag = _tagged(text)
    if tag:
        letter = re.search("[A-Z]", tag.upper())
        return letter[0] if letter else tag[0].upper()
    text = text.strip()
    for statement in STATEMENTS:
        if found := statement.search(text):
            return found[1].upper()
    if found := re.search(r"\b([A-Z])\b", text):
        return found[1]
    for letter, option in options.items():
        option = option.strip().lower()
        if option == text.lower() or (option and option in text.lower()):
            return letter
    return ""


def _tagged(text: str) -> str:
    """Return the content of the first answer tag, up to its end tag or else the next empty line."""
    after = text.partition("<answer>")[2]
    content, closed, _ = after.partition("</answer>")
    return (content if closed else after.partition("\n\n")[0]).strip()


def own_correct_mcq(text: str, record: EvalRecord) -> bool:
    """Return whether a response is correct by the published extraction of a letter."""
    return selected_option(text, text_metrics.options(record.prompt)) == record.answer


def own_scores_open(records: Sequence[EvalRecord]) -> dict[str, OwnScore]:
    """Return the published exact match."""
    verdicts = (own_correct_open(record.text, record) for record in records)
    return {"exact": question_sets.share(verdicts)}


RESULTS = (
    "results/ of github.com/eth-medical-ai-lab/smmile at ab004d2f: *_evaluation.json, *_mcqa.csv"
)
LICENCE = "CC BY-NC-SA 4.0: its page on huggingface.co; CC BY 4.0: its README.md on GitHub"
# Model, exact match of open answers 0-shot and with shots, accuracy of choices likewise; percent.
SCORES = {
    "SMMILE": (
        ("GPT-4o", 0.00, 9.01, 49.55, 58.56),
        ("Claude 3.7 Sonnet", 0.00, 2.70, 55.86, 42.34),
        ("Qwen2.5-VL 72B", 0.00, 16.22, 52.25, 54.95),
        ("Qwen2.5-VL 7B", 0.00, 22.52, 38.74, 45.05),
        ("Llama 3.2 Vision 90B", 0.00, 30.63, 54.95, 29.73),
        ("MedGemma 4B", 0.00, 11.71, 41.44, 40.54),
        ("LLaVA-OneVision 7B", 3.60, 22.52, 39.64, 27.03),
        ("LLaVA-Med", 0.00, 0.00, 0.00, 0.00),
        ("majority of the shots", None, 27.03, None, 24.32),
        ("random shot", None, 23.42, None, 36.04),
    ),
    "SMMILE++": (
        ("GPT-4o", 0.00, 7.80, 56.74, 55.68),
        ("Qwen2.5-VL 72B", 0.00, 24.37, 60.60, 63.20),
        ("Llama 3.2 Vision 90B", 0.00, 27.46, 49.23, 30.06),
        ("MedGemma 4B", 0.00, 13.29, 40.37, 44.80),
        ("LLaVA-OneVision 7B", 2.89, 25.72, 41.62, 27.46),
        ("majority of the shots", None, 17.53, None, 16.67),
    ),
}


def _published(title: str, first: int, what: str) -> tuple[Published, ...]:
    return tuple(
        Published(
            model=row[0], value=row[first + n], metric=f"{title} {what}, {way}, %", read=RESULTS
        )
        for row in SCORES[title]
        for n, way in enumerate(("0-shot", "ICL"))
        if row[first + n] is not None
    )


def _cards(name: str, title: str, count: int, source: str) -> tuple[TaskSpec, TaskSpec]:
    shared = dict(
        source=f"huggingface.co/datasets/smmile/{source}",
        split="train, the only one",
        licence=LICENCE,
        prompt="the row's, after its shots if config.shots is not 0",
        counts=count,
        counted="results of all models in github.com/eth-medical-ai-lab/smmile at ab004d2f",
    )
    scorer = "github.com/eth-medical-ai-lab/smmile at ab004d2f, inference_and_evaluation/"
    agrees = "agrees on 1,200 of 1,200 outputs"
    return (
        TaskSpec(
            task=f"{name}_open",
            title=f"{title}, open",
            family="vqa_open",
            metric="judge_correct",
            differs=f"{title}: exact match of the complete response, or a Llama 3.3 70B verdict",
            published=_published(title, 1, "exact match"),
            own_scores=own_scores_open,
            own_scorer=f"{scorer}evaluate_EM.py: {agrees}",
            **shared,
        ),
        TaskSpec(
            task=f"{name}_mcq",
            title=f"{title}, multiple choice",
            family="vqa_mcq",
            metric="accuracy",
            differs=f"{title}: the options in a random order that is not published, reasoning in "
            "tags, and any letter that occurs in the response",
            published=_published(title, 3, "choice accuracy"),
            own_correct=own_correct_mcq,
            own_scorer=f"{scorer}inference_openai.py: {agrees}",
            **shared,
        ),
    )


CARDS = (
    *_cards("smmile", "SMMILE", 111, "SMMILE"),
    *_cards("smmile_plus_plus", "SMMILE++", 1_038, "SMMILE-plusplus"),
)
