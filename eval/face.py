"""evaluate, from Python: one's own model on items, a JSONL file, or the embedded sample.

    from eval import compare, evaluate
    summary = evaluate(model, "sample", "workdir", "strict")

`model`: any object with `generate(asks)`, see eval/models.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs import eval_tiny
from eval import judging, models, opening, stages, suites, tasks
from eval.settings import Settings
from medmax_jax.config import build


def evaluate(
    model: models.Model,
    tasks: Sequence[tasks.Item] | str | Path,
    workdir: str | Path,
    mode: str,
    *,
    images: str | Path = "",
    progress: Callable[[str], None] = print,
    **changes: Any,
) -> dict[str, Any]:
    """What summary.json holds; interrupted, the same call goes on from the workdir.

    tasks: items, "sample", or a JSONL file in the released schema. mode: strict or paper. images:
    folder of the pictures; "": where the file lies, which a list of items has not. changes: fields
    of configs/eval_tiny.py, like counts or baselines.
    """
    config = eval_tiny.get_config().unlock()
    config.mode, config.images = mode, str(images)
    config.questions = str(tasks) if isinstance(tasks, str | Path) else "sample"
    for name, value in changes.items():
        config[name].update(value) if isinstance(value, dict) else config.update({name: value})
    settings = build(Settings, config)
    if isinstance(tasks, str | Path):
        found = suites.suite(settings)
    else:
        found = suites.Suite(items=list(tasks), train=[], pictures=[], folder=Path(images))
    judging.check_judge(settings.judge, found.items, Path(workdir))
    kind = type(model)
    name = getattr(model, "name", f"{kind.__module__}.{kind.__qualname__}")
    named = opening.Named(
        kind="python",
        where=name,
        adapter="",
        merge=False,
        fingerprint=getattr(model, "fingerprint", name),
        adapter_digest="",
    )
    return stages.run_named(
        settings,
        workdir,
        found=found,
        named=named,
        opened=lambda: opening.Opened(model=model, named=named, found=found),
        progress=progress,
    )
