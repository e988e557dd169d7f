"""Convert images and text to the folder of records that training reads.

python -m data.prepare sample --out D [--split train] [--kind instruction] [--views 4] [--rounds 1]
python -m data.prepare build --source SLAKE --from FOLDER --out D --model M [--sample N --seed S]
python -m data.prepare import --from train.jsonl --out D     the published rows:
                                                             data/release/train_rows.py
python -m data.prepare eval_items --benchmark slake --from FOLDER --out D     to items of eval.run
python -m data.prepare unpack --from images.tar.gz.a* --out D     and their images:
                                                                  data/release/archives.py
python -m data.prepare tokenize --images D --out D2 --model M     to codes, for --codes D2
python -m data.prepare documents --from documents.jsonl --images D --out D2     in the format of
                                                                  data/records/jsonl.py
python -m data.prepare instruct --help   captions to interleaved instructions by an LLM
python -m data.prepare check D [--against EVAL]    corrupt records, duplicates, and overlap with an
    evaluation set: data/analysis/check.py
python -m data.prepare stats D [--out PAGE]     contents and packing efficiency; an HTML page
python -m data.prepare plan D --seq_len N [--row 17] [--save F.npz]    how full rows are, and the
    documents of one row; plan F.npz [--row 17] reads a saved plan; plan D --config C, of a run
python -m data.prepare densify POOL --out D --documents N       the same tasks on few images, and
python -m data.prepare decentralize POOL --out D2 --like D      on many: data/image_density.py
python -m data.prepare pseudo R --model M --out D     answers of a model to the missing kinds of
    each image: data/annotation/cli.py
python -m data.prepare who_saw HASH --in FOLDER ..    shards, plans, runs, checkpoints of an image

Inputs may be published files: hf://ORG/NAME[@REVISION][/FILE], hf://datasets/ORG/NAME/..

    manifest row -> image -> views 0 .. n-1 -> VQGAN codes --+
                 -> documents (text with <image>) -----------+-> token ids -> records

The documents of an image are assigned to its views in turn. An image for which a crop could make
facts untrue (a count, a marked lesion) is never cropped. Exit codes: 0 done, 1 failed, 2 wrong
usage, 75 interrupted: rerun the same command. A folder of records is written atomically, so the
command starts again; `instruct` and `pseudo` resume.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

import medmax_jax
from medmax_jax import arguments
from medmax_jax.checkpoints import export
from medmax_jax.checkpoints.safetensors_file import WeightsError
from medmax_jax.cli import Interrupted, skip_absent_tpu
from medmax_jax.config import ConfigError
from medmax_jax.data import image_density
from medmax_jax.data.analysis import check as record_check
from medmax_jax.data.analysis import provenance, stats
from medmax_jax.data.annotation import cli as annotation_cli
from medmax_jax.data.image_tokens import dicom, document_codes, store
from medmax_jax.data.image_tokens.document_codes import (
    Files,
    OnlineEncoder,
    StoredCodes,
    key,
    of_document,
)
from medmax_jax.data.image_tokens.encoder import (
    Encoder,
    ImageView,
    PrepareError,
    load_encoder,
    log_to_stderr,
    open_image,
)
from medmax_jax.data.image_tokens.store_reader import digest_of
from medmax_jax.data.instruct import cli
from medmax_jax.data.packing import pack, report
from medmax_jax.data.records import jsonl, writer
from medmax_jax.data.records.document import Document, RecordsError
from medmax_jax.data.records.row_streams import SourceError
from medmax_jax.data.release import archives, train_rows
from medmax_jax.data.release import cli as release_cli
from medmax_jax.data.sample.documents import instruction_documents, pretraining_documents
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.data.sources import build as source_build
from medmax_jax.endpoints import egress
from medmax_jax.eval.tasks import benchmark_import
from medmax_jax.io.errors import printable, printable_text
from medmax_jax.models.tokenizer import Tokenizer, TokenizerError, document_ids
from medmax_jax.storage import hub, image_paths, workdir
from medmax_jax.storage.atomic_folder import private_folder
from medmax_jax.storage.folder import Folder, StorageError

log = logging.getLogger("medmax_jax.prepare")

SAMPLE = Path(__file__).parent / "sample"
TINY = Path(medmax_jax.__file__).parent / "tiny"
MAX_UNREADABLE = 0.01  # of the images; a few broken files are usual, more indicate a wrong folder
SHARD_SIZE = 4_096  # documents; about 10 MB per shard at the released document length
KINDS = {
    "instruction": instruction_documents,
    "pretraining": pretraining_documents,
}
SPLITS = ("train", "validation", "test")
ERRORS = (
    *(PrepareError, RecordsError, TokenizerError, ConfigError, WeightsError, StorageError),
    *(egress.OutgoingError, image_paths.ImagePathError),
    *(pack.PackError, train_rows.PublishedError, archives.ArchiveError, SourceError),
    *cli.ERRORS,
    *annotation_cli.ERRORS,
)


def prepare_sample(
    out: str | Path,
    *,
    model_folder: str | Path = TINY,
    split: str = "train",
    kind: str = "instruction",
    views: int = 1,
    seed: int = 0,
    rounds: int = 1,
    vq: Any = None,
    tokenizer: Tokenizer | None = None,
    sample: str | Path = SAMPLE,
    max_unreadable: float = MAX_UNREADABLE,
    codes: Sequence[Path] = (),
    precision: str = "highest",
    view: str = "",
    answer_view: str = "",
) -> dict[str, Any]:
    """Write one split of the sample as records; return its dataset.json.

    `kind`: one of KINDS. `rounds`: wordings of each document, from as many seeds. `vq`,
    `tokenizer`: those of `model_folder`, if they are loaded already. An unreadable image and its
    documents are left out and listed in dataset.json; if more than the share `max_unreadable` of
    all images is unreadable, the work stops. `codes`, `precision`, `view`, `answer_view`: see
    build_source.
    """
    if kind not in KINDS:
        raise PrepareError(f"kind is {kind!r}; use one of {', '.join(KINDS)}")
    if views < 1 or (views > 1 and split != "train"):
        raise PrepareError(
            f"views is {views} for split {split}; use 1, or 1 or more for split train"
        )
    rows = [r for r in _manifest(Path(sample)) if r["split"] == split]
    if not rows:
        raise PrepareError(
            f"the manifest has no image of split {split!r}; use one of {', '.join(SPLITS)}"
        )
    encoder = load_encoder(
        model_folder, vq=vq, tokenizer=tokenizer, view=view, answer_view=answer_view
    )
    texts = _assign_views(_sample_texts(kind, rows, seed, rounds), rows, views, seed)
    notes = dict(maker="sample", split=split, kind=kind, views=views, rounds=rounds, seed=seed)
    code_source = document_codes.open_code_source(codes, encoder, precision)
    images = _Images(Path(sample), {row["file"]: row["file"] for row in rows})
    documents = _encode_documents(texts, encoder, code_source, images, notes, max_unreadable)
    meta = writer.write(out, documents, shard_size=SHARD_SIZE, layout=encoder.layout, notes=notes)
    log.info("%s: %d documents, %d tokens", out, meta["documents"], meta["tokens"])
    return meta


def write_texts(out: Path, split: str, kind: str, seed: int, rounds: int) -> dict[str, Any]:
    """Write the documents of a sample split as text, for `documents`; return their number."""
    rows = [row for row in _manifest(SAMPLE) if row["split"] == split]
    lines = [json.dumps(text) + "\n" for text in _sample_texts(kind, rows, seed, rounds)]
    Folder(out.parent).write(out.name, [line.encode() for line in lines])
    return dict(documents=len(lines))


def prepare_documents(
    out: str | Path,
    *,
    source: str | Path,
    images: str | Path,
    model_folder: str | Path,
    max_unreadable: float = MAX_UNREADABLE,
    codes: Sequence[Path] = (),
    precision: str = "highest",
    view: str = "",
    answer_view: str = "",
) -> dict[str, Any]:
    """Write the documents of a file (jsonl.py) as records; return their dataset.json.

    If any row is credentialed, only the owner can read the folder, and messages and dataset.json
    identify a row and its image by the row's number.
    """
    rows = jsonl.read_texts(source)
    secret = any(egress.is_credentialed(row["credential"]) for row in rows)
    names: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        name = f"image of row {number}" if secret else row["image_path"]
        names.setdefault(row["image_path"], name)
    image_files = _Images(Path(images), names, secret)
    for path in names:
        if path:
            image_files.find(path)  # before any file is opened
    views = {path: ImageView(path, 0, "", False) for path in names if path}
    texts = [(row, views.get(row["image_path"])) for row in rows]
    encoder = load_encoder(model_folder, view=view, answer_view=answer_view)
    notes = dict(maker="documents", source=hub.name_of(source))
    code_source = document_codes.open_code_source(codes, encoder, precision)
    with contextlib.ExitStack() as stack:
        if secret:
            stack.enter_context(private_folder(out))
            stack.enter_context(dicom.silence())  # pydicom's warnings repeat headers
        documents = _encode_documents(
            texts, encoder, code_source, image_files, notes, max_unreadable
        )
        return writer.write(
            out, documents, shard_size=SHARD_SIZE, layout=encoder.layout, notes=notes
        )


@dataclasses.dataclass(frozen=True)
class _Images:
    """The image files of documents. `names`: the names of paths in messages."""

    folder: Path
    names: Mapping[str, str]
    secret: bool = False  # True: messages repeat nothing of a row or a file

    def find(self, path: str) -> Path:
        try:
            label = self.names[path] if self.secret else ""
            return image_paths.resolve(self.folder, path, label=label)
        except image_paths.ImagePathError as error:
            raise PrepareError(str(error)) from error

    def open(self, path: str) -> PIL.Image.Image:
        return open_image(self.find(path), name=self.names[path], secret=self.secret)


def _manifest(sample: Path) -> list[dict[str, Any]]:
    path = sample / "manifest.jsonl"
    try:
        return read_manifest(path)
    except (OSError, ValueError) as error:
        raise PrepareError(
            f"{path}: cannot be read ({printable(error)}); restore the file"
        ) from error


def _sample_texts(
    kind: str, rows: list[dict[str, Any]], seed: int, rounds: int
) -> list[dict[str, Any]]:
    """Return the documents of `rounds` seeds starting at `seed`: the same facts in other words."""
    texts = KINDS[kind](rows, seed)
    for n in range(1, rounds):
        texts += [d | {"id": f"{d['id']}-r{n}"} for d in KINDS[kind](rows, seed + n)]
    return texts


def _assign_views(
    texts: list[dict[str, Any]], rows: list[dict[str, Any]], views: int, seed: int
) -> list[tuple[dict[str, Any], ImageView | None]]:
    """Return each document with the view it shows: the n-th of an image shows view n % views."""
    row_of = {row["file"]: row for row in rows}
    turn: collections.Counter[str] = collections.Counter()
    assigned = []
    for text in texts:
        path, view = text["image_path"], None
        if path:
            row, n = row_of[path], turn[path] % views
            crop = row["count"] is None and not row["lesion"]
            view = ImageView(path=path, number=n, seed=f"{seed}/{row['id']}/{n}", crop=crop)
            turn[path] += 1
        assigned.append((text, view))
    return assigned


def _encode_documents(
    texts: list[tuple[dict[str, Any], ImageView | None]],
    encoder: Encoder,
    code_source: OnlineEncoder | StoredCodes,
    images: _Images,
    notes: dict[str, Any],
    max_unreadable: float,
) -> Iterator[Document]:
    """Yield the documents, and record in `notes` what had to be left out."""
    files = Files(images.open, images.find, images.names.__getitem__)
    layout = encoder.layout
    shown = [of_document(v, text["text"], text["turns"], layout) for text, v in texts if v]
    codes, unreadable = code_source(itertools.chain(*shown), files, log_progress=True)
    count = len({v.path for _, v in texts if v})
    if len(unreadable) > max_unreadable * count:
        raise PrepareError(
            f"{len(unreadable)} of {count} images cannot be read, but --max_unreadable allows only "
            f"the share {max_unreadable}; the first: {next(iter(unreadable.values()))}"
        )
    kept = [(text, v) for text, v in texts if not v or v.path not in unreadable]
    notes["unreadable"] = {images.names[path]: reason for path, reason in unreadable.items()}
    notes["documents_left_out"] = len(texts) - len(kept)
    notes |= dict(codes=code_source.notes())
    if unreadable:
        log.warning(
            "excluded %d unreadable images and their %d documents",
            len(unreadable), len(texts) - len(kept),
        )  # fmt: skip
    digests = {p: digest_of(images.find(p)).hex() for p in {v.path for _, v in kept if v}}
    for number, (text, v) in enumerate(texts, start=1):
        if v and v.path in unreadable:
            continue
        places = of_document(v, text["text"], text["turns"], layout) if v else ()
        image = [codes[key(place)] for place in places] if v else None
        try:
            tokens = document_ids(encoder.tokenizer, text["text"], image, layout.vocab)
        except TokenizerError:
            if not images.secret:
                raise
            raise PrepareError(
                f"row {number}: text contains the name of a control token; remove it"
            ) from None
        names = ["image_path", "task", "source", "credential", "turns", "group", "id"]
        names += [name for name in jsonl.PSEUDO_FIELDS if name in text]
        digest = digests[v.path] if v else ""
        yield Document(
            tokens=tokens, image_sha256=digest, view=layout.view, answer_view=layout.answer_view,
            **{n: text[n] for n in names},
        )  # fmt: skip


# ---- The program ----


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    args = _parser().parse_args(argv)
    log_to_stderr()
    skip_absent_tpu()
    try:
        hub.locate_arguments(args)
        if isinstance(getattr(args, "model", None), str):  # gs://
            args.model = export.local_copy(args.model)
        with _open_out(args):
            result = args.run(args)
    except ERRORS as error:
        print(printable_text(f"error: {error}"), file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(printable_text(str(stop)), file=sys.stderr)
        return 75
    except KeyboardInterrupt:
        print(f"interrupted: {args.left}; rerun the same command", file=sys.stderr)
        return 75
    print(json.dumps(result) if args.json else printable_text("\n".join(_lines(result))))
    return 1 if result.get("errors") else 0


@contextlib.contextmanager
def _open_out(args: argparse.Namespace) -> Iterator[None]:
    """Open the folder of --out; of gs://, the command writes a local copy, which is uploaded."""
    if isinstance(getattr(args, "out", None), str):
        if getattr(args, "texts", False) or args.out.endswith(".jsonl"):
            raise PrepareError(f"--out {args.out}: a file on gs://; write a local one and copy it")
        with workdir.opened(args.out, fresh=not args.resumes) as work:
            args.out = work.folder
            yield
    else:
        yield


def _lines(result: Mapping[str, Any]) -> list[str]:
    """Return a result as lines: the name of each value, and the value or the rows of its table."""
    lines = []
    for name, value in result.items():
        if value and isinstance(value, dict | list):
            rows = _table(value)
        else:  # config.data.plan takes the complete hash
            rows = [[str(value) if name == "plan" else _cell(value)]]
        widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
        for n, row in enumerate(rows):
            cells = "  ".join(map(str.ljust, row, widths))
            lines.append(f"{'' if n else name:>20}  {cells}".rstrip())
    if any(re.search(r"\b[0-9a-f]{12}\.\.", line) for line in lines):
        lines.append("A hash that ends with .. is shortened; --json prints it complete.")
    return lines


def _table(value: dict[Any, Any] | list[Any]) -> list[list[str]]:
    """Return the cells of a table, with the columns' names above parts that have names themselves.

    {"CT": 3, "MRI": 12}    ->   CT  3  |  MRI  12
    [{"file": "a", "documents": 4}]   ->   file  documents  |  a  4
    """
    named = isinstance(value, dict)
    items = list(value.items() if named else enumerate(value))
    if all(isinstance(part, dict) and part for _, part in items):
        columns = list(dict.fromkeys(name for _, part in items for name in part))
        rows = [["", *map(_cell, columns)]]
        rows += [[_cell(n), *(_cell(part.get(c, "")) for c in columns)] for n, part in items]
    else:
        rows = [[_cell(name), _cell(part)] for name, part in items]
    return rows if named else [row[1:] for row in rows]


def _cell(value: Any) -> str:
    """Return a value on one line; of a hash its first digits."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "none"
    text = str(value)
    return f"{text[:12]}.." if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _parser() -> arguments.Parser:
    parser = arguments.Parser(prog="python -m data.prepare", description=__doc__.split("\n")[0])
    parser.set_defaults(left="no records were written", resumes=False)
    commands = parser.add_subparsers(required=True, metavar="command")
    sample = commands.add_parser("sample", help="convert the embedded sample to records")
    sample.add_argument("--out", type=arguments.folder, required=True, help="folder to write")
    sample.add_argument("--split", choices=SPLITS, default="train", help="split of the sample")
    sample.add_argument(
        "--kind", choices=tuple(KINDS), default="instruction", help="kind of documents"
    )
    sample.add_argument("--views", type=_positive, default=1, help="views of each train image")
    sample.add_argument("--rounds", type=_positive, default=1, help="wordings of each document")
    sample.add_argument("--seed", type=int, default=0, help="seed of wordings and views")
    _add_max_unreadable(sample)
    sample.add_argument(
        "--texts", action="store_true", help="write text to the file --out, for `documents`"
    )
    source_build.add_code_flags(sample)
    sample.set_defaults(run=_run_sample)
    release_cli.add(commands)
    documents = commands.add_parser("documents", help="convert text and images to records")
    documents.add_argument(
        "--from", dest="source", type=Path, required=True,
        help="JSONL in the format of data/records/jsonl.py",
    )  # fmt: skip
    documents.add_argument("--images", type=Path, required=True, help="folder of the images")
    documents.add_argument("--out", type=arguments.folder, required=True, help="folder to write")
    _add_max_unreadable(documents)
    source_build.add_code_flags(documents)
    documents.set_defaults(run=_run_documents)
    cli.add(commands)
    benchmark_import.add(commands)
    tokenize = commands.add_parser("tokenize", help="convert images to VQGAN codes, at scale")
    store.add_flags(tokenize)
    tokenize.set_defaults(left="finished shards are kept", resumes=True)
    build = commands.add_parser("build", help="convert a published source of MedMax to records")
    source_build.add_flags(build)
    check = record_check.add(commands, TINY)
    count = stats.add(commands, TINY, SAMPLE / "manifest.jsonl")
    plan = report.add(commands)
    provenance.add(commands)
    image_density.add(commands)
    annotation_cli.add(commands, TINY)
    for command in (check, count):
        command.add_argument("folder", type=arguments.folder, help="folder of records")
    plan.add_argument("folder", type=arguments.folder, help="folder of records, or a saved plan")
    for command in (sample, documents):
        command.add_argument("--model", type=arguments.folder, default=TINY, help="model folder")
    for command in commands.choices.values():
        command.add_argument(
            "--json", action="store_true", help="print one JSON object as the last line"
        )
    return parser


def _add_max_unreadable(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max_unreadable", type=float, default=MAX_UNREADABLE, metavar="SHARE",
        help="stop if more than this share of images cannot be read",
    )  # fmt: skip


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1; use 1 or more")
    return number


def _run_sample(args: argparse.Namespace) -> dict[str, Any]:
    if args.texts:
        return write_texts(args.out, args.split, args.kind, args.seed, args.rounds)
    return prepare_sample(
        args.out,
        model_folder=args.model,
        split=args.split,
        kind=args.kind,
        views=args.views,
        seed=args.seed,
        rounds=args.rounds,
        max_unreadable=args.max_unreadable,
        **source_build.code_options(args),
    )


def _run_documents(args: argparse.Namespace) -> dict[str, Any]:
    return prepare_documents(
        args.out,
        source=args.source,
        images=args.images,
        model_folder=args.model,
        max_unreadable=args.max_unreadable,
        **source_build.code_options(args),
    )


if __name__ == "__main__":
    sys.exit(main())
