"""Describe a checkpoint from its headers and a few percent of its weights."""

import collections
import math
from typing import Any

import numpy as np

from medmax_jax.config import to_dict
from medmax_jax.convert.state_dict import Adapter, Checkpoint, fingerprint
from medmax_jax.io.errors import printable
from medmax_jax.models.vocab import IMAGE_START

NAMED = {  # (hidden_size, num_layers, num_heads, num_kv_heads) -> published model
    (4_096, 32, 32, 32): "7B",
    (8_192, 48, 64, 8): "30B",
}
SAMPLED = 256  # rows of the head that represent the image rows, and as many for the text rows


def describe(found: Checkpoint | Adapter) -> dict[str, Any]:
    """Return everything that `python -m medmax_jax.convert inspect` reports, as JSON values."""
    if isinstance(found, Adapter):
        return _adapter(found)
    said: dict[str, Any] = dict(
        path=found.path,
        layout=found.layout,
        model=_model_name(found),
        parameters=_counts(found),
        dtypes=_dtypes(found),
        quant=found.quant,
        tokenizer=found.tokenizer is not None,
        vqgan=_vqgan(found),
        lora=None,
    )
    if found.layout == "meta" and found.model:
        said["shards"] = found.facts["shards"]
    if found.language:
        said["image_rows"] = _image_rows(found)
    if found.model:
        said["fingerprint"] = source_fingerprint(found)
        said["settings"] = {"vocab": to_dict(found.vocab), "model": to_dict(found.model)}
    if found.vq:
        said.setdefault("settings", {})["vq"] = to_dict(found.vq)
    return said


def source_fingerprint(found: Checkpoint) -> str:
    """Return the fingerprint; for quantized weights that of their source."""
    return found.facts.get("fingerprint", "") if found.quant != "none" else found.fingerprint


def format_description(said: dict[str, Any]) -> str:
    """Return the description as readable text."""
    rows = {name: value for name, value in said.items() if name not in ("settings", "facts")}
    lines = [f"{name:<12} {_word(value)}" for name, value in rows.items()]
    for section, fields in said.get("settings", {}).items():
        lines.append(f"{section:<12} {', '.join(f'{k} {_word(v)}' for k, v in fields.items())}")
    for name, value in said.get("facts", {}).items():
        if name != "config":
            lines.append(f"{name:<12} {_word(value)}")
    return "\n".join(lines)


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{printable(k)} {_word(v)}" for k, v in value.items())
    if isinstance(value, list):
        return printable(" ".join(map(str, value)))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else printable(value)


def _adapter(found: Adapter) -> dict[str, Any]:
    names = sorted({name.split(".")[-2] for name in found.matrices})
    layers = {int(name.split(".")[2]) for name in found.matrices}
    count = sum(math.prod(t.shape) for pair in found.matrices.values() for t in pair)
    lora = to_dict(found.lora) | {"targets": names, "layers": len(layers)}
    ranks = sorted({a.shape[0] for a, _ in found.matrices.values()})
    if ranks != [found.lora.rank]:
        lora["ranks"] = ranks
    dtypes = collections.Counter(t.dtype for pair in found.matrices.values() for t in pair)
    return dict(
        path=found.path,
        layout=f"{found.layout} adapter",
        model=None,
        parameters={"adapter": count},
        dtypes=dict(dtypes),
        lora=lora,
        fingerprint=fingerprint(
            {
                f"{n}.{side}": t
                for n, p in found.matrices.items()
                for side, t in zip("AB", p, strict=True)
            }
        ),
        base=found.facts.get("base"),
        facts={name: value for name, value in found.facts.items() if name != "base"},
    )


def _model_name(found: Checkpoint) -> str | None:
    m = found.model
    if m is None:
        return None
    sizes = (m.hidden_size, m.num_layers, m.num_heads, m.num_kv_heads)
    return NAMED.get(sizes, "another size")


def _counts(found: Checkpoint) -> dict[str, int]:
    return {
        name: sum(math.prod(t.shape) for t in tensors.values())
        for name, tensors in (("language", found.language), ("vqgan", found.vqgan))
    }


def _dtypes(found: Checkpoint) -> dict[str, int]:
    """Return how many tensors have which dtype."""
    both = (*found.language.values(), *found.vqgan.values())
    return dict(collections.Counter(t.dtype for t in both).most_common())


def _vqgan(found: Checkpoint) -> str:
    if not found.vqgan:
        return "absent"
    return "encoder and decoder" if found.has_decoder else "encoder only"


def _image_rows(found: Checkpoint) -> dict[str, Any]:
    """Return whether the head can generate images: the spread of its image and text rows.

    Meta's released head cannot; Anole trained only these rows. Their values in Meta's release are
    not documented.
    """
    head, first = found.language["lm_head.weight"], found.vocab.text_start
    spread = {}
    for name, start, end in (
        ("image", IMAGE_START, IMAGE_START + found.vocab.image_codes),
        ("text", first, found.vocab.size),
    ):
        rows = head.block(slice(start, min(start + SAMPLED, end)), slice(None)).astype(np.float32)
        spread[name] = float(f"{rows.std():.4g}")
    return dict(std=spread["image"], std_of_text_rows=spread["text"], all_zero=spread["image"] == 0)
