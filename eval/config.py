"""What configs/eval_*.py say; configs/eval_tiny.py has every field with its meaning."""

import dataclasses

from medmax_jax.config import Mesh, Sample


class EvalError(ValueError):
    """An evaluation that cannot go on; the message names the file or item and the mend."""


# What every record has that a score, a page or a comparison is made of.
RECORD = ("id", "task", "family", "prompt", "answer", "image", "group", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Items of each family; -1: all, 0: none."""

    vqa_closed: int
    vqa_mcq: int
    vqa_open: int
    captioning: int
    image_generation: int
    multimodal: int
    visual_chat: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """How endpoints are asked: medmax_jax/endpoints/chat_api.py. `parameters`: a JSON object,
    sent as it is.
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
    """Who judges, MODEL@URL; "" for nobody. `paper`: in the release's words too.

    The others: eval/metrics/llm_judge.py.
    """

    endpoint: str
    repeats: int
    attempts: int
    seed: int
    tokens_out: int
    paper: bool
    service: Service


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """An evaluation. Names with commas between them are tuples here."""

    model: str
    questions: tuple[str, ...]
    images: str
    split: str
    counts: Counts
    mode: str
    prompt: str
    baselines: tuple[str, ...]
    probes: tuple[str, ...]
    probe_families: tuple[str, ...]
    options: bool
    scorers: tuple[str, ...]
    train_records: str
    train_model: str
    judge: JudgeSettings
    service: Service
    rows: int
    window: int
    seed: int
    resamples: int
    mesh: Mesh
    sample: Sample
