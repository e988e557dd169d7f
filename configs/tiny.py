"""python -m medmax_jax.train --config=configs/tiny.py --workdir runs/tiny

Trains the tiny MedMax with LoRA on the shipped base and the embedded images.
It takes minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import base

TEXT_TOKENS = 1_016  # maximum rows of the tiny tokenizer's BPE: 8712 + 1016 = 9728 = 76 x 128


def get_config() -> ConfigDict:
    config = base.get_config()
    config.vocab.update(size=8_712 + TEXT_TOKENS, image_codes=256, text_start=8_712)
    config.model.update(
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        intermediate_size=384,
        context_length=512,
        param_dtype="float32",
        compute_dtype="float32",
        remat="none",
    )
    config.vq.update(
        image_size=64,
        channels=32,
        channel_mult=(1, 1, 2, 2),
        num_res_blocks=1,
        z_channels=64,
        embed_dim=64,
        num_codes=256,
        norm_groups=8,  # 4 channels each, as released: with 32 each channel alone, colors turn gray
    )
    config.data.update(document_limit=256, seq_len=256, batch_size=8)
    config.optim.update(peak_lr=3e-3)
    config.train.update(
        init_from="medmax_jax/tiny",
        steps=300,
        log_every=10,
        eval_every=100,
        samples=3,  # two texts and an image
        checkpoint_every=100,
    )
    return config
