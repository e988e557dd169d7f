"""LoRA adapters: PEFT's layout, this project's, and a training run's.

PEFT      adapter_config.json {"peft_type": "LORA", "r", "lora_alpha", ..}
          adapter_model.safetensors   base_model.model.model.layers.3.mlp.up_proj.lora_A.weight
          medmax_jax.json             the facts below; PEFT leaves it alone
native    adapter_config.json {"rank", "alpha", "dropout"} and the facts below
          adapter.safetensors         layers.mlp.up_proj.lora_a, the layers stacked
a run     adapter/ of a finished one, else the newest sound checkpoint

facts     base    fingerprint of the weights it was trained on, see form.digest
          data    fingerprint of the records; sources, credentials: documents of each
          step, config
"""

import json
import re
from typing import Any

import numpy as np

from medmax_jax import checkpoint
from medmax_jax.config import ConfigError, Lora, build, to_dict
from medmax_jax.convert import meta_vqgan, tensor_files
from medmax_jax.convert.form import Adapter, ConvertError, Tensor, check_dtype
from medmax_jax.storage import Folder

CONFIG, FACTS = "adapter_config.json", "medmax_jax.json"
MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
PLAIN = dict(  # a LoRA whose delta is lora_alpha / r x B A and nothing else
    peft_type="LORA", bias="none", use_rslora=False, use_dora=False, fan_in_fan_out=False,
    rank_pattern={}, alpha_pattern={}, modules_to_save=None, lora_bias=False,
)  # fmt: skip
_PEFT = re.compile(r"base_model\.model\.(model\.layers\.\d+\.[\w.]+)\.lora_([AB])\.weight")
_LORA = ("rank", "alpha", "dropout")


def find(folder: Folder) -> Folder | None:
    """The adapter folder that is here or in a run's `adapter`; None where there is none."""
    if folder.has(CONFIG):
        return folder
    inside = Folder(f"{folder.path.rstrip('/')}/adapter")
    return inside if inside.has(CONFIG) else None


def read(folder: Folder) -> Adapter:
    """An adapter of either layout; raises ConvertError on one that is not plain LoRA."""
    config = folder.json(CONFIG)
    if not isinstance(config, dict):
        raise ConvertError(f"{folder.path}/{CONFIG}: no table of settings; copy it again")
    return _read_peft(folder, config) if "peft_type" in config else _read_native(folder, config)


def read_checkpoint(folder: Folder) -> Adapter:
    """The adapters of a run's newest sound checkpoint."""
    where = f"{folder.path.rstrip('/')}/checkpoints"
    step, arrays, meta = checkpoint.newest(where)
    if meta["config"]["train"]["trains"] != "lora":
        raise ConvertError(
            f"{folder.path}: trains a whole model and has not finished; convert its model/ then"
        )
    prefix = "trainable."
    stacks = {
        name.removeprefix(prefix): _in_memory(np.asarray(array), f"{where}/{step}: {name}")
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    facts = {k: meta[k] for k in ("base", "data", "sources", "credentials", "config") if k in meta}
    return Adapter(
        layout="native", path=folder.path, lora=build(Lora, meta["config"]["lora"]),
        matrices=_unstacked(folder.path, stacks), facts=facts | {"step": step},
    )  # fmt: skip


def write_peft(folder: Folder, adapter: Adapter, *, base_name: str) -> None:
    """A folder that peft.PeftModel.from_pretrained loads. `base_name`: where its base model is."""
    tensors = {}
    for name, pair in adapter.matrices.items():
        module = name.removesuffix(".weight")
        for letter, tensor in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = tensor
    used = sorted({name.split(".")[-2] for name in adapter.matrices})
    config = PLAIN | dict(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        r=adapter.lora.rank,
        lora_alpha=_whole(adapter.lora.alpha),
        lora_dropout=adapter.lora.dropout,
        target_modules=used,
        inference_mode=True,
        init_lora_weights=True,
    )
    tensor_files.write_file(folder, "adapter_model.safetensors", tensors, progress=_silent)
    folder.write(FACTS, [_json(adapter.facts)])
    folder.write(CONFIG, [_json(config)])


def write_native(folder: Folder, adapter: Adapter, *, layers: int) -> None:
    """An adapter folder that train and generate know; every layer must have all seven modules."""
    stacks = {}
    for module in MODULES:
        names = [f"model.layers.{i}.{module}.weight" for i in range(layers)]
        if missing := [n for n in names if n not in adapter.matrices]:
            raise ConvertError(
                f"{adapter.path}: has no LoRA on {missing[0]} ({len(missing)} such); adapters here "
                f"have all of {', '.join(MODULES)}: merge this one instead (--format hf)"
            )
        for i, leaf in enumerate(("lora_a", "lora_b")):
            pair = [adapter.matrices[n][i] for n in names]
            stack = np.stack([t.all().astype(np.float32).T for t in pair])
            stacks[f"layers.{module}.{leaf}"] = _in_memory(stack, adapter.path)
    tensor_files.write_file(folder, "adapter.safetensors", stacks, progress=_silent)
    folder.write(CONFIG, [_json(to_dict(adapter.lora) | adapter.facts)])


def _read_native(folder: Folder, config: dict[str, Any]) -> Adapter:
    try:
        lora = build(Lora, {name: config[name] for name in _LORA})
    except (KeyError, ConfigError) as error:
        raise ConvertError(f"{folder.path}/{CONFIG}: {error}; export the adapter again") from error
    stacks = tensor_files.read_file(folder.file("adapter.safetensors"))
    facts = {name: value for name, value in config.items() if name not in _LORA}
    matrices = _unstacked(folder.path, stacks)
    _check_rank(folder.path, matrices, lora)
    return Adapter(layout="native", path=folder.path, lora=lora, matrices=matrices, facts=facts)


def _read_peft(folder: Folder, config: dict[str, Any]) -> Adapter:
    for name, plain in PLAIN.items():
        if (config.get(name) or plain) != plain:
            raise ConvertError(
                f"{folder.path}/{CONFIG}: {name} is {config[name]!r}; only plain LoRA "
                f"({name} {plain!r}) can be converted. Merge it with peft instead"
            )
    if isinstance(config.get("init_lora_weights"), str) and config["init_lora_weights"] not in (
        "gaussian", "loftq", "eva", "orthogonal",
    ):  # fmt: skip
        raise ConvertError(
            f"{folder.path}/{CONFIG}: init_lora_weights {config['init_lora_weights']!r} changes "
            "the base weights too; save the adapter as plain LoRA with peft"
        )
    try:
        lora = build(
            Lora,
            dict(
                rank=config["r"],
                alpha=config["lora_alpha"],
                dropout=config.get("lora_dropout", 0.0),
            ),
        )
    except (KeyError, ConfigError) as error:
        raise ConvertError(f"{folder.path}/{CONFIG}: {error}; not PEFT's LoRA") from error
    if folder.has("adapter_model.safetensors"):
        held = tensor_files.read_file(folder.file("adapter_model.safetensors"))
    else:
        held = meta_vqgan.tensors(folder.file("adapter_model.bin"), dropped=())
    facts = folder.json(FACTS) if folder.has(FACTS) else {}
    matrices = _paired(folder.path, held)
    _check_rank(folder.path, matrices, lora)
    return Adapter(layout="peft", path=folder.path, lora=lora, matrices=matrices, facts=facts)


def _paired(path: str, held: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in held.items():
        found = _PEFT.fullmatch(name)
        if not found or not found[1].endswith(MODULES):
            raise ConvertError(
                f"{path}: {name} has no place; LoRA on {', '.join(MODULES)} can be converted"
            )
        check_dtype(tensor.dtype, tensor.where)
        pairs.setdefault(f"{found[1]}.weight", {})[found[2]] = tensor
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ConvertError(f"{path}: {name} has lora_{min(pair)} alone; an incomplete copy")
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


def _unstacked(path: str, stacks: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each layer's A [R, in] and B [out, R] of arrays [L, in, R] and [L, R, out]."""
    wanted = {f"layers.{module}.{leaf}" for module in MODULES for leaf in ("lora_a", "lora_b")}
    if wrong := sorted(wanted ^ set(stacks)):
        raise ConvertError(f"{path}: {wrong[0]} is missing or has no place; not this adapter")
    found = {}
    for module in MODULES:
        a, b = (stacks[f"layers.{module}.{leaf}"] for leaf in ("lora_a", "lora_b"))
        for i in range(a.shape[0]):
            found[f"model.layers.{i}.{module}.weight"] = (_layer(a, i), _layer(b, i))
    return found


def _layer(stack: Tensor, i: int) -> Tensor:
    """Layer i of a stack, transposed."""

    def block(rows: slice, columns: slice) -> np.ndarray:
        return stack.block(slice(i, i + 1), slice(None))[0].T[rows, columns]

    return Tensor(stack.shape[:0:-1], stack.dtype, block, stack.where)


def _check_rank(path: str, matrices: dict[str, tuple[Tensor, Tensor]], lora: Lora) -> None:
    for name, (a, b) in matrices.items():
        if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == lora.rank:
            raise ConvertError(
                f"{path}: {name} has A {a.shape} and B {b.shape}, {CONFIG} says rank {lora.rank}; "
                "config and weights are of two adapters"
            )


def _in_memory(array: np.ndarray, where: str) -> Tensor:
    def block(rows: slice, columns: slice) -> np.ndarray:
        return array[rows] if array.ndim == 1 else array[rows, columns]

    return Tensor(array.shape, "F32", block, where)


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


def _silent(_: int) -> None:
    """Adapters are small: no progress is shown."""
