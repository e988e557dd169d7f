"""Writes the metrics and the log of a run, and measures its seconds by purpose.

    D/metrics.jsonl         one JSON object per line: {"kind": "train", "step": 120, "loss": 3.21}
    D/events.out.tfevents.* the same metrics for TensorBoard
    D/train.log             the lines that stdout shows, for runs without a terminal

Every line is flushed at once. A resumed run drops everything written after the checkpoint it starts
from, so that each step is in the files once.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import tensorboardX

from medmax_jax import config
from medmax_jax.endpoints import egress
from medmax_jax.io.errors import printable_text
from medmax_jax.io.run_files import LogFile, damage_warning, metrics_lines
from medmax_jax.io.text_files import TextFileError

# The purposes that the wall clock time of a run is split into; goodput is the share of `step`.
BUCKETS = ("load", "compile", "data", "step", "eval", "sample", "checkpoint")


class GoodputTimer:
    """Measures seconds by purpose; goodput is the share of the time since the start in steps."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(BUCKETS, 0.0)
        self.start = time.monotonic()

    @contextlib.contextmanager
    def measure(self, bucket: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[bucket] += time.monotonic() - begin

    @property
    def training(self) -> float:
        """Return the seconds in steps and in waiting for their data: the divisor of token rates."""
        return self.seconds["step"] + self.seconds["data"]

    def report(self) -> dict[str, float]:
        total = time.monotonic() - self.start
        seconds = {f"seconds_{name}": round(s, 3) for name, s in self.seconds.items()}
        return seconds | {
            "seconds_total": round(total, 3),
            "goodput": round(self.seconds["step"] / total, 4) if total else 0.0,
        }


class MetricWriter:
    """Writes the files of a run. Only process 0 writes; elsewhere every method does nothing.

    `sinks`: functions that process 0 also calls with (step, metrics by name).
    """

    def __init__(
        self, folder: str, sinks: Sequence[Callable[[int, dict[str, float]], None]] = ()
    ) -> None:
        self.writes = jax.process_index() == 0
        self.folder, self.board, self._sinks = folder, None, sinks
        if self.writes:
            self.log_file = LogFile(os.path.join(folder, "train.log"), _print)

    def start(self, *, step: int, repeated_kind: str = "") -> None:
        """Open the metrics files; drop what an earlier process wrote after `step`.

        `repeated_kind`: a kind whose row of `step` itself will be written once more.
        """
        if self.writes:
            path = os.path.join(self.folder, "metrics.jsonl")
            try:
                if damaged := truncate_after_step(path, step, repeated_kind):
                    self.log(damage_warning(path, damaged))
            except (OSError, TextFileError) as error:
                self.log(f"WARNING: {error}; rows after step {step} may occur twice")
            self.jsonl = LogFile(path, self.log)
            self.board = tensorboardX.SummaryWriter(self.folder, purge_step=step + 1, flush_secs=5)

    def log(self, line: str) -> None:
        """Write one line (or a table) to stdout and D/train.log."""
        if self.writes:
            _print(line)
            self.log_file.write(line)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write one row of D/metrics.jsonl, and a curve point for each value; NaN becomes null."""
        if self.writes:
            clean = {k: v if math.isfinite(v) else None for k, v in values.items()}
            self.jsonl.write(json.dumps({"kind": kind, "step": step} | clean))
            finite = {f"{kind}/{name}": v for name, v in clean.items() if v is not None}
            for name, value in finite.items():
                # TensorBoard allows no spaces in names.
                self.board.add_scalar(name.replace(" ", "_"), value, step)
            for sink in self._sinks:
                sink(step, finite)

    def close(self) -> None:
        if self.writes:
            self.log_file.close()
        if self.board is not None:
            self.jsonl.close()
            self.board.close()


def truncate_after_step(path: str, step: int, repeated_kind: str = "") -> int:
    """Keep the rows of a JSONL file up to `step`; return how many damaged lines it dropped.

    `repeated_kind`: rows of this kind are kept only from before `step`. An incomplete last line is
    dropped too, but not counted.
    """
    if not os.path.exists(path):
        return 0
    lines, damaged = metrics_lines(path)
    with open(path + ".tmp", "wb") as out:
        for row, line in lines:
            if row["step"] < step or row["step"] == step and row["kind"] != repeated_kind:
                out.write(line + b"\n")
    os.replace(path + ".tmp", path)
    return damaged


def _print(line: str) -> None:
    print(printable_text(line), flush=True)


def format_step(step: int, steps: int, row: dict[str, float], *, eta: float) -> str:
    """Format the line of a step: losses, rates, utilization, memory and the remaining time.

    step 120/300 loss 3.2100 text 2.900 image 5.600 log Z 9.21 (max 12.0) image 8.83 (max 11.2) max
    logit 14.1 image 12.9 norm 310 image 295 A 12 B 0.51 lr 1.0e-03 tok/s/chip 5,120 (5,505 with
    padding) fill 0.93 data 1% MFU 51.2% HFU 60.1% HBM 12.1 GiB eta 1:23. A chip without known
    limits has no MFU, and a device that does not report its memory has no HBM.
    """
    stage = f" stage {row['stage']}" if "stage" in row else ""
    parts = [
        f"step {step}/{steps}{stage} {format_losses(row)} {format_norms(row)} lr {row['lr']:.1e}",
        f"tok/s/chip {row['tokens_per_second_per_chip']:,.0f}",
        f"({row['processed_per_second_per_chip']:,.0f} with padding) fill {row['fill']:.2f}",
        f"data {row['data_share']:.0%}",
    ]
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%} HFU {row['hfu']:.1%}")
    if "hbm_peak_gib" in row:
        parts.append(f"HBM {row['hbm_peak_gib']:.1f} GiB")
    return " ".join([*parts, f"eta {format_duration(eta)}"])


def format_losses(row: dict[str, float]) -> str:
    """Format losses: loss 3.2100 text 2.900 image 5.600; a dash where there were no targets."""
    parts = (row["text_nll"], row["image_nll"])
    text, image = ("-" if math.isnan(nll) else f"{nll:.3f}" for nll in parts)
    return f"loss {row['loss']:.4f} text {text} image {image}"


def format_norms(row: dict[str, float]) -> str:
    """Format log Z, largest logits and norms, each for text and for image targets."""

    def number(name: str) -> str:
        return "-" if math.isnan(row[name]) else f"{row[name]:.3g}"

    log_z = (f"{number(f'{m}_log_z')} (max {number(f'{m}_log_z_max')})" for m in ("text", "image"))
    parts = ["log Z " + " image ".join(log_z)]
    for label, name in (("max logit", "max_logit"), ("norm", "hidden_norm")):
        parts.append(f"{label} {number(f'text_{name}')} image {number(f'image_{name}')}")
    names = {"A": "lora_a_norm", "B": "lora_b_norm", "weights": "param_norm"}
    parts += [f"{label} {number(name)}" for label, name in names.items() if name in row]
    if row["z_loss"]:
        parts.append(f"z-loss {number('z_loss')}")
    return " ".join(parts)


def format_duration(seconds: float) -> str:
    """Format seconds: 83 -> 1:23, 5025 -> 1:23:45."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ---- tracking ----
#
# Weights & Biases, optional: the metrics of a run, never its texts or images.
#
# The package is imported only when requested. Before anything is sent,
# medmax_jax/endpoints/egress.py checks it: metrics computed from credentialed records are
# credentialed, and are sent to listed hosts only.

SERVER = "https://api.wandb.ai"  # WANDB_BASE_URL in the environment overrides it
SECTIONS = ("model", "lora", "mesh", "optim")  # of the config: no paths, nothing about the data


class TrackingError(RuntimeError):
    """Raised for metrics that cannot be sent; the message gives the reason and the fix."""


def init_wandb(
    project: str,
    run: config.Run,
    *,
    name: str,
    folder: str,
    credentials: Iterable[str],
    listed: Iterable[str],
    environment: Mapping[str, str],
) -> tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]:
    """Return (send, close) of a started Weights & Biases run.

    `credentials`: of the records; `listed`: hosts for credentialed data.
    """
    data_classes = map(egress.class_of_credential, credentials)
    server = environment.get("WANDB_BASE_URL") or SERVER
    try:
        egress.check(
            server, egress.strictest(data_classes), listed=egress.parse_allowed_hosts(listed)
        )
    except egress.OutgoingError as error:
        raise TrackingError(f"--wandb={project}: {error} (--listed_host)") from error
    try:
        import wandb
    except ImportError as error:
        raise TrackingError(
            f"--wandb={project}: the package wandb is not installed; pip install wandb, or omit "
            "the flag: metrics.jsonl and TensorBoard contain the same metrics"
        ) from error
    sections = config.to_dict(run)
    wandb_run = wandb.init(
        project=project,
        name=name,
        id=name,
        resume="allow",
        dir=folder,
        config={section: sections[section] for section in SECTIONS},
        settings=wandb.Settings(
            disable_code=True, disable_git=True, console="off", x_disable_meta=True
        ),
    )

    def send(step: int, metrics: dict[str, Any]) -> None:
        wandb_run.log(metrics, step=step)

    return send, wandb_run.finish
