"""The pieces of a model-parallel checkpoint of Meta's, and the order of the rows of a head.

split     the shards of a tensor hold
rows      wq wk wv w1 w3 output        the rows of some heads, of some hidden units
columns   wo w2 tok_embeddings         the columns of them
copies    the norms over D             all of it, each

row of a head, H = 6     HF turns (x[j], x[j + H/2])      a0 a1 a2 b0 b1 b2
                         Meta turns (x[2j], x[2j + 1])    a0 b0 a1 b1 a2 b2
"""

import numpy as np
from jaxtyping import Shaped

from medmax_jax.config import Model
from medmax_jax.convert.form import ConvertError, Tensor

ROWS, COLUMNS, COPIES = "rows", "columns", "copies"
FUSED = {"attention.wqkv": ("wq", "wk", "wv"), "feed_forward.w13": ("w1", "w3")}


def from_meta(x: Shaped[np.ndarray, "NH D"], head_dim: int) -> Shaped[np.ndarray, "NH D"]:
    """Rows of whole heads in Meta's order, in HF's."""
    return x.reshape(-1, head_dim // 2, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def to_meta(x: Shaped[np.ndarray, "NH D"], head_dim: int) -> Shaped[np.ndarray, "NH D"]:
    """Rows of whole heads in HF's order, in Meta's."""
    return x.reshape(-1, 2, head_dim // 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def gains_from_meta(x: Shaped[np.ndarray, "H"]) -> Shaped[np.ndarray, "H"]:
    """The gains or biases of a head, likewise."""
    return from_meta(x[:, None], len(x))[:, 0]


def gains_to_meta(x: Shaped[np.ndarray, "H"]) -> Shaped[np.ndarray, "H"]:
    """The gains or biases of a head, likewise."""
    return to_meta(x[:, None], len(x))[:, 0]


def unfused(shard: dict[str, Tensor], model: Model, count: int) -> dict[str, Tensor]:
    """A shard with wqkv and w13, as Meta's loader makes them, taken apart."""
    sizes = dict(
        wq=model.num_heads * model.head_dim // count,
        wk=model.num_kv_heads * model.head_dim // count,
        wv=model.num_kv_heads * model.head_dim // count,
        w1=model.intermediate_size // count,
        w3=model.intermediate_size // count,
    )
    found = {}
    for name, tensor in shard.items():
        path, _, last = name.removesuffix(".weight").rpartition(".")
        whole = f"{path.rpartition('.')[2]}.{last}"
        if whole not in FUSED:
            found[name] = tensor
            continue
        start = 0
        for part in FUSED[whole]:
            found[f"{path}.{part}.weight"] = _rows(tensor, start, start := start + sizes[part])
    return found


def _rows(tensor: Tensor, begin: int, end: int) -> Tensor:
    """Rows begin..end of a tensor, as a tensor."""

    def block(rows: slice, columns: slice) -> np.ndarray:
        first, last, _ = rows.indices(end - begin)
        return tensor.block(slice(begin + first, begin + last), columns)

    return Tensor((end - begin, *tensor.shape[1:]), tensor.dtype, block, tensor.where)


def joined(parts: list[Tensor], split: str) -> Tensor:
    """The tensor of which each shard has rows, columns or a copy."""
    first, shape = parts[0], list(parts[0].shape)
    if len(parts) == 1:
        return first
    if split != COPIES:
        shape[split == COLUMNS] *= len(parts)

    def block(rows: slice, columns: slice) -> np.ndarray:
        if split == COLUMNS:
            whole = [p.block(rows, slice(None)) for p in parts]
            return np.concatenate(whole, axis=1)[:, columns]
        if split == ROWS:
            height = first.shape[0]
            begin, end, _ = rows.indices(shape[0])
            pieces = [
                p.block(slice(max(begin - i * height, 0), min(end - i * height, height)), columns)
                for i, p in enumerate(parts)
                if begin < (i + 1) * height and end > i * height
            ]
            return np.concatenate(pieces)
        copies = [p.block(rows, columns) for p in parts]
        for copy, part in zip(copies, parts, strict=True):
            if copy.tobytes() != copies[0].tobytes():
                raise ConvertError(
                    f"{part.where}: differs from its copy in the first shard; "
                    "the shards are of two checkpoints"
                )
        return copies[0]

    return Tensor(tuple(shape), first.dtype, block, first.where)


def turned_to_hf(tensor: Tensor, head_dim: int) -> Tensor:
    """q_proj or k_proj in HF's order of rows; whole heads are read, whatever rows are asked for."""

    def block(rows: slice, columns: slice) -> np.ndarray:
        begin, end, _ = rows.indices(tensor.shape[0])
        low, high = begin // head_dim * head_dim, -(-end // head_dim) * head_dim
        return from_meta(tensor.block(slice(low, high), columns), head_dim)[begin - low : end - low]

    return Tensor(tensor.shape, tensor.dtype, block, tensor.where)


def gains(parts: list[Tensor], heads: int, head_dim: int) -> Tensor:
    """q/k-norm gains as HF has them: a row a head, equal within a shard."""

    def block(rows: slice, columns: slice) -> np.ndarray:
        each = np.stack([gains_from_meta(p.all()) for p in parts])
        return np.repeat(each, heads // len(parts), axis=0)[rows, columns]

    for part in parts:
        if part.shape != (head_dim,):
            raise ConvertError(
                f"{part.where}: shape {part.shape}, params.json asks for ({head_dim},)"
            )
    return Tensor((heads, head_dim), parts[0].dtype, block, parts[0].where)
