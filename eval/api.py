"""Evaluates a model from Python: on items, on a JSONL file, or on the embedded sample.

    from medmax_jax.eval import compare, evaluate
    summary = evaluate(model, "sample", "workdir", "strict")

`model`: any object with `generate(requests)`, see eval/models/base.py, or KIND:WHERE as eval.run
has it, such as "native:medmax_jax/tiny".
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.config import build
from medmax_jax.configs import eval_tiny
from medmax_jax.eval.config import EvalError, Settings, pinned
from medmax_jax.eval.models import base, loading
from medmax_jax.eval.pipeline import judging, stages
from medmax_jax.eval.records import Item
from medmax_jax.eval.results import Summary
from medmax_jax.eval.tasks import selection


def evaluate(
    model: base.Model | str,
    tasks: Sequence[Item] | str | Path,
    workdir: str | Path,
    mode: str = "strict",
    *,
    adapter: str | Path = "",
    images: str | Path = "",
    progress: Callable[[str], None] = print,
    **overrides: Any,
) -> dict[str, Any]:
    """Run an evaluation and return the content of summary.json.

    After an interruption, the same call resumes from the workdir.

    model: an object, or KIND:WHERE. tasks: items, "sample", or a JSONL file in the schema of the
    MedMax release. mode: strict or paper. adapter: of a model KIND:WHERE, or the workdir of its
    training. images: folder of the images; "": the folder of the file, or for a list of items the
    current directory. overrides: fields of configs/eval_tiny.py, like counts or baselines.
    """
    named, listed = isinstance(model, str), not isinstance(tasks, str | Path)
    if not named and not callable(getattr(model, "generate", None)):
        raise EvalError(f"model is {model!r}; it requires a method generate(requests)")
    if named and listed or adapter and not named:
        raise EvalError(
            f"model is {model!r} with a list of items or an adapter; name the model as KIND:WHERE "
            "and the items by their file, or pass an object and a list"
        )
    config = eval_tiny.get_config().unlock()
    config.mode, config.images = mode, str(images)
    config.questions = "sample" if listed else str(tasks)
    for name, value in overrides.items():
        config[name].update(value) if isinstance(value, dict) else config.update({name: value})
    settings = pinned(build(Settings, config))
    if isinstance(model, str):
        summary = stages.run(
            settings, workdir, model=model, adapter=str(adapter), progress=progress
        )
        assert summary is not None  # as without a shard or a dry run
        return summary.to_json()
    if isinstance(tasks, str | Path):
        eval_set = selection.load_eval_set(settings)
    else:
        eval_set = selection.EvalSet(
            items=list(tasks), train=[], training_images=[], folder=Path(images)
        )
    return _evaluate_object(model, settings, eval_set, workdir, progress).to_json()


def _evaluate_object(
    model: base.Model,
    settings: Settings,
    eval_set: selection.EvalSet,
    workdir: str | Path,
    progress: Callable[[str], None],
) -> Summary:
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
    with stages.open_workdir(workdir, eval_set) as work:
        judging.check_judge(settings.judge, eval_set.items, work.folder)
        summary = stages.run_named(
            settings,
            work,
            eval_set=eval_set,
            spec=spec,
            load=lambda: loading.LoadedModel(model=model, spec=spec, eval_set=eval_set),
            progress=progress,
        )
    assert summary is not None  # as without a shard or a dry run
    return summary
