"""Compares the arms of imax.py: intervals over groups and seeds, a fit by entries, tables, charts.

    cells      [seeds, groups]: means over the documents of a group (a patient, volume or slide)
    NLL        of a family's reference answers, nats per token; `all`: mean over the families
    accuracy   of a family's items as eval.run asks them; `all`: both families together
    contrast   after - before, paired by seed, document or item; its interval is over seeds and
               groups together (guidance_results.crossed_interval)
    slope      of NLL on log2(entries per image), by least squares in each seed and group: the
               change when entries double, at equal tokens. It may have either sign; the laws of
               medmax_jax.scaling cannot rise, and have as many parameters as there are points

`python benchmarks/imax_results.py --results R.json [--page P.md]` prints the tables of a result, or
writes them to a page in place of its tables with the same columns.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from guidance_results import crossed_interval

from medmax_jax import arguments
from medmax_jax.io import charts

ENTRIES = (1, 2, 4, 8)
# (before, after); the first is the question that was stated before any run
CONTRASTS = (
    ("dmax", "imax"),
    ("dmax", "imax_shuffled"),
    ("imax_shuffled", "imax"),
    ("plain", "dmax"),
    ("dmax", "windows"),
    ("dmax", "pseudo"),
    ("windows", "pseudo"),
    ("imax", "pseudo"),
)
STATISTICS = ("spectral_entropy", "leading_share")
Cells = Mapping[str, Any]  # name (of a family, or "all") -> [seeds, groups]


def family_of(task: str, answer: str) -> str:
    """Return the family of a document: its task, and for VQA the kind of the answer.

    ("VQA", "yes") -> "VQA closed"    ("VQA", "B") -> "VQA multiple choice"
    """
    if task != "VQA":
        return task
    word = answer.strip().rstrip(".").lower()
    if word in ("yes", "no"):
        return "VQA closed"
    return "VQA multiple choice" if len(word) == 1 and word.isalpha() else "VQA open"


def cells(values: Sequence[Mapping[str, float]], keys: Mapping[str, tuple[str, str]]) -> Cells:
    """Return the means of each family by seed and group, and of all families.

    values: of each seed, by document. keys: (family, group) of each document. A group that a family
    lacks has no column there; in `all` a group's value is the mean of its families.
    """
    families = sorted({family for family, _ in keys.values()})
    groups = sorted({group for _, group in keys.values()})
    table = np.full((len(families), len(values), len(groups)), np.nan)
    for row, family in enumerate(families):
        for column, group in enumerate(groups):
            own = [name for name, key in keys.items() if key == (family, group)]
            for seed, of_seed in enumerate(values):
                if own:
                    table[row, seed, column] = np.mean([of_seed[name] for name in own])
    complete = {
        family: part[:, ~np.isnan(part[0])] for family, part in zip(families, table, strict=True)
    }
    named = {"all": np.nanmean(table, axis=0)} | complete
    return {name: np.round(part, 5).tolist() for name, part in named.items()}


def contrasts(arms: Mapping[str, Cells], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each contrast of which both arms exist, and each name."""
    rows = []
    for before, after in CONTRASTS:
        if before in arms and after in arms:
            for name in names:
                old, new = (np.asarray(arms[arm][name]) for arm in (before, after))
                rows.append(
                    dict(contrast=f"{after} - {before}", name=name, before=float(old.mean()))
                    | dict(after=float(new.mean()), groups=old.shape[1])
                    | _shifted(crossed_interval(new - old), "diff")
                )
    return rows


def slopes(arms: Mapping[str, Cells], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return, by name, the means by entries and the slope with its interval; [] without arms."""
    found = [f"entries_{n}" for n in ENTRIES]
    if not all(arm in arms for arm in found):
        return []
    x = np.log2(ENTRIES)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    rows = []
    for name in names:
        by_entries = np.stack([np.asarray(arms[arm][name]) for arm in found])  # [4, seeds, groups]
        slope = np.tensordot(weights, by_entries, axes=1)
        means = [float(part.mean()) for part in by_entries]
        rows.append(dict(name=name, means=means) | _shifted(crossed_interval(slope), "slope"))
    return rows


def spectra(arms: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> list[dict[str, Any]]:
    """Return the difference of each statistic at each point of training, over seeds.

    arms: [seeds][points] of {spectral_entropy, leading_share}.
    """
    rows = []
    for before, after in CONTRASTS:
        if before not in arms or after not in arms:
            continue
        for statistic in STATISTICS:
            old, new = (
                np.array([[point[statistic] for point in seed] for seed in arms[arm]])
                for arm in (before, after)
            )
            rows += [
                dict(contrast=f"{after} - {before}", name=statistic, point=point + 1)
                | dict(before=float(old[:, point].mean()), after=float(new[:, point].mean()))
                | _shifted(crossed_interval(new[:, point] - old[:, point]), "diff")
                for point in range(old.shape[1])
            ]
    return rows


def summary(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return all comparisons of arms {nll, accuracy, probe, batch}, and how many there are."""
    nll = {name: arm["nll"] for name, arm in arms.items()}
    accuracy = {name: arm["accuracy"] for name, arm in arms.items()}
    found = dict(
        nll=contrasts(nll, list(next(iter(nll.values())))),
        accuracy=contrasts(accuracy, list(next(iter(accuracy.values())))),
        slopes=slopes(nll, list(next(iter(nll.values())))),
        accuracy_slopes=[row | dict(name="accuracy") for row in slopes(accuracy, ["all"])],
        probe=spectra({name: arm["probe"] for name, arm in arms.items()}),
        batch=spectra({name: arm["batch"] for name, arm in arms.items()}),
    )
    rows = [row for part in found.values() for row in part if row["ci_low"] is not None]
    excluding = sum(not row["ci_low"] <= 0 <= row["ci_high"] for row in rows)
    return found | dict(intervals=len(rows), excluding_zero=excluding)


def _shifted(interval: Mapping[str, float | None], name: str) -> dict[str, Any]:
    return {name: interval["value"], "ci_low": interval["ci_low"], "ci_high": interval["ci_high"]}


# ---- tables and charts ----


def cell(row: Mapping[str, Any], name: str, digits: int = 3) -> str:
    """Return a number with its interval: "-0.012 [-0.040, 0.016]"."""
    value = f"{row[name]:.{digits}f}"
    if row["ci_low"] is None:
        return value
    return f"{value} [{row['ci_low']:.{digits}f}, {row['ci_high']:.{digits}f}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [f"| {' | '.join(line)} |" for line in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables of the page by name; empty without the arms of one."""
    parts, arms = found["summary"], found["arms"]
    pairs = list(dict.fromkeys(row["contrast"] for row in parts["nll"]))
    by = {(n, row["contrast"], row["name"]): row for n in ("nll", "accuracy") for row in parts[n]}
    families = list(dict.fromkeys(row["name"] for row in parts["nll"]))
    last = max((row["point"] for row in parts["probe"]), default=0)
    ends = {(n, row["contrast"], row["name"]): row for n in ("probe", "batch")
            for row in parts[n] if row["point"] == last}  # fmt: skip
    minutes = sum(sum(run["seconds"]) for arm in arms.values() for run in arm["runs"]) / 60
    return dict(
        facts=table(
            ("seeds", "held-out documents", "their groups", "items asked", "minutes of all runs"),
            [[str(found[name]) for name in ("seeds", "held_out", "groups", "items")]
             + [f"{minutes:.0f}"]],
        ),
        intervals=table(
            ("intervals", "of these exclude 0"),
            [[str(parts[name]) for name in ("intervals", "excluding_zero")]],
        ),
        records=table(
            ("arm", "images", "documents per image", "tasks per image"),
            [[name, *_trained(arm["runs"])[:3]] for name, arm in arms.items()],
        ),
        arms=table(
            ("arm", "steps", "scored tokens", "NLL", "accuracy"),
            [[name, *_trained(arm["runs"])[3:], *(f"{np.mean(arm[measure]['all']):.3f}"
              for measure in ("nll", "accuracy"))] for name, arm in arms.items()],
        ),
        contrasts=table(
            ("difference", "NLL, all families", "accuracy"),
            [[pair, *(cell(by[measure, pair, "all"], "diff") for measure in ("nll", "accuracy"))]
             for pair in pairs],
        ),
        families=table(
            ("NLL by family", *SHOWN),
            [[name, *(cell(by["nll", pair, name], "diff") if pair in pairs else ""
              for pair in SHOWN)] for name in families],
        ),
        entries=table(
            ("NLL by family", f"with {', '.join(map(str, ENTRIES))} entries", "slope"),
            [[row["name"], ", ".join(f"{mean:.3f}" for mean in row["means"]), cell(row, "slope")]
             for row in (*parts["slopes"], *parts["accuracy_slopes"])],
        ) if parts["slopes"] else "",
        statistics=table(
            ("difference", "SE, probe", "rho, probe", "SE, own steps", "rho, own steps"),
            [[pair, *(cell(ends[part, pair, name], "diff")
              for part in ("probe", "batch") for name in STATISTICS)] for pair in pairs],
        ),
    )  # fmt: skip


def _trained(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cells of what the runs of an arm trained on; ranges over seeds."""
    cells = []
    for name, form in (("images", "{}"), ("entries", "{:.2f}"), ("tasks", "{:.2f}"),
                       ("steps", "{}"), ("scored", "{:,}")):  # fmt: skip
        ends = dict.fromkeys(form.format(end(run[name] for run in runs)) for end in (min, max))
        cells.append(" to ".join(ends))
    return cells


SHOWN = ("imax - dmax", "pseudo - dmax")  # contrasts whose families are in a table


@charts.page_style()
def chart(found: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draw NLL by entries per image, and both statistics along training, and save them."""
    arms = found["arms"]
    by_entries = bool(found["summary"]["slopes"])
    figure, axes = charts.subplots(1, 2 + by_entries, size=(9.6, 3.3), squeeze=False)
    others = axes[0][by_entries:]
    if by_entries:
        first = axes[0][0]
        lines = zip(
            *(np.mean(arms[f"entries_{n}"]["nll"]["all"], axis=1) for n in ENTRIES), strict=True
        )
        for values in lines:  # in one color: those of the other charts are arms
            first.plot(ENTRIES, values, "o-", markersize=3.5, color=charts.SERIES[5])
        first.set_xscale("log", base=2)
        first.set_xticks(ENTRIES, [str(n) for n in ENTRIES])
        first.set(title="NLL by entries per image", xlabel="entries; a line per seed")
        first.grid(axis="y")
    names = [name for name in arms if not name.startswith("entries_") and name != "plain"]
    for panel, statistic, title in zip(
        others, STATISTICS, ("SE, probe", "rho, probe"), strict=True
    ):
        for number, name in enumerate(names):
            values = np.array(
                [[point[statistic] for point in seed] for seed in arms[name]["probe"]]
            )
            panel.plot(
                np.arange(1, values.shape[1] + 1) / values.shape[1], values.mean(0), "o-",
                markersize=3.5, color=charts.SERIES[number % len(charts.SERIES)], label=name,
            )  # fmt: skip
        panel.set(title=title, xlabel="share of training")
        panel.grid(axis="y")
    charts.legend(figure, others[0])
    charts.save(figure, path)


def with_tables(page: str, found: Mapping[str, Any]) -> str:
    """Return a page with the tables of a result in place of those with the same head."""
    lines = page.splitlines()
    for text in filter(None, tables(found).values()):
        new = text.splitlines()
        start = lines.index(new[0])
        end = next(
            (n for n in range(start, len(lines)) if not lines[n].startswith("|")), len(lines)
        )
        lines[start:end] = new
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the tables, or write them to a page."""
    parser = arguments.Parser(prog="benchmarks/imax_results.py", description=__doc__,
                              formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--results", type=pathlib.Path, required=True, help="a results.json")
    parser.add_argument("--page", type=pathlib.Path, help="page whose tables are replaced")
    args = parser.parse_args()
    result = json.loads(args.results.read_text())
    if args.page:
        args.page.write_text(with_tables(args.page.read_text(), result))
    else:
        for title, text in tables(result).items():
            print(f"{title}\n\n{text}\n")


if __name__ == "__main__":
    main()
