"""Read and write documents as text: JSONL in the schema of the MedMax release, without token ids.

{"id": "PMC1_f2", "text": "question<reserved08706>answer with <image>", "image_path": "a.png",
 "task": "Multimodal Generation", "source": "PMC-OA", "credential": "no", "group": "PMC1",
 "turns": 1}

A row whose answer a model generated also has "pseudo": true, "generator" and, optionally, "scores".
"""

from pathlib import Path
from typing import Any

from medmax_jax.data.records.document import Document, Layout, RecordsError, check_pseudo
from medmax_jax.endpoints import egress
from medmax_jax.io.text_files import TextFileError, read_objects
from medmax_jax.models.tokenizer import IMAGE_NAME, SEP_NAME, Tokenizer, split_segments
from medmax_jax.storage.image_paths import is_inside

TEXT_FIELDS = ("id", "text", "image_path", "task", "source", "credential", "group")
PSEUDO_FIELDS = {"pseudo": False, "generator": "", "scores": {}}  # and what a row without has


def read_texts(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a file, with the fields above; raise RecordsError or OutgoingError.

    For a row that is credentialed, or that does not state its class, messages contain only the
    row's number, the field and the type.
    """
    try:
        rows = [row for _, row in read_objects(path)]
    except TextFileError as error:
        raise RecordsError(f"{error}: cannot be read; fix the file") from error
    for n, row in enumerate(rows, start=1):
        wrong = [name for name in TEXT_FIELDS if not isinstance(row.get(name), str)]
        wrong += ["turns"] if type(row.get("turns")) is not int or row["turns"] < 0 else []
        if wrong:
            name = wrong[0]
            expected = "an integer of 0 or more" if name == "turns" else "a string"
            raise RecordsError(
                f"{path} row {n}: field {name!r} is {egress.describe(row, name)}; expected "
                f"{expected}"
            )
        egress.data_class_of(row, f"{path} row {n}")
        check_pseudo(*(row.get(k, v) for k, v in PSEUDO_FIELDS.items()), f"{path} row {n}")
        has_image, image_path = IMAGE_NAME in row["text"], row["image_path"]
        if has_image != bool(image_path) or (image_path and not is_inside(image_path)):
            raise RecordsError(
                f"{path} row {n}: image_path is {egress.describe(row, 'image_path')} and "
                f"{IMAGE_NAME} is {'in' if has_image else 'not in'} the text; set both, with a "
                "file below --images, or neither"
            )
    return rows


def to_text(document: Document, layout: Layout, tokenizer: Tokenizer) -> str:
    """Return the text of a document, with `<image>` at the position of each image."""
    parts = split_segments(document.tokens, layout.vocab)
    return "".join(IMAGE_NAME if k == "image" else tokenizer.decode(ids) for k, ids in parts)


def plain_text(document: Document, layout: Layout, tokenizer: Tokenizer) -> str:
    """Return only the text: one line for each stretch between images and separators."""
    text = to_text(document, layout, tokenizer)
    return text.replace(IMAGE_NAME, "\n").replace(SEP_NAME, "\n")
