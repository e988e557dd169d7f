"""python -m medmax_jax.plan.table --cache=runs/plan --minutes=60 --out=docs/reference/plan_7b.md

Write the tables of docs/reference/plan_7b.md: models x machines x lengths, each with its best mesh,
batch and remat. The program compiles the settings that arithmetic ranks first, cell by cell, one
program at a time, within the given time; cells not reached show "arithmetic". The same command
resumes where it stopped.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from medmax_jax import arguments, config
from medmax_jax.config import Run
from medmax_jax.configs import chameleon_30b_lora, medmax_7b_full, medmax_7b_lora, medmax_7b_qlora
from medmax_jax.plan import analytic, compile_cache, search
from medmax_jax.plan import compile as plan_compile
from medmax_jax.plan.topology import Topology, parse, use_no_device

MODELS = {
    "7B LoRA": medmax_7b_lora,
    "7B QLoRA (nf4)": medmax_7b_qlora,
    "7B full": medmax_7b_full,
    "30B LoRA": chameleon_30b_lora,
}
MACHINES = (
    ("v5e:2x2", 1), ("v5e:1x1", 1), ("v6e:1x1", 1), ("v5e:4x4", 1), ("v5p:2x2x1", 1),
    ("v6e:2x2", 1), ("v4:2x2x1", 1), ("v5e:4x4", 2), ("v6e:4x4", 1), ("v5p:4x4x4", 1),
    ("A100-80:1", 1), ("H100:1", 1), ("L40S:1", 1),
)  # fmt: skip
LENGTHS = (2_048, 4_096)
FIRST = (  # what is compiled first, at the first length
    ("7B QLoRA (nf4)", "v5e:1x1"), ("7B LoRA", "v5e:2x2"), ("7B LoRA", "v5e:4x4"),
    ("30B LoRA", "v5p:4x4x4"), ("7B full", "v5e:4x4"), ("7B LoRA", "v6e:1x1"),
    ("7B LoRA", "v5p:2x2x1"),
)  # fmt: skip
UTILISATION = 0.6
NO_ESTIMATE_S = 2**62 / 1e10  # longer than any clock rate allows
MARKS = ("<!-- made by medmax_jax.plan.table -->\n", "<!-- end -->\n")


@dataclasses.dataclass
class TableCell:
    """One row of the table: candidate settings, and the compiler's answers for some of them."""

    model: str
    topology: Topology
    length: int
    order: list[Run]
    answers: dict[int, dict[str, Any]]  # index in `order` -> answer

    def best(self) -> tuple[Run, dict[str, Any]] | None:
        """Return the fastest compiled setting that fits; else the best-ranked one not refuted."""
        fitting = [
            (_rates(self.order[i], self.topology, answer)["tokens_per_s_per_chip"], i)
            for i, answer in self.answers.items()
            if answer["fits"]
        ]
        if fitting:
            index = max(fitting)[1]
            return self.order[index], self.answers[index]
        untested = [run for i, run in enumerate(self.order) if i not in self.answers]
        return (untested[0], analytic.estimate(untested[0], self.topology)) if untested else None


def main() -> None:
    """Compile while there is time, then write the table."""
    parser = arguments.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--cache", type=pathlib.Path, required=True, help="folder of cached compiler answers"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        required=True,
        help="time for compiling; 0: use cached answers only",
    )
    parser.add_argument("--most", type=int, default=2, help="settings compiled per cell")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        required=True,
        help="Markdown file that contains the two marker lines",
    )
    args = parser.parse_args()
    text = args.out.read_text()
    if not all(mark in text for mark in MARKS):
        sys.exit(f"error: {args.out} lacks the lines {' and '.join(map(repr, MARKS))}")
    use_no_device()
    args.cache.mkdir(parents=True, exist_ok=True)
    end, cells = time.monotonic() + 60 * args.minutes, list(make_cells())
    collect(cells, args.cache)
    for number in range(args.most):
        for cell in sorted(cells, key=_turn):
            if time.monotonic() < end:
                compile_next(cell, number, args.cache)
    before, _, rest = text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    args.out.write_text(before + MARKS[0] + render(cells) + MARKS[1] + after)


def _turn(cell: TableCell) -> int:
    """Return its position in the queue; sorting keeps the order of the others."""
    name = (cell.model, cell.topology.name)
    first = name in FIRST and cell.length == LENGTHS[0] and cell.topology.slices == 1
    return FIRST.index(name) if first else len(FIRST)


def make_cells() -> Iterator[TableCell]:
    """Yield the cells, shorter rows first, since the recipe was published with them."""
    for length in LENGTHS:
        for name, slices in MACHINES:
            topology = parse(name, slices=slices)
            for model, file in MODELS.items():
                settings = file.get_config()
                tokens = settings.train.steps * settings.data.batch_size * settings.data.seq_len
                attention = "splash" if topology.is_tpu else "cudnn"
                settings.model.update(attention=attention)
                settings.train.compile = "gather" if topology.is_tpu else "default"
                settings.mesh.update(data=1, fsdp=1, tp=1)
                settings.optim.accumulate = 1  # the search varies rows; a run may have more of them
                settings.data.update(seq_len=length)
                settings.train.steps = round(tokens / length / settings.data.batch_size)
                run = config.from_config_dict(settings)
                order = search.rank_candidates(
                    search.candidates(run, topology), topology, utilisation=UTILISATION
                )
                yield TableCell(model, topology, length, order, {})


def collect(cells: list[TableCell], cache: pathlib.Path) -> None:
    """Find the cached answers, of exactly this step."""
    cases = compile_cache.cached_cases(cache)
    for cell in cells:
        for index, run in enumerate(cell.order):
            if compile_cache.case_summary(run, cell.topology) in cases:
                program = plan_compile.train(run, cell.topology)
                answer = compile_cache.find_cached(cache, program, cell.topology)
                if answer is not None:
                    cell.answers[index] = answer


def compile_next(cell: TableCell, number: int, cache: pathlib.Path) -> None:
    """Compile the cell's first setting not yet compiled, unless `number` of them are already."""
    uncompiled = [i for i in range(len(cell.order)) if i not in cell.answers]
    if not cell.topology.is_tpu or len(cell.answers) > number or not uncompiled:
        return
    run, index = cell.order[uncompiled[0]], uncompiled[0]
    program = plan_compile.train(run, cell.topology)
    answer = compile_cache.compile_cached(cache, program, run, cell.topology)
    cell.answers[index] = answer
    print(
        f"{time.strftime('%H:%M:%S')} {cell.model}, {cell.topology.slices} x {cell.topology.name}, "
        f"{cell.length}, {compile_cache.axes(run)}, {run.data.batch_size} rows, {run.model.remat}: "
        f"{answer['peak_hbm_gib']} GiB, fits {answer['fits']}, {answer['compile_s']} s",
        flush=True,
    )


def render(cells: list[TableCell]) -> str:
    """Return the tables of each model and length, and the error of the arithmetic."""
    lines = []
    for model in MODELS:
        for length in LENGTHS:
            rows = [_row(c) for c in cells if c.model == model and c.length == length]
            lines += ["", f"### {model}, {length:,} tokens per row", ""]
            lines += [
                "| machine | tokens/s/chip | MFU | hours | chip-hours |",
                "|---|---|---|---|---|",
            ]
            lines += [f"| {row[0]} | {row[1]} |" for row in rows]
            lines += [
                "",
                "| machine | data, fsdp, tp | rows per chip, remat | GiB per chip, of | from |",
            ]
            lines += ["|---|---|---|---|---|", *(f"| {row[0]} | {row[2]} |" for row in rows)]
    lines += ["", "### The compiler and arithmetic", "", *_errors(cells), ""]
    return "\n".join(lines) + "\n"


def _row(cell: TableCell) -> tuple[str, str, str]:
    """Return the machine, its columns of speed, and its columns of settings."""
    machine = cell.topology.name + (
        f" x {cell.topology.slices}" if cell.topology.slices > 1 else ""
    )
    best = cell.best()
    if best is None:
        source_of_no = "the compiler" if cell.answers else "arithmetic"
        return machine, "does not fit | | |", f"does not fit | | | {source_of_no}"
    run, answer = best
    rate = _rates(run, cell.topology, answer)
    axes = ", ".join(map(str, compile_cache.axes(run)))
    source = "compiler" if answer["how"] == "compiled" else "arithmetic"
    return (
        machine,
        f"{rate['tokens_per_s_per_chip']:,.0f} | {rate['mfu']:.0%} | {rate['hours']:,.0f} | "
        f"{rate['chip_hours']:,.0f}",
        f"{axes} | {analytic.rows_per_device(run)}, {run.model.remat} | "
        f"{answer['peak_hbm_gib']:.1f}, {answer['hbm_gib']:.1f} | {source}",
    )


def _errors(cells: list[TableCell]) -> list[str]:
    """Compare arithmetic with the compiler, for every setting that was compiled."""
    memory = ["| compiled | GiB, compiler | arithmetic | GiB sent, compiler | arithmetic |"]
    memory.append("|---|---|---|---|---|")
    times = ["| compiled | step s, bound | scheduled |", "|---|---|---|"]
    ratios = []
    for cell in cells:
        for index, answer in sorted(cell.answers.items()):
            run = cell.order[index]
            estimate = analytic.estimate(run, cell.topology)
            name = (
                f"{cell.model}, {cell.topology.slices} x {cell.topology.name}, {cell.length:,}, "
                f"{compile_cache.axes(run)}, {analytic.rows_per_device(run)} rows, "
                f"{run.model.remat}"
            )
            if answer["peak_hbm_gib"] and not _no_vmem(answer):
                ratios.append(estimate["peak_hbm_gib"] / answer["peak_hbm_gib"])
            gathered = [_gathered(result) for result in (answer, estimate)]
            memory.append(
                f"| {name} | {_memory(answer)} | "
                f"{estimate['peak_hbm_gib']} | {gathered[0]} | {gathered[1]} |"
            )
            bound = _rates(run, cell.topology, answer)["step_s"]
            times.append(f"| {name} | {bound:.2f} | {_scheduled(answer)} |")
    if not ratios:
        return ["No setting has been compiled."]
    return [
        f"Arithmetic over compiler, memory: {min(ratios):.2f} to {max(ratios):.2f} in "
        f"{len(ratios)} settings.",
        "",
        *memory,
        "",
        *times,
    ]


def _memory(answer: dict[str, Any]) -> str:
    if _no_vmem(answer):
        return "vmem (no)"
    return f"{answer['peak_hbm_gib']}{'' if answer['fits'] else ' (no)'}"


def _no_vmem(answer: dict[str, Any]) -> bool:
    """Return whether a kernel exceeded the core's own memory, however much HBM was free."""
    return not answer["fits"] and "memory space vmem" in answer.get("error", "")


def _scheduled(answer: dict[str, Any]) -> str:
    """Format cycles: for an operation that it cannot estimate the compiler returns 2**63 - 1."""
    seconds = answer.get("scheduled_s")
    return "-" if seconds is None or seconds > NO_ESTIMATE_S else str(seconds)


def _gathered(answer: dict[str, Any]) -> float | str:
    if answer["collectives"] is None:
        return "-"
    return round(sum(row["bytes"] for row in answer["collectives"]) / 2**30, 1)


def _rates(run: Run, topology: Topology, answer: dict[str, Any]) -> dict[str, Any]:
    return analytic.rates(run, topology, answer, utilisation=UTILISATION, price=None)


if __name__ == "__main__":
    main()
