"""Prints the task cards, or published scores, as Markdown: python -m eval.suite [published]."""

import sys
from collections.abc import Sequence

from medmax_jax.eval.tasks.catalog import AVERAGES, TASKS, TaskSpec


def table() -> str:
    """Return the suite as Markdown."""
    cards = list(TASKS.values())
    parts = (
        (
            ["task", "what", "family", "metric"],
            [(c.task, c.title, c.family, c.metric) for c in cards],
        ),
        (
            ["task", "source", "split", "rows asked", "rows read in"],
            [(c.task, c.source, c.split, _asked(c), c.counted or "-") for c in cards],
        ),
        (["task", "class", "licence"], [(c.task, c.data_class, c.licence) for c in cards]),
    )
    return "\n".join(_markdown(head, rows) for head, rows in parts)


def published_table() -> str:
    """Return the published scores of other models as Markdown."""
    rows = [
        (c.task, p.metric, p.model, f"{p.value:g}", p.read)
        for c in TASKS.values()
        for p in c.published
    ]
    rows += [("average", p.metric, p.model, f"{p.value:g}", p.read) for p in AVERAGES]
    return _markdown(["task", "their metric", "model", "value", "read in"], rows)


def _asked(card: TaskSpec) -> str:
    if card.counts is None:
        return "not published"
    if not card.left_out:
        return f"{card.counts:,}"
    return (
        f"{card.counts:,} of {card.counts + card.left_out:,}; {card.left_out} closed ones without "
        "a yes or no as answer are left out"
    )


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["published"]):
        sys.exit("usage: python -m eval.suite [published]")
    print(published_table() if sys.argv[1:] else table(), end="")
