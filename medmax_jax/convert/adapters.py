"""LoRA adapters: PEFT's layout, this project's, and a training run's.

PEFT      adapter_config.json {"peft_type": "LORA", "r", "lora_alpha", ..}
          adapter_model.safetensors   base_model.model.model.layers.3.mlp.up_proj.lora_A.weight
          medmax_jax.json             the facts below; PEFT ignores it
native    adapter_config.json {"rank", "alpha", "dropout"} and the facts below
          adapter.safetensors         layers.mlp.up_proj.lora_a, the layers stacked
a run     adapter/ of a finished run, else the newest valid checkpoint

facts     base    fingerprint of the weights it was trained on, see state_dict.fingerprint
          data    fingerprint of the records; sources, credentials: documents of each
          step, config
"""

import dataclasses
import json
import math
import re
from collections.abc import Collection
from typing import Any

import numpy as np

from medmax_jax.checkpoints import export, manager
from medmax_jax.checkpoints.resume import config_sections
from medmax_jax.config import BOUNDS, ConfigError, Lora, build, to_dict, with_views_of
from medmax_jax.convert import safetensors_stream
from medmax_jax.convert.state_dict import (
    DTYPES,
    Adapter,
    Checkpoint,
    ConvertError,
    LazyTensor,
    check_dtype,
    check_gathered,
    number,
    section,
)
from medmax_jax.io.errors import printable, quoted
from medmax_jax.storage import hub
from medmax_jax.storage.folder import Folder

CONFIG, FACTS = "adapter_config.json", "medmax_jax.json"
MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
PLAIN = dict(  # a LoRA whose delta is lora_alpha / r x B A and nothing else
    peft_type="LORA", bias="none", use_rslora=False, use_dora=False, fan_in_fan_out=False,
    rank_pattern={}, alpha_pattern={}, modules_to_save=None, lora_bias=False,
)  # fmt: skip
# The settings of adapter_config.json that an adapter may have here. Every other one, including
# those of later PEFT versions, must be neutral: null, false, 0, or empty.
UNDERSTOOD = {  # computed here, each by `_scales` or `_check_targets`
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules",
}  # fmt: skip
WITHOUT_EFFECT = {  # no effect on the B A that is added to the weights; any value
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "qalora_group_size", "runtime_config",
}  # fmt: skip
NEUTRAL = {  # where the neutral value is not null, false, 0 or empty
    "peft_type": ("LORA",),
    "bias": ("none",),
    # All of these start from B A = 0 on the base's own weights, so the sum belongs to that base.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "megatron_core": ("megatron.core",),
}
_CHANGES_BASE = (
    "starts from other base weights or is not known to start from the base's own (LoftQ, PiSSA, "
    "OLoRA, CorDA and LoRA-GA change them)"
)
_SOME_LAYERS = "adds adapters to some modules or layers only"
_MORE_WEIGHTS = "trains weights other than the LoRA matrices"
# why a setting is refused, where "changes what the adapter computes" is not specific enough
REASONS = {
    "init_lora_weights": _CHANGES_BASE, "loftq_config": _CHANGES_BASE, "eva_config": _CHANGES_BASE,
    "corda_config": _CHANGES_BASE, "lora_ga_config": _CHANGES_BASE,
    "layers_to_transform": _SOME_LAYERS, "layers_pattern": _SOME_LAYERS,
    "exclude_modules": _SOME_LAYERS, "target_parameters": _SOME_LAYERS,
    "layer_replication": "repeats layers of the base",
    "modules_to_save": _MORE_WEIGHTS, "trainable_token_indices": _MORE_WEIGHTS,
    "bias": _MORE_WEIGHTS, "lora_bias": _MORE_WEIGHTS,
    "alora_invocation_tokens": "is active only after these tokens",
    "use_dora": "also scales the columns of each weight (DoRA)",
}  # fmt: skip
MAX_LAYERS = BOUNDS["model.num_layers"][1]
MAX_PATTERNS = 4_096  # entries of rank_pattern, alpha_pattern, target_modules
# A key of a pattern is a regular expression in PEFT. Keys of this form cannot take exponential
# time.
_KEY = re.compile(r"\^?(?:[\w.]|\\\.){1,200}")
_PEFT = re.compile(
    r"base_model\.model\.(model\.layers\.[0-9]{1,4}\.[\w.]{1,40})\.lora_([AB])\.weight"
)
_LORA = ("rank", "alpha", "dropout")


def find(folder: Folder) -> Folder | None:
    """Return the adapter folder at this path or in a run's `adapter`; None if there is none."""
    if folder.has(CONFIG):
        return folder
    inside = Folder(f"{folder.path.rstrip('/')}/adapter")
    return inside if inside.has(CONFIG) else None


def read_adapter(folder: Folder) -> Adapter:
    """Read an adapter of either layout; raise ConvertError on one that is not plain LoRA."""
    config = folder.json(CONFIG)
    if not isinstance(config, dict):
        raise ConvertError(f"{folder.path}/{CONFIG}: not a table of settings; copy it again")
    return _read_peft(folder, config) if "peft_type" in config else _read_native(folder, config)


def read_checkpoint(folder: Folder) -> Adapter:
    """Read the adapters of a run's newest valid checkpoint."""
    where = f"{folder.path.rstrip('/')}/checkpoints"
    step, arrays, meta = manager.read_latest(where)
    config = section(section(meta, "config", where), "train", where)
    if config.get("trains") != "lora":
        raise ConvertError(
            f"{folder.path}: an unfinished run that trains all weights; convert its model/ folder "
            "when it has finished"
        )
    prefix = "trainable."
    stacks = {
        name.removeprefix(prefix): _in_memory(np.asarray(array), f"{where}/{step}: {name}")
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    metadata = {
        k: meta[k] for k in ("base", "data", "sources", "credentials", "config") if k in meta
    }
    return Adapter(
        layout="native", path=folder.path, lora=build(Lora, meta["config"].get("lora")),
        matrices=_unstacked(folder.path, stacks),
        facts=_checked_facts(metadata | {"step": step}, where),
    )  # fmt: skip


def write_peft(folder: Folder, adapter: Adapter, *, base_name: str) -> None:
    """Write a folder for peft.PeftModel.from_pretrained; `base_name`: the path of its base.

    Of a repository on the hub the config has the name and the commit, as peft reads them.
    """
    _check_uniform(adapter)
    address, revision = hub.origin(base_name), None
    if address.startswith(hub.SCHEME) and not (found := hub.parse(address)).part:
        base_name, revision = found.repo, found.revision
    tensors = {}
    for name, pair in adapter.matrices.items():
        module = name.removesuffix(".weight")
        for letter, tensor in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = tensor
    target_modules = sorted({name.split(".")[-2] for name in adapter.matrices})
    config = PLAIN | dict(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        revision=revision,
        r=adapter.lora.rank,
        lora_alpha=_as_int(adapter.lora.alpha),
        lora_dropout=adapter.lora.dropout,
        target_modules=target_modules,
        inference_mode=True,
        init_lora_weights=True,
    )
    safetensors_stream.write_file(folder, "adapter_model.safetensors", tensors, progress=_silent)
    folder.write(FACTS, [_json(adapter.facts)])
    folder.write(CONFIG, [_json(config)])


def write_native(folder: Folder, adapter: Adapter, *, layers: int) -> None:
    """Write an adapter folder for train and generate; every layer must have all seven modules."""
    _check_uniform(adapter)
    stacks = {}
    for module in MODULES:
        names = [f"model.layers.{i}.{module}.weight" for i in range(layers)]
        if missing := [n for n in names if n not in adapter.matrices]:
            raise ConvertError(
                f"{adapter.path}: has no LoRA on {missing[0]} ({len(missing)} missing); a native "
                f"adapter requires all of {', '.join(MODULES)}; merge this one (--format hf)"
            )
        for i, leaf in enumerate(("lora_a", "lora_b")):
            pair = [adapter.matrices[n][i] for n in names]
            stack = np.stack([t.read().astype(np.float32).T for t in pair])
            stacks[f"layers.{module}.{leaf}"] = _in_memory(stack, adapter.path)
    safetensors_stream.write_file(folder, "adapter.safetensors", stacks, progress=_silent)
    folder.write(CONFIG, [_json(to_dict(adapter.lora) | adapter.facts)])


def _read_native(folder: Folder, config: dict[str, Any]) -> Adapter:
    where = f"{folder.path}/{CONFIG}"
    try:
        lora = build(Lora, {name: config[name] for name in _LORA})
    except (KeyError, ConfigError) as error:
        raise ConvertError(f"{where}: {error}; export the adapter again") from error
    if not lora.rank:
        raise ConvertError(f"{where}: rank is 0; export the adapter again")
    stacks = safetensors_stream.read_file(folder.file("adapter.safetensors"))
    check_gathered(f"{folder.path}/adapter.safetensors", stacks)
    facts = {name: value for name, value in config.items() if name not in _LORA}
    matrices = _unstacked(folder.path, stacks)
    _check_rank(folder.path, matrices, {name: lora.rank for name in matrices})
    facts = _checked_facts(facts, where)
    return Adapter(layout="native", path=folder.path, lora=lora, matrices=matrices, facts=facts)


def _read_peft(folder: Folder, config: dict[str, Any]) -> Adapter:
    where = f"{folder.path}/{CONFIG}"
    check_plain(config, where)
    rank = number(config, "r", "lora.rank", where)
    alpha = float(number(config, "lora_alpha", "lora.alpha", where))
    dropout = float(number(config, "lora_dropout", "lora.dropout", where, 0.0))
    if not rank:
        raise ConvertError(f"{where}: r is 0; it must be at least 1")
    if folder.has("adapter_model.safetensors"):
        tensors = safetensors_stream.read_file(folder.file("adapter_model.safetensors"))
    else:
        tensors = safetensors_stream.read_torch(folder.file("adapter_model.bin"))
    check_gathered(folder.path, tensors)
    facts = folder.json(FACTS) if folder.has(FACTS) else {}
    matrices = _paired(folder.path, tensors)
    _check_targets(where, config.get("target_modules"), matrices)
    ranks, scales = _scales(config, matrices, where, rank=rank, alpha=alpha)
    _check_rank(folder.path, matrices, ranks)
    # The alpha that plain LoRA of this rank needs for the same sum: rsLoRA divides by the root of
    # r.
    plain_alpha = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    lora = Lora(rank=rank, alpha=plain_alpha, dropout=dropout)
    return Adapter(
        layout="peft", path=folder.path, lora=lora, matrices=matrices, scales=scales,
        facts=_checked_facts(facts, f"{folder.path}/{FACTS}"),
    )  # fmt: skip


def check_plain(config: dict[str, Any], where: str) -> None:
    """Raise ConvertError, by its name, at a setting of PEFT that is not supported here."""
    if "peft_type" in config and config["peft_type"] not in NEUTRAL["peft_type"]:
        raise ConvertError(
            f"{where}: peft_type is {quoted(config['peft_type'])}; only LORA is supported"
        )
    if type(config.get("use_rslora", False)) is not bool:
        raise ConvertError(
            f"{where}: use_rslora is {quoted(config['use_rslora'])}; it must be true or false"
        )
    for name, value in config.items():
        if name in UNDERSTOOD or name in WITHOUT_EFFECT:
            continue
        allowed = NEUTRAL.get(name)
        neutral = value is None or (value in allowed if allowed else not value)
        if not neutral:
            reason = REASONS.get(name, "changes what the adapter computes")
            raise ConvertError(
                f"{where}: {printable(name, 80)} is {quoted(value)}, which {reason}; only plain "
                "LoRA is supported. Merge the adapter into its base with peft instead "
                "(merge_and_unload)"
            )


def _scales(
    config: dict[str, Any],
    names: Collection[str],
    where: str,
    *,
    rank: int,
    alpha: float,
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the rank of each matrix, and the factor of its B A, as PEFT computes them.

    With {"q_proj": 8} as rank_pattern and r 4, lora_alpha 6: 6 / 8 in q_proj, 6 / 4 elsewhere; with
    use_rslora 6 / sqrt(8) and 6 / sqrt(4).
    """
    rank_patterns = _patterns(config, "rank_pattern", "lora.rank", where)
    alpha_patterns = _patterns(config, "alpha_pattern", "lora.alpha", where)
    ranks, scales = {}, {}
    for name in names:
        module = name.removesuffix(".weight")
        ranks[name] = r = _matched(rank_patterns, module, rank)
        if not r:
            raise ConvertError(
                f"{where}: rank_pattern sets the rank of {module} to 0; it must be above 0"
            )
        divisor = math.sqrt(r) if config.get("use_rslora") else r
        scales[name] = _matched(alpha_patterns, module, alpha) / divisor
    return ranks, scales


def _patterns(
    config: dict[str, Any], name: str, bound: str, where: str
) -> list[tuple[re.Pattern, Any]]:
    """Return (regular expression, value) of a pattern in its order; the first match counts."""
    patterns = []
    table = section(config, name, where)
    if len(table) > MAX_PATTERNS:
        raise ConvertError(f"{where}: {name} has {len(table)} entries, more than {MAX_PATTERNS}")
    for key in table:
        if not _KEY.fullmatch(key):
            raise ConvertError(
                f"{where}: {name} has the key {quoted(key)}; only module names, optionally after "
                "^, are supported. Merge the adapter with peft instead (merge_and_unload)"
            )
        value = number(table, key, bound, f"{where}: {name}")
        patterns.append((re.compile(rf"(.*\.)?({key})$"), value))  # PEFT's get_pattern_key
    return patterns


def _matched(patterns: list[tuple[re.Pattern, Any]], module: str, default: Any) -> Any:
    return next((value for key, value in patterns if key.match(module)), default)


def _check_targets(where: str, targets: Any, names: Collection[str]) -> None:
    """Raise ConvertError where target_modules and the matrices of the file disagree.

    A list names modules by their last parts; a text ("all-linear", a regular expression) is not
    evaluated. `check_base` checks against the base that all layers have a matrix.
    """
    if targets is None or isinstance(targets, str):
        return
    is_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not is_list or len(targets) > MAX_PATTERNS:
        raise ConvertError(
            f"{where}: target_modules is {quoted(targets)}; it must be a list of names"
        )
    modules = {name.removesuffix(".weight") for name in names}
    ends = {m[i:] for m in modules for i, c in enumerate("." + m) if c == "."}
    if absent := sorted(set(targets) - ends):
        raise ConvertError(
            f"{where}: target_modules has {quoted(absent[0])}, but the file has no matrices of it; "
            "the copy is incomplete, or config and weights belong to different adapters"
        )
    if other := sorted(m for m in modules if not any(f".{m}".endswith(f".{t}") for t in targets)):
        raise ConvertError(
            f"{where}: the file has matrices of {other[0]}, which is not in target_modules; "
            "config and weights belong to different adapters"
        )


def _check_uniform(adapter: Adapter) -> None:
    """Raise ConvertError unless one rank and one factor apply to all matrices."""
    factor = adapter.lora.alpha / adapter.lora.rank
    for name, (a, _) in adapter.matrices.items():
        if a.shape[0] != adapter.lora.rank or not math.isclose(adapter.scale(name), factor):
            raise ConvertError(
                f"{adapter.path}: {name} has rank {a.shape[0]} and factor {adapter.scale(name):g}, "
                f"others {adapter.lora.rank} and {factor:g} (rank_pattern, alpha_pattern); only "
                "merging supports different ranks or factors (--format hf, --base)"
            )


def _checked_facts(facts: Any, where: str) -> dict[str, Any]:
    """Return the facts of an adapter; raise ConvertError unless they are as described above."""
    valid = isinstance(facts, dict) and all(
        isinstance(facts.get(name, ""), str) for name in ("base", "data")
    )
    valid = valid and type(facts.get("step", 0)) is int
    for name in ("sources", "credentials"):
        table = facts.get(name, {}) if valid else {}
        valid = valid and isinstance(table, dict) and all(type(n) is int for n in table.values())
    try:
        config_sections(facts.get("config", {}) if valid else None)
    except ValueError:
        raise ConvertError(
            f"{where}: base, data, step, sources, credentials or config has an invalid type; "
            "export the adapter again"
        ) from None
    return facts


def _paired(path: str, tensors: dict[str, LazyTensor]) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    pairs: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        match = _PEFT.fullmatch(name)
        if not match or not match[1].endswith(MODULES):
            raise ConvertError(
                f"{path}: {printable(name, 80)} is unexpected; LoRA is supported only on "
                f"{', '.join(MODULES)}"
            )
        check_dtype(tensor.dtype, tensor.where)
        pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ConvertError(f"{path}: {name} has only lora_{min(pair)}; the copy is incomplete")
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


def _unstacked(
    path: str, stacks: dict[str, LazyTensor]
) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """Return each layer's A [R, in] and B [out, R] of arrays [L, in, R] and [L, R, out]."""
    expected = {f"layers.{module}.{leaf}" for module in MODULES for leaf in ("lora_a", "lora_b")}
    if wrong := sorted(expected ^ set(stacks)):
        name = printable(wrong[0], 80)
        raise ConvertError(f"{path}: {name} is missing or unexpected; not a native adapter")
    matrices = {}
    for module in MODULES:
        a, b = (stacks[f"layers.{module}.{leaf}"] for leaf in ("lora_a", "lora_b"))
        for tensor in (a, b):
            check_dtype(tensor.dtype, tensor.where)
        stacked = len(a.shape) == len(b.shape) == 3 and a.shape[0] == b.shape[0] <= MAX_LAYERS
        if not stacked:
            shapes = f"{quoted(a.shape)} and {quoted(b.shape)}"
            raise ConvertError(
                f"{path}: {module} has the shapes {shapes}, which are not stacks of matrices"
            )
        for i in range(a.shape[0]):
            matrices[f"model.layers.{i}.{module}.weight"] = (_layer(a, i), _layer(b, i))
    return matrices


def _layer(stack: LazyTensor, i: int) -> LazyTensor:
    """Return layer i of a stack, transposed."""

    def block(rows: slice, columns: slice) -> np.ndarray:
        return stack.block(slice(i, i + 1), slice(None))[0].T[rows, columns]

    return LazyTensor(stack.shape[:0:-1], stack.dtype, block, stack.where)


def _check_rank(
    path: str, matrices: dict[str, tuple[LazyTensor, LazyTensor]], ranks: dict[str, int]
) -> None:
    for name, (a, b) in matrices.items():
        if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == ranks[name]:
            raise ConvertError(
                f"{path}: {name} has A {quoted(a.shape)} and B {quoted(b.shape)}, but {CONFIG} has "
                f"rank {ranks[name]}; config and weights belong to different adapters"
            )


def _in_memory(array: np.ndarray, where: str) -> LazyTensor:
    def block(rows: slice, columns: slice) -> np.ndarray:
        return array[rows] if array.ndim == 1 else array[rows, columns]

    return LazyTensor(array.shape, "F32", block, where)


def _as_int(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


def _silent(_: int) -> None:
    """Report no progress, because adapters are small."""


# ---- merge ----
#
# Merging adapters into the weights they were trained on: W + alpha / rank B A, in fp32, rounded
# once.


def check_base(adapter: Adapter, base: Checkpoint) -> str:
    """Return the adapter's identity of its base; raise ConvertError if it has another base."""
    if base.quant != "none":
        raise ConvertError(
            f"{base.path}: its matrices are quantized to {base.quant}; set --base to the original "
            "weights"
        )
    for name, (a, b) in adapter.matrices.items():
        shape = (b.shape[0], a.shape[1])
        base_shape = base.language[name].shape if name in base.language else None
        if base_shape != shape:
            raise ConvertError(
                f"{adapter.path}: {name} has shape {shape}, but in {base.path} it is {base_shape}; "
                "the adapter belongs to another base"
            )
    _check_all_layers(adapter, base)
    fingerprints = [base.fingerprint]
    if (
        base.layout == "native"
    ):  # the file of a small model has its own identity, see export.base_fingerprint
        fingerprints.insert(0, export.base_fingerprint(base.path))
    expected = adapter.facts.get("base", fingerprints[0])
    if expected not in fingerprints:
        raise ConvertError(
            f"{adapter.path}: was trained on base weights {expected[:12]}, but {base.path} has "
            f"{fingerprints[0][:12]}; set --base to the weights that it was trained on"
        )
    return expected


def _check_all_layers(adapter: Adapter, base: Checkpoint) -> None:
    """Raise ConvertError where a module has matrices in some layers and none in others."""
    modules = {name.split(".", 3)[3] for name in adapter.matrices}
    expected = (f"model.layers.{i}.{m}" for m in modules for i in range(base.model.num_layers))
    if missing := sorted(name for name in expected if name not in adapter.matrices):
        raise ConvertError(
            f"{adapter.path}: has no LoRA on {missing[0]}, but on that module of other layers "
            f"({len(missing)} missing); the copy is incomplete, copy the adapter again"
        )


SAMPLED_MATRICES, SAMPLED_ROWS = 8, 64  # in kept_share


def merged(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Return the base with the adapter merged into its matrices, each in its own dtype.

    Its images have the views that the adapter was trained on.
    """
    language = dict(base.language)
    for name, (a, b) in adapter.matrices.items():
        language[name] = _sum(language[name], a, b, np.float32(adapter.scale(name)))
    vq = with_views_of(base.vq, adapter.facts.get("config"))
    return dataclasses.replace(base, language=language, vq=vq)


def kept_share(base: Checkpoint, adapter: Adapter) -> float:
    """Return the share of the adapter's change that is left after rounding to the base's dtype.

    A change below half of the distance between two numbers of bfloat16 rounds back to the old
    weight. Estimated from some rows of a few matrices.
    """
    kept = total = 0.0
    names = sorted(adapter.matrices)
    for name in names[:: max(1, len(names) // SAMPLED_MATRICES)]:
        (a, b), weight = adapter.matrices[name], base.language[name]
        rows, columns = slice(0, SAMPLED_ROWS), slice(0, weight.shape[1])
        left = b.block(rows, slice(None)).astype(np.float32)
        right = a.block(slice(0, a.shape[0]), columns).astype(np.float32)
        delta = np.float32(adapter.scale(name)) * (left @ right)
        old = weight.block(rows, columns).astype(np.float32)
        new = (old + delta).astype(DTYPES[weight.dtype]).astype(np.float32)
        kept, total = kept + float(((new - old) * delta).sum()), total + float((delta**2).sum())
    return kept / total if total else 1.0


def _sum(weight: LazyTensor, a: LazyTensor, b: LazyTensor, scale: np.float32) -> LazyTensor:
    def block(rows: slice, columns: slice) -> np.ndarray:
        left = b.block(rows, slice(None)).astype(np.float32)
        right = a.block(slice(0, a.shape[0]), columns).astype(np.float32)
        total = weight.block(rows, columns).astype(np.float32) + scale * (left @ right)
        return total.astype(DTYPES[weight.dtype])

    return LazyTensor(weight.shape, weight.dtype, block, weight.where)
