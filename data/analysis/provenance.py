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
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64

from medmax_jax.config import ConfigError, Data, Mixing, Stage, build
from medmax_jax.data.analysis import near_duplicates, scan
from medmax_jax.data.image_tokens.encoder import PrepareError, log
from medmax_jax.data.image_tokens.store_reader import open_codes
from medmax_jax.data.packing import mixing, plan_file, stages
from medmax_jax.data.packing.condition_dropout import trained_tokens
from medmax_jax.data.packing.pack import PackError, Plan
from medmax_jax.data.records.reader import Records, open_records
from medmax_jax.io.text_files import TextFileError, read_json, read_objects
from medmax_jax.storage.folder import file_sha256

HEX = re.compile(r"[0-9a-f]{16,64}")
SKIPPED = (".git", "__pycache__", "node_modules")


@dataclasses.dataclass(eq=False)
class Inventory:
    """The contents of the folders that were named."""

    records: list[tuple[Records, scan.Columns]]
    codes: list[Path]
    plans: list[Path]
    runs: list[Path]


def find_image(query: str, folders: list[Path]) -> dict[str, Any]:
    """Return all locations of an image; raise PrepareError if a folder is missing."""
    inventory = scan_folders(folders)
    image = _Image(query)
    documents = _matching_documents(inventory, image)
    matches = list(zip(inventory.records, documents, strict=True))
    found = dict(shards=[line for match in matches for line in _shards(*match)])
    found["codes"] = [line for store in inventory.codes for line in _code_shards(store, image)]
    sources = {
        records.fingerprint: Matches(records, numbers, image.codes)
        for (records, _), numbers in matches
    }
    found["plans"] = [line for path in inventory.plans for line in _plan(path, sources)]
    found |= dict(runs=[], checkpoints=[])
    for path in inventory.runs:
        runs, checkpoints = _run_and_checkpoints(path, sources)
        found["runs"] += runs
        found["checkpoints"] += checkpoints
    counts = {f.name: len(getattr(inventory, f.name)) for f in dataclasses.fields(inventory)}
    return dict(documents=sum(map(len, documents)), looked_into=counts) | found


def scan_folders(folders: list[Path]) -> Inventory:
    """Return everything of a known kind below some folders."""
    inventory = Inventory([], [], [], [])
    for top in folders:
        if not top.is_dir():
            raise PrepareError(f"--in {top}: no such folder; check the path")
        for root, subfolders, files in os.walk(top):
            folder = Path(root)
            kept = (n for n in subfolders if n not in SKIPPED and not n.startswith(".venv"))
            subfolders[:] = sorted(kept)
            inventory.plans += [folder / n for n in sorted(files) if n.endswith(plan_file.SUFFIX)]
            if "index.npy" in files and "dataset.json" in files:
                subfolders.clear()
                if "plan.json" in files:
                    inventory.codes.append(folder)
                else:
                    inventory.records.append(_scanned(folder))
            elif "checkpoints" in subfolders and _is_run(folder / "config.json"):
                subfolders.clear()
                inventory.runs.append(folder)
    return inventory


class _Image:
    """The image: names of 64 bits, and the digits of a requested hash."""

    def __init__(self, query: str):
        if os.path.isfile(query):
            query = file_sha256(Path(query))
        self.name = near_duplicates.hash64(query.encode())
        self.codes: set[int] = set()
        self.sha: set[int] = set()
        if HEX.fullmatch(query.lower()):
            self.codes.add(int(query[:16], 16))
            self.sha.add(int(query[:16], 16))

    def matching_documents(self, columns: scan.Columns) -> Bool[np.ndarray, "n"]:
        """Return which documents have the name, the bytes or the codes."""
        matching = (columns.name == self.name) | (columns.path == self.name)
        matching |= np.isin(columns.sha, _sorted_names(self.sha)) & (columns.sha != 0)
        matching[columns.owner[np.isin(columns.codes, _sorted_names(self.codes))]] = True
        return matching

    def add_aliases(self, columns: scan.Columns, matching: Bool[np.ndarray, "n"]) -> None:
        """Add codes and bytes of the documents that show it, of those with one image only."""
        images = np.bincount(columns.owner, minlength=len(matching))
        single = matching & (images == 1)
        self.codes |= set(columns.codes[single[columns.owner]].tolist())
        self.sha |= set(columns.sha[single & (columns.sha != 0)].tolist())


@dataclasses.dataclass(frozen=True, eq=False)
class Matches:
    """The documents of a folder that show the image, and the names of its codes."""

    records: Records
    documents: np.ndarray
    codes: set[int]

    def rows_of(self, plan: Plan, mask: str) -> Int[np.ndarray, "_"]:
        """Return the rows of a plan that show the image.

        With data.condition_dropout, a document may be trained without some of its images. `mask`:
        config.data.mask.
        """
        positions = np.flatnonzero(np.isin(plan.documents, self.documents))
        shown = [
            not stream or self._is_in_stream(document, stream, mask)
            for document, stream in zip(
                plan.documents[positions].tolist(), plan.streams[positions].tolist(), strict=True
            )
        ]
        positions = positions[np.array(shown, bool)]
        return np.unique(np.searchsorted(plan.starts, positions, side="right") - 1)

    def _is_in_stream(self, number: int, stream: int, mask: str) -> bool:
        """Return whether a stream shows the image; True also if its codes are not known."""
        document = self.records[number]
        tokens, _ = trained_tokens(document, stream, self.records, mask)
        parts = (document, dataclasses.replace(document, tokens=tokens))
        images = [scan.images_of(part, self.records) for part in parts]
        known, left = (
            self.codes & {near_duplicates.hash64(image.tobytes()) for image in part}
            for part in images
        )
        return bool(left) or not known


def _scanned(folder: Path) -> tuple[Records, scan.Columns]:
    records, problems = open_records(folder), []
    log.info("%s: reading %d documents", folder, len(records))
    columns = scan.scan(records, lambda *finding: problems.append(finding), lambda *_: None)
    if problems:
        log.warning("%s: data.prepare check has %d findings; fix them", folder, len(problems))
    return records, columns


def _matching_documents(inventory: Inventory, image: _Image) -> list[Int[np.ndarray, "_"]]:
    """Return each folder's documents that show the image, once no more aliases are found."""
    size = (0, 0)
    while True:
        for store in inventory.codes:
            _add_stored_codes(store, image)
        matching = [image.matching_documents(columns) for _, columns in inventory.records]
        for (_, columns), documents in zip(inventory.records, matching, strict=True):
            image.add_aliases(columns, documents)
        if size == (size := (len(image.codes), len(image.sha))):
            return [np.flatnonzero(documents) for documents in matching]


def _shards(
    scanned: tuple[Records, scan.Columns], documents: Int[np.ndarray, "_"]
) -> Iterator[dict[str, Any]]:
    records, columns = scanned
    for number in documents.tolist():
        file, record = scan.shard_of(records, number)
        codes = columns.codes[columns.owner == number]
        names = [f"{int(c):016x}" for c in codes]
        yield dict(shard=str(records.folder / file), record=record, document=number, codes=names)


def _add_stored_codes(folder: Path, image: _Image) -> None:
    """Add the codes of a file that was requested by its bytes, whatever its name."""
    store = open_codes(folder)
    for i in _matching_images(folder, image):
        codes = store[i]
        if codes is not None:
            image.codes.add(near_duplicates.hash64(near_duplicates.code_hash(codes)))


def _matching_images(folder: Path, image: _Image) -> list[int]:
    """Return the matching indices in the image list of a folder of codes."""
    slices = [np.load(p, allow_pickle=False) for p in sorted((folder / "digests").glob("*.npy"))]
    table = np.concatenate([*slices, np.zeros((0, 32), np.uint8)])
    names = np.ascontiguousarray(table[:, :8]).view(">u8")[:, 0].astype(np.uint64)
    return np.flatnonzero(np.isin(names, _sorted_names(image.sha)) & table.any(axis=1)).tolist()


def _code_shards(folder: Path, image: _Image) -> Iterator[dict[str, Any]]:
    index = np.load(folder / "index.npy", allow_pickle=False)
    size = open_codes(folder).meta["plan"]["shard_size"]
    for i in _matching_images(folder, image):
        shard, record = divmod(int(index[i]), size)
        # Verbatim: part of the data.
        line = dict(codes=str(folder), picture=i)
        yield line | (dict(shard=shard, record=record) if index[i] >= 0 else dict(unreadable=True))


def _plan(path: Path, sources: dict[str, Matches]) -> Iterator[dict[str, Any]]:
    """Yield rows of a saved plan, or a note that its records are not available."""
    try:
        saved = plan_file.load(path)
    except PackError:
        return  # another program's file
    header = saved.header
    if header["records"] not in sources:
        records = header["records"][:16]
        yield dict(plan=str(path), unknown=f"its records {records} are not in these folders")
        return
    rows = sources[header["records"]].rows_of(saved.plan, header["settings"].get("mask", ""))
    if len(rows):
        yield dict(plan=str(path), epoch=header["epoch"], rows=rows.tolist())


def _run_and_checkpoints(
    folder: Path, sources: dict[str, Matches]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (steps at which the run reads the image, those before each of its checkpoints)."""
    starts = _history(folder)
    steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    ends = [start["start"] for start in starts[1:]] + [max([*steps, starts[-1]["steps"]])]
    seen: list[tuple[int, int]] = []  # (step, epoch), steps counted from 1 as in the log
    runs = []
    for start, end in zip(starts, ends, strict=True):
        new, line = _steps_of_start(folder, start, end, sources)
        seen += new
        runs += [line] if line else []
    saved = {f"checkpoints/{step}": step for step in steps}
    of_stages = itertools.accumulate(s["steps"] for s in starts[-1]["config"].get("stages", ()))
    exports = {f"_stage_{number}": end for number, end in enumerate(of_stages)} | {"": ends[-1]}
    for suffix, end in exports.items():
        for name, kind in (("adapter", "adapter_config.json"), ("model", "config.json")):
            if (folder / f"{name}{suffix}" / kind).is_file():
                saved[f"{name}{suffix}"] = end
    checkpoints = []
    for name, last in saved.items() if seen else ():
        before, path = [s for s in seen if s[0] <= last], folder / name
        line = dict(checkpoint=str(path))
        if before:
            line |= dict(seen=len(before), first_step=before[0][0], epoch=before[0][1])
        else:
            line["not_yet_seen_by_step"] = last
        checkpoints.append(line)
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
    names = ("data", "plan", "config", "stage_data")
    default = {n: facts[n] for n in names if n in facts} | dict(start=0, validation="")
    path, kept = folder / "history.jsonl", []
    try:
        lines = [line for _, line in read_objects(path)] if path.exists() else []
        for line in lines or [default]:
            kept = [k for k in kept if k["start"] < line["start"]]
            kept.append(line | dict(steps=facts["config"]["train"]["steps"]))
            _check_start(kept[-1])
    except (ValueError, KeyError, TypeError) as error:
        raise PrepareError(
            f"{path}: damaged ({error!r}); fix its lines, or delete it so that config.json is used "
            "for the complete run"
        ) from error
    return kept


def _check_start(line: dict[str, Any]) -> None:
    types = dict(data=str, plan=str, config=dict, start=int, steps=int)
    for name, expected in types.items():
        if type(line[name]) is not expected:
            raise ValueError(f"field {name!r} is not of type {expected.__name__}")
    if not all(isinstance(line["config"][name], dict) for name in ("data", "mixing")):
        raise ValueError("config has no sections data and mixing")
    if not isinstance(line["config"].get("stages", []), list):
        raise ValueError("config.stages is not a list")
    own = line.get("stage_data", [line["data"]])
    if not isinstance(own, list) or not own or not all(isinstance(data, str) for data in own):
        raise ValueError("stage_data is not a list of fingerprints")


def _steps_of_start(
    folder: Path,
    start: dict[str, Any],
    end: int,
    sources: dict[str, Matches],
) -> tuple[list[tuple[int, int]], dict[str, Any] | None]:
    """Return steps start + 1 .. end at which the image was read, and a line about them."""
    line: dict[str, Any] = dict(run=str(folder), plan=start["plan"][:16])
    held_out = sources.get(start.get("validation", ""))
    in_validation = len(held_out.documents) if held_out else 0
    if in_validation:
        line |= dict(in_validation=in_validation)
    try:
        parts = _stages(start["config"])
        of_parts = start.get("stage_data", [start["data"]] * len(parts))
        if absent := [digest for digest in of_parts if digest not in sources]:
            unknown = f"its records {absent[0][:16]} are not in these folders"
            return [], line | dict(unknown=unknown)
        parts = parts[: len(of_parts)]  # without stages whose records did not exist
        matches = [sources[data] for data in of_parts]
        plans = [
            mixing.epochs(found.records, data, mixture)
            for found, (data, mixture, *_) in zip(matches, parts, strict=True)
        ]
    except (ConfigError, PackError) as error:
        return [], line | dict(unknown=f"its settings give no plan ({error})")
    if stages.fingerprint([epochs.first.fingerprint for epochs in plans]) != start["plan"]:
        return [], line | dict(unknown="its records and settings now give another plan")
    seen = []
    for (data, _, first, last), epochs, found in zip(parts, plans, matches, strict=True):
        last, row, epoch, size = min(last, end), 0, 0, data.batch_size
        while len(found.documents) and row < (last - first) * size:
            plan = epochs.plan(epoch)
            steps = first + np.unique((row + found.rows_of(plan, data.mask)) // size) + 1
            seen += [(int(s), epoch) for s in steps if start["start"] < s <= last]
            row, epoch = row + len(plan), epoch + 1
    if seen:
        steps = dict(first_step=seen[0][0], epoch=seen[0][1], last_step=seen[-1][0])
        return seen, line | dict(seen=len(seen)) | steps
    shown = any(len(found.documents) for found in matches) or in_validation
    return [], (line | dict(not_seen_by_step=end)) if shown else None


def _stages(config: dict[str, Any]) -> list[tuple[Data, Mixing, int, float]]:
    """Return packing.stages.parts of a run's settings, which may be older than some fields."""
    data = build(Data, {"plan": ""} | config["data"])
    run_stages = [build(Stage, stage) for stage in config.get("stages", [])]
    return stages.parts(data, build(Mixing, config["mixing"]), run_stages)


def _sorted_names(names: set[int]) -> UInt64[np.ndarray, "_"]:
    return np.array(sorted(names), np.uint64)


# ---- The command line ----


def add(commands: Any) -> argparse.ArgumentParser:
    """Add `who_saw`."""
    parser = commands.add_parser(
        "who_saw", help="find an image in records, codes, plans and training runs"
    )
    parser.add_argument(
        "hash", metavar="HASH", help="SHA-256 of a file or of codes, an id, a path, or a file"
    )
    parser.add_argument(
        "--in", type=Path, nargs="+", default=[Path(".")], dest="folders", metavar="FOLDER",
        help="folders to search for records, codes, plans and runs; default: the current folder",
    )  # fmt: skip
    parser.set_defaults(run=lambda args: find_image(args.hash, args.folders))
    return parser
