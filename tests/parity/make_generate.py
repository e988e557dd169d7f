"""python tests/parity/make_generate.py: greedy answers of HF's generate, with their margins.

Run in an environment of its own with torch and transformers, as make_chameleon.py. HF penalises
first and forbids then, which for what is allowed comes to the same.
"""

import pathlib

import chameleon_cases as cases
import generate_cases
import numpy as np
import torch
import transformers
from make_chameleon import build

HERE = pathlib.Path(__file__).parent


class OnlyText(transformers.LogitsProcessor):
    """The text decoder's allowed ids: EOS and the words."""

    def __call__(self, input_ids, scores):
        allowed = torch.zeros(cases.SIZE, dtype=torch.bool)
        allowed[[2, *range(8_712, cases.SIZE)]] = True
        return scores.masked_fill(~allowed, -torch.inf)


def answer(model, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens after the prompt, and how far the best was before the second at each of them."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor(prompt[None]).long(),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=generate_cases.NEW,
            do_sample=False,
            repetition_penalty=generate_cases.PENALTY,
            eos_token_id=2,
            pad_token_id=1,
            logits_processor=transformers.LogitsProcessorList([OnlyText()]),
            return_dict_in_generate=True,
            output_scores=True,
        )
    best = torch.stack(out.scores)[:, 0].topk(2).values
    return out.sequences[0, len(prompt) :].numpy(), (best[:, 0] - best[:, 1]).numpy()


def main() -> None:
    for case in cases.CASES.values():
        model, arrays = build(case), {}
        for number, prompt in enumerate(generate_cases.prompts(cases.ids())):
            arrays[f"tokens{number}"], arrays[f"margins{number}"] = answer(model, prompt)
        print(case.name, [arrays[f"tokens{n}"].tolist() for n in range(3)])
        print(case.name, "least margin", min(arrays[f"margins{n}"].min() for n in range(3)))
        version = f"transformers {transformers.__version__}"
        np.savez_compressed(HERE / f"generate_{case.name}.npz", versions=version, **arrays)


if __name__ == "__main__":
    main()
