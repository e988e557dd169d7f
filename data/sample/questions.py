"""Make questions about the sample's images that cannot be answered without the image.

    closed   as many "yes" as "no" per value: "Is this an MRI?" is right half of the time
    mcq      the right letter cycles through A B C D; common values are thinned
    open     the value itself
    lists    the values of closed questions without the question, for the base model

A `Question` names its template, so that an image-blind baseline (the most common answer of a
template) can be scored alongside the model.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medmax_jax.data.sample.phrases import NOUNS, body_part_phrase, exclude, with_article

LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """One question about the image of `row`; `value` is the value that it asks for or about."""

    row: dict
    template: str
    kind: str  # "closed" | "open" | "mcq"
    value: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class YesNoQuestions:
    """A family of yes/no questions about the values of one field."""

    template: str
    value: Callable[[dict], str | None]  # what is true of a row; None: unknown, no question
    wordings: tuple[str, ...]
    words: Callable[[str], str] = str  # how a value is written inside a wording
    rounds: int = 1  # how often every image is used in training


def _film(row: dict) -> str | None:
    is_film = row["modality"] == "X-ray" and row["body_part"] == "chest"
    return row["finding"] if is_film and row["finding"] else None


# Verbatim: part of the data.
CLOSED = (
    YesNoQuestions(
        "modality",
        lambda row: None if row["view"] == "localizer" else row["modality"],
        ("Is this {}?", "Is the image {}?", "Is {} shown here?"),
        lambda value: with_article(NOUNS[value]),
        rounds=3,
    ),
    YesNoQuestions(
        "body_part",
        lambda row: row["body_part"],
        ("Does the image show {}?", "Is {} shown here?", "Is this an image of {}?"),
        body_part_phrase,
        rounds=3,
    ),
    YesNoQuestions(
        "plane",
        lambda row: row["plane"],
        ("Is this {} slice?", "Is the slice {}?"),
        rounds=2,
    ),
    YesNoQuestions(
        "stain",
        lambda row: row["stain"] or "none",
        ("Is this tissue with {}?", "Is {} used here?"),
        lambda value: with_article({"H&E": "H&E stain"}.get(value, value)),
    ),
    YesNoQuestions(
        "lesion",
        lambda row: (
            None if row["lesion"] is None else {True: "lesion", False: "none"}[row["lesion"]]
        ),
        ("Is there a marked {} in this slice?", "Does this slice have a marked {}?"),
    ),
    YesNoQuestions(
        "pneumonia",
        _film,
        ("Is the finding of this chest X-ray {}?", "Is {} the finding here?"),
        rounds=2,
    ),
)
# Only this wording takes an article: "Is this an axial slice?" but "Is the slice axial?"
_ARTICLE = {"Is this {} slice?": with_article}

# Verbatim: part of the data.
OPEN = {
    "modality": ("What kind of image is this?", "Which modality is this?"),
    "body_part": ("Which part of the body is shown?", "What does the image show?"),
    "plane": ("In which plane is this slice?",),
    "stain": ("Which stain is used?",),
}
MCQ = ("modality", "body_part")


def closed_questions(
    rows: list[dict], seed: int, rounds: int | None, answerable: set[str] | None = None
) -> list[Question]:
    """Return balanced yes/no questions about `askable` values; `rounds` None: per template."""
    out = []
    for family in CLOSED:
        for turn in range(family.rounds if rounds is None else rounds):
            rng = random.Random(f"{seed} closed {family.template} {turn}")
            out += _balanced(rows, family, rng, answerable)
    return out


def _balanced(
    rows: list[dict], family: YesNoQuestions, rng: random.Random, answerable: set[str] | None
) -> list[Question]:
    candidates = [row for row in rows if family.value(row) is not None]
    used: Counter[str] = (
        Counter()
    )  # how many "no" an image has had: the next goes to the least used one
    out = []
    for value in sorted({family.value(row) for row in candidates} - {"none"}):
        if answerable is not None and f"{family.template}={value}" not in answerable:
            continue
        yes = [row for row in candidates if family.value(row) == value]
        no = [row for row in candidates if exclude(value, family.value(row))]
        count = min(len(yes), len(no))
        rng.shuffle(yes)
        rng.shuffle(no)
        no.sort(key=lambda row: used[row["id"]])
        for row, answer in [(r, "yes") for r in yes[:count]] + [(r, "no") for r in no[:count]]:
            wording = rng.choice(family.wordings)
            words = _ARTICLE.get(wording, family.words)(value)
            used[row["id"]] += answer == "no"
            prompt = wording.format(words)
            out.append(Question(row, f"closed/{family.template}", "closed", value, prompt, answer))
    return out


def checklists(rows: list[dict], seed: int) -> list[tuple[dict, str]]:
    """Return (row, text) once per row: its closed questions as lines, in any order.

    "an MRI:yes\\nthe heart:no\\na CT:no". Per value "yes" occurs as often as "no".
    """
    rng = random.Random(f"{seed} checklists")
    words = {f"closed/{family.template}": family.words for family in CLOSED}
    lines: dict[str, list[str]] = {row["id"]: [] for row in rows}
    for question in closed_questions(rows, seed, 1):
        line = f"{words[question.template](question.value)}:{question.answer}"
        lines[question.row["id"]].append(line)
    for of_row in lines.values():
        rng.shuffle(of_row)
    return [(row, "\n".join(lines[row["id"]])) for row in rows if lines[row["id"]]]


def answerable_values(rows: list[dict]) -> set[str]:
    """Return every template=value that the rows can answer, to limit a test to seen values."""
    return {f"{f.template}={f.value(row)}" for f in CLOSED for row in rows if f.value(row)}


def open_questions(rows: list[dict], seed: int) -> list[Question]:
    """Return one question per known value; not for a single-valued field, which needs no image."""
    rng = random.Random(f"{seed} open")
    return [
        Question(row, f"open/{field}", "open", row[field], rng.choice(wordings), row[field])
        for row in rows
        for field, wordings in OPEN.items()
        if row[field] is not None and len({other[field] for other in rows} - {None}) > 1
    ]


def mcq_questions(rows: list[dict], seed: int) -> list[Question]:
    """Return four-option questions; common values are thinned, so blind answers are at chance."""
    out = []
    for field in MCQ:
        rng = random.Random(f"{seed} mcq {field}")
        candidates = _thinned([row for row in rows if row[field] is not None], field, rng)
        counts = Counter(row[field] for row in candidates)
        count = 0
        for row in candidates:
            options = _distractors(row[field], counts, rng)
            if len(options) < 3:
                continue
            letter = count % 4
            count += 1
            options.insert(letter, row[field])
            prompt = with_options(OPEN[field][0], options)
            out.append(Question(row, f"mcq/{field}", "mcq", row[field], prompt, LETTERS[letter]))
    return out


def with_options(question: str, options: Sequence[str]) -> str:
    """Return a question with its options as lines: "Which ..?\\nA: MRI\\nB: CT"."""
    lines = [f"{letter}: {text}" for letter, text in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines])


def _thinned(rows: list[dict], field: str, rng: random.Random) -> list[dict]:
    """Return shuffled rows; no value of `field` is commoner than the third commonest was."""
    counts = Counter(row[field] for row in rows)
    most = sorted(counts.values(), reverse=True)[min(2, len(counts) - 1)] if counts else 0
    rng.shuffle(rows)
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[row[field]] += 1
        if seen[row[field]] <= most:
            kept.append(row)
    return kept


def _distractors(value: str, counts: Counter, rng: random.Random) -> list[str]:
    """Return three values that exclude `value` and each other, drawn by how common they are."""
    pool = {other: n for other, n in sorted(counts.items()) if exclude(value, other)}
    drawn: list[str] = []
    while pool and len(drawn) < 3:
        pick = rng.choices(list(pool), list(pool.values()))[0]
        drawn.append(pick)
        pool = {other: n for other, n in pool.items() if exclude(pick, other)}
    return drawn
