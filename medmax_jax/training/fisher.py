"""Measures the empirical Fisher information of the adapters from gradients of single documents.

    g_d     gradient of the mean NLL of document d by all A and B, without dropout
    F       1/n sum_d g_d g_d^T     [P, P], which is never formed
    gram    1/n <g_d, g_e>          [n, n], which has the same nonzero eigenvalues as F

    spectral_entropy   - sum p log p, in nats, where p are the eigenvalues divided by their sum
    leading_share      the largest p
    cosine             <g_d, g_e> / (|g_d| |g_e|): agreement of two tasks, on the same image or not

IMAX (arXiv 2504.09967) explains its gain by a lower spectral entropy and a higher leading share.
Its estimator was not available to us; this one is ours. The documents are those of one step, packed
as they are: the weights of a row's other documents are 0, so a gradient is the one that the
document alone has, up to rounding.

A document takes a pass over one row, and over as many as the mesh splits a batch into. So one
measurement takes about the time of DOCUMENTS * split / batch_size steps; `least_interval` has the
steps between two of them that keep this below SHARE.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from medmax_jax import sharding
from medmax_jax.config import Run
from medmax_jax.sharding import BATCH
from medmax_jax.training import loss
from medmax_jax.training.batch import Batch

DOCUMENTS = 32  # of a step at most, whose gradients are in memory together
SHARE = 0.05  # of the time of the steps


class Places(NamedTuple):
    """Where the documents are in a batch; segment 0 is none."""

    rows: Int[np.ndarray, "n"]
    segments: Int[np.ndarray, "n"]


def steps_per_measurement(run: Run) -> float:
    """Return the number of steps that take about as long as one measurement.

    Counted in rows; measured on two CPU cores with configs/tiny.py: 3.1 for 4.
    """
    return DOCUMENTS * run.mesh.data * run.mesh.fsdp / run.data.batch_size


def least_interval(run: Run) -> int:
    """Return the smallest train.fisher_every that costs at most SHARE of the time of the steps."""
    return math.ceil(steps_per_measurement(run) / SHARE)


def describe_cost(run: Run) -> str:
    """Return a line about the time that the measurements of a run take."""
    every, share = run.train.fisher_every, steps_per_measurement(run) / run.train.fisher_every
    advice = f"; {SHARE:.0%} or less from {least_interval(run)} on" if share > SHARE else ""
    return (
        f"Fisher information after every {every} steps, about {share:.1%} of the time of the "
        f"steps{advice} (train.fisher_every)"
    )


def places(
    documents_of_rows: Sequence[Int[np.ndarray, "_"]],
) -> tuple[Places, Int[np.ndarray, "_"]]:
    """Return the places of the first DOCUMENTS documents of a step, and their numbers."""
    found = [
        (row, segment, number)
        for row, numbers in enumerate(documents_of_rows)
        for segment, number in enumerate(numbers.tolist(), start=1)
    ][:DOCUMENTS]
    table = np.array(found, np.int32).reshape(-1, 3)
    padded = np.zeros((DOCUMENTS, 2), np.int32)
    padded[: len(table)] = table[:, :2]
    return Places(padded[:, 0], padded[:, 1]), table[:, 2]


def make_gram(graph: Any, run: Run) -> Callable[..., Float[Array, "L n n"]]:
    """Return gram(trainable, frozen, batch, places), jitted: <g_d, g_e> / n for each layer.

    A document takes as many rows as the mesh splits a batch into, only the first of which counts.
    """

    def gram(
        trainable: PyTree, frozen: PyTree, batch: Batch, places: Places
    ) -> Float[Array, "L n n"]:
        mesh = jax.sharding.get_abstract_mesh()
        split = mesh.shape["data"] * mesh.shape["fsdp"]
        everywhere = jax.tree.map(lambda x: jax.sharding.reshard(x, P(None, None)), batch)

        def gradient(place: tuple[Array, Array]) -> PyTree:
            row, segment = place
            document = jax.tree.map(
                lambda x: jnp.broadcast_to(x[row], (split, *x[row].shape)), everywhere
            )
            counts = (document.segments == segment) & (segment > 0)
            counts &= jnp.arange(split)[:, None] == 0
            weights = jnp.where(counts, document.weights, 0)
            weights = weights / jnp.maximum(weights.sum(), jnp.finfo(jnp.float32).tiny)
            one = dataclasses.replace(document, weights=weights)
            one = jax.tree.map(lambda x: jax.sharding.reshard(x, BATCH), one)

            def objective(trainable: PyTree) -> Array:
                model = nnx.merge(graph, trainable, frozen)
                return loss.training_objective(model, one, None, trains=run.train.trains)[0]

            return jax.grad(objective)(trainable)

        gradients = jax.lax.map(gradient, (places.rows, places.segments))
        return sum(map(_products, jax.tree.leaves(gradients))) / len(places.rows)

    return sharding.jit(gram)


def _products(gradients: Float[Array, "n L I O"]) -> Float[Array, "L n n"]:
    """Return the products of all pairs, layer by layer."""
    return jnp.einsum(
        "nlio,mlio->lnm", gradients, gradients,
        precision=jax.lax.Precision.HIGHEST, out_sharding=P(None, None, None),
    )  # fmt: skip


def spectrum(gram: Float[np.ndarray, "n n"]) -> tuple[float, float]:
    """Return (spectral entropy in nats, share of the largest eigenvalue); NaN for zero gradients.

    Eigenvalues 3, 1, 0   ->   p = .75, .25   ->   0.562, 0.75
    """
    values = np.maximum(np.linalg.eigvalsh(np.asarray(gram, np.float64)), 0)
    if not values.sum() > 0:
        return float("nan"), float("nan")
    p = values / values.sum()
    p = p[p > 0]
    return float(-(p * np.log(p)).sum()), float(p.max())


def task_cosines(
    gram: Float[np.ndarray, "n n"], tasks: Sequence[str], images: Int[np.ndarray, "n"]
) -> dict[str, float]:
    """Return the mean cosine of the gradients of each pair of tasks, on the same image or not.

    {"VQA, Image Captioning/same_image": 0.4, "VQA, VQA/other_image": 0.1, ...}; documents without
    an image (-1) are on no other's image.
    """
    norms = np.sqrt(np.maximum(np.diag(gram), 0))
    sums: dict[str, list[float]] = {}
    for d, e in itertools.combinations(range(len(tasks)), 2):
        if norms[d] > 0 and norms[e] > 0:
            same = images[d] == images[e] >= 0
            pair = ", ".join(sorted((tasks[d], tasks[e])))
            name = f"{pair}/{'same' if same else 'other'}_image"
            sums.setdefault(name, []).append(float(gram[d, e] / (norms[d] * norms[e])))
    return {name: float(np.mean(values)) for name, values in sorted(sums.items())}


def statistics(
    gram: Float[np.ndarray, "L n n"], tasks: Sequence[str], images: Int[np.ndarray, "m"]
) -> dict[str, float]:
    """Return the values of a row of metrics.jsonl for the first m = len(tasks) of n documents."""
    m = len(tasks)
    gram = np.asarray(gram, np.float64)[:, :m, :m]
    total = gram.sum(0)
    entropy, leading = spectrum(total)
    row = {"documents": float(m), "spectral_entropy": entropy, "leading_share": leading}
    for layer, of_layer in enumerate(gram):
        entropy, leading = spectrum(of_layer)
        row[f"layer_{layer:02d}/spectral_entropy"] = entropy
        row[f"layer_{layer:02d}/leading_share"] = leading
    cosines = task_cosines(total, tasks, images)
    return row | {f"cosine/{name}": value for name, value in cosines.items()}
