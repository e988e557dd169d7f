"""Writes the page of gpu.py and tpu.py from their results.json."""

from collections.abc import Iterable
from typing import Any

from accelerator_parts import PARTS

from medmax_jax import flops
from medmax_jax.io import charts, html_page

DEFINITIONS = {
    "MFU_LoRA": "FLOPs that LoRA needs per token, without padding and recomputation, over the peak",
    "HFU": "the same with recomputation",
    "error of GiB": "plan / measured - 1",
    "error of step": "plan / measured - 1",
    "FLOPs per byte": "needed FLOPs over the least bytes that a step moves",
}


def page(results: dict[str, Any]) -> str:
    """Return the page: what was reached, of which limits, as predicted or not, and what failed."""
    machine, records = results["machine"], results["measurements"]
    chip = flops.chip(machine["kind"])
    measured = {n: r for n, r in records.items() if r["outcome"] == "measured"}
    body = html_page.provenance(_provenance(results))
    body += html_page.verdicts(_verdicts(results, measured, chip))
    body += html_page.section("Rates", _rates(measured))
    body += html_page.section("Roofline", _roofline(measured, chip, machine["kind"]))
    body += html_page.section("The plan and the measurements", _plan(records, chip))
    if results["comparison"]:
        body += html_page.section("Compared with HF and peft on one chip", _sides(results))
    rest = _rest(results)
    body += html_page.section("Not measured", rest) if rest else ""
    chips = f"{machine['chips']} x {machine['kind']}"
    title = "Smoke test of the accelerator benchmarks" if machine["smoke"] else "Chameleon-7B"
    return html_page.document(f"{title} on {chips}", body)


def _provenance(results: dict[str, Any]) -> dict[str, Any]:
    sides = [s for r in results["measurements"].values() for s in r.get("sides", {}).values()]
    versions = {name: v for side in sides for name, v in side["versions"].items()}
    facts = {"command": f"python benchmarks/{results['program']}", "weights": "random"}
    return facts | results["environment"] | versions


def _verdicts(
    results: dict[str, Any], measured: dict[str, Any], chip: flops.Chip | None
) -> Iterable[html_page.Verdict]:
    verdicts, kind = [], results["machine"]["kind"]
    if results["machine"]["smoke"]:
        text = "A tiny model on a CPU: the program runs, and no figure describes an accelerator."
        verdicts.append(html_page.Verdict("neutral", "Smoke test", text))
    best = max((r for r in measured.values() if "utilization" in r), key=_per_chip, default=None)
    if best and not results["machine"]["smoke"]:
        mfu = best["utilization"]["mfu_lora"]
        share = f", MFU_LoRA {mfu:.1%}" if mfu else ""
        text = f"{best['part']}: {_per_chip(best):,.0f} tokens/s per chip{share}."
        verdicts.append(html_page.Verdict("neutral", "Best LoRA step", text))
    if chip is None:
        text = f"unknown chip {kind!r}: medmax_jax/flops.py has no limits of it."
        verdicts.append(html_page.Verdict("neutral", "No roofline", text))
    counts = {}
    for record in results["measurements"].values():
        counts[record["outcome"]] = counts.get(record["outcome"], 0) + 1
    counts["not started"] = len(results["unfinished"])
    text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) + "."
    status = "bad" if counts.get("failed") else "good" if counts.get("measured") else "neutral"
    return [*verdicts, html_page.Verdict(status, "Measurements", text)]


def _per_chip(record: dict[str, Any]) -> float:
    return record["sides"]["ours"]["rate"] / record["chips"] if "ours" in record["sides"] else 0.0


def _rates(measured: dict[str, Any]) -> str:
    rows = []
    for name, record in measured.items():
        share = record.get("utilization", {})
        for side_name, side in record["sides"].items():
            ours = side_name == "ours"
            rows.append(
                [
                    name, side_name, _rate(side["rate"], record["unit"]), side["step_s"],
                    side["peak_gib"], _percent(share.get("mfu_lora")) if ours else None,
                    _percent(share.get("hfu")) if ours else None,
                ]
            )  # fmt: skip
    head = ["measurement", "side", "rate, all chips", "step, s", "peak, GiB", "MFU_LoRA", "HFU"]
    caption = (
        "Medians. A step of decode and image is a complete answer of every row, prompt included."
    )
    return html_page.table(head, rows, caption=caption, definitions=DEFINITIONS)


@charts.page_style()
def _roofline(measured: dict[str, Any], chip: flops.Chip | None, kind: str) -> str:
    points = {
        n: r["roofline"] | dict(part=r["part"]) for n, r in measured.items() if "roofline" in r
    }
    if not points:
        return html_page.paragraph("Nothing of ours was measured.")
    figure, axes = charts.subplots(size=(9.0, 4.6))
    for part, color in zip(PARTS, charts.SERIES, strict=False):
        for label, (number, point) in enumerate(
            (i, p) for i, p in enumerate(points.values()) if p["part"] == part
        ):
            axes.loglog(
                point["intensity"], point["flops_per_s"], "o", color=color, ms=7,
                label=None if label else part, gid=f"{charts.TOOLTIP}{number}",
            )  # fmt: skip
    if chip:
        ridge = chip.flops / chip.hbm_rate
        ends = [p["intensity"] for p in points.values()] + [ridge]
        low, high = min(ends) / 3, max(ends) * 3
        axes.loglog(
            [low, ridge, high], [low * chip.hbm_rate, chip.flops, chip.flops], color=charts.SOFT,
            label=f"limits of {chip.name}: {chip.flops / 1e12:,.0f} TFLOP/s in bf16, "
            f"{chip.hbm_rate / 1e12:,.2f} TB/s",
        )  # fmt: skip
    axes.set(xlabel="FLOPs per byte", ylabel="FLOP/s per chip")
    axes.grid(lw=0.6)
    charts.legend(figure, axes)
    tooltips = {f"{charts.TOOLTIP}{n}": name for n, name in enumerate(points)}
    limits = (
        f"the line is the limit of the {chip.name}" if chip else f"no roofline: unknown chip {kind}"
    )
    caption = (
        f"Needed FLOP/s per chip over FLOPs per byte; {limits}. Bytes are the least that a step "
        "moves, so a point is at most as far to the right as shown. vq computes in fp32, on TPUs "
        "by several bf16 products, and cannot reach the peak of bf16."
    )
    return html_page.chart(charts.svg(figure, tooltips=tooltips), caption)


def _plan(records: dict[str, Any], chip: flops.Chip | None) -> str:
    rows = []
    for name, record in records.items():
        if plan := record["plan"]:
            side = record.get("sides", {}).get("ours", {})
            error = record.get("plan_error", {})
            memory = side.get("peak_gib", record["outcome"])
            rows.append(
                [
                    name, plan["gib"], memory, _percent(error.get("gib")), plan.get("seconds"),
                    side.get("step_s"), _percent(error.get("seconds")),
                ]
            )  # fmt: skip
    head = [
        "measurement",
        "GiB, plan",
        "GiB, measured",
        "error of GiB",
        "step s, plan",
        "step s, measured",
        "error of step",
    ]
    usable = next((r["plan"]["usable_gib"] for r in records.values() if chip and r["plan"]), None)
    caption = "By arithmetic (medmax_jax.plan --analytic), products at 60 % of the peak"
    caption += f"; {usable} GiB of a chip are usable." if usable else "."
    return html_page.table(head, rows, caption=caption, definitions=DEFINITIONS)


def _sides(results: dict[str, Any]) -> str:
    rows = [
        [part, best["ours"], best["theirs"], best["ratio"],
         _agreement(best.get("agreement"))]
        for part, best in results["comparison"].items()
    ]  # fmt: skip
    head = ["part", "ours", "theirs", "ratio", "do they compute the same?"]
    return html_page.table(head, rows, caption="The best rate of each; above 1, ours is faster.")


def _agreement(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not measured"
    verdict = "yes" if found["ok"] else "no"
    return f"{verdict}: difference {found['difference']:.2g}, at most {found['within']:.2g}"


def _rest(results: dict[str, Any]) -> str:
    rows = [
        [name, record["outcome"], (record["plan"] or {}).get("gib"), record["message"]]
        for name, record in results["measurements"].items()
        if record["outcome"] != "measured"
    ]
    rows += [
        [name, "not started", None, "the same command resumes"] for name in results["unfinished"]
    ]
    rows += [[f"{part}: theirs", "skipped", None, why] for part, why in results["skipped"].items()]
    head = ["measurement", "outcome", "GiB, plan", "message"]
    return html_page.table(head, rows) if rows else ""


def _rate(rate: float, unit: str) -> str:
    return f"{rate:,.0f} {unit}" if rate >= 100 else f"{rate:.4g} {unit}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"
