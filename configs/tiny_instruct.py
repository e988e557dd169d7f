"""python -m medmax_jax.train --config=configs/tiny_instruct.py --workdir runs/tiny_instruct

Trains the adapter medmax_jax/tiny_adapter: LoRA on the shipped base, on instructions of all tasks.
Create the records first:
    python -m data.prepare sample --out runs/instruct/train --views 32 --rounds 4
    python -m data.prepare sample --out runs/instruct/validation --split validation
"""

from ml_collections import ConfigDict

from medmax_jax.configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.lora.update(rank=8, alpha=16.0)  # a file of 328 kB
    config.data.update(train="runs/instruct/train", validation="runs/instruct/validation")
    config.train.update(steps=900, samples=0)
    return config
