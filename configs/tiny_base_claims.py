"""python -m medmax_jax.train --config=configs/tiny_base_claims.py --workdir runs/tiny_base_claims

The last stage of the tiny base, from the end of configs/tiny_base_more.py: claims about a picture,
judged true or false. The records are made first:
    python -m data.prepare sample --out runs/claims/train --kind claims --views 24 --rounds 10
    python -m data.prepare sample --out runs/claims/validation --kind claims --split validation
"""

from ml_collections import ConfigDict

from configs import tiny_base


def get_config() -> ConfigDict:
    config = tiny_base.get_config()
    config.data.update(
        train="runs/claims/train", validation="runs/claims/validation", mask="answers"
    )
    config.optim.update(peak_lr=2e-3)
    config.train.update(
        init_from="runs/tiny_base_more/model",
        steps=420,
        loss_weight="document",
        eval_every=70,
        checkpoint_every=70,
    )
    config.train.seed = 2
    return config
