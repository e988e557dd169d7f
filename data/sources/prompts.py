"""Questions for the sources that have pictures and captions or reports, but no questions.

prompts.json holds for each kind the wordings that are seen in MedMax's release (its figures, demo
and evaluation) and our own; which the training rows used is not published. {} is where the caption
or the report stands.
"""

import functools
import pathlib
from typing import Any

from data.mixture import CAPTION, GENERATION
from data.sources.row import Place, Plan, Row, drawn, joined
from medmax_jax.io.text_files import read_json
from medmax_jax.tokenizer import IMAGE_NAME, SEP_NAME


@functools.cache
def wordings(kind: str) -> tuple[str, ...]:
    """All wordings of a kind, those of the release first."""
    table = read_json(pathlib.Path(__file__).parent / "prompts.json")
    return tuple(table[kind]["released"] + table[kind]["ours"])


def choose(kind: str, plan: Plan, row_id: str) -> str:
    """The wording of one row: a function of seed and id."""
    return drawn(plan.seed, kind, row_id).choice(wordings(kind))


def captioned(
    plan: Plan, place: Place, caption: str, *, question: str | None, **fields: Any
) -> Row:
    """A picture and its caption as captioning or generation, drawn by seed and id.

    `question`: what the source itself asks for its caption, if anything.
    """
    row_id = place.id(plan.source)
    if drawn(plan.seed, "task", row_id).random() < plan.caption_share:
        asked = question or choose("caption", plan, row_id)
        text, task = joined([(asked, caption)], image="start"), CAPTION
    else:
        text = f"{choose('generation', plan, row_id).format(caption)}{SEP_NAME}{IMAGE_NAME}"
        task = GENERATION
    return Row(id=row_id, text=text, task=task, source=plan.source, turns=1, **fields)
