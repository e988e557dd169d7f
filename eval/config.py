"""Defines the fields of configs/eval_*.py; configs/eval_tiny.py documents every field."""

import dataclasses

from medmax_jax.config import VIEWS, Mesh, Sample
from medmax_jax.storage import hub


class EvalError(ValueError):
    """Raised where an evaluation cannot continue.

    The message names the file or item, and the fix.
    """


MAX_SHOTS = 32  # examples before a question
PERTURBATIONS = ("", "kvasir")  # of images that are shown; "" for none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Sets the number of items of each family; -1: all, 0: none."""

    vqa_closed: int
    vqa_mcq: int
    vqa_rationale: int
    vqa_open: int
    captioning: int
    image_generation: int
    multimodal: int
    visual_chat: int
    vqa_numeric: int
    image_editing: int
    multimodal_generation: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """Configures requests to endpoints: medmax_jax/endpoints/chat_api.py.

    `parameters`: a JSON object, sent unchanged.
    """

    key_env: str
    parameters: str
    price_in: float | None
    price_out: float | None
    max_usd: float | None
    credentialed_hosts: tuple[str, ...]
    concurrency: int
    per_minute: int
    timeout_s: float
    retries: int
    max_wait_s: float
    max_reply_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Configures the judge, MODEL@URL; "" for none.

    `paper`: also judge with the messages of the MedMax release. `read_unparsed`: also read the
    answers that cannot be parsed. The other fields: eval/metrics/llm_judge.py.
    """

    endpoint: str
    repeats: int
    attempts: int
    seed: int
    tokens_out: int
    paper: bool
    read_unparsed: bool
    service: Service


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Holds the settings of an evaluation. Comma-separated names are tuples here."""

    model: str
    adapter: str
    questions: tuple[str, ...]
    images: str
    split: str
    counts: Counts
    mode: str
    prompt: str
    shots: int
    perturbation: str
    baselines: tuple[str, ...]
    probes: tuple[str, ...]
    probe_families: tuple[str, ...]
    options: bool
    verbalized_confidence: bool
    scorers: tuple[str, ...]
    train_records: str
    train_model: str
    judge: JudgeSettings
    service: Service
    rows: int
    window: int
    view: str
    seed: int
    resamples: int
    mesh: Mesh
    sample: Sample

    def __post_init__(self):
        if not -1 <= self.shots <= MAX_SHOTS:
            raise EvalError(
                f"config.shots is {self.shots}; use 0 for none, 1 to {MAX_SHOTS}, or -1 for all "
                "that a row brings"
            )
        if self.view not in ("", *VIEWS):
            raise EvalError(
                f"config.view is {self.view!r}; use {' or '.join(VIEWS)}, or an empty text for the "
                "model's own"
            )
        if self.perturbation not in PERTURBATIONS:
            names = " or ".join(map(repr, PERTURBATIONS))
            raise EvalError(f"config.perturbation is {self.perturbation!r}; use {names}")


def pinned(settings: Settings) -> Settings:
    """Return the settings with each hf:// address at its commit; what it names is downloaded.

    Of KIND:PATH the path is meant. So summary.json states what was read.
    """

    def pin(value: str) -> str:
        if value.startswith(hub.SCHEME):
            return hub.pinned(value)
        kind, colon, path = value.partition(":")
        return f"{kind}:{hub.pinned(path)}" if colon else value

    names = ("model", "adapter", "images", "train_records", "train_model")
    paths = {name: pin(getattr(settings, name)) for name in names}
    lists = {name: tuple(map(pin, getattr(settings, name))) for name in ("questions", "scorers")}
    return dataclasses.replace(settings, **paths, **lists)
