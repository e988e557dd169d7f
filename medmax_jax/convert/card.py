"""The model card (README.md) of what was converted: what it is, its data, and under which terms.

What is not known is said to be not known.
"""

import pathlib
from typing import Any

import data.sample
from data import outgoing
from data.mixture import SOURCES
from data.sample.manifest import read_manifest
from medmax_jax.convert.form import Adapter, Checkpoint

USE = "Research only, not for clinical use: its output may be wrong and must not guide any care."
LICENCE = (
    "Weights that derive from Meta's Chameleon, Anole and MedMax 7B among them, are under the "
    "[Chameleon Research License](https://github.com/facebookresearch/chameleon), whatever other "
    "tag they carry: non-commercial research use. Terms of the data below hold too."
)


def text(title: str, checkpoint: Checkpoint | None, adapter: Adapter | None, identity: str) -> str:
    """The card as Markdown. `identity`: fingerprint of the weights before the adapter, or empty."""
    facts = adapter.facts if adapter else {}
    lines = [_first(facts), "", f"# {title}", "", USE, "", LICENCE, ""]
    if checkpoint and checkpoint.model:
        m = checkpoint.model
        lines += [
            f"A Chameleon of {m.num_layers} layers, width {m.hidden_size}, "
            f"{checkpoint.vocab.size:,} ids; converted from {checkpoint.layout}.",
            "",
        ]
    base = identity or facts.get("base") or "not known"
    lines += [f"Base weights: `{base}`", ""]
    if adapter:
        lora = adapter.lora
        lines += [f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}", ""]
        lines += _training(facts)
    return "\n".join(lines) + "\n"


def _first(facts: dict[str, Any]) -> str:
    """Credentialed data on the first line, where nobody misses them."""
    table = _sources(facts)
    if named := [name for name, (credential, _) in table.items() if credential == "yes"]:
        return f"**Trained on credentialed data: {', '.join(named)}.** Check their terms."
    if any(map(outgoing.is_credentialed, facts.get("credentials", {}))):
        return "**Trained on credentialed data.** Check the terms of the sources below."
    if set(facts.get("credentials", {})) == {"no"}:
        return "Trained on no credentialed data."
    return "Whether these weights were trained on credentialed data is not known to this program."


def _training(facts: dict[str, Any]) -> list[str]:
    steps = facts.get("step", "an unknown number of")
    lines = [f"Trained for {steps} steps on the records `{facts.get('data', 'not known')}`:"]
    lines += ["", "| source | documents | credentialed | licence |", "|---|---|---|---|"]
    for name, (credential, licence) in _sources(facts).items():
        lines.append(f"| {name} | {facts['sources'][name]:,} | {credential} | {licence} |")
    if not facts.get("sources"):
        lines.append("| not known | | | |")
    for section, fields in facts.get("config", {}).items():
        words = ", ".join(f"{k} {v!r}" for k, v in fields.items())
        lines += ["", f"`{section}`: {words}"]
    return lines


def _sources(facts: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """(credentialed, licence) of each source that the records name."""
    published = {_plain(s.name): (s.credential, s.licence) for s in SOURCES}
    embedded = _embedded()
    only_open = set(facts.get("credentials", {})) == {"no"}
    unknown = ("no" if only_open else "unknown", "not known")
    return {
        name: published.get(_plain(name)) or embedded.get(name, unknown)
        for name in sorted(facts.get("sources", {}))
    }


def _embedded() -> dict[str, tuple[str, str]]:
    """The packages that the embedded sample comes from."""
    licences: dict[str, set[str]] = {}
    folder = pathlib.Path(data.sample.__file__).parent
    for row in read_manifest(folder / "manifest.jsonl"):
        licences.setdefault(row["source_package"].split("==")[0], set()).add(row["licence"])
    return {name: ("no", "; ".join(sorted(each))) for name, each in licences.items()}


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
