"""python -m eval.run --config=configs/eval_tiny.py --model=KIND:WHERE --workdir=D

    native:FOLDER       a model folder of this project   [--adapter A [--merge]]
    hf:FOLDER           a checkpoint in Hugging Face's, Meta's or Anole's layout, converted once
    endpoint:NAME@URL   an OpenAI-compatible endpoint that accepts images
    predictions:FILE    recorded answers: JSONL of id, text, images, or another program's file
    baseline:KIND       constant, majority or random
    hf://ORG/NAME       the same as hf:hf://ORG/NAME; A, FOLDER and FILE may be such names

Evaluates one model and writes records.jsonl, summary.json, report.html and the other files of a
workdir (listed in docs/guides/eval.md); after an interruption, the same command resumes. Started on
every host of a run (docs/guides/launch.md), each runs a part on its own devices, and the first one
scores all parts.
--dry_run reports the requests and the cost, and stops. --shard=i/n runs one part; without --shard
all parts are scored together. --export_items=FILE writes the items without their references, for
programs that write the answers of predictions:FILE, and stops. --cards=FILE has the cards of a
benchmark of your own (docs/tutorials/own_benchmark.md).

Status 0: done. 75: interrupted. 1: an error, reported in one line.
"""

import logging
import sys

from absl import flags
from ml_collections import ConfigDict

from medmax_jax import cli, generate
from medmax_jax.config import build
from medmax_jax.eval.config import Settings
from medmax_jax.eval.pipeline import stages
from medmax_jax.eval.reporting import page
from medmax_jax.io.errors import PrintableFormatter, printable_text

log = logging.getLogger("medmax_jax.eval")
# Columns of a score that fit a terminal; the page and summary.json have all columns, and the table
# of each baseline.
COLUMNS = (
    "task", "metric", "n", "groups", "few_groups", "value", "ci_low", "ci_high", "best", "baseline",
    "baseline_name", "paper", "own",
)  # fmt: skip


def main(config: ConfigDict, workdir: str) -> None:
    """Run the program: pass the flags to `stages.run`, log progress, and print the final table."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter("%(message)s"))
    log.setLevel(logging.INFO)
    settings = build(Settings, config)
    if out := flags.FLAGS.export_items:
        count = stages.export_items(settings, out, cards=flags.FLAGS.cards)
        log.info(f"{count} items: {out}")
        return
    with cli.Stop(together=False) as stop:
        progress = stop.progress(log.info)
        given = flags.FLAGS
        summary = stages.run(
            settings,
            workdir,
            model=given.model,
            adapter=given.adapter,
            merge=given.merge,
            shard=given.shard,
            cards=given.cards,
            dry_run=given.dry_run,
            progress=progress,
            stopped=lambda: bool(stop.requested),
        )
    if summary is None:
        return
    lines = [page.markdown([{name: vars(row)[name] for name in COLUMNS} for row in summary.scores])]
    if recorded := summary.recorded:
        lines.append(f"{recorded['matched']} answers of a file in the format {recorded['format']}")
        lines += [f"{row['rows']} rows left out: {row['why']}" for row in recorded["rows"]]
    if summary.view != summary.trained_view:
        lines.append(f"WARNING: view of the images: {page.view_text(summary)}")
    lines += [f"baseline {floor.name}: {floor.says}" for floor in summary.floors]
    lines.append("")
    for baseline in summary.baselines:
        lines.append(f"{baseline['name']} (before) and the model (after):\n")
        lines.append(page.markdown(baseline["scores"]))
    lines.append(f"report: {workdir.rstrip('/')}/report.html")
    print(printable_text("\n".join(lines)))


if __name__ == "__main__":
    flags.DEFINE_string("model", "", "KIND:WHERE, as above; empty: config.model, config.adapter")
    flags.DEFINE_string("adapter", "", "adapter, or the workdir of its training; native, hf")
    flags.DEFINE_bool("merge", False, "merge the adapter into the weights when loading")
    flags.DEFINE_string("shard", "", "i/n: run only shard i of n of the items, from 0")
    flags.DEFINE_string("cards", "", "Python file with the cards of a benchmark of your own")
    flags.DEFINE_bool(
        "dry_run", False, "report the requests and their cost, and stop before any request"
    )
    flags.DEFINE_string(
        "export_items", "", "write the items to this JSONL file, and stop; needs no --workdir"
    )
    cli.run(main, errors=generate.ERRORS, instead="export_items")
