"""Define the kinds of documents that pseudo-annotation adds, and what texts state about an image.

    kind         task of the mixture     a question for which the answer is generated
    closed       VQA                     Is this an MRI?
    open         VQA                     Which part of the body is shown?
    mcq          VQA                     the same with options A to D
    count        VQA                     How many nuclei are shown?
    location     VQA                     On which side is the lesion?
    caption      Image Captioning        a request for a description
    report       Report Understanding    a request for a clinical report
    generation   Image Generation        the generated description becomes the prompt of the image

An attribute is a fact with a few values, which words in a text state: "Axial T1 MRI of the brain"
states the plane axial, the modality MRI and the body part brain. Words are not understood: a text
that excludes something ("no CT was made") states it too, and texts that state values that exclude
each other state nothing.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from medmax_jax.data.mixture import CAPTION, GENERATION, REPORT, VQA
from medmax_jax.data.sample import documents
from medmax_jax.data.sample.phrases import NOUNS, body_part_phrase, exclude, with_article
from medmax_jax.data.sample.questions import LETTERS, OPEN

__all__ = ["ATTRIBUTES", "KINDS", "LETTERS", "Attribute", "Kind"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of document. `questions`: at most, of an image; `request`: added for endpoints."""

    task: str
    max_tokens: int
    questions: int
    is_free_text: bool = False
    request: str = ""


KINDS = {
    "closed": Kind(task=VQA, max_tokens=8, questions=2, request="Answer yes or no."),
    "open": Kind(task=VQA, max_tokens=24, questions=2, request="Answer in a few words."),
    "mcq": Kind(task=VQA, max_tokens=8, questions=1, request="Answer with the letter only."),
    "count": Kind(task=VQA, max_tokens=8, questions=1, request="Answer with a number only."),
    "location": Kind(task=VQA, max_tokens=8, questions=1, request="Answer left or right."),
    "caption": Kind(task=CAPTION, max_tokens=128, questions=1, is_free_text=True),
    "report": Kind(task=REPORT, max_tokens=256, questions=1, is_free_text=True),
    "generation": Kind(task=GENERATION, max_tokens=128, questions=1, is_free_text=True),
}
YES_NO = ("yes", "no")
DESCRIBE = {
    "caption": documents.DESCRIBE[0],
    "generation": documents.DESCRIBE[1],
    "report": documents.REPORT,
}
HOW_MANY, WHICH_SIDE = "How many {} are shown?", "On which side is the {}?"
SIDES = ("left", "right")
REPORTED = ("X-ray", "MRI", "CT", "ultrasound", "angiography", "PET")  # radiology has reports

_NOUNS = NOUNS | {
    "PET": "PET scan",
    "endoscopy": "endoscopy image",
    "dermoscopy": "dermoscopy image",
    "OCT": "OCT image",
}
_COUNT = re.compile(
    r"\b(\d{1,4}) (nuclei|cells|lesions|nodules|glands|vessels|polyps|fractures)\b", re.IGNORECASE
)
_FINDING = r"(lesion|nodule|mass|tumou?r|fracture|opacity|effusion)"
_SIDED = re.compile(
    rf"\b{_FINDING}\b[^.\n]*\b(left|right)\b|\b(left|right)\b[^.\n]*\b{_FINDING}\b", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attribute:
    """A fact about an image. `patterns`: of the words that state each value."""

    open: tuple[str, ...]
    closed: tuple[str, ...]
    words: Callable[[str], str]  # how a value is written in a closed question
    patterns: Mapping[str, re.Pattern[str]]

    def values(self, text: str) -> set[str]:
        """Return the values that the text states, none if they exclude each other."""
        found = {value for value, pattern in self.patterns.items() if pattern.search(text)}
        return set() if any(exclude(a, b) for a in found for b in found) else found


def _patterns(words: Mapping[str, str]) -> dict[str, re.Pattern[str]]:
    return {
        value: re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE)
        for value, pattern in words.items()
    }


ATTRIBUTES = {
    "modality": Attribute(
        open=OPEN["modality"],
        closed=("Is this {}?", "Is the image {}?"),
        words=lambda value: with_article(_NOUNS[value]),
        patterns=_patterns(
            {
                "X-ray": r"x-?rays?|radiographs?",
                "MRI": r"mris?|magnetic resonance(?: imaging| images?)?",
                "CT": r"cts?|computed tomography",
                "ultrasound": r"ultrasounds?|ultrasonography|sonograms?|sonography",
                "angiography": r"angiography|angiograms?",
                "bone scan": r"bone scans?|scintigraphy",
                "cryo-electron tomography": r"cryo-electron tomography",
                "histology": r"histology|histological|histopathology|histopathological",
                "fluorescence microscopy": r"fluorescence microscopy",
                "fundus photograph": r"fundus photographs?|fundus photography|fundus images?",
                "phase microscopy": r"phase microscopy",
                "blood smear": r"blood smears?",
                "PET": r"pet|positron emission tomography",
                "endoscopy": r"endoscopy|endoscopic",
                "dermoscopy": r"dermoscopy|dermoscopic",
                "OCT": r"oct|optical coherence tomography",
            }
        ),
    ),
    "body_part": Attribute(
        open=OPEN["body_part"],
        closed=("Does the image show {}?", "Is this an image of {}?"),
        words=body_part_phrase,
        patterns=_patterns(
            {
                "brain": r"brain",
                "head": r"head",
                "heart": r"heart",
                "chest": r"chest|thorax",
                "breast": r"breast",
                "shoulder": r"shoulder",
                "abdomen": r"abdomen",
                "pelvis": r"pelvis",
                "leg": r"leg",
                "hand": r"hand",
                "retina": r"retina",
                "skin": r"skin",
                "colon": r"colon",
                "lymph node": r"lymph nodes?",
                "cell nuclei": r"cell nuclei",
                "blood": r"blood",
                "whole body": r"whole body",
            }
        ),
    ),
    "plane": Attribute(
        open=OPEN["plane"],
        closed=("Is this {} slice?",),
        words=with_article,
        patterns=_patterns({"axial": "axial", "coronal": "coronal", "sagittal": "sagittal"}),
    ),
    "stain": Attribute(
        open=OPEN["stain"],
        closed=("Is this tissue with {}?",),
        words=lambda value: with_article({"H&E": "H&E stain"}.get(value, value)),
        patterns=_patterns(
            {"H&E": r"h&e|ha?ematoxylin(?: and eosin)?", "DAB immunostain": r"dab immunostain"}
        ),
    ),
}


def stated_count(text: str) -> tuple[str, str] | None:
    """Return (noun, number) of the one count that a text states; None without, or of several."""
    found = {(noun.lower(), number) for number, noun in _COUNT.findall(text)}
    return found.pop() if len(found) == 1 else None


def stated_side(text: str) -> tuple[str, str] | None:
    """Return (finding, side) of the one finding whose side a text states in the same sentence."""
    found = {
        ((match[1] or match[4]).lower(), (match[2] or match[3]).lower())
        for match in _SIDED.finditer(text)
    }
    return found.pop() if len(found) == 1 else None


def kind_of(task: str, question: str, answer: str) -> str:
    """Return the kind of a document of one turn; "" if it is none of KINDS.

    ("VQA", "Is this a CT?", "yes")  ->  "closed"
    """
    of_task = {k.task: name for name, k in KINDS.items() if k.task != VQA}
    if task != VQA:
        return of_task.get(task, "")
    if answer.strip().lower().rstrip(".") in YES_NO:
        return "closed"
    if options(question):
        return "mcq"
    if re.match(r"how many\b", question.strip(), re.IGNORECASE):
        return "count"
    if re.match(r"where\b|on which side\b", question.strip(), re.IGNORECASE):
        return "location"
    return "open"


def options(question: str) -> dict[str, str]:
    """Return letter -> text of the options in the lines of a question; {} if it has none."""
    lines = re.findall(r"^\(?([A-Z])[:.)]\s*(.+?)\s*$", question, re.MULTILINE)
    letters = "".join(letter for letter, _ in lines)
    return dict(lines) if len(lines) > 1 and "ABCDEFGHIJ".startswith(letters) else {}


def stated_text(task: str, sections: Sequence[str]) -> str:
    """Return what a document states about its image; `sections`: question, answer, question, ...

    The question of a closed document is stated where its answer is yes, and of options the right
    one. The prompt of an image is stated, and of other documents the answers.
    """
    question, answers = sections[0], sections[1::2]
    if len(sections) == 1:
        return question
    kind = kind_of(task, question, answers[0]) if len(sections) == 2 else ""
    if kind == "closed":
        return question if answers[0].strip().lower().startswith("yes") else ""
    if kind == "mcq":
        return options(question).get(answers[0].strip()[:1], answers[0])
    if kind == "count" and (noun := re.match(r"\s*how many (\w+)", question, re.IGNORECASE)):
        return f"{answers[0].strip()} {noun[1]}"
    if task in (GENERATION, REPORT):
        return "\n".join(sections)
    return "\n".join(answers) if answers else ""


def contradicts(stated: Mapping[str, set[str]], answer: str) -> bool:
    """Return whether a text states a value that excludes what the image's documents state.

    ({"modality": {"MRI"}}, "An axial CT.")  ->  True
    """
    for name, values in stated.items():
        found = ATTRIBUTES[name].values(answer)
        if found and values and all(exclude(a, b) for a in found for b in values):
            return True
    return False
