"""Sources of questions as parquet with the pictures inside: PathVQA, and VQA-RAD's other form.

    file in the folder, or in data/ of it                columns
    train-00000-of-00007-<hash>.parquet and so on        image {bytes, path}, question, answer
    validation-.., test-..

PathVQA's first release holds its questions as pickles, which can execute code when they are opened;
they are not read. The picture's name is the hash of its bytes, which is also its group: the parquet
does not say which figure of a book it is. Ids count rows through a split's files in name order.
Read at: huggingface.co/datasets/flaviagiammarino/path-vqa and vqa-rad, README.md and files.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from data.sources.questions import VQA_RAD, asked, read_vqa_rad
from data.sources.row import (
    Bad,
    Place,
    Plan,
    Row,
    RowError,
    SourceError,
    collect,
    pseudonym,
    text_of,
)

COLUMNS = ["image", "question", "answer"]
BATCH = 32  # rows read at once; each carries its picture
MAX_IMAGE_BYTES = 2**26  # 64 MiB


def read(folder: pathlib.Path, plan: Plan) -> Iterator[Row | Bad]:
    """Rows of a split's parquet files."""
    paths = sorted(folder.glob(f"{plan.split}-*.parquet"))
    paths = paths or sorted((folder / "data").glob(f"{plan.split}-*.parquet"))
    if not paths:
        raise SourceError(
            f"{plan.source}: no {plan.split}-*.parquet in the folder or its data/; get the parquet "
            "form (pickles are not read)"
        )
    return collect(_items(paths, plan.split), lambda place, item: _row(plan, place, item))


def read_vqa_rad_of_either_form(folder: pathlib.Path, plan: Plan) -> Iterator[Row | Bad]:
    """VQA-RAD: the JSON of its authors, or else parquet."""
    return (read_vqa_rad if (folder / VQA_RAD).is_file() else read)(folder, plan)


def _items(paths: list[pathlib.Path], split: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    import pyarrow  # here: it takes a while, and other sources do without it
    import pyarrow.parquet

    n = 0
    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=BATCH, columns=COLUMNS):
                    if lacking := set(COLUMNS) - set(batch.schema.names):
                        raise SourceError(f"{path.name}: lacks the columns {sorted(lacking)}")
                    for item in batch.to_pylist():
                        n += 1
                        yield Place(f"{split}.parquet", n), item
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            raise SourceError(
                f"{path.name}: damaged ({type(error).__name__}); get it again"
            ) from error


def _row(plan: Plan, place: Place, item: dict[str, Any]) -> Row:
    image = item["image"].get("bytes") if isinstance(item["image"], dict) else None
    if not isinstance(image, bytes) or not 0 < len(image) <= MAX_IMAGE_BYTES:
        raise RowError("image: no bytes, or too many")
    name = pseudonym(image)
    fields = dict(image=image, image_path=name, split=plan.split, group=name)
    return asked(plan, place, text_of(item, "question"), text_of(item, "answer"), **fields)
