"""How fast at best, how long, for how much: from FLOPs, bytes on the network and a utilisation.

    compute      (needed + again) FLOPs / (utilisation x peak)
    overlapped   bytes of collectives that other work may hide / rate of a ring
    exposed      bytes of those that nothing hides / the same
    step         max(compute, overlapped) + exposed + (between slices) gradients / their rate

The utilisation is an assumption that the user states: what matrix products reach while they run.
Packing is one too: tokens are positions of rows, and a document is as long as its row at most.
"""

from typing import Any

from medmax_jax import flops
from medmax_jax.config import Run
from medmax_jax.plan.topology import Topology

# Bytes a second of one chip between slices. v5e, v6e: 6.4 and 25.6 Tb/s for a pod of 256
# (docs.cloud.google.com/tpu/docs/v6e). v4, v5p: 200 Gb/s for a host of four, an assumption.
BETWEEN_SLICES = {"v4": 6.25e9, "v5e": 3.125e9, "v5p": 6.25e9, "v6e": 12.5e9}


def rates(
    run: Run, topology: Topology, found: dict[str, Any], *, utilisation: float, price: float | None
) -> dict[str, Any]:
    """Seconds of a step, tokens/s/chip, MFU, and hours, chip-hours and cost of the whole run."""
    length = min(run.data.document_limit, run.data.seq_len)
    sizes = (run.model, run.vocab, run.lora)
    need = flops.train_flops(*sizes, trains=run.train.trains, length=length)
    again = flops.remat_flops(run.model, trains=run.train.trains, length=length)
    chip, tokens = topology.chip, run.data.batch_size * run.data.seq_len
    compute = (need + again) * tokens / topology.chips / (utilisation * chip.flops)
    rows = found["collectives"] or []
    ring = chip.links * chip.link_rate
    overlapped, exposed = (
        sum(row["sent"] for row in rows if row["overlapped"] is kind) / ring
        for kind in (True, False)
    )
    between = _between(topology, found)
    step = max(compute, overlapped) + exposed + between
    rate = tokens / step / topology.chips
    hours = run.train.steps * step / 3600
    return {
        "utilisation": utilisation,
        "compute_s": round(compute, 4),
        "overlapped_s": round(overlapped, 4),
        "exposed_s": round(exposed + between, 4),
        "step_s": round(step, 4),
        "tokens_per_s_per_chip": round(rate, 1),
        "mfu": round(flops.mfu(rate, need, chips=1, chip=chip), 4),
        "hours": round(hours, 2),
        "chip_hours": round(hours * topology.chips, 1),
        "cost_usd": None if price is None else round(hours * topology.chips * price, 2),
    }


def _between(topology: Topology, found: dict[str, Any]) -> float:
    """Seconds for the gradients, which are as large as half of the optimiser's moments."""
    if topology.slices == 1:
        return 0.0
    gradients = found["parts"]["optimiser"] / 2 * flops.GIB
    share = 2 * (topology.slices - 1) / topology.slices
    return gradients * share / BETWEEN_SLICES[topology.chip.name]
