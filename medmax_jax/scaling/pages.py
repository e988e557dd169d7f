"""page.html of a fit: every figure, number, check and answer, in one file that stands alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax import page
from medmax_jax.scaling import allocate, checklist, plots
from medmax_jax.scaling.bootstrap import LEVEL
from medmax_jax.scaling.study import Study


def write(studies: Sequence[Study], said: Mapping[str, str], folder: Path, title: str) -> Path:
    """The page of one study or several, and each figure as a file of its own."""
    body = ""
    for study in studies:
        prefix = f"{study.table.target}_" if len(studies) > 1 else ""
        pictures = plots.all_of(study)
        for name, (png, _) in pictures.items():
            (folder / f"{prefix}{name}").write_bytes(png)
        body += _sections(study, pictures, said)
    return written(folder, title, body)


def written(folder: Path, title: str, body: str) -> Path:
    """The file."""
    path = folder / "page.html"
    path.write_text(page.document(title, body), encoding="utf-8")
    return path


def parameters(
    found: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float] | None],
    held: Sequence[str],
) -> str:
    """The table of parameters."""
    rows = [
        [
            name,
            f"{value:.5g}",
            checklist.ends(intervals[name]),
            "held" if name in held else "fitted" if intervals[name] else "at a bound",
        ]
        for name, value in found.items()
    ]
    return page.table(["parameter", "value", f"{LEVEL:.0%} interval", ""], rows)


def _sections(study: Study, pictures: dict, said: Mapping[str, str]) -> str:
    name = study.table.target.replace("_", " ")
    lead = f"{name} = {study.law.formula}, after {study.law.paper}; {len(study.table)} rows."
    parts = [
        page.section(
            f"{name}: the law",
            page.paragraph(lead) + page.figure(*pictures["law.png"])
            + parameters(study.found.values, study.intervals, list(study.options.fixed)),
        ),
        page.section(f"{name}: what speaks against it", _doubts(study, pictures)),
    ]  # fmt: skip
    if study.allocation:
        parts.append(page.section(f"{name}: where compute goes", _allocation(study, pictures)))
    rows = [[q, a] for q, a in checklist.checklist(study, said).items()]
    note = page.paragraph("The questions of arXiv 2502.18969.", note=True)
    parts.append(page.section(f"{name}: checklist", note + page.table(["", ""], rows)))
    return "".join(parts)


def _doubts(study: Study, pictures: dict) -> str:
    rows: list[list[Any]] = [["condition number", f"{study.condition:.3g}"]]
    rows.append(["run that moves the fit most", study.influential])
    rows += [line.split(": ", 1) for line in checklist.held_lines(study)]
    warned = "".join(page.paragraph(f"Warning: {w}.") for w in study.warnings)
    return (
        (warned or page.paragraph("No warning."))
        + page.figure(*pictures["residuals.png"])
        + page.table(["check", "result"], rows)
        + page.figure(*pictures["bootstrap.png"])
    )


def _allocation(study: Study, pictures: dict) -> str:
    columns = ("params", "tokens", "tokens_per_param", "loss")
    rows = [
        [f"{row['compute']:.3g}"]
        + [f"{row[c]:.3g}\n{checklist.ends(row[f'{c}_interval'])}" for c in columns]
        for row in study.allocation
    ]
    at = allocate.exponent(study.found.values)
    words = (
        f"With compute = {study.options.flops:g} N D, the size of least loss grows as compute to "
        f"the power {at:.3f}. Beyond the largest run this is an extrapolation."
    )
    return (
        page.paragraph(words)
        + page.figure(*pictures["allocation.png"])
        + page.table(["compute", "parameters", "tokens", "tokens a parameter", "loss"], rows)
    )
