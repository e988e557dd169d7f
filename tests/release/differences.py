"""Paper against strict on the same 5,600 raw outputs: `python tests/release/differences.py`."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # also when run as a program
sys.path.insert(0, str(Path(__file__).parents[2]))

import raw_outputs  # noqa: E402

from medmax_jax.eval.metrics import release, strict

HEAD = (
    "outputs", "n", "paper", "of", "strict", "strict best", "unread by strict", "paper too kind",
    "paper too harsh",
)  # fmt: skip


def table() -> str:
    """Markdown. Too kind: right for paper, wrong or unread for strict; too harsh: the reverse."""
    raw = raw_outputs.rows()
    rows = [
        _row("closed", raw["closed"], lambda r, a: release.closed(r, a), strict.closed),
        _row("mcq", raw["mcq"], release.choice, lambda r, a: strict.choice(r, a, "")),
        _row(
            "open",
            raw["open"],
            lambda r, _: release.parse_judgment(r),
            lambda r, _: strict.parse_correctness(r),
        ),
    ]
    return "\n".join(
        "".join(f"| {' | '.join(str(line[i]) for i in columns)} |\n" for line in lines)
        for columns in ((0, 1, 2, 3), (0, 4, 5, 6), (0, 7, 8))
        for lines in [[HEAD, ["---"] * len(HEAD), *rows]]
    )


def relative() -> dict[str, int]:
    """How many replies of a comparison each side can read: one unread stops all of the paper's."""
    found = {"n": 0, "paper": 0, "strict": 0, "only paper": 0, "only strict": 0}
    for _, reply in raw_outputs.rows()["relative"]:
        ours, theirs = strict.parse_score_pair(reply) is not None, _readable(reply)
        for name, holds in zip(
            found, (True, theirs, ours, theirs and not ours, ours and not theirs), strict=True
        ):
            found[name] += holds
    return found


def _readable(reply: str) -> bool:
    try:
        release.relative([reply])
    except release.PaperError:
        return False
    return True


def _row(kind: str, pairs: list, theirs: Callable, ours: Callable) -> list:
    paper_said = [theirs(raw, answer) for answer, raw in pairs]
    strict_said = [ours(raw, answer) for answer, raw in pairs]
    kept = [float(x) for x in paper_said if x is not None]
    total = strict.total(strict_said)
    both = list(zip(paper_said, (v.value == 1 for v in strict_said), strict=True))
    return [
        kind,
        len(pairs),
        f"{release.accuracy(kept)[0]:.3f}",
        len(kept),
        f"{total.value:.3f}",
        f"{total.best:.3f}",
        total.n_unparsed + total.n_unscored,
        sum(theirs is True and not right for theirs, right in both),
        sum(theirs is not True and right for theirs, right in both),
    ]


if __name__ == "__main__":
    print(table())
    print(f"comparisons that can be read: {relative()}")
