"""The part of `check` that runs in a Python with torch and transformers, without this project.

python torch_reference.py HF_FOLDER OUT.npz {float32,bfloat16}
"""

import sys

SEED = 0
TOKENS = 48


def main(folder: str, out: str, dtype: str) -> None:
    """Save logits of random text ids around an image, and VQ codes of a random smooth image."""
    import numpy as np
    import torch
    import transformers

    model = transformers.ChameleonForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    ).eval()
    rng, config = np.random.default_rng(SEED), model.config
    ids = rng.integers(config.vocab_size // 2, config.vocab_size, (2, TOKENS))
    ids[0, :12] = np.r_[0, 8_197, 4:13, 8_196]
    side = config.vq_config.resolution
    waves = rng.standard_normal((3, 2, 8))
    grid = np.linspace(0, 1, side)[:, None] * np.arange(8) * np.pi
    pixels = np.einsum("ck,hk,cl,wl->chw", waves[:, 0], np.cos(grid), waves[:, 1], np.cos(grid))
    pixels = np.tanh(pixels / pixels.std())[None].astype(np.float32)
    with torch.no_grad():
        hidden = model.model(torch.tensor(ids)).last_hidden_state
        logits = model.lm_head(hidden).float().numpy()
        vq = model.model.vqmodel.float()
        codes = vq.encode(torch.tensor(pixels)).image_tokens.numpy().reshape(1, -1)
    np.savez(out, ids=ids, logits=logits, pixels=pixels, codes=codes)


if __name__ == "__main__":
    main(*sys.argv[1:])
