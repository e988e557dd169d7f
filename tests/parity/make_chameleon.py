"""python tests/parity/make_chameleon.py: the golden outputs of HF's Chameleon and of PEFT's LoRA.

Run in an environment of its own with torch, transformers and peft; the tests read
only the files that it writes next to itself. HF's forward masks the image ids' logits, so
the logits here are its head on its last hidden state.
"""

import pathlib

import chameleon_cases as cases
import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent


def build(case: cases.Case, dtype=torch.float32) -> transformers.ChameleonForConditionalGeneration:
    """HF's model with the case's weights."""
    config = transformers.ChameleonConfig(
        vocab_size=cases.SIZE,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_hidden_layers=case.num_layers,
        num_attention_heads=case.num_heads,
        num_key_value_heads=case.num_kv_heads,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        model_parallel_size=case.qk_norm_shards,
        swin_norm=case.swin_norm,
        vq_config=dict(
            base_channels=32, channel_multiplier=[1], num_res_blocks=1, resolution=16, embed_dim=8,
            latent_channels=8, num_embeddings=16,
        ),
        vocabulary_map={"<image>": 8711, "IMGIMGAZ": 4},
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.ChameleonForConditionalGeneration(config).to(dtype).eval()
    state = model.state_dict()
    for name, array in cases.weights(case, lora=False).items():
        for key, value in hf_arrays(name, array, case):
            assert state[key].shape == value.shape, (key, state[key].shape, value.shape)
            state[key] = torch.tensor(value)
    model.load_state_dict(state)
    return model


def hf_arrays(name: str, array: np.ndarray, case: cases.Case) -> list[tuple[str, np.ndarray]]:
    """Our stacked array as HF's arrays: one a layer, matrices [out, in], a row of gains a head."""
    *path, leaf = name.split(".")
    key = ".".join(path) + ".weight" if leaf != "bias" else name
    if name == "lm_head.kernel":
        return [(key, array.T)]
    if path[0] != "layers":
        return [(f"model.{key}", array)]
    keys = [f"model.layers.{i}.{key.removeprefix('layers.')}" for i in range(len(array))]
    if leaf == "kernel":
        array = array.transpose(0, 2, 1)
    if path[-1] in ("q_norm", "k_norm"):
        heads = case.num_heads if path[-1] == "q_norm" else case.num_kv_heads
        array = np.repeat(array, heads // case.qk_norm_shards, axis=1)
    return list(zip(keys, array, strict=True))


def forward(case: cases.Case) -> dict[str, np.ndarray]:
    """Each layer's output, the final hidden state, chosen columns of the logits and their norm."""
    model, outputs = build(case), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        hidden = model.model(torch.tensor(cases.ids()).long()).last_hidden_state
        logits = model.lm_head(hidden)
    print(case.name, "logits std", logits.std().item(), "hidden", [o.std().item() for o in outputs])
    return dict(
        layers=torch.stack(outputs).numpy(),
        hidden=hidden.numpy(),
        logits=logits[..., cases.COLUMNS].numpy(),
        logsumexp=logits.logsumexp(-1).numpy(),
        logits_std=logits.std().numpy(),
    )


def train(case: cases.Case, dtype=torch.float32) -> dict[str, np.ndarray]:
    """Adapter gradients of the first step, losses and norms of all, and the adapters after them."""
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    config = peft.LoraConfig(
        r=cases.LORA["rank"], lora_alpha=cases.LORA["alpha"], lora_dropout=0.0, target_modules=names
    )
    model = peft.get_peft_model(build(case, dtype), config).to(dtype)
    params = dict(model.named_parameters())
    places = {}  # dotted name -> its tensors, one a layer
    for name, array in cases.weights(case, lora=True).items():
        path, leaf = name.rsplit(".", 1)
        if leaf not in ("lora_a", "lora_b"):
            continue
        suffix = f"{path.removeprefix('layers.')}.lora_{leaf[-1].upper()}.default.weight"
        keys = [f"base_model.model.model.layers.{i}.{suffix}" for i in range(case.num_layers)]
        places[name] = [params[k] for k in keys]
        for tensor, value in zip(places[name], array, strict=True):
            tensor.data = torch.tensor(value.T.copy(), dtype=dtype)
    trained = [p for p in params.values() if p.requires_grad]
    assert sum(len(v) for v in places.values()) == len(trained)
    tokens = torch.tensor(cases.ids()).long()
    adam = torch.optim.AdamW(trained, lr=cases.LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, norms, out = [], [], {}
    for step in range(cases.STEPS):
        adam.zero_grad()
        inner = model.base_model.model
        logits = inner.lm_head(inner.model(tokens).last_hidden_state)[:, :-1]
        nll = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        loss = nll[:, cases.SCORED].mean()
        loss.backward()
        if step == 0:
            out |= {f"grad.{n}": stacked([p.grad for p in ps]) for n, ps in places.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0).item())
        adam.step()
        losses.append(loss.item())
    print(case.name, "losses", losses, "norms before the clip", norms)
    out |= {f"after.{n}": stacked([p.data for p in ps]) for n, ps in places.items()}
    return out | dict(losses=np.array(losses), norms=np.array(norms))


def check_conditioned(case: cases.Case, arrays: dict[str, np.ndarray]) -> None:
    """Adam divides by the size of a gradient, so an entry near 0 makes rounding into a whole step.

    The golden is of use only where fp64 gives the same within a quarter of the tests' tolerance; if
    it does not, choose another SEED.
    """
    for name, exact in train(case, torch.float64).items():
        off = np.abs(arrays[name] - exact).max() / cases.tolerance(name, exact)
        assert off < 0.25, f"{case.name} {name}: fp32 is {off:.2f} tolerances from fp64"


def stacked(tensors: list[torch.Tensor]) -> np.ndarray:
    """HF's [out, in] tensors as [L, in, out]."""
    return np.stack([t.detach().numpy().T for t in tensors])


def main() -> None:
    versions = [f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft)]
    for case in cases.CASES.values():
        lora = {name: array.astype(np.float32) for name, array in train(case).items()}
        check_conditioned(case, lora)
        for kind, arrays in (("forward", forward(case)), ("lora", lora)):
            path = HERE / f"chameleon_{case.name}_{kind}.npz"
            np.savez_compressed(path, versions=versions, **arrays)
            print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
