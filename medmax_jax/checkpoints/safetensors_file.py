"""Store any pytree of arrays as one safetensors file with dotted names.

    model.layers.self_attn.q_proj.kernel  <->  "layers.self_attn.q_proj.kernel"
    model.down[0].block[1].conv1.kernel   <->  "down.0.block.1.conv1.kernel"

The `value` that NNX adds under every variable is not part of a name, so a module and its state read
the same file.
"""

import os
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medmax_jax.io.errors import FileError

_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names; a cast between these only rounds
_INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


class WeightsError(FileError):
    """A weight file that does not fit; the message names the file, the key and the fix."""


def save(path_file: str | os.PathLike, tree: Any, metadata: dict[str, str]) -> None:
    """Write every array of `tree` atomically; every host calls this, one writes."""
    arrays = {name: fetch_to_host(leaf) for name, leaf in flatten_named(tree).items()}
    if jax.process_index() != 0:
        return
    path_file = Path(path_file)
    path_file.parent.mkdir(parents=True, exist_ok=True)
    partial = path_file.with_name(path_file.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode  # by the umask; the library's files are 0600
    save_file(arrays, partial, metadata=metadata)
    partial.chmod(mode)
    os.replace(partial, path_file)


def load(path_file: str | os.PathLike, like: Any) -> Any:
    """Return the tree of `like` from the file, in its dtypes and shardings.

    `like` has arrays or ShapeDtypeStructs. A host reads only the rows that it holds. Raises
    WeightsError on a key that `like` lacks, a name that the file lacks, or a shape that differs.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [dotted_name(path) for path, _ in leaves]
    with _opened(path_file) as file:
        check_names(path_file, set(file.keys()), set(names))
        arrays = [
            _placed(path_file, file, name, leaf)
            for name, (_, leaf) in zip(names, leaves, strict=True)
        ]
    return jax.tree_util.tree_unflatten(structure, arrays)


def metadata(path_file: str | os.PathLike) -> dict[str, str]:
    """Return the metadata that was passed to `save`."""
    with _opened(path_file) as file:
        return dict(file.metadata() or {})


def names(path_file: str | os.PathLike) -> list[str]:
    """Return the names of the arrays in the file."""
    with _opened(path_file) as file:
        return list(file.keys())


def flatten_named(tree: Any) -> dict[str, Any]:
    """Return dotted name -> leaf, in tree order; raise WeightsError when two share a name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {dotted_name(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise WeightsError(
            f"{len(leaves) - len(named)} arrays have the same dotted name as another array; "
            "rename an attribute"
        )
    return named


def shape_error(
    path: str | os.PathLike, name: str, shape: tuple[int, ...], leaf: Any
) -> WeightsError:
    """Return the error for a shape that is not the model's."""
    return WeightsError(
        f"{path}: {name} has shape {shape}, but the model has {tuple(leaf.shape)}; use the "
        "config that the file was written with"
    )


def dotted_name(path: tuple[Any, ...]) -> str:
    """Return a jax key path as a dotted name, without the `value` of an NNX variable."""
    parts = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", None)))) for k in path]
    if len(parts) > 1 and parts[-1] == "value":
        parts = parts[:-1]
    return ".".join(parts)


def fetch_to_host(leaf: Any) -> np.ndarray:
    """Return all of an array on this host; every host must call this for a distributed array."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.ascontiguousarray(np.asarray(leaf)).reshape(np.shape(leaf))


def _opened(path_file: str | os.PathLike) -> Any:
    if not Path(path_file).is_file():
        raise WeightsError(f"{path_file}: weight file not found; check the folder in the config")
    try:
        return safe_open(path_file, framework="numpy")
    except SafetensorError as e:
        raise WeightsError(
            f"{path_file}: not a complete safetensors file ({e}); copy or export it again"
        ) from e


def check_names(path_file: str | os.PathLike, stored: set[str], expected: set[str]) -> None:
    """Raise WeightsError unless the file has exactly the names that the model requires."""
    extra, missing = sorted(stored - expected), sorted(expected - stored)
    if extra or missing:
        raise WeightsError(
            f"{path_file} does not match this model: {len(missing)} arrays are missing in the file "
            f"{missing[:4]}, {len(extra)} are unexpected {extra[:4]}; use the config that the file "
            "was written with"
        )


def _placed(path_file: str | os.PathLike, file: Any, name: str, leaf: Any) -> jax.Array:
    rows = file.get_slice(name)
    shape = tuple(rows.get_shape())
    if shape != tuple(leaf.shape):
        raise shape_error(path_file, name, shape, leaf)
    dtype, floats = rows.get_dtype(), np.issubdtype(_numpy_dtype(leaf.dtype), np.floating)
    floats = floats or str(leaf.dtype) == "bfloat16"
    if dtype not in (_FLOATS if floats else _INTEGERS):
        raise WeightsError(
            f"{path_file}: {name} has dtype {dtype}, but the model has {leaf.dtype}; convert the "
            "original checkpoint again"
        )
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.local_devices()[0]
    )

    def read(index: tuple[slice, ...]) -> np.ndarray:
        part = rows[index] if index else file.get_tensor(name)
        return np.asarray(part).astype(_numpy_dtype(leaf.dtype))

    return jax.make_array_from_callback(shape, sharding, read)


def _numpy_dtype(dtype: Any) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if str(dtype) == "bfloat16" else np.dtype(dtype)
