"""Runs the other side of the parts decode and vq, in a Python with torch and transformers."""

import math
import time
from typing import Any

import sides

if __name__ == "__main__":
    SPEC = sides.read_spec(__doc__, "torch", "transformers", "peft")  # before they are imported

import hf_side
import numpy as np
import same_weights
import torch
import transformers
from transformers.models.chameleon import modeling_chameleon

COLUMNS = 256  # as in jax_serving.py


class Decoder:
    """Runs HF's model and its generate, greedy, with its static cache."""

    def __init__(self, spec: dict[str, Any]):
        dtype, device = getattr(torch, spec["dtype"]), spec["device"]
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = transformers.ChameleonForConditionalGeneration(hf_side.hf_config(spec))
        torch.set_default_dtype(torch.float32)
        self.model, self.spec = model.to(dtype).eval(), spec
        for name, tensor in self.model.named_parameters():
            if not name.startswith("model.vqmodel"):
                hf_side.fill(name, tensor)
        ids = np.array(spec["prompts"])
        self.prompt = torch.tensor(ids).long().to(device)

    @torch.inference_mode()
    def losses(self, count: int) -> dict[str, Any]:
        """Return the logits after the prompt of the first row."""
        hidden = self.model.model(self.prompt).last_hidden_state[:, -1:]
        return dict(losses=self.model.lm_head(hidden)[0, -1, :COLUMNS].float().tolist())

    @torch.inference_mode()
    def steps(self, count: int) -> dict[str, Any]:
        """Return the seconds of prompt and answer together."""
        seconds, new_tokens = [], self.spec["count"]
        for _ in range(count):
            start = time.perf_counter()
            output = self.model.generate(
                self.prompt, attention_mask=torch.ones_like(self.prompt), do_sample=False,
                max_new_tokens=new_tokens, min_new_tokens=new_tokens, cache_implementation="static",
            )  # fmt: skip
            output[0, -1].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        return dict(seconds=seconds)

    def about(self) -> dict[str, Any]:
        """Return the versions and the peak of memory."""
        return hf_side.device(self.spec)


class Images:
    """Runs HF's VQGAN, which has only an encoder."""

    def __init__(self, spec: dict[str, Any]):
        vq, self.spec = spec["vq"], spec
        settings = transformers.ChameleonVQVAEConfig(
            base_channels=vq["channels"], channel_multiplier=list(vq["channel_mult"]),
            num_res_blocks=vq["num_res_blocks"], resolution=vq["image_size"],
            latent_channels=vq["z_channels"], embed_dim=vq["embed_dim"],
            num_embeddings=vq["num_codes"], attn_resolutions=None,
        )  # fmt: skip
        with torch.device(spec["device"]):
            self.model = modeling_chameleon.ChameleonVQVAE(settings).eval()
        for name, tensor in self.model.named_parameters():
            _fill(tensor, *spec["names"][name])
        pixels = np.load(spec["images"])["pixels"][: spec["rows"]].transpose(0, 3, 1, 2)
        self.pixels = torch.tensor(np.ascontiguousarray(pixels)).to(spec["device"])

    @torch.inference_mode()
    def losses(self, count: int) -> dict[str, Any]:
        """Return the codes of the first image."""
        codes = self.model.encode(self.pixels).image_tokens.reshape(len(self.pixels), -1)
        return dict(losses=codes[0].tolist())

    @torch.inference_mode()
    def steps(self, count: int) -> dict[str, Any]:
        """Return the seconds to encode."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.model.encode(self.pixels).image_tokens[..., -1].reshape(-1)[-1].item()
            seconds.append(time.perf_counter() - start)
        return dict(seconds=seconds)

    def about(self) -> dict[str, Any]:
        """Return the versions and the peak of memory."""
        return hf_side.device(self.spec)


@torch.no_grad()
def _fill(tensor: torch.Tensor, name: str, shape: list[int]) -> None:
    """Fill a tensor of taming's layout from this project's name and shape.

    [h, w, I, O] is [O, I, h, w] there.
    """
    wide = same_weights.width(name, shape[0])
    if wide is None:
        tensor.fill_(same_weights.constant(name))
        return
    index = torch.arange(math.prod(shape), device=tensor.device)
    bits = same_weights.bits(index, same_weights.salt(name, 0), int)
    value = ((bits.float() / 2**24 - 0.5) * wide).reshape(shape)
    tensor.copy_(value.permute(3, 2, 0, 1) if len(shape) == 4 else value)


def main(spec: dict[str, Any]) -> None:
    """Build the models, then serve requests."""
    sides.serve(lambda: {"decode": Decoder, "vq": Images}[spec["part"]](spec))


if __name__ == "__main__":
    main(SPEC)
