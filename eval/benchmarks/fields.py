"""Reads what the rows of several benchmarks share: lettered options, and images inside a row.

    options(["CT", "MRI"], "options")  ->  {"A": "CT", "B": "MRI"}
    embedded([PNG, JPEG], "images")    ->  {"image_path": ["images/0c1f.png", "images/77ab.jpg"],
                                            "image_bytes": [PNG, JPEG]}

data.prepare eval_items writes `image_bytes` to the files of `image_path`. A file is named by the
hash of its content, so an image of several rows is one file.
"""

import base64
import binascii
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

from medmax_jax.data.records.document import pseudonym
from medmax_jax.data.records.row_streams import RowLocation, SourceError
from medmax_jax.data.sources.row import RowError, field_text
from medmax_jax.data.sources.vqa import MAX_IMAGE_BYTES, choice_text
from medmax_jax.eval.benchmarks.card import Item, item_row
from medmax_jax.io import text_files
from medmax_jax.io.text_files import TextFileError

SUFFIXES = {  # the first bytes of the formats that images.load opens -> suffix of the file
    b"\x89PNG\r\n\x1a\n": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"II*\x00": ".tif",
    b"MM\x00*": ".tif",
}
MAX_JSON = 1 << 27  # bytes of a file that must be read completely
MAX_IMAGES = 16  # of one row; the most published are 6


def options(texts: Any, field: str) -> dict[str, str]:
    """Return letter -> text of a list of options."""
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(string.ascii_uppercase):
        raise RowError(f"{field}: not a list of 2 to 26 texts")
    letters = zip(string.ascii_uppercase, texts, strict=False)
    return {letter: field_text({field: text}, field) for letter, text in letters}


def choice_row(
    name: str,
    place: RowLocation,
    *,
    question: str,
    choices: Mapping[str, str],
    answer: Any,
    **fields: Any,
) -> Item:
    """Return an item of a multiple choice question; `answer` must be the letter of a choice."""
    letter = answer.strip() if isinstance(answer, str) else answer
    if letter not in choices:
        raise RowError("the answer is not one of the options")
    prompt = choice_text(question, dict(choices))
    return item_row(name, place, "mcq", prompt=prompt, answer=letter, **fields)


def embedded(images: Sequence[bytes], field: str) -> dict[str, list[Any]]:
    """Return the image fields of a row that brings its images."""
    if not 1 <= len(images) <= MAX_IMAGES:
        raise RowError(f"{field}: not 1 to {MAX_IMAGES} images")
    names = []
    for data in images:
        suffix = next((end for start, end in SUFFIXES.items() if data.startswith(start)), None)
        if suffix is None:
            raise RowError(f"{field}: not an image of a known format")
        names.append(f"images/{pseudonym(data)}{suffix}")
    return {"image_path": names, "image_bytes": list(images)}


def image_of_parquet(value: Any, field: str) -> bytes:
    """Return the bytes of an image column: {"bytes", "path"}."""
    data = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(data, bytes) or not 0 < len(data) <= MAX_IMAGE_BYTES:
        raise RowError(f"{field}: no bytes, or too many")
    return data


def image_of_base64(value: Any, field: str) -> bytes:
    """Return the bytes of an image in base64, which may be a data URL and have line breaks."""
    if not isinstance(value, str) or not value:
        raise RowError(f"{field}: missing or not text")
    if value.startswith("data:"):
        value = value.partition(",")[2]
    if len(value) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise RowError(f"{field}: more than {MAX_IMAGE_BYTES} bytes")
    try:
        text = value if value.isalnum() else "".join(value.split())
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"{field}: not base64") from error


def json_file(path: pathlib.Path) -> Any:
    """Return the content of a JSON file of at most 128 MiB; its rows are checked one by one."""
    try:
        data = text_files.read_bytes(path, max_bytes=MAX_JSON)
        return text_files.parse_json(
            data, path.name, allow_nonfinite=True, allow_lone_surrogates=True
        )
    except TextFileError as error:
        raise SourceError(f"{error}; use the file as it is published") from error


def check_present(folder: pathlib.Path, path: str, archive: str) -> None:
    """Raise RowError where an image of a benchmark is missing in its folder."""
    if not (folder / path).is_file():
        raise RowError(f"an image is missing in the folder; unpack {archive} in it")


def split_files(folder: pathlib.Path, split: str, name: str) -> list[pathlib.Path]:
    """Return the Parquet files of a split, in the folder, its data/ or its doctor/."""
    for part in ("", "data", "doctor"):
        if paths := sorted((folder / part).glob(f"{split}-*.parquet")):
            return paths
    raise SourceError(f"{name}: no {split}-*.parquet in the folder or its data/; check --from")
