"""Writes peft_scales.json: the rank and scaling that PEFT gives each matrix, for some settings.

Run in an environment with torch and peft, which this project does not need:
    python tests/parity/make_peft_scales.py
"""

import json
import pathlib
import warnings

import peft
import torch

MODULES = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj")}
MODULES |= {"mlp": ("gate_proj", "up_proj", "down_proj")}
LAYERS = 12
CASES = [
    dict(r=4, lora_alpha=6),
    dict(r=4, lora_alpha=6, use_rslora=True),
    dict(r=4, lora_alpha=6, rank_pattern={"q_proj": 8, "mlp.up_proj": 2}),
    dict(r=4, lora_alpha=6, alpha_pattern={"down_proj": 9.5}, rank_pattern={"down_proj": 3}),
    dict(r=8, lora_alpha=16, rank_pattern={"layers.1.self_attn.v_proj": 2, "v_proj": 16}),
    dict(r=8, lora_alpha=16, rank_pattern={"v_proj": 16, "layers.1.self_attn.v_proj": 2}),
    dict(r=8, lora_alpha=16, alpha_pattern={"^model.layers.0.mlp.up_proj": 3, "o_proj": 5}),
    dict(r=8, lora_alpha=16, alpha_pattern={r"layers\.1\.mlp\.gate_proj": 3, "proj": 7}),
    dict(
        r=5, lora_alpha=7, use_rslora=True, rank_pattern={"k_proj": 3}, alpha_pattern={"k_proj": 2}
    ),
]


def model() -> torch.nn.Module:
    """Linear layers of one unit under Chameleon's names."""
    layers = [
        torch.nn.ModuleDict(
            {
                part: torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, False) for name in names})
                for part, names in MODULES.items()
            }
        )
        for _ in range(LAYERS)
    ]
    inner = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})
    return torch.nn.ModuleDict({"model": inner})


def main() -> None:
    warnings.simplefilter("ignore")
    found = []
    names = [name for names in MODULES.values() for name in names]
    for settings in CASES:
        config = peft.LoraConfig(target_modules=names, **settings)
        adapted = peft.inject_adapter_in_model(config, model())
        layers = {
            name: [module.r["default"], module.scaling["default"]]
            for name, module in adapted.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        }
        found.append({"settings": settings, "layers": layers})
    path = pathlib.Path(__file__).with_name("peft_scales.json")
    path.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
