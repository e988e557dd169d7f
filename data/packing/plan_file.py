"""Save a plan as a file: one epoch's rows, what they were made from, and a SHA-256 of all of it.

    plan.npz   header     JSON as bytes: format, records, settings, epoch, names of labels
               documents  int32, starts int64: the rows, as in pack.Plan
               lengths    int32, source, task int32: of every document of the records
               trained    int32, streams uint8: tokens and stream of each of `documents`, see
                          condition_dropout.py; only with it, in format 2
               sha256     of the header and the arrays

The file holds only numpy arrays, nothing pickled. A run whose config.data.plan is header["run"] has
this plan or does not start.
"""

import dataclasses
import hashlib
import io
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from medmax_jax.config import ConditionDropout, Data, Mixing
from medmax_jax.data.packing import mixing
from medmax_jax.data.packing.pack import PackError, Plan
from medmax_jax.data.records.reader import Records
from medmax_jax.io.errors import printable
from medmax_jax.io.text_files import parse_object
from medmax_jax.models.guidance_streams import STREAMS
from medmax_jax.storage.folder import Folder

SUFFIX = ".npz"
ARRAYS = ("documents", "starts", "lengths", "source", "task")
FORMATS = {1: ARRAYS, 2: (*ARRAYS, "trained", "streams")}
_DAMAGE = (  # all errors that numpy, zipfile and zlib raise for changed bytes
    *(OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)
_FIX = "create it again with data.prepare plan --save"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SavedPlan:
    """A plan read from a file. `header["run"]`: the hash of a run with these settings."""

    header: dict[str, Any]
    plan: Plan
    lengths: np.ndarray  # int32 [documents of the records]
    source: np.ndarray  # index into header["sources"]
    task: np.ndarray

    def row_documents(self, row: int) -> list[dict[str, Any]]:
        """Return the documents of a row, each with its position in the row."""
        if not 0 <= row < len(self.plan):
            raise PackError(f"--row is {row}; this epoch has rows 0..{len(self.plan) - 1}")
        documents, start = [], 0
        for number, tokens, stream in zip(*self.plan.complete_row(row), strict=True):
            line = dict(document=int(number), start=start, tokens=int(tokens))
            line |= {n: self.header[f"{n}s"][getattr(self, n)[number]] for n in ("source", "task")}
            documents.append(line | (dict(stream=STREAMS[stream]) if stream else {}))
            start += int(tokens)
        return documents


def save(
    path: Path, records: Records, data: Data, mixing_config: Mixing, *, epoch: int
) -> dict[str, Any]:
    """Write the plan of an epoch atomically; return its header."""
    if path.suffix != SUFFIX:
        raise PackError(f"--save {path}: the file name must end in {SUFFIX}")
    epochs = mixing.epochs(records, data, mixing_config)
    plan = epochs.plan(epoch)
    settings = dataclasses.asdict(data) | dataclasses.asdict(mixing_config)
    dropped = data.condition_dropout != ConditionDropout.off()
    unsaved = ("train", "validation", "plan", *(() if dropped else ("condition_dropout",)))
    unsaved += ("pseudo",) if mixing_config.pseudo else ()  # as in files of before the field
    unsaved += ("image_window",) if not mixing_config.image_centric else ()  # it has no effect
    header = dict(
        format=2 if dropped else 1,
        records=records.fingerprint,
        folder=records.folder.name,
        settings={n: v for n, v in settings.items() if n not in unsaved},
        epoch=epoch,
        run=epochs.first.fingerprint,
        rows=plan.fingerprint,
        sources=records.names("source"),
        tasks=records.names("task"),
    )
    arrays = dict(documents=plan.documents, starts=plan.starts, lengths=records.index["length"])
    arrays |= {name: records.index[name] for name in ("source", "task")}
    if dropped:
        arrays |= dict(trained=plan.lengths, streams=plan.streams)
    text = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            digest = np.frombuffer(bytes.fromhex(_digest(text, arrays)), np.uint8)
            np.savez_compressed(file, header=text, sha256=digest, **arrays)
        os.replace(partial, path)
    except OSError as error:
        raise PackError(
            f"--save {path}: cannot be written ({error.strerror}); use another file"
        ) from error
    return header


def load(path: str | Path) -> SavedPlan:
    """Read the plan of a file; raise PackError unless every byte is as it was saved."""
    try:
        with _opened(path) as raw, np.load(raw, allow_pickle=False) as file:
            text, sha256 = file["header"], file["sha256"].tobytes().hex()
            header = parse_object(text.tobytes(), "header")
            version = header["format"]
            known = type(version) is int and version in FORMATS
            arrays = {name: file[name] for name in FORMATS[version]} if known else {}
    except _DAMAGE as error:
        reason = printable(error)
        raise PackError(f"{path}: not a plan, or damaged ({reason}); {_FIX}") from error
    if not known:
        version = printable(repr(version), 80)
        raise PackError(f"{path}: plan format is {version}, expected 1 or 2; {_FIX}")
    if wrong := _wrong_part(header, arrays):
        raise PackError(f"{path}: {wrong} has a wrong type or range: damaged; {_FIX}")
    complete = np.zeros(len(arrays["documents"]), np.uint8)
    plan = Plan(
        arrays["documents"],
        arrays["starts"],
        arrays.get("trained", arrays["lengths"][arrays["documents"]]),
        arrays.get("streams", complete),
    )
    if _digest(text, arrays) != sha256 or plan.fingerprint != header["rows"]:
        raise PackError(f"{path}: SHA-256 does not match the content: damaged; {_FIX}")
    return SavedPlan(
        header=header, plan=plan, lengths=arrays["lengths"], source=arrays["source"],
        task=arrays["task"],
    )  # fmt: skip


def _opened(path: str | Path) -> BinaryIO:
    folder, _, name = str(path).rpartition("/")
    remote = folder.startswith("gs://")
    return io.BytesIO(Folder(folder).read(name)) if remote else open(path, "rb")


def _wrong_part(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """Return the first part of a plan that has a wrong type or range; "" if all are valid.

    A program that changes a file can also rewrite its digest, so the digest does not detect this.
    """
    types = dict(records=str, folder=str, settings=dict, epoch=int, run=str, rows=str)
    for name, expected in (types | dict(sources=list, tasks=list)).items():
        if type(header.get(name)) is not expected:
            return f"header.{name}"
    for name in ("sources", "tasks"):
        if not all(isinstance(label, str) for label in header[name]):
            return f"header.{name}"
    for name, array in arrays.items():
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            return name
    documents, starts, count = arrays["documents"], arrays["starts"], len(arrays["lengths"])
    limits = dict(documents=(documents, count))
    for name in ("source", "task"):
        if len(arrays[name]) != count:
            return name
        limits[name] = (arrays[name], len(header[f"{name}s"]))
    for name, limit in (("trained", 1 << 31), ("streams", len(STREAMS))):
        if name in arrays:
            if len(arrays[name]) != len(documents):
                return name
            limits[name] = (arrays[name], limit)
    for name, (array, limit) in limits.items():
        if array.size and not (0 <= array.min() and array.max() < limit):
            return name
    rising = len(starts) and starts[0] == 0 and (np.diff(starts) >= 0).all()
    return "" if rising and starts[-1] == len(documents) else "starts"


def _digest(header: np.ndarray, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(header.tobytes())
    for name in arrays:
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
