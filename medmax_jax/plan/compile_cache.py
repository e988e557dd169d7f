"""Cache the compiler's answers in a folder: each program is compiled once, and work can resume.

    D/3f9c0a...json   {"case": settings and machine, "fits": ..., "peak_hbm_gib": ..., ...}

An answer's name is a digest of the program's own text, the machine, the compile options and the
versions that compile. So a config that differs in nothing that is compiled finds the answer, and
after a change of the step no old answer is found.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
from typing import Any

from medmax_jax.config import Run
from medmax_jax.io.text_files import TextFileError, read_json_object
from medmax_jax.plan import compile as plan_compile
from medmax_jax.plan.topology import Topology

PACKAGES = ("jax", "jaxlib", "libtpu")


def versions() -> dict[str, str]:
    """Return the versions that affect compilation; libtpu is needed only here."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def digest(program: plan_compile.Program, topology: Topology) -> str:
    """Return the name of an answer."""
    machine = f"{topology.slices} x {topology.name}"
    facts = [plan_compile.FORMAT, versions(), program.facts]
    parts = [program.text, machine, json.dumps(facts)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def find_cached(
    folder: pathlib.Path, program: plan_compile.Program, topology: Topology
) -> dict[str, Any] | None:
    """Return the cached answer, or None."""
    return _read_cached(folder / f"{digest(program, topology)}.json")


def compile_cached(
    folder: pathlib.Path, program: plan_compile.Program, run: Run, topology: Topology
) -> dict[str, Any]:
    """Return the answer from the folder, or compile and store it there."""
    answer = find_cached(folder, program, topology)
    if answer is not None:
        return answer
    answer = plan_compile.compile_(program, topology) | {"versions": versions()}
    answer["case"] = case_summary(run, topology)
    path = folder / f"{digest(program, topology)}.json"
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(answer, indent=1) + "\n")
    os.replace(part, path)  # atomic
    return answer


def case_summary(run: Run, topology: Topology) -> dict[str, Any]:
    """Describe the case of an answer for readers; its name identifies it exactly."""
    return {
        "topology": topology.name, "slices": topology.slices, "compile": run.train.compile,
        "mesh": list(axes(run)), "batch_size": run.data.batch_size, "seq_len": run.data.seq_len,
        "remat": run.model.remat, "accumulate": run.optim.accumulate,
        "attention": run.model.attention, "quant": run.model.quant,
        "trains": run.train.trains, "layers": run.model.num_layers,
        "hidden_size": run.model.hidden_size,
    }  # fmt: skip


def cached_cases(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Return the cases of the cached answers, whether of this step or of an older one."""
    answers = [_read_cached(path) or {} for path in sorted(folder.glob("*.json"))]
    return [answer["case"] for answer in answers if isinstance(answer.get("case"), dict)]


def _read_cached(path: pathlib.Path) -> dict[str, Any] | None:
    """Return the content of a cached file; None if missing or corrupt: it is computed again."""
    try:
        return read_json_object(path)
    except TextFileError:
        return None


def axes(run: Run) -> tuple[int, int, int]:
    """Return (data, fsdp, tp)."""
    return run.mesh.data, run.mesh.fsdp, run.mesh.tp
