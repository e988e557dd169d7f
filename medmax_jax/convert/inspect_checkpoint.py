"""Describe a checkpoint from its headers and a few percent of its weights."""

import collections
import math
from typing import Any

import numpy as np

from medmax_jax.config import to_dict
from medmax_jax.convert.state_dict import Adapter, Checkpoint, fingerprint
from medmax_jax.io.errors import printable
from medmax_jax.models.vocab import IMAGE_START
from medmax_jax.storage import hub

NAMED = {  # (hidden_size, num_layers, num_heads, num_kv_heads) -> published model
    (4_096, 32, 32, 32): "7B",
    (8_192, 48, 64, 8): "30B",
}
SAMPLED = 256  # rows of the head that represent the image rows, and as many for the text rows


def describe(checkpoint: Checkpoint | Adapter) -> dict[str, Any]:
    """Return everything that `python -m medmax_jax.convert inspect` reports, as JSON values."""
    if isinstance(checkpoint, Adapter):
        return _adapter(checkpoint)
    description: dict[str, Any] = dict(
        path=hub.origin(checkpoint.path),
        layout=checkpoint.layout,
        model=model_name(checkpoint),
        parameters=_counts(checkpoint),
        dtypes=_dtypes(checkpoint),
        quant=checkpoint.quant,
        tokenizer=checkpoint.tokenizer is not None,
        vqgan=_vqgan(checkpoint),
        lora=None,
    )
    if checkpoint.layout == "meta" and checkpoint.model:
        description["shards"] = checkpoint.facts["shards"]
    if checkpoint.language:
        description["image_rows"] = _image_rows(checkpoint)
    if checkpoint.model:
        description["fingerprint"] = source_fingerprint(checkpoint)
        description["settings"] = {
            "vocab": to_dict(checkpoint.vocab),
            "model": to_dict(checkpoint.model),
        }
    if checkpoint.vq:
        description.setdefault("settings", {})["vq"] = to_dict(checkpoint.vq)
    return description


def source_fingerprint(checkpoint: Checkpoint) -> str:
    """Return the fingerprint; for quantized weights that of their source."""
    return (
        checkpoint.facts.get("fingerprint", "")
        if checkpoint.quant != "none"
        else checkpoint.fingerprint
    )


def format_description(description: dict[str, Any]) -> str:
    """Return the description as readable text."""
    rows = {name: value for name, value in description.items() if name not in ("settings", "facts")}
    lines = [f"{name:<12} {_format_value(value)}" for name, value in rows.items()]
    for section, fields in description.get("settings", {}).items():
        lines.append(
            f"{section:<12} {', '.join(f'{k} {_format_value(v)}' for k, v in fields.items())}"
        )
    for name, value in description.get("facts", {}).items():
        if name != "config":
            lines.append(f"{name:<12} {_format_value(value)}")
    return "\n".join(lines)


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{printable(k)} {_format_value(v)}" for k, v in value.items())
    if isinstance(value, list):
        return printable(" ".join(map(str, value)))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else printable(value)


def _adapter(adapter: Adapter) -> dict[str, Any]:
    names = sorted({name.split(".")[-2] for name in adapter.matrices})
    layers = {int(name.split(".")[2]) for name in adapter.matrices}
    count = sum(math.prod(t.shape) for pair in adapter.matrices.values() for t in pair)
    lora = to_dict(adapter.lora) | {"targets": names, "layers": len(layers)}
    ranks = sorted({a.shape[0] for a, _ in adapter.matrices.values()})
    if ranks != [adapter.lora.rank]:
        lora["ranks"] = ranks
    dtypes = collections.Counter(t.dtype for pair in adapter.matrices.values() for t in pair)
    return dict(
        path=hub.origin(adapter.path),
        layout=f"{adapter.layout} adapter",
        model=None,
        parameters={"adapter": count},
        dtypes=dict(dtypes),
        lora=lora,
        fingerprint=fingerprint(
            {
                f"{n}.{side}": t
                for n, p in adapter.matrices.items()
                for side, t in zip("AB", p, strict=True)
            }
        ),
        base=adapter.facts.get("base"),
        facts={name: value for name, value in adapter.facts.items() if name != "base"},
    )


def model_name(checkpoint: Checkpoint) -> str | None:
    """Return the published model of these sizes, "unknown size", or None for a VQGAN alone."""
    m = checkpoint.model
    if m is None:
        return None
    sizes = (m.hidden_size, m.num_layers, m.num_heads, m.num_kv_heads)
    return NAMED.get(sizes, "unknown size")


def _counts(checkpoint: Checkpoint) -> dict[str, int]:
    return {
        name: sum(math.prod(t.shape) for t in tensors.values())
        for name, tensors in (("language", checkpoint.language), ("vqgan", checkpoint.vqgan))
    }


def _dtypes(checkpoint: Checkpoint) -> dict[str, int]:
    """Return how many tensors have which dtype."""
    tensors = (*checkpoint.language.values(), *checkpoint.vqgan.values())
    return dict(collections.Counter(t.dtype for t in tensors).most_common())


def _vqgan(checkpoint: Checkpoint) -> str:
    if not checkpoint.vqgan:
        return "absent"
    return "encoder and decoder" if checkpoint.has_decoder else "encoder only"


def _image_rows(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return whether the head can generate images: the spread of its image and text rows.

    Meta's released head cannot; Anole trained only these rows. Their values in Meta's release are
    not documented.
    """
    head, first = checkpoint.language["lm_head.weight"], checkpoint.vocab.text_start
    spread = {}
    for name, start, end in (
        ("image", IMAGE_START, IMAGE_START + checkpoint.vocab.image_codes),
        ("text", first, checkpoint.vocab.size),
    ):
        rows = head.block(slice(start, min(start + SAMPLED, end)), slice(None)).astype(np.float32)
        spread[name] = float(f"{rows.std():.4g}")
    return dict(std=spread["image"], std_of_text_rows=spread["text"], all_zero=spread["image"] == 0)
