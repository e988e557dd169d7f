"""Defines what accelerator.py measures, and what the plan computes for it beforehand.

    train    a LoRA step of Chameleon-7B, rows of 2,048 tokens, on a base in bf16
    qlora    the same on a base in nf4         int8    the same on one in int8, computed in bf16
    decode   a prompt of 1,034 tokens, then 256 greedy ones, of 1, 8 and 32 rows
    image    1,024 codes of each row, with a text prompt and guidance
    vq       images of 512 px to codes, and back

Weights are random (same_weights.py). With `smoke` all of it is tiny.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax_side
import numpy as np
import sides

from medmax_jax import config, flops
from medmax_jax.configs import base
from medmax_jax.convert import vqgan
from medmax_jax.flops import GIB
from medmax_jax.models import kv_cache, quantization
from medmax_jax.plan import analytic, topology

QUANT = {"train": "none", "qlora": "nf4", "int8": "int8"}
PARTS = (*QUANT, "decode", "image", "vq")
SHARED = ["torch", "transformers", "peft"]
NEEDS = {  # packages of the other side, in the parts that it has
    "train": SHARED, "qlora": [*SHARED, "bitsandbytes"], "decode": SHARED, "vq": SHARED,
}  # fmt: skip
BATCHES = 10  # that both sides share
STEPS = {"vq": 5, "decode": 1, "image": 1}  # of a round; 3 for the others
UTILIZATION = 0.6  # of the time estimate, as medmax_jax.plan --utilisation
PROMPT, WRITTEN, WORDS = 1_034, 256, 30  # tokens: an image and a question; of an image's prompt
ROWS = dict(decode=(1, 8, 32), image=(1, 8), vq=(8, 1, 16))  # the most informative first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """Describes a kind of device. Settings of training: the most promising first."""

    platform: str  # of JAX
    ours: tuple[tuple[int, str, str], ...]  # rows per chip, what remat saves, attention
    theirs: tuple[tuple[int, bool, bool], ...] = ()  # rows, recomputation, torch.compile
    meshes: bool = False  # also on all chips of the host: fsdp trains, tp decodes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Describes one or both sides at one setting."""

    name: str
    part: str
    unit: str
    chips: int
    rank: int  # of the first rank of every part is measured first
    scripts: dict[str, str]
    specs: dict[str, dict[str, Any]]
    environment: dict[str, str]
    work: float  # tokens or images of a step, unless the side reports them
    within: float = 0.01  # difference of the first losses, logits or codes of both sides

    @property
    def steps(self) -> int:
        """Return the steps of a round."""
        return STEPS.get(self.part, 3)

    def agree(self, ours: list[float], theirs: list[float]) -> dict[str, Any]:
        """Check whether both sides compute the same."""
        if self.part in QUANT:  # losses, which must also change
            found = sides.agree(ours, theirs, within=self.within)
            return {name: found[name] for name in ("ok", "difference", "change", "within")}
        a, b = np.array(ours), np.array(theirs)
        if self.part == "vq":  # codes: a share of them may be equally near to two rows
            difference = float((a != b).mean())
        else:
            difference = float(np.abs(a - b).max() / b.std())
        return dict(ok=difference <= self.within, difference=difference, within=self.within)


def measurements(
    parts: list[str], device: Accelerator, *, chips: int, smoke: bool, folder: pathlib.Path,
    theirs: set[str],
) -> list[Measurement]:  # fmt: skip
    """Return what is to be measured, by value; files of the sides are written to `folder`.

    theirs: the parts in which the other side is measured, too.
    """
    found: list[Measurement] = []
    for count in sorted({1, chips if device.meshes else 1}):
        for part in parts:
            make = _training if part in QUANT else _images if part == "vq" else _generation
            found += make(part, device, count, smoke, folder, part in theirs and count == 1)
    if smoke:
        found = [m for m in found if m.rank == 0]
    return sorted(found, key=lambda m: m.rank)


# ---- What is measured ----


def _settings(smoke: bool) -> Any:
    """Return the run as a ConfigDict."""
    c, seq = base.get_config(), 64 if smoke else 2_048
    if smoke:
        c.vocab.update(size=9_728, text_start=8_712)
        c.model.update(
            hidden_size=128, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=64,
            intermediate_size=256, context_length=seq, param_dtype="float32",
            compute_dtype="float32",
        )  # fmt: skip
    c.data.update(validation="", document_limit=seq, seq_len=seq, pack=False)
    c.optim.update(peak_lr=3e-3, warmup_ratio=0.0, final_lr_ratio=1.0)
    c.train.update(steps=1_000, prng_impl="rbg")
    return c


def _environment(smoke: bool, *, both: bool, chips: int = 1) -> dict[str, str]:
    if smoke:
        return dict(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(chips))
    return dict(XLA_PYTHON_CLIENT_MEM_FRACTION="0.45" if both else "0.94")


def _training(
    part: str, device: Accelerator, chips: int, smoke: bool, folder: pathlib.Path, theirs: bool
) -> list[Measurement]:
    quant, records = QUANT[part], folder / f"records_{chips}"
    ours, other = device.ours, device.theirs if theirs else ()
    if quant != "none":
        ours, other = ours[:2], other[:2]

    def run(rows: int, remat: str, attention: str) -> config.Run:
        c = _settings(smoke)
        c.model.update(remat=remat, attention="xla" if smoke else attention, quant=quant)
        c.data.update(train=str(records), batch_size=rows * chips)
        tiles = c.model.intermediate_size // quantization.TILE  # of nf4, which shards cannot cut
        c.mesh.fsdp = math.gcd(chips, tiles) if quant == "nf4" else chips
        c.mesh.data = chips // c.mesh.fsdp
        if quant != "none":
            c.train.init_from = "generated by same_weights.py"  # no folder is read
        return config.from_config_dict(c)

    def make(rank: int, rows: int, **specs: Any) -> Measurement:
        if "ours" in specs:
            of_ours = run(rows, *specs["ours"])
            specs["ours"] = dict(run=config.to_dict(of_ours), batches=BATCHES)
            shown = f"remat {of_ours.model.remat}, {of_ours.model.attention}"
        if "theirs" in specs:
            recomputed, compiled = specs["theirs"]
            fields = {n: config.to_dict(first)[n] for n in ("model", "vocab", "lora", "optim")}
            specs["theirs"] = fields | dict(
                batches=str(batches), rows=rows, device="cpu" if smoke else "cuda", threads=2,
                dtype=first.model.compute_dtype, quant=quant, checkpointing=recomputed,
                compile=compiled, attention="sdpa",
            )  # fmt: skip
            shown = f"theirs, checkpointing {recomputed}, compiled {compiled}"
        both = len(specs) > 1
        exact = smoke and quant == "none"  # bitsandbytes rounds its scales a second time
        return Measurement(
            name=f"{part}: {rows} row{'s' * (rows > 1)} per chip, {'both sides' if both else shown}"
            + (f", {chips} chips" if chips > 1 else ""),
            part=part, unit="tokens/s", chips=chips, rank=rank, specs=specs,
            environment=_environment(smoke, both=both, chips=chips),
            scripts=dict(ours="jax_side.py", theirs="hf_side.py"),
            work=rows * chips * first.data.seq_len, within=1e-4 if exact else 3e-3,
        )  # fmt: skip

    most = max(rows for rows, *_ in device.ours + device.theirs) * BATCHES
    first, batches = run(1, "attn", ours[0][2]), folder / "batches.npz"
    if not (records / "dataset.json").exists():
        jax_side.write_records(records, first, count=most * chips)
    if theirs and not batches.exists():
        jax_side.write_batches(batches, first, count=most)
    found = [make(0, 1, ours=("attn", ours[0][2]), theirs=(False, False))] if other else []
    found += [make(rank, rows, ours=rest) for rank, (rows, *rest) in enumerate(ours)]
    return found + [make(rank, rows, theirs=rest) for rank, (rows, *rest) in enumerate(other)]


def _generation(
    part: str, device: Accelerator, chips: int, smoke: bool, folder: pathlib.Path, theirs: bool
) -> list[Measurement]:
    c = _settings(smoke)
    c.lora.update(rank=0, alpha=0.0, dropout=0.0)
    c.mesh.tp = chips
    c.train.trains = "image_head"  # nothing is trained here; its base may be in bf16
    run, rng = config.from_config_dict(c), np.random.default_rng(0)
    prompt, count, codes = (24, 8, 16) if smoke else (PROMPT, WRITTEN, run.vq.codes_per_image)
    found = []
    for rank, rows in enumerate(ROWS[part]):
        shared = dict(part=part, rows=rows, count=count, prompts=[])
        ours = shared | dict(run=config.to_dict(run), codes=codes, words=8 if smoke else WORDS)
        specs = dict(ours=ours)
        if part == "decode":
            ids = rng.integers(8_712, run.vocab.size, (rows, prompt)).tolist()
            ours["prompts"] = ids
            if theirs:
                specs["theirs"] = {n: ours["run"][n] for n in ("model", "vocab", "lora")} | dict(
                    shared, prompts=ids, dtype=run.model.compute_dtype, attention="sdpa",
                    device="cpu" if smoke else "cuda",
                )  # fmt: skip
        found.append(
            Measurement(
                name=f"{part}: {rows} row{'s' * (rows > 1)}"
                + (f", {chips} chips" if chips > 1 else ""),
                part=part,
                unit="tokens/s",
                chips=chips,
                rank=rank,
                specs=specs,
                environment=_environment(smoke, both=len(specs) > 1, chips=chips),
                scripts=dict(ours="jax_serving.py", theirs="hf_serving.py"),
                work=rows * count,
                within=1e-3 if smoke else 0.1,
            )  # fmt: skip
        )
    return found


def _images(
    part: str, device: Accelerator, chips: int, smoke: bool, folder: pathlib.Path, theirs: bool
) -> list[Measurement]:
    if chips > 1:  # images are independent of each other
        return []
    fields = base.get_config().vq
    if smoke:  # with 32 groups per norm, as in HF and unlike configs/tiny.py
        fields.update(
            image_size=32, channels=32, channel_mult=(1, 2), num_res_blocks=1, z_channels=32,
            embed_dim=32, num_codes=64,
        )  # fmt: skip
    vq, path = config.build(config.VQ, fields), folder / "images.npz"
    shape = (1 if smoke else max(ROWS[part]), vq.image_size, vq.image_size, 3)
    np.savez(path, pixels=np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32))
    found = []
    for rank, rows in enumerate((1,) if smoke else ROWS[part]):
        shared = dict(part=part, images=str(path), rows=rows, vq=json.loads(fields.to_json()))
        for call in ("encode", "decode"):
            specs = dict(ours=shared | dict(call=call))
            if theirs and call == "encode":  # HF has no decoder
                names = {n: (x.name, x.shape) for n, x in vqgan.key_map(vq).items()}
                specs["theirs"] = shared | dict(names=names, device="cpu" if smoke else "cuda")
            found.append(
                Measurement(
                    name=f"{part}: {call}, {rows} image{'s' * (rows > 1)}",
                    part=part,
                    unit="images/s",
                    chips=1,
                    rank=rank,
                    specs=specs,
                    environment=_environment(smoke, both=len(specs) > 1),
                    scripts=dict(ours="jax_serving.py", theirs="hf_serving.py"),
                    work=rows,
                )  # fmt: skip
            )
    return found


# ---- What is computed ----


def plan(m: Measurement, chip: flops.Chip | None) -> dict[str, Any] | None:
    """Return memory per chip and seconds per step as the plan has them before any measurement.

    None: the plan has neither (the image tokenizer, the other side). Without the limits of the chip
    there are no seconds.
    """
    if "ours" not in m.specs or m.part == "vq":
        return None
    run = config.from_config_dict(m.specs["ours"]["run"])
    machine = topology.Topology(
        name=f"{m.chips} chips", chip=chip or flops.CHIPS["H100"], shape=(m.chips,), slices=1
    )
    if m.part in QUANT:
        answer = analytic.estimate(run, machine)
        gib = answer["peak_hbm_gib"]
        rates = analytic.rates(run, machine, answer, utilisation=UTILIZATION, price=None)
        seconds = rates["step_s"]
    else:
        gib = _generation_bytes(m, run) / m.chips / GIB
        seconds = sum(
            max(moved / machine.chip.hbm_rate, needed / machine.chip.flops / UTILIZATION)
            for needed, moved in _generation_work(m, run)
        ) / m.chips  # fmt: skip
    limits = dict(seconds=seconds, usable_gib=round(machine.usable / GIB, 2)) if chip else {}
    return dict(gib=round(gib, 3)) | limits


def work(m: Measurement, side: dict[str, Any]) -> tuple[float, float]:
    """Return the FLOPs that a step of ours needs and the least bytes it moves, on all chips.

    Recomputation is not needed. Every array that a step cannot do without is moved once: weights in
    the forward and in the backward pass, saved activations written and read, the cache per token.
    """
    if m.part == "vq":
        return side["flops"], side["bytes"]
    run = config.from_config_dict(m.specs["ours"]["run"])
    if m.part not in QUANT:
        needed, moved = zip(*_generation_work(m, run), strict=True)
        return sum(needed), sum(moved)
    needed = side["tokens"] * flops.train_flops(
        run.model, run.vocab, run.lora, trains="lora", length=side["attended_length"]
    )
    weights = flops.decode_bytes(run.model, run.vocab, run.lora, context=0, rows=0)  # of each chip
    return needed, 2 * m.chips * (weights + analytic.activation_bytes(run))


def utilization(m: Measurement, side: dict[str, Any], needed: float, chip: flops.Chip | None):
    """Return MFU_LoRA on tokens without padding, and HFU; None for an unknown chip."""
    run = config.from_config_dict(m.specs["ours"]["run"])
    length = side["attended_length"]
    again = flops.remat_flops(run.model, trains="lora", length=length) * side["tokens"]
    mfu = flops.mfu(1 / side["step_s"], needed, chips=m.chips, chip=chip)
    return dict(mfu_lora=mfu, hfu=flops.hfu(mfu, needed, again))


def _generation_sizes(m: Measurement) -> tuple[int, int, int, int]:
    """Return rows of the cache, and tokens of a prompt, of an answer, and of all an answer has."""
    spec = m.specs["ours"]
    if m.part == "image":
        return 2 * spec["rows"], spec["words"] + 3, spec["codes"], spec["codes"] + 1
    return spec["rows"], len(spec["prompts"][0]), spec["count"], spec["count"]


def _generation_work(m: Measurement, run: config.Run) -> list[tuple[float, float]]:
    """Return (FLOPs, bytes) of reading the prompts, and of writing the answers."""
    rows, prompt, count, _ = _generation_sizes(m)
    fields = (run.model, run.vocab, run.lora)
    read = rows * prompt * flops.decode_flops(*fields, context=prompt / 2)
    middle = prompt + count / 2
    write = rows * count * flops.decode_flops(*fields, context=middle)
    per_token = flops.decode_bytes(*fields, context=middle, rows=rows)
    prefill = flops.decode_bytes(*fields, context=prompt, rows=rows)
    return [(read, prefill), (write, count * per_token)]


def _generation_bytes(m: Measurement, run: config.Run) -> float:
    """Return the bytes of the weights and of the KV cache."""
    rows, prompt, _, count = _generation_sizes(m)
    weights = flops.decode_bytes(run.model, run.vocab, run.lora, context=0, rows=0)
    embedding = flops.parameters(run.model, run.vocab, run.lora).embedding
    width = flops.BYTES[run.model.param_dtype]
    return (
        weights
        + embedding * width
        + kv_cache.cache_bytes(
            run.model, num_slots=rows, cache_length=prompt + count, cache_dtype="model"
        )
    )
