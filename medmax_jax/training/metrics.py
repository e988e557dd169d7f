"""Sums what steps count over an interval (clu), and computes the means for reports."""

from typing import Any

import flax.struct
import jax
import numpy as np
from clu import metrics as clu_metrics


def _ratio(total: str, count: str) -> type[clu_metrics.Average]:
    """Return a metric class for a mean whose sum and count the step has already computed."""

    @flax.struct.dataclass
    class Ratio(clu_metrics.Average):
        @classmethod
        def from_model_output(cls, **outputs: Any) -> clu_metrics.Metric:
            return cls(total=outputs[total], count=outputs[count])

    return Ratio


@flax.struct.dataclass
class TrainMetrics(clu_metrics.Collection):
    """Collects sums since the last report: computed on device, merged on host in float64."""

    loss: clu_metrics.Average.from_output("loss")
    text_nll: _ratio("text_nll", "text_count")  # over scored text targets, each counted once
    image_nll: _ratio("image_nll", "image_count")
    kinds: _ratio("kind_nll", "kind_count")  # [KINDS, 2]: for each kind of document, text and image
    grad_norm: clu_metrics.Average.from_output("grad_norm")  # before the clip
    finite: clu_metrics.Average.from_output(
        "finite"
    )  # share of steps with finite loss and gradient, or skipped as spikes
    skipped: clu_metrics.Average.from_output("skipped")  # share of steps without an update
    lr: clu_metrics.LastValue.from_output("lr")
    tokens: _ratio("tokens", "steps")  # real tokens per step, without padding
    fill: _ratio("tokens", "positions")  # real tokens over all positions


@flax.struct.dataclass
class EvalMetrics(clu_metrics.Collection):
    """Collects sums over held-out batches."""

    loss: _ratio("weighted_loss", "share")
    text_nll: _ratio("text_nll", "text_count")
    image_nll: _ratio("image_nll", "image_count")
    kinds: _ratio("kind_nll", "kind_count")


def to_host(collection: clu_metrics.Collection) -> clu_metrics.Collection:
    """Return the sums as float64 numbers of this host; waits for the device."""
    return jax.tree.map(np.float64, jax.device_get(collection))


def to_list(collection: clu_metrics.Collection | None) -> list[Any]:
    """Return the plain sums for a checkpoint's cursor; empty for no collection."""
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(collection)]


def from_list(values: list[Any]) -> TrainMetrics | None:
    """Invert `to_list`."""
    if not values:
        return None
    return jax.tree.unflatten(jax.tree.structure(TrainMetrics.empty()), map(np.float64, values))


def compute_means(collection: clu_metrics.Collection) -> dict[str, float]:
    """Map name to mean; NaN where nothing was counted (an interval without image targets)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means = collection.compute()
    return {name: float(value) for name, value in means.items() if name != "kinds"}


def by_kind(collection: clu_metrics.Collection, kinds: list[tuple[str, str]]) -> dict[str, float]:
    """Return means per source and per task, where there are targets.

    Example: {"source/SLAKE/text_nll": 1.5, ...}. `kinds`: source and task of each kind, as in the
    loader's `BatchSource.kinds`.
    """
    sums = np.stack([collection.kinds.total, collection.kinds.count], -1)  # [KINDS, 2, 2]
    totals: dict[str, np.ndarray] = {}
    for (source, task), group_sums in zip(kinds, sums, strict=False):
        for name in (f"source/{source}", f"task/{task}"):
            for name_of_sum, sum_and_count in zip(
                ("text_nll", "image_nll"), group_sums, strict=True
            ):
                totals[f"{name}/{name_of_sum}"] = (
                    totals.get(f"{name}/{name_of_sum}", 0) + sum_and_count
                )
    return {name: float(t / n) for name, (t, n) in sorted(totals.items()) if n}
