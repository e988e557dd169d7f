"""Sums what steps count over an interval (clu), and computes the means for reports."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import numpy as np
from clu import metrics as clu_metrics

LOWEST = float(np.finfo(np.float32).min)  # in place of -inf, which JSON does not have
PARAMETER_NORMS = ("lora_a_norm", "lora_b_norm", "param_norm")


def _ratio(total: str, count: str) -> type[clu_metrics.Average]:
    """Return a metric class for a mean whose sum and count the step has already computed."""

    @flax.struct.dataclass
    class Ratio(clu_metrics.Average):
        @classmethod
        def from_model_output(cls, **outputs: Any) -> clu_metrics.Metric:
            return cls(total=outputs[total], count=outputs[count])

    return Ratio


def _last(old: Any, new: Any) -> Any:
    return new


def _value(output: str, merge: Callable[[Any, Any], Any]) -> type[clu_metrics.Metric]:
    """Return a metric class for one value of an output over steps; LOWEST means none, as NaN."""

    @flax.struct.dataclass
    class Value(clu_metrics.Metric):
        value: Any = flax.struct.field(default_factory=lambda: np.float32(LOWEST))

        @classmethod
        def empty(cls) -> clu_metrics.Metric:
            return cls()

        @classmethod
        def from_model_output(cls, **outputs: Any) -> clu_metrics.Metric:
            return cls(value=outputs[output])

        def merge(self, other: clu_metrics.Metric) -> clu_metrics.Metric:
            return self.replace(value=merge(self.value, other.value))

        def compute(self) -> Any:
            return np.where(self.value > LOWEST, self.value, np.nan)

    return Value


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
    # Fields are only added at the end, see from_list.
    z_loss: clu_metrics.Average.from_output("z_loss")  # of a step, not part of `loss`
    text_log_z: _ratio("text_log_z", "text_count")
    image_log_z: _ratio("image_log_z", "image_count")
    text_log_z_max: _value("text_log_z_max", np.maximum)
    image_log_z_max: _value("image_log_z_max", np.maximum)
    text_max_logit: _value("text_max_logit", np.maximum)
    image_max_logit: _value("image_max_logit", np.maximum)
    text_hidden_norm: _ratio("text_hidden_norm", "text_count")  # of the last layer's output
    image_hidden_norm: _ratio("image_hidden_norm", "image_count")
    lora_a_norm: _value("lora_a_norm", _last)
    lora_b_norm: _value("lora_b_norm", _last)
    param_norm: _value("param_norm", _last)  # where no adapters train


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
    """Invert `to_list`; values that an older checkpoint lacks are empty."""
    if not values:
        return None
    empty, structure = jax.tree.flatten(TrainMetrics.empty())
    return jax.tree.unflatten(structure, map(np.float64, [*values, *empty[len(values) :]]))


def compute_means(collection: clu_metrics.Collection) -> dict[str, float]:
    """Map name to mean; NaN where nothing was counted (an interval without image targets).

    Norms of parameters that do not train are left out.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        means = collection.compute()
    values = {name: float(value) for name, value in means.items() if name != "kinds"}
    absent = {name for name in PARAMETER_NORMS if np.isnan(values.get(name, 0.0))}
    return {name: value for name, value in values.items() if name not in absent}


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
