"""Meta's Chameleon in numpy, from its own files' arrays: neighbours turn, shards add up.

Written from the description of the layout, with none of the project's code, so that a conversion
which mixes up rows, gains or shards shows in the logits.
"""

import numpy as np


def logits(shards: list[dict[str, np.ndarray]], params: dict, ids: np.ndarray) -> np.ndarray:
    """fp64 logits [B, T, V]; `shards`: one state dict a file, `params`: of params.json."""
    count = len(shards)
    x = np.concatenate([s["tok_embeddings.weight"] for s in shards], axis=1)[ids].astype(np.float64)
    for layer in range(params["n_layers"]):
        names = f"layers.{layer}."
        weights = [{k.removeprefix(names): v for k, v in s.items() if names in k} for s in shards]
        attend = lambda y, w=weights: sum(_attention(y, each, params, count) for each in w)  # noqa: E731
        mlp = lambda y, w=weights: sum(_mlp(y, each) for each in w)  # noqa: E731
        first, second = (weights[0][f"{n}_norm.weight"] for n in ("attention", "ffn"))
        if params["swin_norm"]:
            x = x + _rms(attend(x), first, params)
            x = x + _rms(mlp(x), second, params)
        else:
            x = x + attend(_rms(x, first, params))
            x = x + mlp(_rms(x, second, params))
    x = _rms(x, shards[0]["norm.weight"], params)
    return np.concatenate([x @ s["output.weight"].astype(np.float64).T for s in shards], axis=-1)


def _attention(x: np.ndarray, w: dict[str, np.ndarray], params: dict, count: int) -> np.ndarray:
    heads, groups = params["n_heads"] // count, params["n_kv_heads"] // count
    size = params["dim"] // params["n_heads"]
    q, k, v = (
        np.stack(np.split(x @ w[f"attention.{n}.weight"].astype(np.float64).T, each, -1), 1)
        for n, each in (("wq", heads), ("wk", groups), ("wv", groups))
    )  # [B, heads, T, size]
    q, k = (
        _turn(_layer_norm(y, w[f"attention.{n}_normalization.weight"],
                          w[f"attention.{n}_normalization.bias"]), size, params["rope_theta"])
        for n, y in (("q", q), ("k", k))
    )  # fmt: skip
    out, length = [], x.shape[1]
    for head in range(heads):
        mine = head * groups // heads
        scores = q[:, head] @ k[:, mine].swapaxes(1, 2) / np.sqrt(size)
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(scores / scores.sum(-1, keepdims=True) @ v[:, mine])
    return np.concatenate(out, -1) @ w["attention.wo.weight"].astype(np.float64).T


def _turn(x: np.ndarray, size: int, theta: float) -> np.ndarray:
    """Neighbours as one complex number, times e^(i angle)."""
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    speed = theta ** (-np.arange(0, size, 2) / size)
    pairs = pairs * np.exp(1j * np.arange(x.shape[2])[:, None] * speed)
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def _mlp(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    w1, w2, w3 = (w[f"feed_forward.w{i}.weight"].astype(np.float64) for i in (1, 2, 3))
    gate = x @ w1.T
    return (gate / (1 + np.exp(-gate)) * (x @ w3.T)) @ w2.T


def _rms(x: np.ndarray, gain: np.ndarray, params: dict) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + params["norm_eps"]) * gain


def _layer_norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain + bias
