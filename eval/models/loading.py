"""Resolves --model=KIND:WHERE to a model, and loads the model when it is first used.

native:FOLDER       hf:FOLDER (converted once, into a cache)       endpoint:NAME@URL
predictions:FILE    baseline:{constant,majority,random}            hf://ORG/NAME: as hf:FOLDER

A FOLDER, FILE or adapter may be an address on the hub: native:hf://ORG/NAME.
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
from medmax_jax.eval.models.base import ModalityClassifier
from medmax_jax.eval.records import Item
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks.selection import EvalSet, Shard
from medmax_jax.generation import model_bundle
from medmax_jax.io.journal import open_journal
from medmax_jax.sharding import local_mesh
from medmax_jax.storage import hub
from medmax_jax.storage.folder import Folder

LOCAL = ("native", "hf")  # kinds that run in this process
KINDS = (*LOCAL, "endpoint", "predictions", "baseline")
RECORDED_REASON = "n/a: the answers are recorded, so no changed question can be answered"
CALLS = "calls.jsonl"
ADAPTER = "adapter.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Identifies a model. `folder`: of its weights in the native layout, if it has one.

    `view`: of the images that it is shown; `trained_view`: of those that it was trained on.
    """

    kind: str
    where: str
    adapter: str
    merge: bool
    fingerprint: str
    adapter_digest: str
    folder: str = ""
    view: str = "released"
    trained_view: str = "released"


@dataclasses.dataclass(kw_only=True)
class LoadedModel:
    """Holds a loaded model. `generator`: of the native kinds, which encode images as codes."""

    model: base.Model
    spec: ModelSpec
    eval_set: EvalSet
    generator: model_bundle.ModelBundle | None = None
    close: Callable[[], None] = lambda: None

    def modality_classifier(self) -> ModalityClassifier | None:
        """Return the modality classifier of generated images, if there are training images."""
        if self.generator is None or not self.eval_set.training_images:
            return None
        return modality.make_classifier(self.generator, self._centroids)

    def real_image_accuracy(self, resampling: intervals.Resampling) -> dict[str, Any] | None:
        """Return how often real images match their modality, as the upper bound."""
        if self.generator is None or not self.eval_set.training_images:
            return None
        return real_image_accuracy(
            self.generator,
            self.eval_set.items,
            self._centroids,
            images_folder=self.eval_set.folder,
            resampling=resampling,
        )

    def recorded(self) -> dict[str, Any] | None:
        """Return how many rows of another program's predictions are of items, and why not."""
        if not isinstance(self.model, predictions.Predictions):
            return None
        return self.model.recorded

    def usage(self) -> dict[str, Any] | None:
        """Return calls, tokens and USD of this start, for endpoints."""
        if not isinstance(self.model, endpoint_model.EndpointModel):
            return None
        return dataclasses.asdict(self.model.usage)

    @functools.cached_property
    def _centroids(self):
        return modality.centroids(
            self.generator, self.eval_set.training_images, images_folder=self.eval_set.folder
        )


def parse_model_spec(
    model: str, adapter: str, merge: bool, settings: Settings, *, progress: Callable[[str], None]
) -> ModelSpec:
    """Resolve `--model`. A checkpoint of another layout is converted here, once."""
    kind, _, where = ("hf", "", model) if model.startswith(hub.SCHEME) else model.partition(":")
    if kind not in KINDS or not where:
        near = f"native:{model}" if kind == model else "native:FOLDER"
        raise EvalError(
            f"--model is {model!r}; expected KIND:WHERE with KIND one of {', '.join(KINDS)}, like "
            f"{near}"
        )
    if (adapter or merge) and kind not in LOCAL:
        raise EvalError(
            f"--adapter, config.adapter and --merge require a native or hf model, but the model is "
            f"{model!r}; set --adapter and config.adapter to an empty text"
        )
    if settings.view and kind not in LOCAL:
        raise EvalError(
            f"config.view is {settings.view!r}, but {model!r} does not read images in a view of "
            "this project; leave it empty"
        )
    if merge and not adapter:
        raise EvalError("--merge requires --adapter; set it")
    folder, adapter_digest, trained_view = "", "", "released"
    match kind:
        case "native" | "hf":
            tuned = Folder(found := model_bundle.adapter_folder(adapter)) if adapter else None
            if tuned and not adapter.startswith("gs://"):
                adapter = hub.origin(found)
            where = hub.pinned(where)
            folder = where if kind == "native" else str(convert_to_native(where, progress))
            if tuned and tuned.has(ADAPTER):
                adapter_digest = tuned.file(ADAPTER).digest("sha256")
            fingerprint = export.base_fingerprint(folder)
            trained_view = model_bundle.settings_of(folder, adapter or None)[2].view
        case "endpoint":
            endpoint = endpoint_model.make_endpoint(where, settings.service, field="service")
            fingerprint = endpoint_model.fingerprint(endpoint)
        case "predictions":
            where = hub.pinned(where)
            fingerprint = predictions.digest(hub.locate(where))
        case "baseline":
            if where not in baselines.KINDS:
                raise baselines.BaselineError(
                    f"--model is {model!r}; use one of {', '.join(baselines.KINDS)}"
                )
            fingerprint = f"baseline:{where}:{settings.seed}"
    return ModelSpec(
        kind=kind,
        where=where,
        adapter=adapter,
        merge=merge,
        fingerprint=fingerprint,
        adapter_digest=adapter_digest,
        folder=folder,
        view=settings.view or trained_view,
        trained_view=trained_view,
    )


def is_recorded(spec: ModelSpec) -> bool:
    """Return whether the answers are recorded, so that a changed image changes nothing."""
    return spec.kind == "predictions"


def load_model(
    spec: ModelSpec,
    settings: Settings,
    eval_set: EvalSet,
    workdir: Path,
    shard: Shard,
    stopped: Callable[[], bool],
) -> LoadedModel:
    """Load the model, or open what replaces it; the caller calls `close`."""
    stack = contextlib.ExitStack()
    match spec.kind:
        case "native" | "hf":
            return _native(spec, settings, eval_set)
        case "endpoint":
            endpoint = endpoint_model.make_endpoint(spec.where, settings.service, field="service")
            journal = stack.enter_context(open_journal(shard.file(workdir / CALLS)))
            model = endpoint_model.EndpointModel(
                endpoint, settings.service, cached_chat_api.Cache(journal), stopped
            )
        case "predictions":
            model = predictions.Predictions(hub.locate(spec.where), eval_set.items)
        case _:
            model = baselines.Baseline(
                spec.where, eval_set.items, eval_set.folder, seed=settings.seed
            )
    return LoadedModel(model=model, spec=spec, eval_set=eval_set, close=stack.close)


def convert_to_native(source: str, progress: Callable[[str], None]) -> Path:
    """Return the native folder, in the user's cache, of a checkpoint in another layout."""
    folder = Path(hub.locate(source))
    if not folder.is_dir():
        raise EvalError(
            f"--model is hf:{source}, which is not a folder; name one, or hf://ORG/NAME"
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [[str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), facts]).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(root) / "medmax_jax" / "converted" / f"{folder.resolve().name}-{key}"
    if target.is_dir():
        progress(f"{source} was already converted to {target}")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    progress(f"converting {source} to {target}")
    try:
        convert.convert(source, str(target), layout="native", say=progress)
    except convert.ERRORS as error:
        raise EvalError(f"--model hf:{source}: {error}") from error
    return target


def _native(spec: ModelSpec, settings: Settings, eval_set: EvalSet) -> LoadedModel:
    generator = model_bundle.load(
        spec.folder,
        adapter=spec.adapter or None,
        merge=spec.merge,
        mesh=local_mesh(settings.mesh),
        view=spec.view,
    )
    model = base.NativeModel(
        generator,
        settings.sample,
        rows=settings.rows,
        name=spec.where,
        fingerprint=spec.fingerprint,
    )
    return LoadedModel(model=model, spec=spec, eval_set=eval_set, generator=generator)


def real_image_accuracy(
    generator: model_bundle.ModelBundle,
    items: Sequence[Item],
    centroids: modality.Centroids,
    *,
    images_folder: str | Path,
    resampling: intervals.Resampling,
) -> dict[str, Any]:
    """Return how often real images of the items match their modality: the bound for generation."""
    real = {item.image: item for item in items if item.modality}
    features = modality.modality_features(generator, list(real), images_folder=images_folder)
    return intervals.mean_interval(
        [
            float(modality.nearest_centroid(centroids, vector) == item.modality)
            for vector, item in zip(features, real.values(), strict=True)
        ],
        [item.group for item in real.values()],
        resampling=resampling,
    ).row()
