"""Compiles the loss over the complete vocabulary for TPUs in three ways: temporaries and cycles.

    python benchmarks/head_aot.py --topology=v5e:2x2 --mesh=1,4,1 --rows=4

    ours      cross_entropy.weighted_nll, the head frozen
    remat     chunks under jax.checkpoint, the head gathered once over fsdp: the former code
    naive     all logits at once

At the widths of 7B and 2,048 tokens per row. Prints one JSON object; step_aot.py defines est_ms.
"""

import json

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from step_aot import CLOCK, Cycles, make_topology_mesh

from medmax_jax import arguments, sharding
from medmax_jax.models.layers import HeadWeights
from medmax_jax.training import cross_entropy as ce

LENGTH, WIDTH, VOCAB = 2_048, 4_096, 65_536


def main() -> None:
    """Parse the flags, compile, and print one JSON object."""
    parser = arguments.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--mesh", default="1,4,1", help="data,fsdp,tp")
    parser.add_argument("--rows", type=int, default=4, help="rows per device")
    args = parser.parse_args()
    m = make_topology_mesh(args.topology, args.mesh)
    rows = args.rows * m.shape["data"] * m.shape["fsdp"]
    like = lambda shape, dtype, spec: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=NamedSharding(m, spec)
    )
    inputs = (
        like((rows, LENGTH, WIDTH), jnp.bfloat16, sharding.ACT),
        like((WIDTH, VOCAB), jnp.bfloat16, sharding.UP),
        like((rows, LENGTH), jnp.int32, sharding.BATCH),
        like((rows, LENGTH), jnp.float32, sharding.BATCH),
    )
    report = dict(topology=args.topology, mesh=args.mesh, rows=args.rows, jax=jax.__version__)
    with jax.set_mesh(m):
        for name, total in (("ours", ours), ("remat", remat), ("naive", naive)):
            compiled = jax.jit(jax.value_and_grad(total)).lower(*inputs).compile()
            temp = compiled.memory_analysis().temp_size_in_bytes
            cycles = Cycles(compiled.as_text()).total()
            report[name] = dict(
                temp_gib=round(temp / 2**30, 3), est_ms=round(cycles / CLOCK * 1e3, 1)
            )
    print(json.dumps(report))


def ours(hidden, kernel, targets, weights):
    """Compute the loss as the training step does."""
    head = HeadWeights(kernel, None)
    chunks = ce.num_chunks(hidden, kernel)
    return ce.weighted_nll(hidden, head, targets, weights, trains_kernel=False, chunks=chunks)[0]


def remat(hidden, kernel, targets, weights):
    """Compute the logits chunk by chunk of every row, and again in the backward pass."""
    rows, length, width = hidden.shape
    chunks = ce.num_chunks(hidden, kernel)
    kernel = jax.reshard(kernel, P(None, "tp"))
    parts = (
        jnp.moveaxis(hidden.reshape(rows, chunks, length // chunks, width), 1, 0),
        jnp.moveaxis(targets.reshape(rows, chunks, length // chunks), 1, 0),
    )
    chunk = jax.checkpoint(_nll, prevent_cse=False)
    nll = jax.lax.scan(lambda _, part: (None, chunk(part[0], kernel, part[1])), None, parts)[1]
    return (weights * jnp.moveaxis(nll, 0, 1).reshape(rows, length)).sum()


def naive(hidden, kernel, targets, weights):
    """Compute all logits of a device in fp32."""
    return (weights * _nll(hidden, jax.reshard(kernel, P(None, "tp")), targets)).sum()


def _nll(hidden, kernel, targets):
    rows = jnp.reshape(hidden, (-1, hidden.shape[-1]), out_sharding=P(sharding.ROWS, None))
    out = P(sharding.ROWS, "tp")
    logits = jnp.matmul(rows, kernel, out_sharding=out, preferred_element_type=jnp.float32)
    flat = jnp.reshape(targets, (-1,), out_sharding=P(sharding.ROWS))
    hit = flat[:, None] == jnp.arange(kernel.shape[1])
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.where(hit, logits, 0).sum(-1)
    return jnp.reshape(nll, targets.shape, out_sharding=sharding.BATCH)


if __name__ == "__main__":
    main()
