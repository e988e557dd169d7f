"""Runs the other side of decode_cpu.py: generate of HF's Chameleon, in a Python with torch.

python decode_hf_side.py SPEC.json, then one request per line (sides.py). The weights are equal, by
same_weights.py; text ids and EOS are allowed, as in this project's text mode.
"""

import time
import types
from typing import Any

import sides

if __name__ == "__main__":
    SPEC = sides.read_spec(__doc__, "torch", "transformers", "peft")  # before they are imported

import torch
import transformers
from hf_side import fill, hf_config


class OnlyText(transformers.LogitsProcessor):
    """Holds the text decoder's allowed ids as one mask."""

    def __init__(self, vocab: dict[str, int]):
        self.forbidden = torch.ones(vocab["size"], dtype=torch.bool)
        self.forbidden[[2, *range(vocab["text_start"], vocab["size"])]] = False

    def __call__(self, input_ids, scores):
        return scores.masked_fill(self.forbidden, -torch.inf)


def main(spec: dict[str, Any]) -> None:
    """Build the model and serve requests."""
    torch.set_num_threads(spec["threads"])
    model = transformers.ChameleonForConditionalGeneration(hf_config(spec)).eval()
    for name, tensor in model.named_parameters():
        if not name.startswith("model.vqmodel"):
            fill(name, tensor)
    only = transformers.LogitsProcessorList([OnlyText(spec["vocab"])])

    def text(rows: int, new: int) -> dict[str, Any]:
        prompts = torch.tensor(spec["prompts"][:rows])
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=1,
                logits_processor=only,
            )
        seconds = time.perf_counter() - start
        return dict(seconds=seconds, tokens=out[:, prompts.shape[1] :].tolist())

    def about() -> dict[str, Any]:
        return dict(torch=torch.__version__, transformers=transformers.__version__)

    sides.serve(lambda: types.SimpleNamespace(text=text, about=about))


if __name__ == "__main__":
    main(SPEC)
