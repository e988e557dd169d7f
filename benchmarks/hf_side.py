"""Runs the other side of training benchmarks: HF's Chameleon with peft's LoRA.

python hf_side.py SPEC.json, then one request per line (sides.py), in a Python with both. SPEC: the
model of the other side, and the batches, so that both train the same weights on the same tokens:

    model vocab lora optim   the fields of medmax_jax.config     batches   .npz of ids and weights
    device dtype threads quant checkpointing compile             rows      of a step

The forward is HF's model and its head without the mask that HF puts on the logits of image ids; the
loss is sum(weights * nll), which both sides take from the same file.
"""

import dataclasses
import time
from typing import Any

import sides

if __name__ == "__main__":
    SPEC = sides.read_spec(__doc__, "torch", "transformers", "peft")  # before they are imported

import numpy as np
import peft
import same_weights
import torch
import transformers

NAMES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def build(spec: dict[str, Any]) -> torch.nn.Module:
    """Return HF's model with peft's adapters and the weights of same_weights.py."""
    dtype = getattr(torch, spec["dtype"])
    torch.set_default_dtype(dtype)
    with torch.device(spec["device"]):
        model = transformers.ChameleonForConditionalGeneration(hf_config(spec)).to(dtype)
    torch.set_default_dtype(torch.float32)
    for name, tensor in model.named_parameters():
        if not name.startswith("model.vqmodel"):
            fill(name, tensor)
    if spec["quant"] == "nf4":
        quantize(model)
    if spec["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lora = spec["lora"]
    adapters = peft.LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=NAMES
    )
    return peft.get_peft_model(model, adapters)  # adapters in fp32 for any base


def hf_config(spec: dict[str, Any]) -> transformers.ChameleonConfig:
    """Return the same architecture, with the smallest image tokenizer inside HF's model."""
    m = spec["model"]
    return transformers.ChameleonConfig(
        vocab_size=spec["vocab"]["size"],
        hidden_size=m["hidden_size"],
        intermediate_size=m["intermediate_size"],
        num_hidden_layers=m["num_layers"],
        num_attention_heads=m["num_heads"],
        num_key_value_heads=m["num_kv_heads"],
        max_position_embeddings=m["context_length"],
        rms_norm_eps=m["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": m["rope_theta"]},
        model_parallel_size=m["qk_norm_shards"],
        swin_norm=m["swin_norm"],
        vq_config=dict(
            base_channels=32, channel_multiplier=[1], num_res_blocks=1, resolution=16, embed_dim=8,
            latent_channels=8, num_embeddings=16,
        ),
        vocabulary_map={"<image>": 8711, "IMGIMGAZ": 4},
        attn_implementation=spec["attention"],
    )  # fmt: skip


def ours(name: str) -> tuple[str, int]:
    """Return this project's name of a tensor, and its layer.

    model.layers.3.mlp.up_proj.weight -> layers.mlp..., 3.
    """
    parts = [
        p for p in name.split(".") if p not in ("base_model", "model", "default", "base_layer")
    ]
    layer = int(parts.pop(1)) if parts[0] == "layers" else 0
    if parts[-2] in ("lora_A", "lora_B"):
        return ".".join(parts[:-2] + [parts[-2].lower()]), layer
    if parts[-2].endswith("norm"):
        leaf = "scale" if parts[-1] == "weight" else "bias"
    else:
        leaf = "embedding" if parts[-2] == "embed_tokens" else "kernel"
    return ".".join(parts[:-1] + [leaf]), layer


@torch.no_grad()
def fill(name: str, tensor: torch.Tensor) -> None:
    """Write the tensor's weights in place."""
    name, layer = ours(name)
    # torch stores matrices as [out, in]
    transposed = not name.endswith(("embedding", "scale", "bias"))
    shape = tensor.shape[::-1] if transposed else tensor.shape
    wide = same_weights.width(name, shape[0])
    if wide is None:
        tensor.fill_(same_weights.constant(name))
        return
    index = torch.arange(shape[0] * shape[1], device=tensor.device)  # int64
    bits = same_weights.bits(index, same_weights.salt(name, layer), int)
    value = ((bits.float() / 2**24 - 0.5) * wide).reshape(shape)
    tensor.copy_(value.T if transposed else value)


def quantize(model: torch.nn.Module) -> None:
    """Quantize the matrices of the layers to nf4 of bitsandbytes, in place.

    The embedding and head are unchanged.
    """
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, old in list(block.named_children()):
                if name in NAMES:
                    new = bnb.nn.Linear4bit(
                        old.in_features, old.out_features, bias=False, quant_type="nf4",
                        compute_dtype=old.weight.dtype,
                    )  # fmt: skip
                    new.weight = bnb.nn.Params4bit(
                        old.weight.data.cpu(), requires_grad=False, quant_type="nf4"
                    )
                    setattr(block, name, new.to(old.weight.device))


@dataclasses.dataclass
class Trainer:
    """Holds a model, its optimizer and its batches."""

    spec: dict[str, Any]

    def __post_init__(self):
        spec = self.spec
        if spec["device"] == "cpu":
            torch.set_num_threads(spec["threads"])
        self.model = build(spec).train()
        batches = np.load(spec["batches"])
        self.ids, self.weights = (
            torch.tensor(batches[name]).to(spec["device"]) for name in ("ids", "weights")
        )
        self.forward = torch.compile(self.loss) if spec["compile"] else self.loss
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.restart(dropout=spec["lora"]["dropout"])

    def loss(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        inner = self.model.base_model.model
        logits = inner.lm_head(inner.model(ids).last_hidden_state)[:, :-1]
        nll = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1), reduction="none"
        )
        return (nll * weights[:, 1:].reshape(-1)).sum()

    def restart(self, *, dropout: float) -> None:
        """Restore the first weights, and create a new optimizer."""
        for name, tensor in self.model.named_parameters():
            if "lora_" in name:
                fill(name, tensor)
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        o = self.spec["optim"]
        self.adam = torch.optim.AdamW(
            self.trained, lr=o["peak_lr"], betas=(o["b1"], o["b2"]), eps=o["eps"],
            weight_decay=o["weight_decay"], fused=True,
        )  # fmt: skip
        self.at = 0

    def step(self) -> torch.Tensor:
        rows = self.spec["rows"]
        first = self.at * rows % (len(self.ids) // rows * rows)
        ids, weights = (x[first : first + rows] for x in (self.ids, self.weights))
        self.at += 1
        self.adam.zero_grad(set_to_none=True)
        loss = self.forward(ids.long(), weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.spec["optim"]["clip_norm"])
        self.adam.step()
        return loss.detach()

    def losses(self, count: int) -> dict[str, Any]:
        """Return the losses of the first steps, without dropout."""
        self.restart(dropout=0.0)
        losses = [self.step().item() for _ in range(count)]
        self.restart(dropout=self.spec["lora"]["dropout"])
        return dict(losses=losses)

    def steps(self, count: int) -> dict[str, Any]:
        """Return the seconds of each of `count` steps."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.step().item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        return dict(seconds=seconds)

    def about(self) -> dict[str, Any]:
        """Return the versions, and the peak of the device's memory so far."""
        return device(self.spec) | dict(trained=sum(p.numel() for p in self.trained))


def device(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the device and the versions."""
    cuda, modules = spec["device"] != "cpu", (torch, transformers, peft)
    return dict(
        versions={m.__name__: m.__version__ for m in modules},
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if cuda else "cpu",
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
    )


def main(spec: dict[str, Any]) -> None:
    """Build the model, then serve requests."""
    sides.serve(lambda: Trainer(spec))


if __name__ == "__main__":
    main(SPEC)
