"""Weights & Biases, for those who ask for it: the numbers of a run, never its texts or pictures.

The package is imported only then. What leaves is asked of data/outgoing.py first: numbers made
from credentialed records are credentialed, and go to listed hosts only.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from data import outgoing
from medmax_jax import config

SERVER = "https://api.wandb.ai"  # WANDB_BASE_URL in the environment names another
SECTIONS = ("model", "lora", "mesh", "optim")  # of the config: no paths, nothing of the data


class TrackingError(RuntimeError):
    """Numbers that cannot be sent; the message says why and what to do."""


def wandb(
    project: str,
    run: config.Run,
    *,
    name: str,
    folder: str,
    credentials: Iterable[str],
    listed: Iterable[str],
    environment: Mapping[str, str],
) -> tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]:
    """(send, close). `credentials`: of the records; `listed`: hosts for credentialed data."""
    kinds = map(outgoing.class_of_credential, credentials)
    server = environment.get("WANDB_BASE_URL") or SERVER
    try:
        outgoing.check(server, outgoing.strictest(kinds), listed=outgoing.hosts(listed))
    except outgoing.OutgoingError as error:
        raise TrackingError(f"--wandb={project}: {error} (--listed_host)") from error
    try:
        import wandb as package
    except ImportError as error:
        raise TrackingError(
            f"--wandb={project}: the package wandb is not installed; pip install wandb, or leave "
            "the flag out: metrics.jsonl and TensorBoard have the same numbers"
        ) from error
    whole = config.to_dict(run)
    started = package.init(
        project=project,
        name=name,
        id=name,
        resume="allow",
        dir=folder,
        config={section: whole[section] for section in SECTIONS},
        settings=package.Settings(
            disable_code=True, disable_git=True, console="off", x_disable_meta=True
        ),
    )

    def send(step: int, numbers: dict[str, Any]) -> None:
        started.log(numbers, step=step)

    return send, started.finish
