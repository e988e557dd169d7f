"""The cards as a Markdown table, or the numbers of others: python -m eval.suite [published]."""

import sys
from collections.abc import Sequence

from eval.cards import CARDS, Card


def table() -> str:
    """The suite as Markdown."""
    head = ["task", "what", "family", "source", "split", "rows", "licence", "class", "metric"]
    rows = [
        (
            *(c.task, c.title, c.family, c.source, c.split),
            f"{c.counts:,}" if c.counts is not None else f"not published{_told(c)}",
            *(c.licence, c.data_class, c.metric),
        )
        for c in CARDS.values()
    ]
    return _markdown(head, rows)


def published_table() -> str:
    """The numbers of others as Markdown."""
    rows = [
        (c.task, p.metric, p.model, f"{p.value:g}", p.read)
        for c in CARDS.values()
        for p in c.published
    ]
    return _markdown(["task", "their metric", "model", "value", "read in"], rows)


def _told(card: Card) -> str:
    return f" ({card.counted})" if card.counted else ""


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["published"]):
        sys.exit("usage: python -m eval.suite [published]")
    print(published_table() if sys.argv[1:] else table(), end="")
