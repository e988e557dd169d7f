"""Read what records hold about each image, and make the questions of its missing kinds.

    documents of an image                     kinds       stated            questions (open, closed)
    Generate an axial MRI. | <image>          generation  plane axial       In which plane is ..?
                                                          modality MRI      Is this an MRI?  a CT?

A question is about an attribute that the image's documents state, so that it applies to the image;
only the modality, which every image has, is also asked where nothing is stated. Its other values
come from the folder: an attribute with one value in all of it needs no image and is not asked.
"""

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from medmax_jax.data.analysis.near_duplicates import code_hash
from medmax_jax.data.analysis.scan import images_of
from medmax_jax.data.annotation import kinds
from medmax_jax.data.annotation.kinds import ATTRIBUTES, KINDS, LETTERS
from medmax_jax.data.image_tokens.document_codes import views_of_text
from medmax_jax.data.records.document import Document, Layout, pseudonym
from medmax_jax.data.records.jsonl import to_text
from medmax_jax.data.records.reader import Records
from medmax_jax.data.sample.phrases import exclude
from medmax_jax.data.sample.questions import with_options
from medmax_jax.endpoints import egress
from medmax_jax.models.tokenizer import IMAGE_NAME, SEP_NAME, Tokenizer

MIN_OPTIONS = 3  # of a multiple-choice question


@dataclasses.dataclass(kw_only=True, eq=False)
class ImageFacts:
    """An image of the records, and what its documents state; source and group of the first one."""

    path: str
    group: str
    source: str
    credential: str
    image_sha256: str = ""
    codes: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # by view, the first
    variants: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # all, by hash
    kinds: set[str] = dataclasses.field(default_factory=set)
    stated: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    counts: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    sides: set[tuple[str, str]] = dataclasses.field(default_factory=set)

    @property
    def name(self) -> str:
        """Return a name that does not repeat the path, which may be credentialed."""
        return pseudonym(self.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question. `options`: its own, or values for distractors; () of free text.

    `stated`: the answer that the image's documents state, "" if they state none.
    """

    id: str
    image: int  # number of the image
    kind: str
    text: str
    options: tuple[str, ...] = ()
    attribute: str = ""
    stated: str = ""


def read_images(records: Records, tokenizer: Tokenizer) -> list[ImageFacts]:
    """Read every document once; return the images in the order of the index."""
    count = int(records.index["image_path"].max(initial=-1)) + 1
    images: list[ImageFacts | None] = [None] * count
    for number, document in enumerate(records):
        image = int(records.index["image_path"][number])
        if image < 0:
            continue
        if (facts := images[image]) is None:
            facts = images[image] = ImageFacts(
                path=document.image_path,
                group=document.group,
                source=document.source,
                credential=document.credential,
            )
        _add_document(facts, document, records, tokenizer)
    for facts in images:
        for name, values in facts.stated.items():
            if any(exclude(a, b) for a in values for b in values):
                facts.stated[name] = set()
    return images


def _add_document(
    facts: ImageFacts, document: Document, records: Records, tokenizer: Tokenizer
) -> None:
    text = to_text(document, records.layout, tokenizer)
    views = views_of_text(text, document.turns, records.layout)
    for view, codes in zip(views, images_of(document, records), strict=True):
        facts.codes.setdefault(view, codes)
        facts.variants.setdefault(code_hash(codes), codes)
    facts.image_sha256 = facts.image_sha256 or document.image_sha256
    if egress.is_credentialed(document.credential):
        facts.credential = document.credential
    sections = [part.strip() for part in text.replace(IMAGE_NAME, "").split(SEP_NAME)]
    question, answer = sections[0], sections[1] if len(sections) > 1 else ""
    if len(sections) == 2 and (kind := kinds.kind_of(document.task, question, answer)):
        facts.kinds.add(kind)
    if document.pseudo:
        return
    stated = kinds.stated_text(document.task, sections)
    for name, attribute in ATTRIBUTES.items():
        facts.stated.setdefault(name, set()).update(attribute.values(stated))
    facts.counts |= {found} if (found := kinds.stated_count(stated)) else set()
    facts.sides |= {found} if (found := kinds.stated_side(stated)) else set()


def make_questions(
    images: Sequence[ImageFacts],
    wanted: Collection[str],
    excluded: Collection[int],
    layout: Layout,
    *,
    seed: int,
) -> tuple[list[Question], dict[str, Counter[str]]]:
    """Return the questions kind by kind, and of each kind the number of images by their state.

    States: present, overlap (in `excluded`), other_view (no document shows the image in the view
    that one of this kind requires), unsupported (no question can be made), asked.
    """
    seen = _Seen(images)
    questions, states = [], {}
    for kind in (kind for kind in KINDS if kind in wanted):
        states[kind] = Counter(present=0, overlap=0, other_view=0, unsupported=0, asked=0)
        for number, image in enumerate(images):
            made = []
            if kind in image.kinds:
                state = "present"
            elif number in excluded:
                state = "overlap"
            elif view_of(kind, layout) not in image.codes:
                state = "other_view"
            else:
                rng = random.Random(f"{seed} {kind} {image.path}")
                made = _MAKERS.get(kind, _free_text)(kind, image, seen, rng)
                state = "asked" if made else "unsupported"
            states[kind][state] += 1
            questions += [
                Question(id=f"{kind}/{image.name}/{n}", image=number, kind=kind, **fields)
                for n, fields in enumerate(made[: KINDS[kind].questions])
            ]
    return questions, states


def view_of(kind: str, layout: Layout) -> str:
    """Return the view of the image in a document of this kind."""
    return layout.answer_view if kind == "generation" else layout.view


class _Seen:
    """The values that the images of the folder state: of attributes, of counts and of sides."""

    def __init__(self, images: Sequence[ImageFacts]):
        self.values = {
            name: sorted({value for image in images for value in image.stated.get(name, ())})
            for name in ATTRIBUTES
        }
        self.counts: dict[str, list[str]] = defaultdict(list)
        self.sides: dict[str, set[str]] = defaultdict(set)
        for noun, number in sorted({pair for image in images for pair in image.counts}):
            self.counts[noun].append(number)
        for image in images:
            for finding, side in image.sides:
                self.sides[finding].add(side)

    def askable(self, image: ImageFacts) -> list[str]:
        """Return the attributes that apply to an image and have several values in the folder."""
        return [
            name
            for name, values in self.values.items()
            if len(values) > 1 and (image.stated.get(name) or name == "modality")
        ]

    def others(self, name: str, stated: Collection[str]) -> list[str]:
        """Return the values that exclude all of `stated`."""
        return [v for v in self.values[name] if all(exclude(v, value) for value in stated)]


Made = list[Mapping[str, object]]  # fields of questions


def _closed(kind: str, image: ImageFacts, seen: _Seen, rng: random.Random) -> Made:
    """Return one question whose stated answer is yes and one whose is no, as far as known."""
    made = []
    for answer in rng.sample(kinds.YES_NO, 2):
        name = rng.choice(names) if (names := seen.askable(image)) else ""
        stated = sorted(image.stated.get(name, ()))
        pool = stated if answer == "yes" and stated else seen.others(name, stated) if name else []
        if pool:
            attribute, value = ATTRIBUTES[name], rng.choice(pool)
            text = rng.choice(attribute.closed).format(attribute.words(value))
            fields = dict(text=text, options=kinds.YES_NO, attribute=name)
            made.append(fields | dict(stated=answer if stated else ""))
    return _distinct(made)


def _open(kind: str, image: ImageFacts, seen: _Seen, rng: random.Random) -> Made:
    names = seen.askable(image)
    rng.shuffle(names)
    return [
        dict(
            text=rng.choice(ATTRIBUTES[name].open),
            options=tuple(seen.values[name]),
            attribute=name,
        )
        for name in names
    ]


def _mcq(kind: str, image: ImageFacts, seen: _Seen, rng: random.Random) -> Made:
    """Return a question with the stated value among its options."""
    names = [name for name in seen.askable(image) if image.stated.get(name)]
    rng.shuffle(names)
    made = []
    for name in names:
        value = rng.choice(sorted(image.stated[name]))
        options = [value, *spread(seen.others(name, image.stated[name]), rng, len(LETTERS) - 1)]
        if len(options) >= MIN_OPTIONS:
            rng.shuffle(options)
            text = with_options(ATTRIBUTES[name].open[0], options)
            made.append(dict(text=text, options=tuple(options), attribute=name, stated=value))
    return made


def _count(kind: str, image: ImageFacts, seen: _Seen, rng: random.Random) -> Made:
    pairs = [(n, x) for n, x in sorted(image.counts) if len(seen.counts[n]) > 1]
    return [
        dict(text=kinds.HOW_MANY.format(n), options=tuple(seen.counts[n]), stated=x)
        for n, x in (pairs if len(pairs) == 1 else ())
    ]


def _location(kind: str, image: ImageFacts, seen: _Seen, rng: random.Random) -> Made:
    pairs = [(f, side) for f, side in sorted(image.sides) if len(seen.sides[f]) > 1]
    return [
        dict(text=kinds.WHICH_SIDE.format(f), options=kinds.SIDES, stated=side)
        for f, side in (pairs if len(pairs) == 1 else ())
    ]


def _free_text(kind: str, image: ImageFacts, seen: _Seen, rng: random.Random) -> Made:
    if kind == "report" and not image.stated.get("modality", set()) & set(kinds.REPORTED):
        return []
    return [dict(text=kinds.DESCRIBE[kind])]


_MAKERS = dict(closed=_closed, open=_open, mcq=_mcq, count=_count, location=_location)


def spread(values: Sequence[str], rng: random.Random, count: int) -> list[str]:
    """Return up to `count` values that exclude each other, in random order."""
    drawn: list[str] = []
    for value in rng.sample(list(values), len(values)):
        if len(drawn) < count and all(exclude(value, other) for other in drawn):
            drawn.append(value)
    return drawn


def _distinct(made: Made) -> Made:
    return list({fields["text"]: fields for fields in made}.values())
