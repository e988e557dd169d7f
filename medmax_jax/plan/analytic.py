"""Estimate memory by part and bytes on the network by arithmetic, roughly and within a second.

    base, adapters, optimiser    exact: numbers in a device's shards
    activations                  what remat saves, exactly
    temporaries                  max(a layer's work, the loss) + gradients
    collectives                  weights gathered twice over fsdp, activations summed over tp

The answer is marked as analytic. Its constants were fitted to compiled steps;
docs/reference/plan_7b.md has the remaining error.
"""

import math
from typing import Any

from medmax_jax import flops
from medmax_jax.config import Run
from medmax_jax.flops import BYTES, GIB
from medmax_jax.plan.topology import Topology

CODE = 0.04 * GIB  # of the 7B step
WORK = 10  # arrays [tokens, F] that a layer's backward pass needs at once
CHUNK = 2**26  # bytes of the logits of a chunk: cross_entropy.CHUNK_LOGITS in fp32


def estimate(run: Run, topology: Topology) -> dict[str, Any]:
    """Return the same fields as a compiled answer, with `how` equal to "analytic"."""
    parts = _argument_bytes(run) | {
        "activations": activation_bytes(run),
        "temporaries": _temporaries(run),
        "code": CODE,
    }
    peak = sum(parts.values())
    return {
        "how": "analytic",
        "fits": peak <= topology.usable,
        "peak_hbm_gib": round(peak / GIB, 3),
        "hbm_gib": round(topology.usable / GIB, 3),
        "parts": {name: round(size / GIB, 3) for name, size in parts.items()},
        "collectives": _collectives(run),
    }


def rows_per_device(run: Run) -> int:
    """Return the rows of a microbatch on one device."""
    return run.data.batch_size // (run.mesh.data * run.mesh.fsdp * run.optim.accumulate)


def _argument_bytes(run: Run) -> dict[str, float]:
    """Return the bytes of the arguments on one device."""
    n, width = flops.parameters(run.model, run.vocab, run.lora), BYTES[run.model.param_dtype]
    shards = run.mesh.fsdp * run.mesh.tp
    base = n.layers * flops.matrix_bytes(run.model) + (n.head + n.embedding) * width
    base = base / shards + n.norms * width
    adapters = 4 * _adapters(run)
    trained = base if run.train.trains == "full" else adapters
    if run.train.trains == "image_head":
        trained = 4 * run.model.hidden_size * run.vocab.image_codes / shards
    return {"base": base, "adapters": adapters, "optimiser": 2 * trained}


def _adapters(run: Run) -> float:
    """Return the adapter numbers on one device: A and B each follow one axis of their matrix."""
    m, tp, fsdp = run.model, run.mesh.tp, run.mesh.fsdp
    d, wide, narrow = m.hidden_size, m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    into = [(d, wide), (d, narrow), (d, narrow), (d, m.intermediate_size), (d, m.intermediate_size)]
    back = [(wide, d), (m.intermediate_size, d)]
    numbers = sum(i / fsdp + o / tp for i, o in into) + sum(i / tp + o / fsdp for i, o in back)
    return m.num_layers * run.lora.rank * numbers


def _temporaries(run: Run) -> float:
    m, tp = run.model, run.mesh.tp
    n, wide = rows_per_device(run) * run.data.seq_len, BYTES[m.compute_dtype]
    parts = flops.parameters(m, run.vocab, run.lora)
    layer = parts.layers / m.num_layers / tp * wide  # one layer's matrices, as they are used
    gathered = 2 * layer if run.mesh.fsdp > 1 else 0  # this layer's, and the next one's
    if m.quant != "none":
        gathered = max(gathered, layer / 2)  # some matrices made dense, one after another
    work = WORK * n * m.intermediate_size / tp * wide + gathered
    if m.attention == "xla":
        work += rows_per_device(run) * m.num_heads / tp * run.data.seq_len**2 * (4 + 4 + wide)
    part = parts.head / tp / run.mesh.fsdp * wide  # of the head, by columns
    loss = part + 3 * CHUNK + n * m.hidden_size * (wide + 4)
    embedding = parts.embedding / tp * wide if run.mesh.fsdp > 1 else 0
    trained = _argument_bytes(run)["optimiser"] / 2  # gradients are sharded like their parameters
    if run.optim.accumulate > 1:
        trained *= 2  # the sum, and a microbatch's own
    return max(work, loss, embedding) + trained


def activation_bytes(run: Run) -> float:
    """Return bytes of activations kept for the backward pass, by config.model.remat."""
    if run.train.trains == "image_head":
        return 0.0  # there is no backward pass below the head
    tokens = rows_per_device(run) * run.data.seq_len
    m, tp, wide = run.model, run.mesh.tp, BYTES[run.model.compute_dtype]
    heads, pairs = m.num_heads * m.head_dim / tp, 2 * m.num_kv_heads * m.head_dim / tp
    attn = heads * wide + (4 * m.num_heads / tp if m.attention != "xla" else 0)
    dots = heads + pairs + 2 * m.hidden_size + 2 * m.intermediate_size / tp
    dots *= 2 if run.lora.rank else 1  # of the matrix, and of its adapter
    by_remat = {
        "all": 0.0,
        "attn": attn,
        "attn_offload": 0.0,  # in host memory
        "qkv_attn": attn + (heads + pairs) * wide,
        "dots": attn + dots * wide,
        "none": attn + (2 * (heads + pairs) + 4 * m.intermediate_size / tp) * wide,
    }
    if m.remat not in by_remat:
        raise ValueError(f"config.model.remat is {m.remat!r}; its memory cannot be estimated")
    return m.num_layers * tokens * (m.hidden_size * wide + by_remat[m.remat])


def _collectives(run: Run) -> list[dict[str, Any]]:
    """Return rows in the format of hlo_analysis.summary."""
    m, mesh = run.model, run.mesh
    n = flops.parameters(m, run.vocab, run.lora)
    wide, width = BYTES[m.compute_dtype], BYTES[m.param_dtype]
    microbatches, tokens = run.optim.accumulate, rows_per_device(run) * run.data.seq_len
    rows = []
    if mesh.fsdp > 1:
        passes = (2 if run.train.trains != "image_head" else 1) * microbatches
        layers = passes * n.layers * flops.matrix_bytes(m)
        rows.append(
            _row("all-gather", layers / mesh.tp, 7 * passes * m.num_layers, mesh.fsdp, True)
        )
        table = microbatches * n.embedding * width / mesh.tp
        rows.append(_row("all-gather", table, microbatches, mesh.fsdp, False))
        # The loss: tokens are gathered and their gradients scattered, the head changes its
        # sharding.
        size = microbatches * tokens * mesh.fsdp * m.hidden_size
        rows.append(_row("all-gather", size * wide, microbatches, mesh.fsdp, False))
        rows.append(_row("reduce-scatter", size * wide, microbatches, mesh.fsdp, False))
        head = microbatches * n.head * width / mesh.tp / mesh.fsdp
        rows.append(_row("all-to-all", head, microbatches, mesh.fsdp, False))
    if mesh.tp > 1:
        sums = 2 + 2 + (1 if m.remat != "none" else 0)  # forward, backward, recomputation
        times, size = sums * m.num_layers * microbatches, tokens * m.hidden_size * wide
        rows.append(_row("all-reduce", times * size, times, mesh.tp, False))
    group = mesh.data * mesh.fsdp
    if group > 1:
        gradients = _argument_bytes(run)["optimiser"] / 2
        if run.train.trains == "full" and mesh.fsdp > 1:
            rows.append(
                _row("reduce-scatter", gradients * mesh.fsdp, 7 * m.num_layers, mesh.fsdp, True)
            )
            group = mesh.data
        if group > 1:
            rows.append(_row("all-reduce", gradients, 7 * m.num_layers, group, False))
    return rows


def _row(kind: str, size: flops.Number, count: int, group: int, overlapped: bool) -> dict[str, Any]:
    share = (group - 1) / group * (2 if kind == "all-reduce" else 1)
    return {
        "kind": kind, "overlapped": overlapped, "count": count, "bytes": math.ceil(size),
        "sent": math.ceil(size * share),
    }  # fmt: skip


# ---- Speed ----
#
# Best possible speed, duration and cost: from FLOPs, bytes on the network and a utilization.
#
#     compute      (needed + again) FLOPs / (utilisation x peak)
#     overlapped   bytes of collectives that other work may hide / rate of a ring
#     exposed      bytes of those that nothing hides / the same
#     step         max(compute, overlapped) + exposed + (between slices) gradients / their rate
#
# The utilization is an assumption of the user: what matrix products reach while they run.
# Packing is one too: tokens are positions of rows, and a document is as long as its row at most.

# Bytes per second of one chip between slices. v5e, v6e: 6.4 and 25.6 Tb/s for a pod of 256
# (docs.cloud.google.com/tpu/docs/v6e). v4, v5p: 200 Gb/s for a host of four, an assumption.
BETWEEN_SLICES = {"v4": 6.25e9, "v5e": 3.125e9, "v5p": 6.25e9, "v6e": 12.5e9}


def rates(
    run: Run, topology: Topology, answer: dict[str, Any], *, utilisation: float, price: float | None
) -> dict[str, Any]:
    """Return seconds per step, tokens/s/chip, MFU, and the run's hours, chip-hours and cost."""
    length = min(run.data.document_limit, run.data.seq_len)
    train_flops = flops.train_flops(
        run.model, run.vocab, run.lora, trains=run.train.trains, length=length
    )
    remat_flops = flops.remat_flops(run.model, trains=run.train.trains, length=length)
    chip, tokens = topology.chip, run.data.batch_size * run.data.seq_len
    compute = (train_flops + remat_flops) * tokens / topology.chips / (utilisation * chip.flops)
    rows = answer["collectives"] or []
    ring = chip.links * chip.link_rate
    overlapped, exposed = (
        sum(row["sent"] for row in rows if row["overlapped"] is kind) / ring
        for kind in (True, False)
    )
    between = _between(topology, answer)
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
        "mfu": round(flops.mfu(rate, train_flops, chips=1, chip=chip), 4),
        "hours": round(hours, 2),
        "chip_hours": round(hours * topology.chips, 1),
        "cost_usd": None if price is None else round(hours * topology.chips * price, 2),
    }


def _between(topology: Topology, answer: dict[str, Any]) -> float:
    """Return the seconds for the gradients, whose size is half of the optimizer's moments."""
    if topology.slices == 1:
        return 0.0
    gradients = answer["parts"]["optimiser"] / 2 * flops.GIB
    share = 2 * (topology.slices - 1) / topology.slices
    return gradients * share / BETWEEN_SLICES[topology.chip.name]
