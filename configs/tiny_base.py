"""python -m medmax_jax.train --config=configs/tiny_base.py --workdir runs/tiny_base

Trains the "Anole" of the tiny family, a base model, from scratch on prose, images and checklists.
Create the records first:
    python -m data.prepare sample --out runs/base/train --kind pretraining --views 32 --rounds 4
    python -m data.prepare sample --out runs/base/validation --kind pretraining --split validation
"""

from ml_collections import ConfigDict

from medmax_jax.configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.lora.update(rank=0, alpha=0.0, dropout=0.0)
    config.data.update(
        train="runs/base/train", validation="runs/base/validation", mask="release", batch_size=8
    )
    config.optim.update(peak_lr=3e-3, warmup_ratio=0.05, final_lr_ratio=0.02, b2=0.98)
    config.optim.update(weight_decay=0.1)
    config.train.update(
        trains="full",
        init_from="",
        steps=800,
        log_every=10,
        eval_every=100,
        samples=0,  # no tokenizer without init_from
        checkpoint_every=100,
    )
    return config
