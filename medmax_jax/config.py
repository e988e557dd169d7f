"""Defines every setting of a run as frozen dataclasses, built once from the config files.

    configs/x.py (ConfigDict)  --from_config_dict-->  Run(vocab, model, vq, lora, mesh, data, ...)

Only the programs handle a ConfigDict; all other code takes these classes. No field has a default:
`configs/base.py` defines each value with its source. Unknown, missing and contradictory settings
raise ConfigError.
"""

import dataclasses
import hashlib
import json
import math
from typing import Any

from ml_collections import ConfigDict

from medmax_jax import config_fields
from medmax_jax.config_fields import ConfigError, merge
from medmax_jax.io.errors import quoted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocab:
    size: int  # number of ids, the rows of the embedding
    image_codes: int  # VQ codes that have an id; id = code + 4
    text_start: int  # first id of the text BPE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int  # tokens
    rope_theta: float
    rms_norm_eps: float
    qk_norm_eps: float
    qk_norm_shards: int  # rows of the q/k-norm gains: 1 for 7B, 4 for 30B (model-parallel shards)
    swin_norm: bool  # 30B: norms after attention and MLP instead of before
    param_dtype: str  # of the frozen base weights
    quant: str  # none | int8 | int4 | nf4: format of the matrices inside the layers
    compute_dtype: str
    remat: str  # none | dots | qkv_attn | attn | attn_offload | all: how much is recomputed
    attention: str  # xla | splash | cudnn: for complete rows in training, see attention.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQ:
    image_size: int  # pixels, square
    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    embed_dim: int
    num_codes: int  # rows of the codebook
    norm_groups: int  # of every GroupNorm; 32 in every released VQGAN
    view: str  # released | pad: of images in prompts: cropped to the center square, or padded
    answer_view: str  # released | pad: of images that are trained as answers

    @property
    def downsampling(self) -> int:
        """Return the pixels per code along one side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def codes_per_side(self) -> int:
        return self.image_size // self.downsampling

    @property
    def codes_per_image(self) -> int:
        return self.codes_per_side**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    rank: int  # 0: no adapters
    alpha: float
    dropout: float  # on the adapter's input


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    data: int
    fsdp: int
    tp: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionDropout:
    """Probabilities that a document with an image to generate is trained without its condition."""

    text: float  # without the text: the image-only stream, the unconditional one without an image
    image: float  # without the images of the condition: the text-only stream
    all: float  # without either: the unconditional stream

    @classmethod
    def off(cls) -> "ConditionDropout":
        return cls(text=0.0, image=0.0, all=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    train: str  # folder of ArrayRecord shards; a gs:// folder is first copied to this host
    validation: str  # as `train`; empty: no validation
    document_limit: int  # tokens; a longer document is left out, none is truncated
    seq_len: int  # tokens per row, of one or several documents
    batch_size: int  # rows per step, over all devices
    pack: bool  # several documents per row; otherwise one
    mask: str  # answers | release: which tokens are scored
    condition_dropout: ConditionDropout  # 0, 0 and 0: every document is trained complete
    seed: int
    plan: str  # SHA-256 of the packing plan that the run requires; empty: any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixing:
    by: str  # source | task: which names `weights` refers to
    unit: str  # documents | tokens: the unit of which a weight is a share
    weights: str  # "name=3, other=1"; empty: each document once per epoch
    image_centric: bool  # all documents of an image in one window of the plan: our reading of IMAX
    image_window: int  # documents of such a window, about; two steps or so
    leave_out: str  # "name, other": all documents of these are left out; empty: none
    pseudo: bool  # documents whose answer a model generated are drawn too
    fraction: float  # of the images of each source, nested; 1: all
    fraction_seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Factors of the loss of single targets, before the sum of all weights of a step is made 1."""

    text: float  # of text targets, BOI and EOI included
    image: float  # of image codes
    tasks: str  # "VQA=2, Visual Chat=0.5": of all targets of a task's documents; others 1
    pseudo: float  # of all targets of a document whose answer a model generated

    @classmethod
    def off(cls) -> "LossWeights":
        return cls(text=1.0, image=1.0, tasks="", pseudo=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZLoss:
    """Coefficients of (log Z)^2, Z being the sum of exp of all logits of a position; 0: off."""

    text: float  # where the target is text
    image: float  # where it is an image code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    weights: LossWeights
    z: ZLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    peak_lr: float
    warmup_ratio: float  # of all steps
    final_lr_ratio: float  # of the peak, at the end of the cosine
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    skip_window: int  # steps against which a spike is measured; 0: no step is skipped
    skip_factor: float  # standard deviations above the mean of those steps
    schedule: str  # run | stage: what warm-up and cosine span
    accumulate: int  # microbatches per step, in sequence; 1: the complete batch at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    trains: str  # lora | full | image_head: Anole's stage, the image columns of lm_head
    init_from: str  # folder of base weights, or hf://ORG/NAME; empty: random weights
    steps: int
    loss_weight: str  # document | token
    residual_dropout: float  # of what attention and MLP add to the residual stream
    seed: int
    prng_impl: str  # threefry2x32 | rbg | unsafe_rbg
    compile: str  # default | gather: options of the TPU compiler, see step.py
    log_every: int  # steps
    eval_every: int  # steps; 0: never
    fisher_every: int  # steps; 0: never; training/fisher.py
    samples: int  # samples written at each evaluation; 0: none
    checkpoint_every: int  # steps
    keep: int  # checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    text_temperature: float
    text_top_p: float
    text_greedy: bool
    repetition_penalty: float
    image_temperature: float
    image_top_p: float
    image_greedy: bool
    guidance_scale_text: float
    guidance_scale_image: float
    max_gen_len: int  # text tokens
    budget: str  # answer | segment: what max_gen_len limits; segment: restarts after each image
    boi_ends: bool  # an opened image ends the answer, as with Meta's extra_eos_tokens
    jacobi_window: int  # codes of an image per pass of the model, at most; 0: one
    jacobi_rule: str  # gumbel | speculative: how drafts are verified, see generation/jacobi.py
    jacobi_init: str  # repeat | horizontal | vertical | random: the first drafts
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run, with settings in place of the run's; a field that a file omits is the run's.

    `mixing`, `condition_dropout` and `loss_weights` are of config.mixing, config.data and
    config.loss.
    """

    steps: int
    mixing: Mixing
    condition_dropout: ConditionDropout
    loss_weights: LossWeights
    view: str  # as vq.view, which the records of all stages have: stated only to be checked
    trains: str  # "q_proj, mlp": parameters with such a part in their name; empty: all that train
    records: str  # in place of data.train; may be made once the stage before has ended


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    vocab: Vocab
    model: Model
    vq: VQ
    lora: Lora
    mesh: Mesh
    data: Data
    mixing: Mixing
    loss: Loss
    optim: Optim
    train: Train
    sample: Sample
    stages: tuple[Stage, ...]  # in sequence; none: the settings above from first to last step


VIEWS = ("released", "pad")  # of an image, see models/images.py
CHOICES = {
    "model.param_dtype": ("float32", "bfloat16"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.quant": ("none", "int8", "int4", "nf4"),
    "model.remat": ("none", "dots", "qkv_attn", "attn", "attn_offload", "all"),
    "model.attention": ("xla", "splash", "splash_interpret", "cudnn"),
    "data.mask": ("answers", "release"),
    "mixing.by": ("source", "task"),
    "mixing.unit": ("documents", "tokens"),
    "optim.schedule": ("run", "stage"),
    "vq.view": VIEWS,
    "vq.answer_view": VIEWS,
    "sample.budget": ("answer", "segment"),
    "sample.jacobi_rule": ("speculative", "gumbel"),
    "sample.jacobi_init": ("repeat", "horizontal", "vertical", "random"),
    "train.trains": ("lora", "full", "image_head"),
    "train.loss_weight": ("document", "token"),
    "train.prng_impl": ("threefry2x32", "rbg", "unsafe_rbg"),
    "train.compile": ("default", "gather"),
}
# Smallest and largest value of the numbers that set the size of a model, far above any published
# one. The settings of an external file are checked against them before anything is built from it.
BOUNDS = {
    "vocab.size": (1, 1 << 22),
    "vocab.image_codes": (1, 1 << 20),
    "vocab.text_start": (0, 1 << 22),
    "model.hidden_size": (1, 1 << 17),
    "model.num_layers": (1, 1 << 10),
    "model.num_heads": (1, 1 << 12),
    "model.num_kv_heads": (1, 1 << 12),
    "model.head_dim": (1, 1 << 13),
    "model.intermediate_size": (1, 1 << 20),
    "model.context_length": (1, 1 << 34),  # sizes the KV cache alone, whose error explains itself
    "model.rope_theta": (1e-3, 1e12),
    "model.rms_norm_eps": (0.0, 1.0),
    "model.qk_norm_eps": (0.0, 1.0),
    "model.qk_norm_shards": (1, 1 << 12),
    "vq.image_size": (1, 1 << 14),
    "vq.channels": (1, 1 << 13),
    "vq.channel_mult": (1, 64),
    "vq.num_res_blocks": (1, 8),
    "vq.z_channels": (1, 1 << 13),
    "vq.embed_dim": (1, 1 << 13),
    "vq.num_codes": (1, 1 << 20),
    "vq.norm_groups": (1, 1 << 13),
    "lora.rank": (0, 1 << 14),
    "lora.alpha": (-1e6, 1e6),
    "lora.dropout": (0.0, 1.0),
    "mesh.data": (1, 1 << 20),
    "mesh.fsdp": (1, 1 << 20),
}
# Fields that older configs, runs and checkpoints lack, with the value that they meant.
ADDED = {
    "data.condition_dropout": {"text": 0.0, "image": 0.0, "all": 0.0},
    "mixing.pseudo": True,
    "lossweights.pseudo": 1.0,
    "stage.records": "",
    "mixing.image_window": 256,
    "run.loss": {
        "weights": {"text": 1.0, "image": 1.0, "tasks": "", "pseudo": 1.0},
        "z": {"text": 0.0, "image": 0.0},
    },
    "train.residual_dropout": 0.0,
    "train.fisher_every": 0,
    "optim.schedule": "run",
    **{"sample.jacobi_window": 0, "sample.jacobi_rule": "gumbel", "sample.jacobi_init": "vertical"},
    "run.stages": [],
    "vq.view": "released",
    "vq.answer_view": "released",
    "layout.view": "released",  # of records
    "layout.answer_view": "released",
    "settings.view": "",  # of an evaluation
}
RULES = config_fields.Rules(bounds=BOUNDS, added=ADDED)
MAX_POSITIONS = 1 << 24  # RoPE computes in fp32, which has no odd numbers beyond
STAGE_SEED = 1 << 20  # added to data.seed for each stage, so that no two have the same order


def build(cls: type, config: Any) -> Any:
    """Return the settings of a ConfigDict or dict.

    Raises ConfigError on unknown, missing and mistyped fields, and on numbers outside BOUNDS.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    return config_fields.build(cls, values, "config", RULES)


def check_bounds(name: str, value: Any, where: str) -> None:
    """Raise ConfigError unless `value` is within BOUNDS[name]; `where` appears in the message."""
    config_fields.check_bounds(BOUNDS[name], value, where)


def from_config_dict(config: ConfigDict | dict[str, Any]) -> Run:
    """Return the typed run of a config; also raises ConfigError on contradictory settings."""
    settings = config.to_dict() if isinstance(config, ConfigDict) else config
    stages = settings.get("stages", ()) if isinstance(settings, dict) else ()
    run = build(Run, settings | {"stages": ()} if stages else settings)
    own = {
        "mixing": dataclasses.asdict(run.mixing),
        "condition_dropout": dataclasses.asdict(run.data.condition_dropout),
        "loss_weights": dataclasses.asdict(run.loss.weights),
        "view": run.vq.view,
        "trains": "",
        "records": "",
    }
    if isinstance(stages, (list, tuple)):
        stages = [merge(own, stage) for stage in stages]
    stages = config_fields.convert(tuple[Stage, ...], stages, "config.stages", RULES)
    run = dataclasses.replace(run, stages=stages)
    check(run)
    return run


def run_of_stage(run: Run, number: int) -> Run:
    """Return the run that a stage is by itself: its settings and steps, and no stages."""
    stage = run.stages[number]
    return dataclasses.replace(
        run,
        data=data_of_stage(run.data, stage, number),
        mixing=stage.mixing,
        loss=dataclasses.replace(run.loss, weights=stage.loss_weights),
        train=dataclasses.replace(run.train, steps=stage.steps),
        stages=(),
    )


def data_of_stage(data: Data, stage: Stage, number: int) -> Data:
    """Return the settings of a stage's rows; those of stage 0 have the run's seed."""
    return dataclasses.replace(
        data,
        train=stage.records or data.train,
        condition_dropout=stage.condition_dropout,
        seed=data.seed + STAGE_SEED * number,
        plan="",
    )


def check(run: Run) -> None:
    """Raise ConfigError on a value outside its choices and on contradictory settings."""
    for name, allowed in CHOICES.items():
        section, field = name.split(".")
        value = getattr(getattr(run, section), field)
        _rule(value in allowed, name, value, f"one of {', '.join(allowed)}")
    check_model(run.model, run.vocab, run.vq)
    _check_sizes(run)
    check_condition_dropout(run.data.condition_dropout)
    check_loss_weights(run.loss.weights)
    rate = run.train.residual_dropout
    _rule(0 <= rate < 1, "train.residual_dropout", rate, "in [0, 1)")
    for name, value in dataclasses.asdict(run.loss.z).items():
        _rule(0 <= value < math.inf, f"loss.z.{name}", value, "at least 0, and finite")
    _check_stages(run)


def check_model(model: Model, vocab: Vocab, vq: VQ) -> None:
    """Raise ConfigError where the settings of a model contradict each other."""
    m, v = model, vocab
    for name in ("param_dtype", "compute_dtype", "quant", "remat", "attention"):
        allowed, value = CHOICES[f"model.{name}"], getattr(m, name)
        _rule(value in allowed, f"model.{name}", value, f"one of {', '.join(allowed)}")
    heads, shards = m.num_heads, m.qk_norm_shards
    _rule(heads % m.num_kv_heads == 0, "model.num_heads", heads, "divisible by num_kv_heads")
    requirement = "a divisor of num_kv_heads"
    _rule(m.num_kv_heads % shards == 0, "model.qk_norm_shards", shards, requirement)
    _rule(m.head_dim % 2 == 0, "model.head_dim", m.head_dim, "even: RoPE rotates pairs")
    _rule(v.size > v.text_start >= 8712, "vocab.text_start", v.text_start, "in 8712..vocab.size")
    _rule(0 < v.image_codes <= 8192, "vocab.image_codes", v.image_codes, "in 1..8192")
    requirement = f"{v.image_codes}, equal to vocab.image_codes"
    _rule(vq.num_codes == v.image_codes, "vq.num_codes", vq.num_codes, requirement)
    check_vq(vq)
    if m.quant in ("int4", "nf4"):
        for name in ("hidden_size", "intermediate_size"):
            _rule(getattr(m, name) % 64 == 0, f"model.{name}", getattr(m, name), "a multiple of 64")
        requirement = f"x head_dim a multiple of 64 for {m.quant}"
        _rule(m.num_heads * m.head_dim % 64 == 0, "model.num_heads", m.num_heads, requirement)


def check_vq(vq: VQ) -> None:
    """Raise ConfigError where the settings of a VQGAN contradict each other."""
    requirement = f"a multiple of vq.norm_groups = {vq.norm_groups}"
    _rule(vq.channels % vq.norm_groups == 0, "vq.channels", vq.channels, requirement)
    requirement = f"a multiple of {vq.downsampling}"
    _rule(vq.image_size % vq.downsampling == 0, "vq.image_size", vq.image_size, requirement)
    for name in ("vq.view", "vq.answer_view"):
        value = getattr(vq, name.split(".")[1])
        _rule(value in CHOICES[name], name, value, f"one of {', '.join(CHOICES[name])}")


def with_views_of(vq: VQ, run: Any) -> VQ:
    """Return `vq` with the views of a run's config as JSON has it, where that states any.

    Raises ConfigError where they are no views.
    """
    stated = run.get("vq") if isinstance(run, dict) else None
    names = {"view", "answer_view"} & set(stated) if isinstance(stated, dict) else ()
    changed = build(VQ, dataclasses.asdict(vq) | {name: stated[name] for name in names})
    check_vq(changed)
    return changed


def view_text(settings: Any) -> str:
    """Return the views of a VQ, or of the layout of records: "view pad, answer_view released"."""
    return f"view {settings.view}, answer_view {settings.answer_view}"


def view_warning(model: str, trained: VQ, used: VQ) -> str:
    """Return a warning if a model is used with other views than it was trained on, else ""."""
    if (trained.view, trained.answer_view) == (used.view, used.answer_view):
        return ""
    return (
        f"{model} was trained on images with {view_text(trained)}, but is used with "
        f"{view_text(used)}: it reads other pixels than it has learned, and may answer worse"
    )


def to_dict(settings: Any) -> dict[str, Any]:
    """Return a dict that JSON can encode; `from_config_dict(to_dict(run)) == run`."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def fingerprint(settings: Any) -> str:
    """Return twelve hex digits that change when any field changes."""
    canonical = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _check_sizes(run: Run) -> None:
    m, d = run.model, run.data
    # Positions restart with each document of a row.
    limit = min(d.seq_len, m.context_length, MAX_POSITIONS)
    requirement = f"in 1..{limit}: at most data.seq_len and model.context_length"
    requirement += f", and {MAX_POSITIONS}" if limit == MAX_POSITIONS else ""
    _rule(0 < d.document_limit <= limit, "data.document_limit", d.document_limit, requirement)
    unweighted = not (run.mixing.weights and run.mixing.image_centric)
    _rule(unweighted, "mixing.weights", run.mixing.weights, "empty when mixing.image_centric")
    _rule(run.mixing.image_window > 0, "mixing.image_window", run.mixing.image_window, "above 0")
    share = run.mixing.fraction
    _rule(0 < share <= 1, "mixing.fraction", share, "above 0 and at most 1")
    _rule(run.optim.accumulate > 0, "optim.accumulate", run.optim.accumulate, "above 0")
    rows = run.mesh.data * run.mesh.fsdp * run.optim.accumulate
    requirement = f"a multiple of data x fsdp x optim.accumulate = {rows}"
    _rule(d.batch_size % rows == 0, "data.batch_size", d.batch_size, requirement)
    lora, full = run.train.trains == "lora", run.train.trains == "full"
    rank, requirement = run.lora.rank, f"0 when train.trains is {run.train.trains}"
    _rule(not lora or rank > 0, "lora.rank", rank, "above 0 when train.trains is lora")
    _rule(lora or rank == 0, "lora.rank", rank, requirement)
    full_precision = m.param_dtype == "float32" or not full  # bfloat16 rounds small updates away
    _rule(full_precision, "model.param_dtype", m.param_dtype, "float32 when train.trains is full")
    if m.attention.startswith("splash"):
        _rule(d.seq_len % 128 == 0, "data.seq_len", d.seq_len, "a multiple of 128 for splash")
    supported = m.compute_dtype == "bfloat16" or m.attention != "cudnn"  # its kernels have no fp32
    requirement = "bfloat16 when model.attention is cudnn"
    _rule(supported, "model.compute_dtype", m.compute_dtype, requirement)
    unquantized = m.quant == "none"  # convert makes quantized matrices; a full export has none
    requirement = f"none when train.trains is {run.train.trains}"
    _rule(unquantized or lora, "model.quant", m.quant, requirement)
    has_base, requirement = bool(run.train.init_from), f"set when model.quant is {m.quant}"
    _rule(unquantized or has_base, "train.init_from", "", requirement)
    _rule(0 <= run.lora.dropout < 1, "lora.dropout", run.lora.dropout, "in [0, 1)")
    warmup = run.optim.warmup_ratio
    _rule(0 <= warmup < 1, "optim.warmup_ratio", warmup, "in [0, 1)")
    window, factor = run.optim.skip_window, run.optim.skip_factor
    _rule(window == 0 or window > 1, "optim.skip_window", window, "0, or above 1")
    _rule(not window or factor > 0, "optim.skip_factor", factor, "above 0")
    for name in ("eval_every", "fisher_every", "samples"):
        value = getattr(run.train, name)
        _rule(value >= 0, f"train.{name}", value, "at least 0")
    measured, trains = run.train.fisher_every, run.train.trains
    _rule(lora or not measured, "train.fisher_every", measured, f"0 when train.trains is {trains}")
    samples_possible = not run.train.samples or bool(run.train.init_from and run.data.validation)
    requirement = "0 unless train.init_from (its tokenizer and VQGAN) and data.validation are set"
    _rule(samples_possible, "train.samples", run.train.samples, requirement)
    for name in ("steps", "log_every", "checkpoint_every", "keep"):
        _rule(getattr(run.train, name) > 0, f"train.{name}", getattr(run.train, name), "above 0")


def _check_stages(run: Run) -> None:
    for number, stage in enumerate(run.stages):
        _rule(stage.steps > 0, f"stages[{number}].steps", stage.steps, "above 0")
        requirement = f"{run.vq.view}, as vq.view: the records of a run have one view"
        _rule(stage.view == run.vq.view, f"stages[{number}].view", stage.view, requirement)
        first = not (stage.records and number == 0)
        _rule(first, "stages[0].records", stage.records, "empty: stage 0 reads data.train")
        try:
            check(run_of_stage(run, number))
        except ConfigError as error:
            raise ConfigError(f"config.stages[{number}]: {error}") from error
    if run.stages:
        steps = [stage.steps for stage in run.stages]
        requirement = f"{run.train.steps} in all, equal to train.steps, not {sum(steps)}"
        _rule(sum(steps) == run.train.steps, "stages: steps", steps, requirement)


def check_condition_dropout(dropout: ConditionDropout) -> None:
    """Raise ConfigError where a number is no probability, or all sum to more than 1."""
    probabilities = dataclasses.asdict(dropout)
    for name, value in probabilities.items():
        requirement = "a probability, in 0..1"
        _rule(0 <= value <= 1, f"data.condition_dropout.{name}", value, requirement)
    requirement = "such that text, image and all sum to at most 1"
    within = sum(probabilities.values()) <= 1
    _rule(within, "data.condition_dropout", probabilities, requirement)


def check_loss_weights(weights: LossWeights) -> None:
    """Raise ConfigError on a factor that is negative or not finite, and where both are 0."""
    for name in ("text", "image", "pseudo"):
        value = getattr(weights, name)
        _rule(0 <= value < math.inf, f"loss.weights.{name}", value, "at least 0, and finite")
    both = {"text": weights.text, "image": weights.image}
    requirement = "above 0 for text or image, else nothing trains"
    _rule(any(both.values()), "loss.weights", both, requirement)
    task_weights(weights)


def task_weights(weights: LossWeights) -> dict[str, float]:
    """Return the factor of each task that is named: {"VQA": 2.0, "Visual Chat": 0.5}."""
    parsed: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in weights.tasks.split(","))):
        name, _, number = (word.strip() for word in part.rpartition("="))
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        valid = bool(name) and name not in parsed and 0 <= value < math.inf
        requirement = "name=number pairs separated by commas, each task once and at least 0: "
        _rule(valid, "loss.weights.tasks", weights.tasks, f"{requirement}{part!r} is not")
        parsed[name] = value
    return parsed


def _rule(holds: bool, name: str, value: Any, requirement: str) -> None:
    if not holds:
        raise ConfigError(f"config.{name} is {quoted(value)}; it must be {requirement}")
