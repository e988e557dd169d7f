"""Save a plan as a file: one epoch's rows, what they were made from, and a SHA-256 of all of it.

    plan.npz   header     JSON as bytes: format, records, settings, epoch, names of labels
               documents  int32, starts int64: the rows, as in pack.Plan
               lengths    int32, source, task int32: of every document of the records
               sha256     of the header and the arrays

The file holds only numpy arrays, nothing pickled. A run whose config.data.plan is header["run"] has
this plan or does not start.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from medmax_jax.config import Data, Mixing
from medmax_jax.data.packing import mixing
from medmax_jax.data.packing.pack import PackError, Plan
from medmax_jax.data.records.reader import Records
from medmax_jax.io.errors import printable
from medmax_jax.io.text_files import parse_object

FORMAT = 1
SUFFIX = ".npz"
ARRAYS = ("documents", "starts", "lengths", "source", "task")
_DAMAGE = (  # all errors that numpy, zipfile and zlib raise for changed bytes
    *(OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)
_MEND = "make it again with data.prepare plan --save"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SavedPlan:
    """A plan read from a file. `header["run"]`: the hash of a run with these settings."""

    header: dict[str, Any]
    plan: Plan
    lengths: np.ndarray  # int32 [documents of the records]
    source: np.ndarray  # index into header["sources"]
    task: np.ndarray

    def who(self, row: int) -> list[dict[str, Any]]:
        """Return the documents of a row, each with its position in the row."""
        if not 0 <= row < len(self.plan):
            raise PackError(f"--row is {row}; this epoch has rows 0..{len(self.plan) - 1}")
        told, start = [], 0
        for number in self.plan.row(row).tolist():
            names = {n: self.header[f"{n}s"][getattr(self, n)[number]] for n in ("source", "task")}
            told.append(
                dict(document=number, start=start, tokens=int(self.lengths[number])) | names
            )
            start += int(self.lengths[number])
        return told


def save(path: Path, found: Records, data: Data, mixed: Mixing, *, epoch: int) -> dict[str, Any]:
    """Write the plan of an epoch atomically; return its header."""
    if path.suffix != SUFFIX:
        raise PackError(f"--save {path}: name a file that ends in {SUFFIX}")
    epochs = mixing.epochs(found, data, mixed)
    plan = epochs.plan(epoch)
    settings = dataclasses.asdict(data) | dataclasses.asdict(mixed)
    header = dict(
        format=FORMAT,
        records=found.fingerprint,
        folder=found.folder.name,
        settings={n: v for n, v in settings.items() if n not in ("train", "validation", "plan")},
        epoch=epoch,
        run=epochs.first.fingerprint,
        rows=plan.fingerprint,
        sources=found.names("source"),
        tasks=found.names("task"),
    )
    arrays = dict(documents=plan.documents, starts=plan.starts, lengths=found.index["length"])
    arrays |= {name: found.index[name] for name in ("source", "task")}
    text = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            digest = np.frombuffer(bytes.fromhex(_digest(text, arrays)), np.uint8)
            np.savez_compressed(file, header=text, sha256=digest, **arrays)
        os.replace(partial, path)
    except OSError as error:
        raise PackError(f"--save {path}: cannot be written ({error.strerror})") from error
    return header


def load(path: Path) -> SavedPlan:
    """Read the plan of a file; raise PackError unless every byte is as it was saved."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            text, told = file["header"], file["sha256"].tobytes().hex()
            arrays = {name: file[name] for name in ARRAYS}
        header = parse_object(text.tobytes(), "header")
        found = header["format"]
    except _DAMAGE as error:
        why = printable(error)
        raise PackError(f"{path}: no plan, or damaged ({why}); {_MEND}") from error
    if found != FORMAT:
        found = printable(repr(found), 80)
        raise PackError(f"{path}: a plan of format {found}, not {FORMAT}; {_MEND}")
    if wrong := _wrong(header, arrays):
        raise PackError(f"{path}: {wrong} is not of its type or range: damaged; {_MEND}")
    plan = Plan(arrays["documents"], arrays["starts"])
    if _digest(text, arrays) != told or plan.fingerprint != header["rows"]:
        raise PackError(f"{path}: its SHA-256 is not that of what it holds: damaged; {_MEND}")
    others = {name: arrays[name] for name in ("lengths", "source", "task")}
    return SavedPlan(header=header, plan=plan, **others)


def _wrong(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """Return the first part of a plan that has a wrong type or range; "" if all are valid.

    A program that changes a file can also rewrite its digest, so the digest does not detect this.
    """
    kinds = dict(records=str, folder=str, settings=dict, epoch=int, run=str, rows=str)
    for name, kind in (kinds | dict(sources=list, tasks=list)).items():
        if type(header.get(name)) is not kind:
            return f"header.{name}"
    for name in ("sources", "tasks"):
        if not all(isinstance(each, str) for each in header[name]):
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
    for name, (array, limit) in limits.items():
        if array.size and not (0 <= array.min() and array.max() < limit):
            return name
    rising = len(starts) and starts[0] == 0 and (np.diff(starts) >= 0).all()
    return "" if rising and starts[-1] == len(documents) else "starts"


def _digest(header: np.ndarray, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(header.tobytes())
    for name in ARRAYS:
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
