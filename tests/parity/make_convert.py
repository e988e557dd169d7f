"""What HF and peft compute from folders that this project exported; they need torch.

    python tests/parity/export_cases.py D                 here: D/base_hf, D/swin_hf
    python tests/parity/make_convert.py make D            with torch, transformers, peft
    python tests/parity/export_cases.py D --adapters      here: D/base_peft, D/base_merged
    python tests/parity/make_convert.py check D           with torch

`make` writes convert.npz (chosen columns of logits) and peft_adapter/, an adapter as peft saves it.
`check` loads our own PEFT folder and our merged model, and compares them with that adapter.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent
COLUMNS = np.r_[0:8, 4:40, 8_190:8_200, 8_705:8_760]
MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def load(folder: str | pathlib.Path) -> transformers.ChameleonForConditionalGeneration:
    """In fp32; nothing may be missing, and only the VQGAN's decoder is unexpected."""
    model, said = transformers.ChameleonForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not said["missing_keys"] and not said["mismatched_keys"], said
    assert all(".decoder." in key for key in said["unexpected_keys"]), said
    return model.eval()


def logits(model: transformers.ChameleonForConditionalGeneration) -> np.ndarray:
    """[2, 24, V]; HF's own forward would mask the image ids."""
    ids = np.random.default_rng(0).integers(0, 9_728, (2, 24))
    with torch.no_grad():
        return model.lm_head(model.model(torch.tensor(ids)).last_hidden_state).numpy()


def make(folder: pathlib.Path) -> None:
    """The goldens."""
    arrays = {f"{n}_logits": logits(load(folder / f"{n}_hf")) for n in ("base", "swin")}
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.05, target_modules=MODULES)
    model = peft.get_peft_model(load(folder / "base_hf"), config).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    target = HERE / "peft_adapter"
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    (target / "README.md").unlink(missing_ok=True)
    settings = json.loads((target / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "base_hf"  # not a path of the machine that made it
    (target / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    arrays["peft_logits"] = logits(model.base_model.model)
    arrays = {name: each[..., COLUMNS] for name, each in arrays.items()}
    versions = [f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft)]
    np.savez_compressed(HERE / "convert.npz", columns=COLUMNS, versions=versions, **arrays)


def check(folder: pathlib.Path) -> None:
    """Our PEFT folder in peft, our merged model in HF: the golden logits of peft's own adapter."""
    golden = np.load(HERE / "convert.npz")["peft_logits"]
    tolerance = 2e-5 * max(1.0, float(golden.std()))
    ours = peft.PeftModel.from_pretrained(load(folder / "base_hf"), folder / "base_peft").eval()
    for name, model in (
        ("our PEFT folder in peft", ours.base_model.model),
        ("our merged model in HF", load(folder / "base_merged")),
    ):
        off = np.abs(logits(model)[..., COLUMNS] - golden).max()
        print(f"{name}: {off:.2e}, tolerance {tolerance:.2e}")
        assert off <= tolerance


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
