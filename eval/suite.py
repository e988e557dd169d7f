"""Prints the tasks, or published scores, as Markdown: python -m eval.suite [published]."""

import sys
from collections.abc import Sequence

from medmax_jax import arguments
from medmax_jax.eval.tasks.catalog import AVERAGES, CHAT_OVERALL, TASKS, TaskSpec


def table() -> str:
    """Return the suite as Markdown."""
    cards = list(TASKS.values())
    parts = (
        (
            ["task", "title", "family", "metric"],
            [(c.task, c.title, c.family, c.metric) for c in cards],
        ),
        (
            ["task", "source", "split", "rows", "rows counted in"],
            [(c.task, c.source, c.split, _row_count(c), c.counted or "-") for c in cards],
        ),
        (
            ["task", "class", "license", "scored as by", "also run by"],
            [
                (c.task, c.data_class, c.licence, c.own_scorer or "-", c.run_by or "-")
                for c in cards
            ],
        ),
    )
    return "\n".join(_markdown(head, rows) for head, rows in parts)


def published_table() -> str:
    """Return the published scores of other models as Markdown."""
    rows = [
        (c.task, p.metric, p.model, f"{p.value:g}", p.read)
        for c in TASKS.values()
        for p in c.published
    ]
    for name, means in (("average", AVERAGES), ("visual_chat, overall", CHAT_OVERALL)):
        rows += [(name, p.metric, p.model, f"{p.value:g}", p.read) for p in means]
    return _markdown(["task", "published metric", "model", "value", "source"], rows)


def _row_count(spec: TaskSpec) -> str:
    if spec.counts is None:
        return "not published"
    if not spec.left_out:
        return f"{spec.counts:,}"
    return (
        f"{spec.counts:,} of {spec.counts + spec.left_out:,}; {spec.left_out} closed questions "
        "without a yes or no answer are left out"
    )


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table that was requested."""
    parser = arguments.Parser(prog="python -m eval.suite", description=__doc__)
    parser.add_argument(
        "table", nargs="?", choices=("tasks", "published"), default="tasks",
        help="the tasks of the suite (default), or the published scores",
    )  # fmt: skip
    args = parser.parse_args(argv)
    print(published_table() if args.table == "published" else table(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
