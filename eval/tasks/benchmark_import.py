"""Implements `data.prepare eval_items`: converts a benchmark to a folder of items.

    D/items.jsonl    rows for config.questions of eval.run, one JSON object per line
    D/images/        only where the benchmark embeds its images (PathVQA)
    D/import.json    how many rows of each task, what was left out and why, whether counts agree

Only the owner can read the folder, and it appears atomically. Other images stay in place:
image_path is --prefix and the path in the benchmark, so that one folder can hold several.
"""

import argparse
import collections
import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from medmax_jax import arguments
from medmax_jax.data.image_tokens.encoder import log
from medmax_jax.data.records.row_streams import SourceError
from medmax_jax.data.sources.row import RejectedRow
from medmax_jax.eval.records import is_credentialed
from medmax_jax.eval.tasks import benchmark_readers, catalog, items
from medmax_jax.eval.tasks.benchmark_readers import READERS, YES_NO
from medmax_jax.storage import hub
from medmax_jax.storage.atomic_folder import atomic_folder
from medmax_jax.storage.folder import os_errors
from medmax_jax.storage.image_paths import is_inside

SUMMARY = "import.json"
MAX_ROWS = 1_000_000  # the largest, OmniMedVQA, has 88,996
MAX_BAD = 0.01  # share of the rows: a few are usual, more indicate another file
LISTED = 20  # reasons
LOG_EVERY = 10_000  # rows between two log lines


@dataclasses.dataclass
class Tally:
    """Counts kept rows by task, and the others by reason with the first of each."""

    kept: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    bad: dict[tuple[str, bool], list[Any]] = dataclasses.field(default_factory=dict)
    inside: bool = False  # images

    def refuse(self, bad: RejectedRow) -> None:
        count, first = self.bad.get((bad.reason, bad.by_rule), (0, bad.where))
        self.bad[bad.reason, bad.by_rule] = [count + 1, first]

    def number(self, *, by_rule: bool) -> int:
        return sum(n for (_, rule), (n, _) in self.bad.items() if rule == by_rule)

    def reasons(self) -> list[dict[str, Any]]:
        rows = [
            dict(reason=reason, by_rule=rule, rows=n, first=first)
            for (reason, rule), (n, first) in self.bad.items()
        ]
        return sorted(rows, key=lambda row: (row["by_rule"], -row["rows"]))


def eval_items(
    name: str, folder: Path, out: Path, *, prefix: str, allow_counts: bool, max_bad: float
) -> dict[str, Any]:
    """Write the test rows of a benchmark; return the content of import.json."""
    if name not in READERS:
        raise SourceError(f"--benchmark is {name!r}; use one of {', '.join(READERS)}")
    if prefix and not is_inside(prefix):
        raise SourceError(f"--prefix is {prefix!r}; use a path inside the folder of images")
    if not folder.is_dir():
        raise SourceError(
            f"--from is {str(folder)!r}, which is not a folder; name the benchmark's folder"
        )
    tally = Tally()
    with atomic_folder(out, bytes_needed=0, seal=SUMMARY) as new:
        with os_errors(str(out)), open(Path(new.path) / "items.jsonl", "wb") as file:
            for row_or_rejection in _bounded(name, folder):
                if isinstance(row_or_rejection, RejectedRow):
                    tally.refuse(row_or_rejection)
                    continue
                row = _placed(row_or_rejection, prefix, Path(new.path))
                tally.inside |= "image_bytes" in row_or_rejection
                try:
                    (item,) = items.from_rows([row])  # checks the row, and names its task
                except items.TaskError as error:
                    reason = str(error).partition(": ")[2] or str(error)
                    tally.refuse(RejectedRow(where=row["id"], reason=reason))
                    continue
                if is_credentialed(item):  # the folder is not private
                    raise SourceError(f"{name}: {item.task} is credentialed; remove its rows")
                tally.kept[item.task] += 1
                file.write(json.dumps(row).encode() + b"\n")
                if (count := tally.kept.total()) % LOG_EVERY == 0:
                    log.info("%s: %d rows", name, count)
        summary = _import_summary(name, tally, allow_counts, max_bad) | hub.source_note(folder)
        new.write(SUMMARY, [json.dumps(summary, indent=1).encode() + b"\n"])
    return dict(items=str(out / "items.jsonl"), **summary)


def _bounded(name: str, folder: Path):
    for number, row in enumerate(READERS[name](folder)):
        if number == MAX_ROWS:
            raise SourceError(f"{name}: more than {MAX_ROWS} rows; use the files as published")
        yield row


def _placed(item: benchmark_readers.Item, prefix: str, new: Path) -> dict[str, Any]:
    """Return the row with its path under the prefix; write an embedded image to a file."""
    row = {key: value for key, value in item.items() if key != "image_bytes"}
    if "image_bytes" in item:
        path = new / row["image_path"]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(item["image_bytes"])
    row["image_path"] = str(PurePosixPath(prefix, row["image_path"]))
    return row


def _import_summary(name: str, tally: Tally, allow_counts: bool, max_bad: float) -> dict[str, Any]:
    kept, malformed = tally.kept.total(), tally.number(by_rule=False)
    reasons = tally.reasons()
    shown = "; ".join(
        f"{r['reason']} ({r['rows']} rows, first {r['first']})"
        for r in itertools.islice(reasons, LISTED)
    )
    if malformed > max_bad * (kept + malformed):
        raise SourceError(
            f"{name}: {malformed} of {kept + malformed} rows are malformed, but --max_bad allows a "
            f"share of {max_bad}: {shown}"
        )
    if not kept:
        raise SourceError(f"{name}: no row can be used: {shown or 'the files are empty'}")
    other = _other_counts(name, tally)
    if other and not allow_counts:
        raise SourceError(
            f"{name}: {'; '.join(other)}; download the files again, or accept them with "
            "--allow_counts"
        )
    return dict(
        rows=kept,
        tasks=dict(sorted(tally.kept.items())),
        malformed=malformed,
        left_out=tally.number(by_rule=True),
        reasons=reasons,
        other_counts=other,
    )


def _other_counts(name: str, tally: Tally) -> list[str]:
    """Return where the numbers of rows differ from the published ones.

    Rows that the suite leaves out count, and in a benchmark of one task the malformed ones too.
    """
    excluded = tally.bad.get((YES_NO, True), [0])[0]
    counted = tally.kept + collections.Counter({f"{name}_closed": excluded})
    if len(tally.kept) == 1:
        counted += collections.Counter({next(iter(tally.kept)): tally.number(by_rule=False)})
    differences = []
    if name in catalog.EXPECTED_ROWS and counted.total() != catalog.EXPECTED_ROWS[name]:
        differences.append(f"{counted.total()} rows, published: {catalog.EXPECTED_ROWS[name]}")
    if tally.inside:
        return differences  # classified by the answer, unlike the published counts
    specs: Mapping[str, catalog.TaskSpec] = catalog.TASKS
    for task, n in sorted(counted.items()):
        spec = specs.get(task)
        if spec and spec.counts is not None and spec.counts + spec.left_out != n:
            differences.append(f"{n} rows of {task}, published: {spec.counts + spec.left_out}")
    return differences


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "eval_items", help="convert a public benchmark to items for eval.run"
    )
    parser.add_argument("--benchmark", required=True, choices=tuple(READERS))
    parser.add_argument(
        "--from", dest="source", type=Path, required=True, help="folder of the benchmark"
    )
    parser.add_argument("--out", type=arguments.folder, required=True, help="folder to write")
    parser.add_argument("--prefix", default="", help="folder to prepend to each image_path")
    parser.add_argument(
        "--allow_counts",
        action="store_true",
        help="accept numbers of rows that differ from the published ones",
    )
    parser.add_argument(
        "--max_bad",
        type=float,
        default=MAX_BAD,
        metavar="SHARE",
        help="largest accepted share of malformed rows",
    )
    parser.set_defaults(run=_run, left="no items were written")
    return parser


def _run(args: argparse.Namespace) -> dict[str, Any]:
    return eval_items(
        args.benchmark,
        args.source,
        args.out,
        prefix=args.prefix,
        allow_counts=args.allow_counts,
        max_bad=args.max_bad,
    )
