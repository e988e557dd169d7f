"""Evaluates a model from Python: on items, on a JSONL file, or on the embedded sample.

    from medmax_jax.eval import compare, evaluate
    summary = evaluate(model, "sample", "workdir", "strict")

`model`: any object with `generate(requests)`, see eval/models/base.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.config import build
from medmax_jax.configs import eval_tiny
from medmax_jax.eval.config import EvalError, Settings, pinned
from medmax_jax.eval.models import base, loading
from medmax_jax.eval.pipeline import judging, stages
from medmax_jax.eval.tasks import items, selection


def evaluate(
    model: base.Model,
    tasks: Sequence[items.Item] | str | Path,
    workdir: str | Path,
    mode: str = "strict",
    *,
    images: str | Path = "",
    progress: Callable[[str], None] = print,
    **overrides: Any,
) -> dict[str, Any]:
    """Run an evaluation and return the content of summary.json.

    After an interruption, the same call resumes from the workdir.

    tasks: items, "sample", or a JSONL file in the schema of the MedMax release. mode: strict or
    paper. images: folder of the images; "": the folder of the file, or for a list of items the
    current directory. overrides: fields of configs/eval_tiny.py, like counts or baselines.
    """
    if not callable(getattr(model, "generate", None)):
        raise EvalError(f"model is {model!r}; it requires a method generate(requests)")
    config = eval_tiny.get_config().unlock()
    config.mode, config.images = mode, str(images)
    config.questions = str(tasks) if isinstance(tasks, str | Path) else "sample"
    for name, value in overrides.items():
        config[name].update(value) if isinstance(value, dict) else config.update({name: value})
    settings = pinned(build(Settings, config))
    if isinstance(tasks, str | Path):
        eval_set = selection.load_eval_set(settings)
    else:
        eval_set = selection.EvalSet(
            items=list(tasks), train=[], training_images=[], folder=Path(images)
        )
    model_class = type(model)
    name = getattr(model, "name", f"{model_class.__module__}.{model_class.__qualname__}")
    spec = loading.ModelSpec(
        kind="python",
        where=name,
        adapter="",
        merge=False,
        fingerprint=getattr(model, "fingerprint", name),
        adapter_digest="",
    )
    with stages.open_workdir(workdir, eval_set) as folder:
        judging.check_judge(settings.judge, eval_set.items, folder)
        return stages.run_named(
            settings,
            folder,
            eval_set=eval_set,
            spec=spec,
            load=lambda: loading.LoadedModel(model=model, spec=spec, eval_set=eval_set),
            progress=progress,
        )
