"""The model card (README.md) of a converted model: its origin, data and terms.

The card states explicitly what is not known.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from medmax_jax.checkpoints.resume import config_sections
from medmax_jax.convert.state_dict import Adapter, Checkpoint
from medmax_jax.endpoints import egress
from medmax_jax.storage import hub

USE = "Research only, not for clinical use: the output may be wrong and must not guide any care."
LICENCE = (
    "Weights that derive from Meta's Chameleon, including Anole and MedMax 7B, are licensed under "
    "the [Chameleon Research License](https://github.com/facebookresearch/chameleon) for "
    "non-commercial research use, even if they are published under another license. The terms of "
    "the data listed below also apply."
)


@dataclasses.dataclass(frozen=True)
class SourceTerms:
    """The terms of one source of training data."""

    credential: str  # whether it is credentialed: yes | no | unknown
    licence: str


def render_model_card(
    title: str,
    checkpoint: Checkpoint | None,
    adapter: Adapter | None,
    identity: str,
    data_sources: Mapping[str, SourceTerms],
) -> str:
    """Return the card as Markdown.

    identity: fingerprint of the weights before the adapter, or empty. data_sources: the terms of
    each source by its name; a source that is missing there has unknown terms.
    """
    facts = adapter.facts if adapter else {}
    lines = [_first(facts, data_sources), "", f"# {title}", "", USE, "", LICENCE, ""]
    if checkpoint and checkpoint.model:
        m, source = checkpoint.model, hub.origin(checkpoint.path)
        of = f" of `{source}`" if source.startswith(hub.SCHEME) else ""  # local paths are private
        lines += [
            f"A Chameleon model with {m.num_layers} layers, hidden size {m.hidden_size} and a "
            f"vocabulary of {checkpoint.vocab.size:,}; converted from the {checkpoint.layout} "
            f"layout{of}.",
            "",
        ]
    base = identity or facts.get("base") or "unknown"
    lines += [f"Base weights: `{base}`", ""]
    if adapter:
        lora = adapter.lora
        lines += [f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}", ""]
        lines += _training(facts, data_sources)
    return "\n".join(lines) + "\n"


def _first(facts: dict[str, Any], data_sources: Mapping[str, SourceTerms]) -> str:
    """Return the first line, a notice of credentialed data, placed where it is not overlooked."""
    table = _sources(facts, data_sources)
    if credentialed_names := [
        name for name, (credential, _) in table.items() if credential == "yes"
    ]:
        return (
            f"**Trained on credentialed data: {', '.join(credentialed_names)}.** Check their terms."
        )
    if any(map(egress.is_credentialed, facts.get("credentials", {}))):
        return "**Trained on credentialed data.** Check the terms of the sources below."
    if set(facts.get("credentials", {})) == {"no"}:
        return "Trained on no credentialed data."
    return "It is unknown whether these weights were trained on credentialed data."


def _training(facts: dict[str, Any], data_sources: Mapping[str, SourceTerms]) -> list[str]:
    steps = facts.get("step", "an unknown number of")
    lines = [f"Trained for {steps} steps on the records `{facts.get('data', 'unknown')}`:"]
    lines += ["", "| source | documents | credentialed | license |", "|---|---|---|---|"]
    for name, (credential, licence) in _sources(facts, data_sources).items():
        lines.append(f"| {name} | {facts['sources'][name]:,} | {credential} | {licence} |")
    if not facts.get("sources"):
        lines.append("| unknown | | | |")
    for section, fields in config_sections(facts.get("config", {})):
        settings = ", ".join(f"{k} {v!r}" for k, v in fields.items())
        lines += ["", f"`{section}`: {settings}"]
    return lines


def _sources(
    facts: dict[str, Any], data_sources: Mapping[str, SourceTerms]
) -> dict[str, tuple[str, str]]:
    """Return (credentialed, license) of each source that the records name."""
    terms = {_normalized(name): (t.credential, t.licence) for name, t in data_sources.items()}
    only_open = set(facts.get("credentials", {})) == {"no"}
    unknown = ("no" if only_open else "unknown", "unknown")
    return {
        name: terms.get(_normalized(name), unknown) for name in sorted(facts.get("sources", {}))
    }


def _normalized(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
