"""`python -m data.prepare who_saw HASH --in FOLDER ...`: find an image and the runs that read it.

    HASH   SHA-256 of the image's file, or of its codes (at least 16 digits of either); the id or
           image_path of a record; or an image file, which is hashed

    records    shards and records in them            codes    shards of `tokenize`
    plans      rows of a saved plan                  runs     steps of a training run, by its plan
    checkpoints, adapters                            which of them came after such a step

The images of a matching record are searched for by their codes and bytes in all folders, so a copy
under another name counts. A run does not log what it reads step by step: its plan determines it, a
function of the records and of the settings in history.jsonl, which a run writes at every start. A
line names documents by number and image by hash, never by id or path: the image may be
credentialed.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64

from medmax_jax.config import ConfigError, Data, Mixing, build
from medmax_jax.data.analysis import near_duplicates, scan
from medmax_jax.data.image_tokens.encoder import PrepareError, log
from medmax_jax.data.image_tokens.store_reader import open_codes
from medmax_jax.data.packing import mixing, plan_file
from medmax_jax.data.packing.pack import PackError, Plan
from medmax_jax.data.records.reader import Records, open_records
from medmax_jax.io.storage import file_sha256
from medmax_jax.io.text_files import TextFileError, read_json, read_objects

HEX = re.compile(r"[0-9a-f]{16,64}")
SKIPPED = (".git", "__pycache__", "node_modules")


@dataclasses.dataclass(eq=False)
class Inventory:
    """The contents of the folders that were named."""

    records: list[tuple[Records, scan.Columns]]
    codes: list[Path]
    plans: list[Path]
    runs: list[Path]


def find_image(asked: str, folders: list[Path]) -> dict[str, Any]:
    """Return all locations of an image; raise PrepareError if a folder is missing."""
    places = scan_folders(folders)
    wanted = _Image(asked)
    held = _held(places, wanted)
    both = list(zip(places.records, held, strict=True))
    found = dict(shards=[line for where in both for line in _shards(*where)])
    found["codes"] = [line for store in places.codes for line in _code_shards(store, wanted)]
    known = {records.fingerprint: (records, documents) for (records, _), documents in both}
    found["plans"] = [line for path in places.plans for line in _plan(path, known)]
    found |= dict(runs=[], checkpoints=[])
    for path in places.runs:
        runs, checkpoints = _run_of(path, known)
        found["runs"] += runs
        found["checkpoints"] += checkpoints
    looked = {f.name: len(getattr(places, f.name)) for f in dataclasses.fields(places)}
    return dict(documents=sum(map(len, held)), looked_into=looked) | found


def scan_folders(folders: list[Path]) -> Inventory:
    """Return everything of a known kind below some folders."""
    places = Inventory([], [], [], [])
    for top in folders:
        if not top.is_dir():
            raise PrepareError(f"--in {top}: no such folder")
        for here, below, files in os.walk(top):
            folder = Path(here)
            below[:] = sorted(n for n in below if n not in SKIPPED and not n.startswith(".venv"))
            places.plans += [folder / n for n in sorted(files) if n.endswith(plan_file.SUFFIX)]
            if "index.npy" in files and "dataset.json" in files:
                below.clear()
                if "plan.json" in files:
                    places.codes.append(folder)
                else:
                    places.records.append(_scanned(folder))
            elif "checkpoints" in below and _is_run(folder / "config.json"):
                below.clear()
                places.runs.append(folder)
    return places


class _Image:
    """The image: names of 64 bits, and the digits of a requested hash."""

    def __init__(self, asked: str):
        if os.path.isfile(asked):
            asked = file_sha256(Path(asked))
        self.name = near_duplicates.hash64(asked.encode())
        self.codes: set[int] = set()
        self.sha: set[int] = set()
        if HEX.fullmatch(asked.lower()):
            self.codes.add(int(asked[:16], 16))
            self.sha.add(int(asked[:16], 16))

    def matching_documents(self, columns: scan.Columns) -> Bool[np.ndarray, "n"]:
        """Return which documents have the name, the bytes or the codes."""
        shown = (columns.name == self.name) | (columns.path == self.name)
        shown |= np.isin(columns.sha, _numbers(self.sha)) & (columns.sha != 0)
        shown[columns.owner[np.isin(columns.codes, _numbers(self.codes))]] = True
        return shown

    def add_aliases(self, columns: scan.Columns, shown: Bool[np.ndarray, "n"]) -> None:
        """Add codes and bytes of the documents that show it, of those with one image only."""
        images = np.bincount(columns.owner, minlength=len(shown))
        alone = shown & (images == 1)
        self.codes |= set(columns.codes[alone[columns.owner]].tolist())
        self.sha |= set(columns.sha[alone & (columns.sha != 0)].tolist())


def _scanned(folder: Path) -> tuple[Records, scan.Columns]:
    records, wrong = open_records(folder), []
    log.info("%s: reading %d documents", folder, len(records))
    columns = scan.scan(records, lambda *finding: wrong.append(finding), lambda *_: None)
    if wrong:
        log.warning("%s: %d findings of data.prepare check; mend them first", folder, len(wrong))
    return records, columns


def _held(places: Inventory, wanted: _Image) -> list[Int[np.ndarray, "_"]]:
    """Return each folder's documents that show the image, once no more aliases are found."""
    size = (0, 0)
    while True:
        for store in places.codes:
            _learn_codes(store, wanted)
        shown = [wanted.matching_documents(columns) for _, columns in places.records]
        for (_, columns), which in zip(places.records, shown, strict=True):
            wanted.add_aliases(columns, which)
        if size == (size := (len(wanted.codes), len(wanted.sha))):
            return [np.flatnonzero(which) for which in shown]


def _shards(
    where: tuple[Records, scan.Columns], documents: Int[np.ndarray, "_"]
) -> Iterator[dict[str, Any]]:
    records, columns = where
    for number in documents.tolist():
        file, record = scan.shard_of(records, number)
        codes = columns.codes[columns.owner == number]
        names = [f"{int(c):016x}" for c in codes]
        yield dict(shard=str(records.folder / file), record=record, document=number, codes=names)


def _learn_codes(folder: Path, wanted: _Image) -> None:
    """Add the codes of a file that was requested by its bytes, whatever its name."""
    store = open_codes(folder)
    for i in _pictures_of(folder, wanted):
        codes = store[i]
        if codes is not None:
            wanted.codes.add(near_duplicates.hash64(near_duplicates.code_hash(codes)))


def _pictures_of(folder: Path, wanted: _Image) -> list[int]:
    """Return the matching indices in the image list of a folder of codes."""
    slices = [np.load(p, allow_pickle=False) for p in sorted((folder / "digests").glob("*.npy"))]
    table = np.concatenate([*slices, np.zeros((0, 32), np.uint8)])
    names = np.ascontiguousarray(table[:, :8]).view(">u8")[:, 0].astype(np.uint64)
    return np.flatnonzero(np.isin(names, _numbers(wanted.sha)) & table.any(axis=1)).tolist()


def _code_shards(folder: Path, wanted: _Image) -> Iterator[dict[str, Any]]:
    index = np.load(folder / "index.npy", allow_pickle=False)
    size = open_codes(folder).meta["plan"]["shard_size"]
    for i in _pictures_of(folder, wanted):
        shard, record = divmod(int(index[i]), size)
        where = dict(codes=str(folder), picture=i)
        yield where | (dict(shard=shard, record=record) if index[i] >= 0 else dict(unreadable=True))


def _plan(
    path: Path, known: dict[str, tuple[Records, Int[np.ndarray, "_"]]]
) -> Iterator[dict[str, Any]]:
    """Yield rows of a saved plan, or a note that its records are not available."""
    try:
        saved = plan_file.load(path)
    except PackError:
        return  # another program's file
    header = saved.header
    if header["records"] not in known:
        yield dict(plan=str(path), unknown=f"its records {header['records'][:16]} are not here")
        return
    rows = _rows(saved.plan, known[header["records"]][1])
    if len(rows):
        yield dict(plan=str(path), epoch=header["epoch"], rows=rows.tolist())


def _rows(plan: Plan, documents: Int[np.ndarray, "_"]) -> Int[np.ndarray, "_"]:
    places = np.flatnonzero(np.isin(plan.documents, documents))
    return np.unique(np.searchsorted(plan.starts, places, side="right") - 1)


def _run_of(
    folder: Path, known: dict[str, tuple[Records, Int[np.ndarray, "_"]]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (what the run reads of the image, what each of its checkpoints has seen)."""
    starts = _history(folder)
    steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    ends = [start["start"] for start in starts[1:]] + [max([*steps, starts[-1]["steps"]])]
    seen: list[tuple[int, int]] = []  # (step, epoch), steps counted from 1 as in the log
    runs = []
    for start, end in zip(starts, ends, strict=True):
        part, line = _read_by(folder, start, end, known)
        seen += part
        runs += [line] if line else []
    for name, kind in (("adapter", "adapter_config.json"), ("model", "config.json")):
        if (folder / name / kind).is_file():
            steps.append(name)
    checkpoints = []
    for step in steps if seen else []:
        last = ends[-1] if isinstance(step, str) else step
        before = [s for s in seen if s[0] <= last]
        place = folder / ("" if isinstance(step, str) else "checkpoints") / str(step)
        said = dict(checkpoint=str(place))
        if before:
            said |= dict(seen=len(before), first_step=before[0][0], epoch=before[0][1])
        else:
            said["not_yet_seen_by_step"] = last
        checkpoints.append(said)
    return runs, checkpoints


def _is_run(path: Path) -> bool:
    """Return whether a config.json is of medmax_jax.train; other programs have checkpoints too."""
    try:
        facts = read_json(path)
    except TextFileError:
        return False
    return isinstance(facts, dict) and {"data", "plan", "config"} <= facts.keys()


def _history(folder: Path) -> list[dict[str, Any]]:
    """Return each start of a run and what it reads, without starts that a later resume replaced."""
    facts = read_json(folder / "config.json")
    whole = {n: facts[n] for n in ("data", "plan", "config")} | dict(start=0, validation="")
    path, kept = folder / "history.jsonl", []
    try:
        lines = [line for _, line in read_objects(path)] if path.exists() else []
        for line in lines or [whole]:
            kept = [k for k in kept if k["start"] < line["start"]]
            kept.append(line | dict(steps=facts["config"]["train"]["steps"]))
            _check_start(kept[-1])
    except (ValueError, KeyError, TypeError) as error:
        raise PrepareError(
            f"{path}: damaged ({error!r}); mend its lines, or delete it to have config.json taken "
            "for the whole run"
        ) from error
    return kept


def _check_start(line: dict[str, Any]) -> None:
    kinds = dict(data=str, plan=str, config=dict, start=int, steps=int)
    for name, kind in kinds.items():
        if type(line[name]) is not kind:
            raise ValueError(f"{name} is no {kind.__name__}")
    if not all(isinstance(line["config"][name], dict) for name in ("data", "mixing")):
        raise ValueError("config has no sections data and mixing")


def _read_by(
    folder: Path,
    start: dict[str, Any],
    end: int,
    known: dict[str, tuple[Records, Int[np.ndarray, "_"]]],
) -> tuple[list[tuple[int, int]], dict[str, Any] | None]:
    """Return steps start + 1 .. end at which the image was read, and a line about them."""
    line: dict[str, Any] = dict(run=str(folder), plan=start["plan"][:16])
    held = len(known.get(start.get("validation", ""), ((), ()))[1])
    if held:
        line |= dict(in_validation=held)
    if start["data"] not in known:
        return [], line | dict(unknown=f"its records {start['data'][:16]} are not here")
    records, documents = known[start["data"]]
    try:
        data = build(Data, {"plan": ""} | start["config"]["data"])
        epochs = mixing.epochs(records, data, build(Mixing, start["config"]["mixing"]))
    except (ConfigError, PackError) as error:
        return [], line | dict(unknown=f"its settings make no plan ({error})")
    if epochs.first.fingerprint != start["plan"]:
        return [], line | dict(unknown="its records and settings make another plan by now")
    seen, row, epoch, size = [], 0, 0, data.batch_size
    while len(documents) and row < end * size:
        plan = epochs.plan(epoch)
        steps = np.unique((row + _rows(plan, documents)) // size) + 1
        seen += [(int(s), epoch) for s in steps if start["start"] < s <= end]
        row, epoch = row + len(plan), epoch + 1
    if seen:
        at = dict(first_step=seen[0][0], epoch=seen[0][1], last_step=seen[-1][0])
        return seen, line | dict(seen=len(seen)) | at
    return [], (line | dict(not_seen_by_step=end)) if len(documents) or held else None


def _numbers(names: set[int]) -> UInt64[np.ndarray, "_"]:
    return np.array(sorted(names), np.uint64)


# ---- The command line ----


def add(commands: Any) -> argparse.ArgumentParser:
    """Add `who_saw`."""
    asked = commands.add_parser("who_saw", help="where an image lies, who was trained on it")
    asked.add_argument("hash", metavar="HASH", help="SHA-256 of file or codes, id, path, or a file")
    asked.add_argument(
        "--in", type=Path, nargs="+", default=[Path(".")], dest="folders", metavar="FOLDER",
        help="records, codes, plans and runs are looked for below them; without: here",
    )  # fmt: skip
    asked.set_defaults(run=lambda args: find_image(args.hash, args.folders))
    return asked
