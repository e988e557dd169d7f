"""The quickstart's page: what ran, curves, scores before and after, cases one can look at.

report.json --+
cases --------+--> report.html    one file, no script, every text escaped (page.py)
curves.png ---+
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to draw into a file
import matplotlib.pyplot as plt
import PIL.Image

from eval import report_tables
from medmax_jax import page

NOTICE = (
    "This is a toy-sized research model, trained in minutes on a few hundred embedded pictures. "
    "It shows that the road works from end to end. It is not for clinical use."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One held-out picture with a question and what the two models said."""

    name: str
    image: PIL.Image.Image
    reconstruction: PIL.Image.Image  # after the VQGAN and back
    question: str
    answer: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """Pictures that the two models made from the same words."""

    prompt: str
    before: PIL.Image.Image
    after: PIL.Image.Image


def build(
    report: dict[str, Any], cases: Sequence[Case], generated: Sequence[Generated], curves: bytes
) -> str:
    """The whole page as HTML."""
    body = page.paragraph(NOTICE) + page.paragraph(_summary(report), note=True)
    body += page.section("What ran", _stages(report))
    body += page.section("Scores on held-out groups", _scores(report))
    body += page.section("Curves", page.figure(curves, "Training loss by kind of token, and rate"))
    body += page.section("Held-out cases", "".join(map(_case, cases)))
    body += page.section("Pictures from words", "".join(map(_generated, generated)))
    return page.document("MedMax in JAX: the quickstart", body)


def curves(train: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]) -> bytes:
    """PNG of the mean loss of text and of image tokens by step, and of tokens per second."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for kind, colour in (("text", "#0b6e69"), ("image", "#b4552d")):
        for rows, style, name in ((train, "-", "training"), (held, "o--", "validation")):
            points = [(r["step"], r[f"{kind}_nll"]) for r in rows if f"{kind}_nll" in r]
            if points:
                left.plot(*zip(*points, strict=True), style, color=colour, label=f"{kind}, {name}")
    left.set(xlabel="step", ylabel="nats per token", title="Loss")
    left.legend(frameon=False)
    rates = [(r["step"], r["tokens_per_second"]) for r in train if r.get("tokens_per_second")]
    if rates:
        right.plot(*zip(*rates, strict=True), color="#444")
    right.set(xlabel="step", ylabel="real tokens per second", title="Rate", ylim=(0, None))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()


def interval(row: Mapping[str, Any]) -> str:
    """ "+0.012 .. +0.340", marked where there are few groups; a dash for one group alone."""
    if row["ci_low"] is None:
        return page.NOTHING
    return report_tables.marked(row, f"{row['ci_low']:+.3f} .. {row['ci_high']:+.3f}")


def _summary(report: dict[str, Any]) -> str:
    ran = report["ran"]
    return (
        f"{ran['device']}, {ran['seconds'] / 60:.1f} minutes, peak memory {ran['peak_gib']:.1f} "
        f"GiB; jax {ran['jax']}, configuration {ran['config']}. Split by patient, volume or "
        f"slide: {ran['train_groups']} groups to learn from, {ran['test_groups']} held out."
    )


def _stages(report: dict[str, Any]) -> str:
    rows = [(s["stage"], s["what"], round(s["seconds"], 1)) for s in report["stages"]]
    return page.table(["stage", "what", "seconds"], rows)


def _scores(report: dict[str, Any]) -> str:
    head = ["task", "metric", "n", "groups", "before", "after", "difference", "95% interval"]
    rows = [
        (
            s["task"], s["metric"], s["n"], s["groups"], s["before"], s["after"], s["diff"],
            interval(s),
        )
        for s in report["scores"]
    ]  # fmt: skip
    against = [
        (c["against"], c["n"], c["groups"], c["theirs"], c["ours"], c["diff"], interval(c))
        for c in report["comparisons"]
    ]  # fmt: skip
    return (
        page.table(head, rows, caption="Before and after LoRA, the same items, the same settings")
        + page.table(
            [
                "the primary row against",
                "n",
                "groups",
                "theirs",
                "ours",
                "difference",
                "95% interval",
            ],
            against,
            caption="vqa_closed after LoRA against three baselines",
        )
        + page.paragraph(report["notes"], note=True)
    )


def _case(case: Case) -> str:
    pictures = page.figures(
        [
            (page.png(case.image), case.name),
            (page.png(case.reconstruction), "through the VQGAN and back"),
        ]
    )
    rows = [
        ("question", case.question), ("answer", case.answer),
        ("before LoRA", case.before), ("after LoRA", case.after),
    ]  # fmt: skip
    return pictures + page.table(["", ""], rows)


def _generated(made: Generated) -> str:
    return page.paragraph(made.prompt) + page.figures(
        [(page.png(made.before), "before LoRA"), (page.png(made.after), "after LoRA")]
    )
