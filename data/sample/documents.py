"""Make documents from manifest rows: training in MedMax's release schema, pretraining, evaluation.

    {"id": "ct-head_00/vqa-003", "text": "<image>Is this a CT?<reserved08706>yes", "turns": 1,
     "image_path": "images/ct-head_00.jpg", "task": "VQA", "source": "pydicom", "credential": "no",
     "group": "ct-head", "split": "train"}

No human wrote these texts for these images: sentences are templates filled with facts of the
manifest, in several wordings drawn by a seed. Only the overview of an interleaved answer, and the
corresponding text in pretraining, is a general sentence about the kind of image. `<reserved08706>`
separates a user's part from its answer and turns from each other; `image_path` is "" in a document
without `<image>`.

Every document carries the split of its group. Train on "train" only.
"""

import json
import random
from collections.abc import Callable

from medmax_jax.data.sample.manifest import SPLITS, check_groups, read_manifest
from medmax_jax.data.sample.phrases import (
    GLOSSARY,
    NOUNS,
    body_part_phrase,
    capitalize_first,
    caption,
    details,
    image_phrase,
    patient,
    report,
    with_article,
)
from medmax_jax.data.sample.questions import (
    Question,
    answerable_values,
    checklists,
    closed_questions,
    mcq_questions,
    open_questions,
)

__all__ = [
    "IMAGE",
    "SEPARATOR",
    "check_groups",
    "eval_items",
    "instruction_documents",
    "pretraining_documents",
    "read_manifest",
]

IMAGE, SEPARATOR = "<image>", "<reserved08706>"

# Verbatim: part of the data.
DESCRIBE = (
    "Please describe this picture.",
    "Provide a brief overview of what is shown in the image",
)
DOMAINS = {"mri": "MRI", "histology": "histology", "ct_scan": "CT"}
REPORT = (
    "Examine this medical image and document your observations "
    "in a standard clinical report format."
)
GENERATE = "Generate an image. {}"
CHECKLISTS = 12  # of each image in one round of pretraining
# Verbatim: part of the data.
EXPLAIN = (
    "Could you explain what {} looks like?",
    "What does {} look like?",
    "Please explain {} with a picture.",
)


def instruction_documents(rows: list[dict], seed: int) -> list[dict]:
    """Return documents of all MedMax task kinds, balanced inside each split of `rows`."""
    out = []
    for split in SPLITS:
        chosen = [row for row in rows if row["split"] == split]
        if not chosen:
            continue
        questions = closed_questions(chosen, seed, None)
        questions += open_questions(chosen, seed)
        questions += mcq_questions(chosen, seed)
        out += _numbered([_vqa(question) for question in questions], "vqa")
        for key, make in _MAKERS.items():
            rng = random.Random(f"{seed} {key} {split}")
            documents = [
                document
                for row in chosen
                for _ in range(_repeats(row, chosen))
                for document in make(row, rng)
            ]
            out += _numbered(documents, key)
    return out


def pretraining_documents(rows: list[dict], seed: int) -> list[dict]:
    """Return documents for the base model: prose and checklists about images, no questions.

    A checklist follows a separator, so that `release` scores its lines and not the image: the few
    answers would be outweighed by image tokens. The words of questions and answers are included
    too, without the images: adapters leave the output rows unchanged, and could not teach the
    letter B to a base model that has never written one. These words do not reveal which answer is
    right.
    """
    rng = random.Random(f"{seed} pretraining")
    out = []
    for row in rows:
        for _ in range(_repeats(row, rows)):
            texts = (
                f"{IMAGE}{caption(row, rng)}",
                f"{IMAGE}{_prose(row, rng)}",
                f"{caption(row, rng)}{IMAGE}",
                f"{capitalize_first(image_phrase(row))}.{IMAGE}{details(row)}",
                f"{GLOSSARY[row['modality']]} {caption(row, rng)}",
            )
            out += [_document(row, text.strip(), "Pretraining", turns=0) for text in texts]
    for turn in range(CHECKLISTS):
        for row, text in checklists(rows, seed * CHECKLISTS + turn):
            out.append(_document(row, f"{IMAGE}{SEPARATOR}{text}", "Pretraining"))
    instructions = rng.sample(instruction_documents(rows, seed), len(rows))
    return _numbered(out, "pre") + [_without_image(document) for document in instructions]


def _without_image(document: dict) -> dict:
    words = document["text"].replace(IMAGE, "").replace(SEPARATOR, " ").strip()
    own = dict(id=f"words-{document['id']}", text=words, image_path="", task="Pretraining", turns=0)
    return document | own


def eval_items(rows: list[dict], seed: int, split: str = "test") -> list[dict]:
    """Return items of one split in the released evaluation schema; pass all rows of the manifest.

    Closed questions use only values that the train rows of `rows` have too, so that none is about a
    body part that training has never seen.
    """
    held_out = [row for row in rows if row["split"] == split]
    train = [row for row in rows if row["split"] == "train"]
    answerable = answerable_values(train) if train and split != "train" else None
    questions = closed_questions(held_out, seed, 1, answerable)
    questions += open_questions(held_out, seed)
    questions += mcq_questions(held_out, seed)
    items = [_item(q.row, "sample_vqa", q.kind, q.prompt, q.answer, q.template) for q in questions]
    rng = random.Random(f"{seed} eval {split}")
    explained: set[str] = set()
    for row in held_out:
        text = f"Generate {with_article(image_phrase(row))}."
        items.append(
            _item(row, "image_captioning", "sample", DESCRIBE[0], caption(row, rng), "captioning")
        )
        items.append(_item(row, "image_generation", "sample", text, "", "generation"))
        if row["group"] + image_phrase(row) not in explained:  # one image of each kind in a group
            explained.add(row["group"] + image_phrase(row))
            prompt, answer = _explained(row, rng)
            answer = answer.replace(f"{IMAGE}\n", "")  # the reference image is image_path
            items.append(_item(row, "mm_out", "sample", prompt, answer, "mm_out"))
    rng = random.Random(f"{seed} eval chat {split}")
    for row in held_out:
        question, answer = rng.choice(_turns(row, rng))
        text = json.dumps(_chat_answer(row, answer, rng))
        items.append(_item(row, "visual_chat", "sample", f"{question}\n{IMAGE}", text, "chat"))
    return _numbered(items, "eval")


def _vqa(question: Question) -> dict:
    text = f"{IMAGE}{question.prompt}{SEPARATOR}{question.answer}"
    return _document(question.row, text, "VQA")


def _captioning(row: dict, rng: random.Random) -> list[dict]:
    texts = [f"{IMAGE}{prompt}{SEPARATOR}{caption(row, rng)}" for prompt in DESCRIBE]
    return [_document(row, text, "Image Captioning") for text in texts]


def _generation(row: dict, rng: random.Random) -> list[dict]:
    prompts = (
        f"Generate {with_article(image_phrase(row))}.",
        GENERATE.format(caption(row, rng)),
    )
    return [_document(row, f"{p}{SEPARATOR}{IMAGE}", "Image Generation") for p in prompts]


def _report(row: dict, rng: random.Random) -> list[dict]:
    text = report(row)
    if not text:
        return []
    prompt = f"Generate {with_article(NOUNS[row['modality']])} for this report.\n{text}"
    pair = (f"{IMAGE}{REPORT}{SEPARATOR}{text}", f"{prompt}{SEPARATOR}{IMAGE}")
    return [_document(row, both, "Report Understanding") for both in pair]


def _chat(row: dict, rng: random.Random) -> list[dict]:
    """Return a conversation of two to three turns.

    The image is placed before or after the first question.
    """
    opening, *more = _turns(row, rng)
    rng.shuffle(more)
    turns = [opening, *more[: rng.choice((1, 2, 2))]]
    question, answer = opening
    first = rng.choice((f"{IMAGE}{question}", f"{question}{IMAGE}"))
    parts = [first, answer, *(text for pair in turns[1:] for text in pair)]
    return [_document(row, SEPARATOR.join(parts), "Visual Chat", len(turns))]


def _turns(row: dict, rng: random.Random) -> list[tuple[str, str]]:
    """Return two or more questions on an image with their answers; the first can be the opening."""
    turns = [(rng.choice(("What kind of image is this?", "What am I looking at?")),
              f"This is {with_article(NOUNS[row['modality']])}.")]  # fmt: skip
    if row["body_part"]:
        turns.append(("Which part of the body does it show?", f"It shows {body_part_phrase(row)}."))
    if row["plane"]:
        turns.append(("In which plane is it?", f"The plane is {row['plane']}."))
    if row["stain"]:
        turns.append(("How was it stained?", f"The stain is {row['stain']}."))
    if patient(row):
        turns.append(("What is known about the patient?", details(row)))
    elif details(row):
        turns.append(("What else can you tell me?", details(row)))
    if len(turns) == 1:
        turns.append(("How is such an image made?", GLOSSARY[row["modality"]]))
    return turns


def _chat_answer(row: dict, reference: str, rng: random.Random) -> dict:
    """Return the answer in the form of the released visual_chat rows.

    data/release/chat_answers.py documents this form.
    """
    chest = row["modality"] == "X-ray" and row["body_part"] == "chest"
    domain = {name: row["modality"] == kind for name, kind in DOMAINS.items()}
    # Verbatim: part of the data.
    figure = dict(fig_label="Picture", fig_caption=caption(row, rng), in_text_mention=None)
    return figure | dict(gpt4_answer=reference, domain=domain | {"chest_xray": chest})


def _interleaved(row: dict, rng: random.Random) -> list[dict]:
    prompt, answer = _explained(row, rng)
    return [_document(row, f"{prompt}{SEPARATOR}{answer}", "Multimodal Generation")]


def _explained(row: dict, rng: random.Random) -> tuple[str, str]:
    """Return a text question and its answer in headed sections with one image between them."""
    points = [f"- Kind: {NOUNS[row['modality']]}"]
    points += [f"- Body part: {row['body_part']}"] if row["body_part"] else []
    points += [f"- Plane: {row['plane']}"] if row["plane"] else []
    points += [f"- Stain: {row['stain']}"] if row["stain"] else []
    answer = (
        f"#### a) Overview\n{GLOSSARY[row['modality']]}\n#### b) Visual Context\n{IMAGE}\n"
        f"This is {with_article(image_phrase(row))}.\n#### c) Key Components\n" + "\n".join(points)
    )
    return rng.choice(EXPLAIN).format(with_article(image_phrase(row))), answer


def _prose(row: dict, rng: random.Random) -> str:
    """Return the facts as plain sentences, in an order that changes."""
    kinds = sorted(set(NOUNS) - {row["modality"]})
    sentences = [
        f"The image is {with_article(NOUNS[row['modality']])}.",
        f"It is {with_article(NOUNS[row['modality']])}, "
        f"not {with_article(NOUNS[rng.choice(kinds)])}.",
    ]
    sentences = [rng.choice(sentences)]
    if row["body_part"]:
        sentences.append(f"It shows {body_part_phrase(row)}.")
    if row["plane"]:
        sentences.append(f"The plane is {row['plane']}.")
    if row["stain"]:
        sentences.append(f"The stain is {row['stain']}.")
    rest = sentences[1:]
    rng.shuffle(rest)
    return " ".join([sentences[0], *rest, details(row)]).strip()


_MAKERS: dict[str, Callable[[dict, random.Random], list[dict]]] = {
    "caption": _captioning,
    "generate": _generation,
    "report": _report,
    "chat": _chat,
    "interleaved": _interleaved,
}


def _repeats(row: dict, rows: list[dict]) -> int:
    """Return how often an image is used: rare kinds up to four times, common ones once."""
    same = sum((o["modality"], o["split"]) == (row["modality"], row["split"]) for o in rows)
    return max(1, min(4, round(24 / same)))  # 24 images of a kind are seen often enough


def _document(row: dict, text: str, task: str, turns: int = 1) -> dict:
    return {
        "id": row["id"],
        "text": text,
        "image_path": row["file"] if IMAGE in text else "",
        "task": task,
        "source": row["source_package"].split("==")[0],
        "credential": "no",
        "group": row["group"],
        "split": row["split"],
        "turns": turns,
    }


def _item(
    row: dict, task_name: str, question_type: str, prompt: str, answer: str, template: str
) -> dict:
    return {
        "id": row["id"],
        "task_name": task_name,
        "question_type": question_type,
        "prompt": prompt,
        "answer": answer,
        "image_path": row["file"],
        "group": row["group"],
        "template": template,
    }


def _numbered(documents: list[dict], key: str) -> list[dict]:
    """Assign ids made of image, kind and number: "ct-head_00/vqa-003"."""
    seen: dict[str, int] = {}
    for document in documents:
        number = seen[document["id"]] = seen.get(document["id"], -1) + 1
        document["id"] = f"{document['id']}/{key}-{number:03d}"
    return documents
