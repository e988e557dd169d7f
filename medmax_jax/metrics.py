"""What a run reports: sums over an interval (clu), seconds by purpose, and where both are written.

    D/metrics.jsonl         a JSON object a line: {"kind": "train", "step": 120, "loss": 3.21, ...}
    D/events.out.tfevents.* the same numbers for TensorBoard
    D/train.log             the lines that stdout shows, for runs without a terminal

Every line is flushed at once. A resumed run drops what was written after the checkpoint it starts
from, so that each step stands in the files once.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import numpy as np
import tensorboardX
from clu import metrics as clu_metrics

BUCKETS = ("compile", "data", "step", "eval", "checkpoint")


def _ratio(total: str, count: str) -> type[clu_metrics.Average]:
    """A mean whose sum and count the step has already taken."""

    @flax.struct.dataclass
    class Ratio(clu_metrics.Average):
        @classmethod
        def from_model_output(cls, **outputs: Any) -> clu_metrics.Metric:
            return cls(total=outputs[total], count=outputs[count])

    return Ratio


@flax.struct.dataclass
class Interval(clu_metrics.Collection):
    """Sums over the steps since the last report: made on device, merged on the host in float64."""

    loss: clu_metrics.Average.from_output("loss")
    text_nll: _ratio("text_nll", "text_count")  # over scored text targets, each counting once
    image_nll: _ratio("image_nll", "image_count")
    kinds: _ratio("kind_nll", "kind_count")  # [KINDS, 2]: of each kind of document, text and image
    grad_norm: clu_metrics.Average.from_output("grad_norm")  # before the clip
    finite: clu_metrics.Average.from_output(
        "finite"
    )  # share of steps with finite loss and gradient
    lr: clu_metrics.LastValue.from_output("lr")
    tokens: _ratio("tokens", "steps")  # real tokens a step, padding not counted
    fill: _ratio("tokens", "slots")  # real tokens over all positions


@flax.struct.dataclass
class Held(clu_metrics.Collection):
    """Sums over held-out batches."""

    loss: _ratio("weighted_loss", "share")
    text_nll: _ratio("text_nll", "text_count")
    image_nll: _ratio("image_nll", "image_count")
    kinds: _ratio("kind_nll", "kind_count")


def on_host(collection: clu_metrics.Collection) -> clu_metrics.Collection:
    """The same sums as float64 numbers of this host; waits for the device."""
    return jax.tree.map(np.float64, jax.device_get(collection))


def to_list(collection: clu_metrics.Collection | None) -> list[Any]:
    """The bare sums for a checkpoint's cursor; empty for no collection."""
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(collection)]


def from_list(values: list[Any]) -> Interval | None:
    """The inverse of `to_list`."""
    if not values:
        return None
    return jax.tree.unflatten(jax.tree.structure(Interval.empty()), map(np.float64, values))


def means(collection: clu_metrics.Collection) -> dict[str, float]:
    """Name -> mean. NaN where nothing was counted (an interval without image targets)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = collection.compute()
    return {name: float(value) for name, value in found.items() if name != "kinds"}


def by_kind(collection: clu_metrics.Collection, kinds: list[tuple[str, str]]) -> dict[str, float]:
    """{"source/SLAKE/text_nll": 1.5, ...}: means per source and per task, where there are targets.

    `kinds`: source and task of each kind, as the loader's `Batches.kinds` has them.
    """
    sums = np.stack([collection.kinds.total, collection.kinds.count], -1)  # [KINDS, 2, 2]
    totals: dict[str, np.ndarray] = {}
    for (source, task), each in zip(kinds, sums, strict=False):
        for name in (f"source/{source}", f"task/{task}"):
            for what, pair in zip(("text_nll", "image_nll"), each, strict=True):
                totals[f"{name}/{what}"] = totals.get(f"{name}/{what}", 0) + pair
    return {name: float(t / n) for name, (t, n) in sorted(totals.items()) if n}


class Clock:
    """Seconds by purpose. goodput = the share of all time since the start that went into steps."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(BUCKETS, 0.0)
        self.start = time.monotonic()

    @contextlib.contextmanager
    def spend(self, bucket: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[bucket] += time.monotonic() - begin

    @property
    def training(self) -> float:
        """Seconds in steps and in waiting for their data: what a token rate divides by."""
        return self.seconds["step"] + self.seconds["data"]

    def report(self) -> dict[str, float]:
        total = time.monotonic() - self.start
        seconds = {f"seconds_{name}": round(s, 3) for name, s in self.seconds.items()}
        return seconds | {
            "seconds_total": round(total, 3),
            "goodput": round(self.seconds["step"] / total, 4) if total else 0.0,
        }


class Writer:
    """The files of a run. Only process 0 writes; elsewhere every method does nothing."""

    def __init__(self, folder: str) -> None:
        self.writes = jax.process_index() == 0
        self.folder, self.board = folder, None
        if self.writes:
            self.log_file = open(os.path.join(folder, "train.log"), "a", buffering=1)

    def start(self, *, step: int) -> None:
        """Opens the number files; drops what an earlier process wrote after `step`."""
        if self.writes:
            path = os.path.join(self.folder, "metrics.jsonl")
            drop_after(path, step)
            self.jsonl = open(path, "a", buffering=1)
            self.board = tensorboardX.SummaryWriter(self.folder, purge_step=step + 1, flush_secs=5)

    def log(self, line: str) -> None:
        """One line (or a table) to stdout and D/train.log."""
        if self.writes:
            print(line, flush=True)
            self.log_file.write(line + "\n")

    def numbers(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One row of D/metrics.jsonl, and a curve point each; NaN becomes null."""
        if self.writes:
            clean = {k: v if math.isfinite(v) else None for k, v in values.items()}
            self.jsonl.write(json.dumps({"kind": kind, "step": step} | clean) + "\n")
            for name, value in clean.items():
                if value is not None:
                    self.board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self.writes:
            self.log_file.close()
        if self.board is not None:
            self.jsonl.close()
            self.board.close()


def drop_after(path: str, step: int) -> None:
    """Keeps the whole rows of a JSONL file up to `step`; a torn last line goes too."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path) as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the process died while writing it
            if row["step"] <= step:
                kept.append(line if line.endswith("\n") else line + "\n")
    with open(path + ".tmp", "w") as out:
        out.writelines(kept)
    os.replace(path + ".tmp", path)


def step_line(step: int, steps: int, row: dict[str, float], *, eta: float) -> str:
    """step 120/300 loss 3.2100 text 2.900 image 5.600 lr 1.0e-03 tok/s 5,120 fill 0.93 eta 1:23"""
    return (
        f"step {step}/{steps} {loss_words(row)} lr {row['lr']:.1e} "
        f"tok/s {row['tokens_per_second']:,.0f} fill {row['fill']:.2f} eta {clock_face(eta)}"
    )


def loss_words(row: dict[str, float]) -> str:
    """loss 3.2100 text 2.900 image 5.600; a dash where there were no such targets."""
    parts = (row["text_nll"], row["image_nll"])
    text, image = ("-" if math.isnan(nll) else f"{nll:.3f}" for nll in parts)
    return f"loss {row['loss']:.4f} text {text} image {image}"


def clock_face(seconds: float) -> str:
    """83 -> 1:23, 5025 -> 1:23:45."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
