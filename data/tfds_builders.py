"""Convert folders of records to a TensorFlow data set, written and read without TensorFlow.

python -m data.tfds_builders --from train=records/train validation=records/val --out D --name mine

    import tensorflow_datasets as tfds
    source = tfds.builder_from_directory("D/medmax_records/mine/1.0.0").as_data_source("train")
    source = tfds.data_source("medmax_records/mine", data_dir="D", split="train")      # the same
    source[0]["tokens"]           int32 [T]; document(source[0]) is the Document of the records

Every split holds the documents of one folder in their order; metadata.json states what their ids
mean and the folders' fingerprints. Exit codes: 0 done, 1 failed, 2 wrong usage, 75 interrupted. The
data set is written atomically.
"""

import argparse
import dataclasses
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from medmax_jax import arguments
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Document, RecordsError
from medmax_jax.endpoints import egress
from medmax_jax.io import text_files
from medmax_jax.io.errors import printable_text
from medmax_jax.io.progress import ByteProgress
from medmax_jax.storage.atomic_folder import private_umask

log = logging.getLogger("medmax_jax.tfds")

TEXTS = (
    "image_path", "task", "source", "credential", "group", "id", "image_sha256", "view",
    "answer_view", "generator",
)  # fmt: skip
NAME = "medmax_records"  # as TFDS spells the class below
_WORD = re.compile(r"[a-z][a-z0-9_]*")


@dataclasses.dataclass(eq=False, kw_only=True)
class RecordsConfig(tfds.core.BuilderConfig):
    """The folder that each split is made from."""

    folders: Mapping[str, Path]
    progress: Callable[[int], None] = dataclasses.field(repr=False)  # bytes of tokens written


class MedmaxRecords(tfds.core.GeneratorBasedBuilder):
    """Documents of MedMax: each is one token sequence of text and images."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so no checksums are stored next to this file. TFDS 4.9 would look for
    # them with importlib_resources, which it does not require.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        records = {s: writer.open_records(f) for s, f in self.builder_config.folders.items()}
        metadata = {
            split: {"sha256": r.fingerprint, "layout": r.meta["layout"], "notes": r.meta["notes"]}
            for split, r in records.items()
        }
        # A Tensor, because Sequence(int32) would decode to a list of numpy scalars, thirty times
        # slower.
        features = {"tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32)}
        features |= {name: tfds.features.Text() for name in TEXTS}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                features | {"turns": np.int32, "pseudo": np.bool_, "scores": tfds.features.Text()}
            ),
            disable_shuffling=True,  # keeps the order of the records; training shuffles by itself
            metadata=tfds.core.MetadataDict(metadata),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        folders = self.builder_config.folders
        return {split: self._generate_examples(folder) for split, folder in folders.items()}

    def _generate_examples(self, folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, document in enumerate(writer.open_records(folder)):
            fields = dataclasses.fields(document)
            example = {field.name: getattr(document, field.name) for field in fields}
            yield number, example | {"scores": json.dumps(document.scores)}
            self.builder_config.progress(document.tokens.nbytes)


def write(
    folders: Mapping[str, str | Path], out: str | Path, *, name: str, say: Callable[[str], None]
) -> Path:
    """Write OUT/medmax_records/NAME/1.0.0 from records by split; return that folder."""
    for word in (name, *folders):
        if not _WORD.fullmatch(word):
            raise RecordsError(
                f"{word!r} is not a valid name of a data set or split; use one like train_2"
            )
    target = Path(os.path.abspath(out)) / NAME / name / str(MedmaxRecords.VERSION)
    if target.exists():
        raise RecordsError(f"{target}: exists; use another --name or --out, or delete it")
    records = {split: writer.open_records(folder) for split, folder in folders.items()}
    credentials = {c for r in records.values() for c in r.meta["credentials"]}
    secret = set(map(egress.is_credentialed, credentials))
    if len(secret) > 1:
        raise RecordsError(
            "credentialed documents must not be stored with others; create a separate data set of "
            "each: "
            + ", ".join(f"{split} has {r.meta['credentials']}" for split, r in records.items())
        )
    for leftover in target.parent.glob("incomplete.*"):  # left by a run that was killed
        shutil.rmtree(leftover)
    progress = ByteProgress(4 * sum(r.meta["tokens"] for r in records.values()), say)
    config = RecordsConfig(
        name=name, folders={split: Path(f) for split, f in folders.items()}, progress=progress
    )
    if secret == {True}:
        with private_umask():
            _prepare(config, out)
    else:
        _prepare(config, out)
    progress.done(f"{target}: {sum(map(len, records.values()))} documents")
    return target


def document(example: Mapping[str, Any]) -> Document:
    """Return the document from which an example of a data source was made."""
    # Data sets written before a field was added lack it.
    texts = {name: example[name].decode() for name in TEXTS if name in example}
    return Document(
        tokens=example["tokens"],
        turns=int(example["turns"]),
        pseudo=bool(example.get("pseudo", False)),
        scores=text_files.parse_object(example.get("scores", b"{}"), "scores"),
        **texts,
    )


def _prepare(config: RecordsConfig, out: str | Path) -> None:
    # array_record: the only format that TFDS both writes and reads in random order without
    # TensorFlow
    builder = MedmaxRecords(config=config, data_dir=os.fspath(out), file_format="array_record")
    builder.download_and_prepare()


# ---- The program ----


def main(argv: list[str] | None = None) -> int:
    """Write one data set; return the exit code."""
    parser = arguments.Parser(
        prog="python -m data.tfds_builders", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--from",
        nargs="+",
        required=True,
        type=_split,
        dest="folders",
        metavar="SPLIT=FOLDER",
        help="split names and the folders of their records",
    )
    parser.add_argument("--out", type=Path, required=True, help="data_dir of TFDS")
    parser.add_argument("--name", required=True, help="name of this data set")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    log.setLevel(logging.INFO)
    tfds.disable_progress_bar()
    try:
        print(write(dict(args.folders), args.out, name=args.name, say=log.info))
    except RecordsError as error:
        print(printable_text(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: no data set was written; rerun the same command", file=sys.stderr)
        return 75
    return 0


def _split(text: str) -> tuple[str, str]:
    split, equals, folder = text.partition("=")
    if not equals or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not SPLIT=FOLDER")
    return split, folder


if __name__ == "__main__":
    sys.exit(main())
