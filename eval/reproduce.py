"""python -m eval.reproduce --model=hf://ORG/NAME --rows=released/items.jsonl --workdir=D

Evaluates a model as a paper did, and compares every published number with the one computed here.
D/reproduction.html has the published value, ours with its interval, the settings that differ, and
the numbers that were not run with their reason; D/reproduction.json is for citing. The plan and its
price come first; after an interruption the same command resumes, and gives the same numbers.

    --rows=FILE,..         items of the released schema: what data.prepare import wrote, or folders
                           of data.prepare eval_items
    --tables=vqa,images    some tables only; of vqa, images, visual_chat, multimodal
    --strict               also generates in strict mode, for a comparison with the published one
    --config.judge.endpoint=NAME@URL, --config.scorers=biomedclip:FOLDER
                           without them the numbers that require them are not run
    --verify=FILE          checks that the numbers of a reproduction.json follow from the records in
                           its folder (or in --workdir), and stops

Status 0: done. 75: interrupted. 1: an error, or a number that does not follow.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from medmax_jax import cli, generate
from medmax_jax.config import build
from medmax_jax.eval.config import Settings
from medmax_jax.eval.reporting import page as evaluation_page
from medmax_jax.eval.reproduction import citation, page, parts, published
from medmax_jax.io import journal
from medmax_jax.io.errors import PrintableFormatter, printable_text
from medmax_jax.storage import workdir as storage

log = logging.getLogger("medmax_jax.eval")
SKIPPED = tuple(f"{mode}/*" for mode in (parts.PAPER, parts.STRICT))  # written by the parts


class CitationError(ValueError):
    """Raised where the numbers of a citation do not follow from its records."""


def main(config: ConfigDict, workdir: str) -> None:
    """Run the program: plan, run each part, and write the page and the citation."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter("%(message)s"))
    log.setLevel(logging.INFO)
    given, workdir = flags.FLAGS, (workdir or "").rstrip("/")
    if given.verify:
        verify(given.verify, workdir)
        return
    settings = parts.with_rows(build(Settings, config), given.rows, given.images)
    model = parts.Model(model=given.model, adapter=given.adapter, merge=given.merge)
    published.cells(given.published)  # raises for an unknown model before anything is run
    every = parts.divide(settings, model, given.tables, strict=given.strict)
    parts.plan(every, model, workdir, progress=log.info)
    if given.dry_run:
        return
    with cli.Stop(together=False) as stop:
        progress = stop.progress(log.info)
        for part in every:
            parts.run(part, model, workdir, progress=progress, stopped=lambda: bool(stop.requested))
    if jax.process_index():
        return
    content = write(workdir, given.published, settings, every)
    print(printable_text(as_text(content, workdir)))


def write(
    workdir: str, model: str, settings: Settings, every: Sequence[parts.Part]
) -> dict[str, Any]:
    """Write the page and the citation of finished parts; return the content of the citation."""
    with storage.opened(workdir, mode="read") as work:
        content = citation.build(flags.FLAGS.paper, model, settings, every, work.folder)
    with cli.open_workdir(workdir, own=citation.FILE, skip=SKIPPED) as work:
        journal.write_text(work.folder / citation.PAGE, page.render(content))
        journal.write_json(work.folder / citation.FILE, content)
    return content


def verify(file: str, workdir: str) -> None:
    """Print whether the numbers of a citation follow from its records; raise where one does not."""
    folder, _, name = file.rpartition("/")
    with storage.opened(workdir or folder or ".", mode="read") as work:
        path = Path(file) if workdir or not file.startswith("gs://") else work.folder / name
        cited, problems = citation.check(path, work.folder)
    for line in problems:
        log.info(line)
    if problems:
        raise CitationError(
            f"{file}: {len(problems)} statements do not follow from the records of "
            f"{workdir or folder or '.'}; the first: {problems[0]}"
        )
    if changed := citation.code_changes(cited):
        log.info(f"scored by other code of {', '.join(changed)}, with equal results")
    cells = [cell for cell in cited["cells"] if cell.get("released")]
    log.info(f"{file}: all {len(cited['cells'])} numbers follow, {len(cells)} of them with a score")


def as_text(content: Mapping[str, Any], workdir: str) -> str:
    """Return the table for a terminal."""
    rows = [
        {
            "task": cell["task"],
            "published": cell["published"],
            "here": (score := cell["released"] or {}).get("value"),
            "low": score.get("low"),
            "high": score.get("high"),
            "n": score.get("n"),
            "status": cell["status"],
            "reason": cell["reason"],
        }
        for cell in content["cells"]
    ]
    lines = [evaluation_page.markdown(rows)]
    lines += [f"{workdir.rstrip('/')}/{name}" for name in (citation.PAGE, citation.FILE)]
    return "\n".join(lines)


if __name__ == "__main__":
    flags.DEFINE_enum("paper", "medmax", list(published.PAPERS), "paper whose numbers are compared")
    flags.DEFINE_string(
        "published", published.MODEL, "model of the paper whose numbers are reproduced"
    )
    flags.DEFINE_string("model", "", "KIND:WHERE, as in eval.run; empty: config.model")
    flags.DEFINE_string("adapter", "", "adapter, or the workdir of its training; native, hf")
    flags.DEFINE_bool("merge", False, "merge the adapter into the weights when loading")
    flags.DEFINE_string("rows", "", "JSONL files or folders of items; empty: config.questions")
    flags.DEFINE_string("images", "", "folder of the images; empty: that of the first file")
    flags.DEFINE_string("tables", "", f"of {', '.join(published.TABLES)}; empty: all")
    flags.DEFINE_bool("strict", False, "also generate in strict mode")
    flags.DEFINE_bool("dry_run", False, "report the plan and its price, and stop")
    flags.DEFINE_string("verify", "", "check this reproduction.json against its records, and stop")
    cli.run(
        main,
        errors=(*generate.ERRORS, CitationError),
        defaults={"config": "configs/eval_paper.py"},
        instead="verify",
    )
