"""The torch side of true_size.py: PY true_size_torch.py STEP SCRATCH.

HF's layers with the weights of a checkpoint in HF's layout, one layer in memory at a time, on the
inputs that true_size_jax.py has saved. Differences are relative to the standard deviation of what
is compared. Each step prints one JSON object as its last line.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import sides

if __name__ == "__main__":
    STEP, SCRATCH, *_ = sides.read_step(__doc__, "torch", "transformers", "safetensors")

import numpy as np
import safetensors
import torch
import transformers
from torch.nn import functional as F  # noqa: N812
from transformers.models.chameleon import modeling_chameleon as chameleon
from transformers.models.janus import modeling_janus as janus

PROJECTIONS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj")}
PROJECTIONS["mlp"] = ("gate_proj", "up_proj", "down_proj")
SCALE_TEXT, FIRST_CODE = 3.0, 4
ROWS = 256  # of logits at a time
NF4 = (  # QLoRA (arXiv:2305.14314), appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class Weights:
    """The tensors of a checkpoint in HF's layout, read one by one."""

    def __init__(self, folder: pathlib.Path):
        self.config = transformers.ChameleonConfig.from_pretrained(folder)
        self.config._attn_implementation = "sdpa"
        self._files, self._places = {}, {}
        for path in sorted(folder.glob("*.safetensors")):
            self._files[path] = file = safetensors.safe_open(path, framework="pt")
            self._places |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[self._places[name]].get_tensor(name)

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors whose names begin with `prefix`, without it."""
        names = [n for n in self._places if n.startswith(prefix)]
        return {n.removeprefix(prefix): self[n] for n in names}

    def module(self, make: Callable[[], torch.nn.Module], prefix: str) -> torch.nn.Module:
        """Return a module with its weights in their own dtype."""
        with torch.device("meta"):
            module = make()
        module.load_state_dict(self.under(prefix), assign=True)
        return module.eval()

    def layer(self, i: int) -> torch.nn.Module:
        """Return one decoder layer."""
        kind = "ChameleonSwinDecoderLayer" if self.config.swin_norm else "ChameleonDecoderLayer"
        make = functools.partial(getattr(chameleon, kind), self.config, i)
        return self.module(make, f"model.layers.{i}.")

    @property
    def codes(self) -> slice:
        """Return the ids of image codes."""
        return slice(FIRST_CODE, FIRST_CODE + self.config.vq_config.num_embeddings)

    def norm(self) -> torch.nn.Module:
        """Return the final norm."""
        c = self.config
        make = functools.partial(chameleon.ChameleonRMSNorm, c.hidden_size, eps=c.rms_norm_eps)
        return self.module(make, "model.norm.")


class Saved:
    """The arrays that true_size_jax.py left."""

    def __init__(self, scratch: pathlib.Path, name: str):
        self._folder, self._name = scratch / "arrays", name

    def __call__(self, key: str) -> torch.Tensor:
        array = np.load(self._folder / f"{self._name}.{key}.npy", mmap_mode="c")
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor

    def tree(self, kind: str) -> dict[str, torch.Tensor]:
        """Return all arrays of a kind by their names."""
        prefix = f"{self._name}.{kind}."
        paths = self._folder.glob(f"{prefix}*.npy")
        return {p.name.removeprefix(prefix).removesuffix(".npy"): torch.from_numpy(np.load(p))
                for p in paths}  # fmt: skip


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """Return the largest and the root mean square difference over the std of `theirs`."""
    ours, theirs = ours.float(), theirs.float()
    gap, std = (ours - theirs).abs(), theirs.std()
    rms = gap.square().mean().sqrt()
    return dict(most=round(float(gap.max() / std), 4), rms=round(float(rms / std), 5))


def packed(
    segments: torch.Tensor, positions: torch.Tensor, weights: Weights, dtype
) -> dict[str, Any]:
    """Return the mask and the rotations of a packed row."""
    order = torch.arange(segments.shape[1])
    mask = (segments[:, :, None] == segments[:, None, :]) & (order[:, None] >= order[None, :])
    rotary = chameleon.ChameleonRotaryEmbedding(weights.config)
    angles = rotary(torch.zeros(1, dtype=dtype), positions.long())
    return dict(attention_mask=mask[:, None], position_embeddings=angles)


@torch.no_grad()
def forward(scratch: pathlib.Path) -> dict[str, Any]:
    """Compare every layer on this side's own stream, three of them also on ours, and the logits."""
    weights, saved = Weights(scratch / "hf"), Saved(scratch, "forward")
    ids, hidden, count = saved("ids").long(), saved("hidden"), weights.config.num_hidden_layers
    row = packed(saved("segments"), saved("positions"), weights, torch.bfloat16)
    real = (saved("segments") > 0)[0]
    x = F.embedding(ids, weights["model.embed_tokens.weight"])
    assert torch.equal(x, hidden[0]), "the embeddings differ"
    chained, alone = [], {}
    for i in range(count):
        layer = weights.layer(i)
        x, ours = layer(x, **row)[0], hidden[i + 1][:, real]
        chained.append(difference(ours, x[:, real]))
        print(f"layer {i}: {chained[-1]}", flush=True)
        if i in (0, count // 2, count - 1):  # on our stream, also in fp32
            once = layer(hidden[i].clone(), **row)[0][:, real]
            wide = packed(saved("segments"), saved("positions"), weights, torch.float32)
            best = layer.float()(hidden[i].float(), **wide)[0][:, real]
            alone[i] = dict(
                apart=difference(ours, once), ours_from_fp32=difference(ours, best),
                theirs_from_fp32=difference(once, best),
            )  # fmt: skip
            print(f"    alone: {alone[i]}", flush=True)
    ours, head = saved("logits")[0][real], weights["lm_head.weight"]
    theirs = weights.norm()(x)[0, real]
    parts = [
        _compare_logits(ours[at : at + ROWS], theirs[at : at + ROWS] @ head.T, weights.codes)
        for at in range(0, len(ours), ROWS)
    ]
    logits = {
        key: round(float((np.max if "most" in key else np.mean)([p[key] for p in parts])), 4)
        for key in parts[0]
    }
    return dict(
        chained_most=max(d["most"] for d in chained), chained_rms=[d["rms"] for d in chained],
        alone=alone, **logits,
    )  # fmt: skip


def _compare_logits(ours: torch.Tensor, theirs: torch.Tensor, codes: slice) -> dict[str, float]:
    every, image = difference(ours, theirs), difference(ours[:, codes], theirs[:, codes])
    return dict(
        logits_most=every["most"], logits_rms=every["rms"], image_logits_most=image["most"],
        image_logits_rms=image["rms"], std_of_image_logits=float(theirs[:, codes].float().std()),
        same_best=float((ours.argmax(1) == theirs.argmax(1)).float().mean()),
    )  # fmt: skip


@torch.no_grad()
def quantized(scratch: pathlib.Path) -> dict[str, Any]:
    """Compare each layer on our stream with HF's on weights that are rounded here.

    Also chained, which shows what the rounding does to the logits of these random weights.
    """
    weights, saved, found = Weights(scratch / "hf"), Saved(scratch, "quantized"), {}
    ids, head, logits = saved("ids").long(), weights["lm_head.weight"], {}
    row = packed(saved("segments"), saved("positions"), weights, torch.bfloat16)
    for kind in ("native", "int8", "nf4"):
        hidden = Saved(scratch, f"quantized.{kind}")("hidden")
        x, apart = F.embedding(ids, weights["model.embed_tokens.weight"]), []
        for i in range(weights.config.num_hidden_layers):
            layer = weights.layer(i)
            for part in layer.modules() if kind != "native" else ():
                if isinstance(part, torch.nn.Linear):
                    part.weight = torch.nn.Parameter(rounded(part.weight, kind), False)
            apart.append(difference(hidden[i + 1], layer(hidden[i].clone(), **row)[0])["rms"])
            x = layer(x, **row)[0]
            print(f"{kind}, layer {i}: {apart[-1]}", flush=True)
        logits[kind] = (weights.norm()(x)[0] @ head.T).float()
        ours = Saved(scratch, f"quantized.{kind}")("logits")[0]
        found[kind] = dict(
            layers_rms_most=max(apart), logits_rms=difference(ours, logits[kind])["rms"],
            correlation_with_bf16=_correlation(logits[kind], logits["native"]),
        )  # fmt: skip
    return found


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a matrix [out, in] rounded to int8 by rows, or to nf4 by 64 numbers of a row."""
    wide = weight.float()
    if kind == "int8":
        scale = wide.abs().amax(1, keepdim=True) / 127
        return ((wide / scale).round() * scale).to(weight.dtype)
    tiles = wide.reshape(len(wide), -1, 64)
    scale = tiles.abs().amax(2, keepdim=True)
    levels = torch.tensor(NF4)
    nearest = torch.bucketize(tiles / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).reshape(wide.shape).to(weight.dtype)


def _correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return round(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]), 4)


@torch.no_grad()
def vq(scratch: pathlib.Path) -> dict[str, Any]:
    """Compare codes with HF's encoder, and decoded pixels with Janus' decoder of the same net."""
    weights, saved = Weights(scratch / "hf"), Saved(scratch, "vq")
    config = weights.config.vq_config
    names = {n: t for n, t in weights.under("model.vqmodel.").items()}
    net = chameleon.ChameleonVQVAE(config)
    net.load_state_dict({n: t for n, t in names.items() if not n.startswith("decoder.")})
    decoder = _decoder(config, names)
    table, equal, gaps, worst = names["quantize.embedding.weight"], [], [], 0.0
    for ours, pixels, decoded in zip(
        saved("codes").long(), saved("pixels"), saved("decoded"), strict=True
    ):
        x = pixels.permute(2, 0, 1)[None]
        latents = net.quant_conv(net.encoder(x))[0].flatten(1).T
        far = torch.cdist(latents, table).square()
        theirs = far.argmin(1)
        assert torch.equal(theirs, net.encode(x).image_tokens.reshape(-1)), (
            "HF's own argmin differs"
        )
        equal.append(float((theirs == ours).float().mean()))
        extra = far.gather(1, ours[:, None])[:, 0] - far.min(1).values
        gaps.append(float((extra / far.min(1).values).max()))
        side = int(len(ours) ** 0.5)
        z = F.embedding(ours, table).T.reshape(1, -1, side, side)
        rebuilt = decoder(net.post_quant_conv(z))[0].permute(1, 2, 0)
        worst = max(worst, float((rebuilt - decoded).abs().max() / rebuilt.std()))
        print(
            f"equal codes {equal[-1]:.4f}, extra distance {gaps[-1]:.2e}, pixels {worst:.2e}",
            flush=True,
        )
    return dict(equal_codes=min(equal), largest_extra_distance=max(gaps), pixels_most=worst)


def _decoder(config: Any, names: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return Janus' decoder without attention in its levels, with taming's names and order."""
    like = janus.JanusVQVAEConfig(
        base_channels=config.base_channels, latent_channels=config.latent_channels, out_channels=3,
        channel_multiplier=config.channel_multiplier, num_res_blocks=config.num_res_blocks,
        dropout=0.0,
    )  # fmt: skip
    decoder, levels = janus.JanusVQVAEDecoder(like), len(config.channel_multiplier)
    decoder.up[0].attn = torch.nn.ModuleList()
    state = {}
    for name, tensor in names.items():
        if name.startswith("decoder.up."):
            _, up, level, rest = name.split(".", 3)
            state[f"{up}.{levels - 1 - int(level)}.{rest}"] = tensor
        elif name.startswith("decoder."):
            state[name.removeprefix("decoder.")] = tensor
    decoder.load_state_dict(state)
    return decoder.eval()


@torch.no_grad()
def _logits_of(weights: Weights, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the logits of sequences, run as the documents of one packed row."""
    ids = torch.cat(sequences)[None].long()
    lengths = torch.tensor([len(s) for s in sequences])
    segments = torch.repeat_interleave(torch.arange(len(lengths)) + 1, lengths)[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    row = packed(segments, positions, weights, torch.bfloat16)
    x = F.embedding(ids, weights["model.embed_tokens.weight"])
    for i in range(weights.config.num_hidden_layers):
        x = weights.layer(i)(x, **row)[0]
    logits = (weights.norm()(x)[0] @ weights["lm_head.weight"].T).float()
    return list(logits.split(lengths.tolist()))


def generate(scratch: pathlib.Path) -> dict[str, Any]:
    """Ask HF's layers for the best token after each of ours: text, and codes with guidance.

    A greedy sequence is HF's as long as each token is HF's best after the tokens before it.
    """
    weights, saved = Weights(scratch / "hf"), Saved(scratch, "generate")
    prompt, text, codes = (saved(n).long() for n in ("prompt", "text", "codes"))
    boi = torch.tensor([8_197])
    full = torch.cat([prompt, boi, codes])
    free = torch.cat([torch.tensor([0]), boi, codes])
    of_text, of_full, of_free = _logits_of(weights, [torch.cat([prompt, text]), full, free])
    of_text = of_text[len(prompt) - 1 : -1].masked_fill(~saved("allowed"), -torch.inf)
    start = len(prompt)
    of_full, of_free = of_full[start : start + len(codes)], of_free[1 : 1 + len(codes)]
    of_full, of_free = (x[:, weights.codes] for x in (of_full, of_free))
    guided = of_free + SCALE_TEXT * (of_full - of_free)
    return {"text": _greedy(of_text, text), "codes": _greedy(guided, codes - FIRST_CODE)}


def _greedy(logits: torch.Tensor, ours: torch.Tensor) -> dict[str, Any]:
    """Return how many of our tokens are the best, and how far the others are below it."""
    top = logits.topk(2, dim=1)
    std = torch.stack([row[row.isfinite()].std() for row in logits])
    below = (top.values[:, 0] - logits.gather(1, ours[:, None])[:, 0]) / std
    wrong = torch.nonzero(below > 0)[:, 0]
    return dict(
        tokens=len(ours), equal=int((below == 0).sum()),
        first_difference=int(wrong[0]) if len(wrong) else None,
        most_below_best=round(float(below.max()), 4),
        median_margin=round(float(((top.values[:, 0] - top.values[:, 1]) / std).median()), 4),
    )  # fmt: skip


class Adapted(torch.nn.Module):
    """A projection with LoRA of scale 1; a [in, r], b [r, out] are fp32, used in x's dtype."""

    def __init__(self, base: torch.nn.Module, a: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.base, self.a, self.b = base, torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + (x @ self.a.to(x.dtype)) @ self.b.to(x.dtype)


def _gradients(weights: Weights, saved: Saved, dtype) -> tuple[float, dict[str, torch.Tensor]]:
    adapters, x = saved.tree("adapter"), saved("x").to(dtype)
    last = len(next(iter(adapters.values())))
    first, places = weights.config.num_hidden_layers - last, {}
    row, layers = packed(saved("segments"), saved("positions"), weights, dtype), []
    for n in range(last):
        layer = weights.layer(first + n).to(dtype).requires_grad_(False)
        for block, names in PROJECTIONS.items():
            for name in names:
                key = f"layers.{block}.{name}"
                a, b = (adapters[f"{key}.lora_{c}"][n].clone() for c in "ab")
                new = Adapted(getattr(getattr(layer, block), name), a, b)
                setattr(getattr(layer, block), name, new)
                places[key, n] = new
        layers.append(layer)
    for layer in layers:
        x = layer(x, **row)[0]
    x = weights.norm().to(dtype)(x)[0, :-1]
    targets, share = saved("ids")[0, 1:].long(), saved("weights")[0, 1:]
    used, head = torch.nonzero(share)[:, 0], weights["lm_head.weight"].to(dtype)
    logits = (x[used] @ head.T).float()
    loss = (F.cross_entropy(logits, targets[used], reduction="none") * share[used]).sum()
    loss.backward()
    grads = {
        f"{key}.lora_{c}.{n}": getattr(new, c).grad
        for (key, n), new in places.items()
        for c in "ab"
    }
    return loss.item(), grads


def gradient(scratch: pathlib.Path, name: str = "gradient", folder: str = "hf") -> dict[str, Any]:
    """Compare the loss and the adapters' gradients of the last layers with autograd."""
    weights, saved = Weights(scratch / folder), Saved(scratch, name)
    ours = {f"{leaf}.{n}": g for leaf, gs in saved.tree("grad").items() for n, g in enumerate(gs)}
    losses, grads = {}, {}
    for dtype in ("bfloat16", "float32"):
        losses[dtype], grads[dtype] = _gradients(weights, saved, getattr(torch, dtype))
        print(f"{dtype}: loss {losses[dtype]:.5f}", flush=True)
    assert ours.keys() == grads["float32"].keys()
    apart = lambda a, b: float((a - b).norm() / b.norm())  # noqa: E731
    best = grads["float32"]
    of_ours = {n: apart(ours[n], best[n]) for n in best}
    of_theirs = {n: apart(grads["bfloat16"][n], best[n]) for n in best}
    worst = max(of_ours, key=of_ours.get)
    return dict(
        loss_bf16=losses["bfloat16"], loss_fp32=losses["float32"], tensors=len(best), worst=worst,
        ours_from_fp32=round(of_ours[worst], 5), bf16_from_fp32=round(max(of_theirs.values()), 5),
        medians=[round(float(np.median(list(d.values()))), 5) for d in (of_ours, of_theirs)],
    )  # fmt: skip


def large_layer(scratch: pathlib.Path) -> dict[str, Any]:
    """Compare one layer of the 30B."""
    return gradient(scratch, "large", "large_hf")


@torch.no_grad()
def reload(scratch: pathlib.Path) -> dict[str, Any]:
    """Load the merged model as a user of HF does; compare with the separate adapter."""
    saved = Saved(scratch, "adapted")
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(
        scratch / "merged_hf", dtype=torch.bfloat16
    ).eval()
    hidden = model.model(saved("ids").long()).last_hidden_state
    codes = Weights(scratch / "merged_hf").codes
    found = _compare_logits(saved("logits")[0], model.lm_head(hidden)[0], codes)
    return {key: round(value, 4) for key, value in found.items()}


def meta(scratch: pathlib.Path) -> dict[str, Any]:
    """Compare tensors of the merged model in Meta's file, by torch.load, with HF's files."""
    weights = Weights(scratch / "merged_hf")
    (path,) = (scratch / "merged_meta").glob("models/*/consolidated.pth")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    names = {"output": "lm_head", "tok_embeddings": "model.embed_tokens", "norm": "model.norm"}
    for i in (0, weights.config.num_hidden_layers - 1):
        names |= {f"layers.{i}.feed_forward.w{n}": f"model.layers.{i}.mlp.{name}_proj"
                  for n, name in ((1, "gate"), (2, "down"), (3, "up"))}  # fmt: skip
        names |= {
            f"layers.{i}.attention.w{n}": f"model.layers.{i}.self_attn.{n}_proj" for n in "vo"
        }
    equal = sum(torch.equal(state[f"{a}.weight"], weights[f"{b}.weight"]) for a, b in names.items())
    return dict(equal_tensors=equal, compared=len(names), tensors=len(state))


if __name__ == "__main__":
    torch.set_num_threads(2)
    steps = (forward, vq, generate, gradient, quantized, large_layer, reload, meta)
    step = {f.__name__: f for f in steps}[STEP]
    print(json.dumps(step(pathlib.Path(SCRATCH))))
