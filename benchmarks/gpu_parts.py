"""Defines the measurements of gpu.py: each part as a list, and the plan's estimates for ours."""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np
import sides

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NEEDS = {  # packages of the other side
    "train": ["torch", "transformers", "peft"],
    "qlora": ["torch", "transformers", "peft", "bitsandbytes"],
    "decode": ["torch", "transformers", "peft"],
    "vq": ["torch", "transformers", "peft"],
}
BATCHES = 10  # batches that both sides share
UTILIZATION = 0.6  # of the time estimate, as medmax_jax.plan --utilisation
PROMPT, WRITTEN = {"7b": 1_034, "tiny": 24}, {"7b": 256, "tiny": 8}
# Rows, what remat saves and the attention, the most promising first.
OURS = [(4, "attn", "cudnn"), (8, "attn", "cudnn"), (2, "dots", "cudnn"), (4, "qkv_attn", "cudnn"),
        (16, "attn", "cudnn"), (16, "all", "cudnn"), (2, "attn", "xla")]  # fmt: skip
# Rows, recomputation by layers, torch.compile.
THEIRS = [(4, True, False), (2, False, False), (8, True, False), (2, False, True),
          (16, True, False), (4, True, True)]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Describes one or both sides at one setting. `work`: tokens or images of a step."""

    name: str
    unit: str
    scripts: dict[str, str]
    specs: dict[str, dict[str, Any]]
    environment: dict[str, str]
    settings: dict[str, Any]
    work: float
    steps: int
    within: float  # of the first losses, logits or codes of both sides
    moves: bool  # they are losses, which must also change

    def agree(self, ours: list[float], theirs: list[float]) -> dict[str, Any]:
        """Check whether both sides compute the same."""
        if self.moves:
            return sides.agree(ours, theirs, within=self.within)
        a, b = np.array(ours), np.array(theirs)
        if self.unit == "images/s":  # codes: a share of them may be equally near to two rows
            difference = float((a != b).mean())
        else:
            difference = float(np.abs(a - b).max() / b.std())
        return dict(ok=difference <= self.within, difference=difference, within=self.within)


def measurements(part: str, size: str, workdir: pathlib.Path, *, theirs: bool) -> list[Measurement]:
    """Return the measurements of a part; files shared by the sides are written to `workdir`."""
    make = {"train": _training, "qlora": _training, "decode": _decoding, "vq": _images}[part]
    return [m for m in make(part, size, workdir) if theirs or "ours" in m.specs]


def planned(measurement: Measurement, side: dict[str, Any]) -> dict[str, Any] | None:
    """Return the computed memory and time next to the measured ones.

    error is plan / measured - 1.
    """
    from medmax_jax import config, flops
    from medmax_jax.plan import analytic, topology

    if (
        measurement.unit != "tokens/s"
        or "rows" not in measurement.specs["ours"]
        or not measurement.moves
    ):
        return None
    run = config.from_config_dict(measurement.specs["ours"]["run"])
    chip = flops.chip(side["device"])
    machine = topology.parse(f"{chip.name if chip else 'H100'}:1", slices=1)
    plan = analytic.estimate(run, machine)
    estimate = dict(device=side["device"], plan_gib=plan["peak_hbm_gib"], gib=side["peak_gib"])
    if side["peak_gib"]:
        estimate["memory_error"] = round(plan["peak_hbm_gib"] / side["peak_gib"] - 1, 3)
    if chip is None:
        return estimate | dict(time="unknown device: medmax_jax/flops.py has no limits of it")
    rates = analytic.rates(run, machine, plan, utilisation=UTILIZATION, price=None)
    flops_needed = flops.train_flops(
        run.model, run.vocab, run.lora, trains="lora", length=run.data.seq_len
    )
    recomputed = flops.remat_flops(run.model, trains="lora", length=run.data.seq_len)
    mfu = flops.mfu(side["rate"], flops_needed, chips=1, chip=chip)
    step = measurement.work / side["rate"]
    return estimate | dict(
        plan_step_s=rates["step_s"], step_s=round(step, 4), utilization=UTILIZATION,
        time_error=round(rates["step_s"] / step - 1, 3), mfu_lora=round(mfu, 4),
        hfu=round(flops.hfu(mfu, flops_needed, recomputed), 4),
    )  # fmt: skip


# ---- train and qlora


def settings(part: str, size: str, folder: str, rows: int, remat: str, attention: str) -> Any:
    """Return the run as a ConfigDict."""
    from medmax_jax.configs import base

    c = base.get_config()
    seq = 2_048
    if size == "tiny":
        seq = 64
        c.vocab.update(size=9_728, text_start=8_712)
        c.model.update(
            hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32,
            intermediate_size=128, context_length=seq, param_dtype="float32",
            compute_dtype="float32",
        )  # fmt: skip
    c.model.update(remat=remat, attention=attention if size == "7b" else "xla")
    if part == "qlora":
        c.model.update(quant="nf4")
        c.train.update(init_from="generated by same_weights.py")  # no folder is read
    c.data.update(
        train=folder, validation="", document_limit=seq, seq_len=seq, batch_size=rows, pack=False
    )
    c.optim.update(peak_lr=3e-3, warmup_ratio=0.0, final_lr_ratio=1.0)
    c.train.update(steps=1_000, prng_impl="rbg")
    return c


def _training(part: str, size: str, workdir: pathlib.Path) -> list[Measurement]:
    import jax_side

    from medmax_jax import config

    folder, max_rows = workdir / "records", max(rows for rows, *_ in OURS + THEIRS)
    run = config.from_config_dict(settings(part, size, str(folder), 1, "attn", "cudnn"))
    if not (folder / "dataset.json").exists():
        jax_side.write_records(folder, run, count=max_rows * BATCHES)
    batches = workdir / "batches.npz"
    if not batches.exists():
        jax_side.write_batches(batches, run, count=max_rows * BATCHES)

    def their_spec(rows: int, checkpointing: bool, compiled: bool) -> dict[str, Any]:
        run_settings = config.to_dict(run)
        shared = {name: run_settings[name] for name in ("model", "vocab", "lora", "optim")}
        return shared | dict(
            batches=str(batches), rows=rows, device="cuda" if size == "7b" else "cpu", threads=2,
            dtype=run.model.compute_dtype, quant=run.model.quant, checkpointing=checkpointing,
            compile=compiled, attention="sdpa",
        )  # fmt: skip

    def our_spec(rows: int, remat: str, attention: str) -> dict[str, Any]:
        c = settings(part, size, str(folder), rows, remat, attention)
        return dict(run=config.to_dict(config.from_config_dict(c)), batches=BATCHES, rows=rows)

    def make_measurement(name: str, rows: int, both: bool, **specs: Any) -> Measurement:
        environment = dict(XLA_PYTHON_CLIENT_MEM_FRACTION="0.45" if both else "0.94")
        if size == "tiny":
            environment = dict(JAX_PLATFORMS="cpu")
        exact = size == "tiny" and part == "train"  # bitsandbytes rounds its scales a second time
        return Measurement(
            name=name, unit="tokens/s", specs=specs, environment=environment,
            scripts=dict(ours="jax_side.py", theirs="hf_side.py"), work=rows * run.data.seq_len,
            steps=3, within=1e-4 if exact else 3e-3, moves=True, settings=dict(rows=rows),
        )  # fmt: skip

    results = [
        make_measurement(
            "same", 1, True, ours=our_spec(1, "attn", "cudnn"), theirs=their_spec(1, False, False)
        )
    ]
    ours, theirs = (OURS, THEIRS) if size == "7b" else (OURS[:1], THEIRS[:1])
    for number in range(max(len(ours), len(theirs))):  # alternating
        if number < len(ours):
            rows, remat, attention = ours[number]
            name = f"ours: {rows} rows, remat {remat}, {attention}"
            results.append(
                make_measurement(name, rows, False, ours=our_spec(rows, remat, attention))
            )
        if number < len(theirs):
            rows, checkpointing, compiled = theirs[number]
            name = f"theirs: {rows} rows, checkpointing {checkpointing}, compiled {compiled}"
            results.append(
                make_measurement(
                    name, rows, False, theirs=their_spec(rows, checkpointing, compiled)
                )
            )
    return results


# ---- decode and vq


def _decoding(part: str, size: str, workdir: pathlib.Path) -> list[Measurement]:
    from medmax_jax import config

    c = settings("train", size, "", 1, "none", "xla")
    c.lora.update(rank=0, alpha=0.0, dropout=0.0)
    c.train.update(trains="full")
    c.model.update(param_dtype="float32")
    run_settings = config.to_dict(config.from_config_dict(c))
    run_settings["model"]["param_dtype"] = run_settings["model"]["compute_dtype"]
    # Nothing is trained here; the base of image_head may be in bf16.
    run_settings["train"]["trains"] = "image_head"
    prompts, length, count = workdir / "prompts.npz", PROMPT[size], WRITTEN[size]
    ids = np.random.default_rng(0).integers(8_712, run_settings["vocab"]["size"], (32, length))
    np.savez(prompts, ids=ids.astype(np.int32))
    results = []
    for rows in (1, 16) if size == "7b" else (1,):
        shared = dict(part=part, prompts=str(prompts), rows=rows, count=count)
        theirs = {n: run_settings[n] for n in ("model", "vocab", "lora", "optim")} | dict(
            dtype=run_settings["model"]["compute_dtype"], device="cuda" if size == "7b" else "cpu",
            attention="sdpa",
        )  # fmt: skip
        results.append(
            Measurement(
                name="same" if rows == 1 else f"{rows} rows",
                unit="tokens/s",
                scripts=dict(ours="jax_serving.py", theirs="hf_serving.py"),
                specs=dict(ours=shared | dict(run=run_settings), theirs=shared | theirs),
                environment=_both(size),
                work=rows * count,
                steps=1,
                settings=shared,
                within=1e-3 if size == "tiny" else 0.1,
                moves=False,
            )  # fmt: skip
        )
    return results


def _images(part: str, size: str, workdir: pathlib.Path) -> list[Measurement]:
    from medmax_jax import config
    from medmax_jax.configs import base
    from medmax_jax.convert import vqgan

    fields = base.get_config().vq
    if size == "tiny":  # with 32 groups per norm, as in HF and unlike configs/tiny.py
        fields.update(
            image_size=32, channels=32, channel_mult=(1, 2), num_res_blocks=1, z_channels=32,
            embed_dim=32, num_codes=64,
        )  # fmt: skip
    vq = config.build(config.VQ, fields)
    names = {n: (location.name, location.shape) for n, location in vqgan.key_map(vq).items()}
    path = workdir / "images.npz"
    shape = (16 if size == "7b" else 1, vq.image_size, vq.image_size, 3)
    pixels = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    np.savez(path, pixels=pixels)
    results = []
    for rows in (1, 8, 16) if size == "7b" else (1,):
        shared = dict(part=part, images=str(path), rows=rows, vq=json.loads(fields.to_json()))
        results.append(
            Measurement(
                name="same" if rows == 1 else f"{rows} images",
                unit="images/s",
                scripts=dict(ours="jax_serving.py", theirs="hf_serving.py"),
                specs=dict(
                    ours=shared,
                    theirs=shared | dict(names=names, device="cuda" if size == "7b" else "cpu"),
                ),
                environment=_both(size),
                work=rows,
                steps=5,
                settings=dict(rows=rows),
                within=0.01,
                moves=False,
            )  # fmt: skip
        )
    return results


def _both(size: str) -> dict[str, str]:
    """Return the settings for two sides that are alive together."""
    if size == "tiny":
        return dict(JAX_PLATFORMS="cpu")
    return dict(XLA_PYTHON_CLIENT_MEM_FRACTION="0.45")
