"""python -m medmax_jax.train --config=configs/tiny_base_more.py --workdir runs/tiny_base_more

Goes on from the end of configs/tiny_base.py with the words of questions and answers, so that the
frozen output rows of LoRA know "yes", "no" and the letters. The records are made first:
    python -m data.prepare sample --out runs/language/train --kind language --views 48
    python -m data.prepare sample --out runs/language/validation --kind language --split validation
"""

from ml_collections import ConfigDict

from configs import tiny_base


def get_config() -> ConfigDict:
    config = tiny_base.get_config()
    config.data.update(train="runs/language/train", validation="runs/language/validation")
    config.optim.update(peak_lr=2e-3, warmup_ratio=0.1)
    config.train.update(
        init_from="runs/tiny_base/model", steps=140, eval_every=70, checkpoint_every=70
    )
    config.train.seed = 1
    return config
