"""Resolves --model=KIND:WHERE to a model, and loads the model when it is first used.

native:FOLDER       hf:FOLDER (converted once, into a cache)       endpoint:NAME@URL
predictions:FILE    baseline:{constant,majority,random}
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.checkpoints import export
from medmax_jax.convert import convert
from medmax_jax.endpoints import cached_chat_api
from medmax_jax.eval.config import EvalError, Settings
from medmax_jax.eval.encoders import modality
from medmax_jax.eval.models import base, baselines, predictions
from medmax_jax.eval.models import endpoint as endpoint_model
from medmax_jax.eval.models.base import Looks
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.eval.tasks.selection import EvalSet, Shard
from medmax_jax.generation import model_bundle, requests
from medmax_jax.io.journal import open_journal
from medmax_jax.io.storage import Folder
from medmax_jax.sharding import make_mesh

KINDS = ("native", "hf", "endpoint", "predictions", "baseline")
RECORDED_REASON = "n/a: the answers are there already, and nobody can be asked again"
CALLS = "calls.jsonl"
ADAPTER = "adapter.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Identifies a model. `folder`: of its weights in the native layout, if it has one."""

    kind: str
    where: str
    adapter: str
    merge: bool
    fingerprint: str
    adapter_digest: str
    folder: str = ""


@dataclasses.dataclass(kw_only=True)
class LoadedModel:
    """Holds a loaded model. `generator`: of the native kinds, which encode images as codes."""

    model: base.Model
    named: ModelSpec
    found: EvalSet
    generator: model_bundle.ModelBundle | None = None
    close: Callable[[], None] = lambda: None

    def looks(self) -> Looks | None:
        """Return the modality classifier of generated images, if training images are known."""
        if self.generator is None or not self.found.pictures:
            return None
        return modality.make_classifier(self.generator, self._centroids)

    def ceiling(self, numbers: dict[str, int]) -> dict[str, Any] | None:
        """Return how often real images match their modality, as the upper bound."""
        if self.generator is None or not self.found.pictures:
            return None
        return real_image_accuracy(
            self.generator,
            self.found.items,
            self._centroids,
            images_folder=self.found.folder,
            **numbers,
        )

    def spent(self) -> dict[str, Any] | None:
        """Return calls, tokens and USD of this start, for endpoints."""
        spent = getattr(self.model, "spent", None)
        return None if spent is None else dataclasses.asdict(spent)

    @functools.cached_property
    def _centroids(self):
        return modality.centroids(
            self.generator, self.found.pictures, images_folder=self.found.folder
        )


def parse_model_spec(
    model: str, adapter: str, merge: bool, settings: Settings, *, progress: Callable[[str], None]
) -> ModelSpec:
    """Resolve `--model`. A checkpoint of another layout is converted here, once."""
    kind, _, where = model.partition(":")
    if kind not in KINDS or not where:
        raise EvalError(
            f"--model is {model!r}; write KIND:WHERE with KIND one of {', '.join(KINDS)}, like "
            "native:FOLDER"
        )
    if (adapter or merge) and kind not in ("native", "hf"):
        raise EvalError(f"--adapter and --merge are for native models; {kind} has no weights")
    if merge and not adapter:
        raise EvalError("--merge adds an adapter; give --adapter too")
    fixed = dict(kind=kind, where=where, adapter=adapter, merge=merge)
    match kind:
        case "native" | "hf":
            requests.require_single_process()  # before a conversion or a mesh is started
            folder = where if kind == "native" else str(convert_to_native(where, progress))
            tuned = Folder(adapter) if adapter else None
            digest = tuned.file(ADAPTER).digest("sha256") if tuned and tuned.has(ADAPTER) else ""
            return ModelSpec(
                fingerprint=export.base_fingerprint(folder),
                adapter_digest=digest,
                folder=folder,
                **fixed,
            )
        case "endpoint":
            endpoint = endpoint_model.make_endpoint(where, settings.service, field="service")
            stamp = endpoint_model.fingerprint(endpoint)
        case "predictions":
            stamp = predictions.digest(where)
        case "baseline":
            if where not in baselines.KINDS:
                raise baselines.BaselineError(
                    f"--model is {model!r}; use one of {', '.join(baselines.KINDS)}"
                )
            stamp = f"baseline:{where}:{settings.seed}"
    return ModelSpec(fingerprint=stamp, adapter_digest="", **fixed)


def is_recorded(named: ModelSpec) -> bool:
    """Return whether the answers are recorded, so that a changed image changes nothing."""
    return named.kind == "predictions"


def load_model(
    named: ModelSpec,
    settings: Settings,
    found: EvalSet,
    workdir: Path,
    shard: Shard,
    stopped: Callable[[], bool],
) -> LoadedModel:
    """Load the model, or open what replaces it; the caller calls `close`."""
    fixed = dict(named=named, found=found)
    match named.kind:
        case "native" | "hf":
            return _native(named, settings, found)
        case "endpoint":
            endpoint = endpoint_model.make_endpoint(named.where, settings.service, field="service")
            stack = contextlib.ExitStack()
            journal = stack.enter_context(open_journal(shard.file(workdir / CALLS)))
            model = endpoint_model.EndpointModel(
                endpoint, settings.service, cached_chat_api.Cache(journal), stopped
            )
            return LoadedModel(model=model, close=stack.close, **fixed)
        case "predictions":
            return LoadedModel(model=predictions.Predictions(named.where, found.items), **fixed)
        case _:
            model = baselines.Baseline(named.where, found.items, found.folder, seed=settings.seed)
            return LoadedModel(model=model, **fixed)


def convert_to_native(source: str, progress: Callable[[str], None]) -> Path:
    """Return the native folder, in the user's cache, of a checkpoint in another layout."""
    place = Path(source)
    if not place.is_dir():
        raise EvalError(f"--model hf:{source}: no folder; download the checkpoint first")
    files = sorted(path for path in place.rglob("*") if path.is_file())
    facts = [[str(p.relative_to(place)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    key = hashlib.sha256(json.dumps([str(place.resolve()), facts]).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(root) / "medmax_jax" / "converted" / f"{place.resolve().name}-{key}"
    if target.is_dir():
        progress(f"{source} was converted into {target}")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    progress(f"converting {source} into {target}")
    try:
        convert.convert(source, str(target), layout="native", say=progress)
    except convert.ERRORS as error:
        raise EvalError(f"--model hf:{source}: {error}") from error
    return target


def _native(named: ModelSpec, settings: Settings, found: EvalSet) -> LoadedModel:
    g = model_bundle.load(
        named.folder,
        adapter=named.adapter or None,
        merge=named.merge,
        mesh=make_mesh(settings.mesh),
    )
    model = base.NativeModel(
        g, settings.sample, rows=settings.rows, name=named.where, stamp=named.fingerprint
    )
    return LoadedModel(model=model, named=named, found=found, generator=g)


def real_image_accuracy(
    generator: model_bundle.ModelBundle,
    items: Sequence[task_items.Item],
    centroids: modality.Centroids,
    *,
    images_folder: str | Path,
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    """Return how often real images of the items match their modality: the bound for generation."""
    real = {item.image: item for item in items if item.kind}
    found = modality.modality_features(generator, list(real), images_folder=images_folder)
    return intervals.mean_interval(
        [
            float(modality.nearest_centroid(centroids, one) == item.kind)
            for one, item in zip(found, real.values(), strict=True)
        ],
        [item.group for item in real.values()],
        seed=seed,
        resamples=resamples,
    ).row()
