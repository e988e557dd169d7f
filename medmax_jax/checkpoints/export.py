"""Write folders that other programs read: complete models, and adapters for one base model.

    model/     config.json {vocab, model, vq}, tokenizer.json, vqgan.safetensors, and the weights:
               model.safetensors, one file; or model.zarr/, which convert makes of large models
    adapter/   adapter_config.json, adapter.safetensors

A folder is written atomically and replaces an older one. A model may be stored under gs://.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from medmax_jax import config
from medmax_jax.checkpoints import safetensors_file, zarr_arrays
from medmax_jax.storage import hub, workdir
from medmax_jax.storage.folder import Folder, StorageError

SHIPPED = ("medmax_jax/tiny", "medmax_jax/tiny_adapter")  # in a checkout; `locate` elsewhere
SMALL, LARGE = "model.safetensors", "model.zarr"
LEFT_REMOTE = (f"{LARGE}/*", "checkpoints/*", "compiled/*", "model/*", "profile/*", "events.out.*")
# files of a model folder in addition to the weights
SIDE_FILES = ("tokenizer.json", "vqgan.safetensors")
# how a model runs, not what it is; a run may use another view than its base, with a warning
FREE = ("param_dtype", "compute_dtype", "remat", "attention", "view", "answer_view")


class ExportError(RuntimeError):
    """A model folder that does not fit the run; the message names the field."""


def locate(folder: str | os.PathLike) -> str:
    """Return the path of a model or adapter folder: the package's own one for a name of SHIPPED.

    So `medmax_jax/tiny` is the shipped model also where the current folder is no checkout. What an
    hf:// address names is downloaded.
    """
    path = hub.locate(folder)
    if path.rstrip("/") in SHIPPED and not os.path.exists(path):
        return str(pathlib.Path(__file__).parents[1] / os.path.basename(path.rstrip("/")))
    return path


def local_copy(folder: str | os.PathLike) -> pathlib.Path:
    """Return the local folder; of one on gs://, a copy without what is read from there in blocks.

    folder: of a model, an adapter or a training run.
    """
    return workdir.local_copy(locate(folder), skip=LEFT_REMOTE)


def load(folder: str | os.PathLike, like: PyTree) -> PyTree:
    """Return the weights of a model folder, by `safetensors_file.load` or `zarr_arrays.load`."""
    folder = locate(folder)
    if Folder(folder).has(SMALL):
        return safetensors_file.load(local_copy(folder) / SMALL, like)
    return zarr_arrays.load(Folder(f"{folder.rstrip('/')}/{LARGE}"), like)


def base_fingerprint(folder: str | os.PathLike) -> str:
    """Return the identity of a base for adapters: sha256 of its file, or convert's fingerprint."""
    model_folder = Folder(locate(folder))
    if model_folder.has(SMALL):
        return model_folder.file(SMALL).digest("sha256")
    settings = model_folder.json("config.json")
    try:
        return settings["weights"]["fingerprint"]
    except (TypeError, KeyError) as error:
        raise ExportError(
            f"{folder} has neither {SMALL} nor a fingerprint in config.json; convert it again "
            "(python -m medmax_jax.convert --help)"
        ) from error


def adapter(
    target: pathlib.Path, adapters: PyTree, run: config.Run, metadata: dict[str, Any]
) -> None:
    """Write the trained adapters and `metadata`, which has base, data, step, sources."""
    metadata = config.to_dict(run.lora) | metadata

    def fill(folder: pathlib.Path) -> None:
        safetensors_file.save(folder / "adapter.safetensors", adapters, _file_metadata(metadata))
        if jax.process_index() == 0:
            _write_json(folder / "adapter_config.json", metadata)

    _replace(target, fill)


def model(
    target: pathlib.Path, base: PyTree, run: config.Run, *, data: str, step: int
) -> list[str]:
    """Write a complete model; return the names of the side files that are missing.

    The tokenizer and the VQGAN come from train.init_from.
    """
    source = Folder(locate(run.train.init_from)) if run.train.init_from else None
    side_files = [name for name in SIDE_FILES if source and source.has(name)]

    def fill(folder: pathlib.Path) -> None:
        safetensors_file.save(folder / SMALL, base, _file_metadata({"data": data, "step": step}))
        if jax.process_index() == 0:
            _write_json(folder / "config.json", _sections(run))
            for name in side_files:
                (folder / name).write_bytes(source.read(name))

    _replace(target, fill)
    return [name for name in SIDE_FILES if name not in side_files]


def check_base(folder: str, run: config.Run, *, tokenizer: str, vqgan: str) -> None:
    """Raise ExportError unless the model in `folder` is the one of the config.

    Heads, RoPE and norms leave no trace in the shapes of the weights, so the settings are compared.
    `tokenizer`, `vqgan`: sha256 of the files that made the records; empty where unknown.
    """
    model_folder = Folder(locate(folder))
    try:
        settings = model_folder.json("config.json")
    except StorageError as error:
        raise ExportError(f"{error}; set config.train.init_from to a model folder") from error
    for section, fields in _sections(run).items():
        for field, value in fields.items():
            stored = settings.get(section, {}).get(field)
            if stored != value and field not in FREE:
                raise ExportError(
                    f"{folder}: {section}.{field} is {stored!r}, but this run has {value!r}; "
                    "use the config of that model"
                )
    for name, digest in zip(SIDE_FILES, (tokenizer, vqgan), strict=True):
        comparable = digest and model_folder.has(name)
        if comparable and model_folder.file(name).digest("sha256") != digest:
            raise ExportError(
                f"the records were prepared with a {name} that differs from the one in {folder}; "
                "prepare them again with the files of this folder"
            )


def base_vq(folder: str) -> config.VQ:
    """Return the VQGAN's settings of a model folder, whose views the model was trained on."""
    try:
        return config.build(config.VQ, Folder(locate(folder)).json("config.json").get("vq"))
    except (StorageError, config.ConfigError) as error:
        raise ExportError(f"{folder}: {error}; use a model folder") from error


def _sections(run: config.Run) -> dict[str, dict]:
    return {name: config.to_dict(getattr(run, name)) for name in ("vocab", "model", "vq")}


def _file_metadata(metadata: dict) -> dict[str, str]:
    # One entry: safetensors writes several in random order, and the file's digest is an identity.
    return {"medmax_jax": json.dumps(metadata, sort_keys=True)}


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def _replace(target: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> None:
    """Write a folder under another name by `fill`, then replace `target` by it."""
    partial = target.with_name(target.name + ".partial")
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    fill(partial)
    if first:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
