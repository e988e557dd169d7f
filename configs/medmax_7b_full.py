"""python -m medmax_jax.train --config=configs/medmax_7b_full.py --workdir runs/full

Trains the complete model in fp32 with AdamW on the packed rows.
Weights and moments take 84 GB. MedMax has no published full run: the learning rate is the default
of its command line (training/parser.py), which is for full training, and is not scaled with the
batch.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import medmax_7b_lora


def get_config() -> ConfigDict:
    config = medmax_7b_lora.get_config()
    config.mesh.update(data=1, fsdp=16)
    config.model.update(param_dtype="float32", remat="all")
    config.lora.update(rank=0, alpha=0.0, dropout=0.0)
    config.optim.update(peak_lr=1e-5)
    config.train.update(trains="full", checkpoint_every=500)
    return config
