"""Search the best mesh, batch and remat of a machine: arithmetic ranks, compiling decides."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from medmax_jax import config
from medmax_jax.config import ConfigError, Run
from medmax_jax.models.quantization import PACKED, TILE
from medmax_jax.plan import analytic
from medmax_jax.plan.topology import PlanError, Topology
from medmax_jax.training import stages

MARGIN = 0.95  # of a device's memory: settings estimated above it are not compiled
REMAT = ("dots", "qkv_attn", "attn", "all")
ROWS = (1, 2, 4, 8, 16)  # of a device
TP = (1, 2, 4, 8)


def candidates(run: Run, topology: Topology, *, rows: Sequence[int] = ROWS) -> Iterator[Run]:
    """Yield every setting of mesh, batch and remat that the model allows on the machine."""
    for tp in TP:
        for fsdp in (2**i for i in range(int(math.log2(topology.chips)) + 1)):
            data, rest = divmod(topology.chips, fsdp * tp)
            if rest or data < 1 or data % topology.slices:
                continue
            mesh = config.Mesh(data=data, fsdp=fsdp, tp=tp)
            for count in rows:
                for remat in REMAT:
                    yield from _valid(with_settings(run, mesh=mesh, rows=count, remat=remat))


def nearest_mesh(mesh: config.Mesh, runs: Iterator[Run]) -> config.Mesh | None:
    """Return the mesh of the runs that differs least from `mesh`, by the factors of its axes."""

    def distance(other: config.Mesh) -> tuple[float, int]:
        axes = zip(dataclasses.astuple(mesh), dataclasses.astuple(other), strict=True)
        # of equal ones the largest fsdp, which needs the least memory
        return round(sum(abs(math.log2(a / b)) for a, b in axes), 6), -other.fsdp

    meshes = dict.fromkeys(run.mesh for run in runs)
    return min(meshes, key=distance, default=None)


def with_settings(run: Run, *, mesh: config.Mesh, rows: int, remat: str) -> Run:
    """Return the run with these, `rows` of a microbatch per device; total tokens are unchanged."""
    size = rows * mesh.data * mesh.fsdp * run.optim.accumulate
    steps = max(1, round(run.train.steps * run.data.batch_size / size))
    return dataclasses.replace(
        stages.with_steps(run, steps),
        mesh=mesh,
        model=dataclasses.replace(run.model, remat=remat),
        data=dataclasses.replace(run.data, batch_size=size),
    )


def rank_candidates(runs: Iterator[Run], topology: Topology, *, utilisation: float) -> list[Run]:
    """Return the runs that may fit, fastest by arithmetic first; of equal ones the smaller."""
    scored = []
    for run in runs:
        estimate = analytic.estimate(run, topology)
        if estimate["peak_hbm_gib"] <= MARGIN * estimate["hbm_gib"]:
            rate = analytic.rates(run, topology, estimate, utilisation=utilisation, price=None)
            scored.append((-rate["tokens_per_s_per_chip"], estimate["peak_hbm_gib"], run))
    return [run for *_, run in sorted(scored, key=lambda entry: entry[:2])]


def best_fitting(
    order: Sequence[Run],
    topology: Topology,
    answer: Callable[[Run], dict[str, Any]],
    *,
    utilisation: float,
    most: int,
) -> tuple[Run, dict[str, Any]]:
    """Return the fastest of the first `most` that fit, else the first of the others that does."""
    if not order:
        raise PlanError(
            f"by arithmetic no setting fits {topology.slices} x {topology.name}; use more chips, "
            "model.quant=nf4 or a shorter --seq"
        )
    fitting: list[tuple[float, Run, dict[str, Any]]] = []
    for number, run in enumerate(order):
        if number >= most and fitting:
            break
        result = answer(run)
        if result["fits"]:
            rate = analytic.rates(run, topology, result, utilisation=utilisation, price=None)
            fitting.append((rate["tokens_per_s_per_chip"], run, result))
    if not fitting:
        raise PlanError(
            f"none of {len(order)} settings fits {topology.slices} x {topology.name}; "
            "use more chips"
        )
    _, run, result = max(fitting, key=lambda entry: entry[0])
    return run, result


def _valid(run: Run) -> Iterator[Run]:
    m, mesh = run.model, run.mesh
    remainders = [m.num_heads % mesh.tp, m.num_kv_heads % mesh.tp, m.intermediate_size % mesh.tp]
    remainders += [run.vocab.size % mesh.tp, m.hidden_size % mesh.fsdp]
    if m.quant in PACKED:
        remainders += [m.intermediate_size // TILE % mesh.tp, m.hidden_size // TILE % mesh.fsdp]
    try:
        config.check(run)
    except ConfigError:
        return
    if not any(remainders):
        yield run
