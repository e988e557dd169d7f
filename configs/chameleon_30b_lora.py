"""python -m medmax_jax.train --config=configs/chameleon_30b_lora.py --workdir runs/lora_30b

Applies the packed recipe to Chameleon-30B.
No 30B Anole or MedMax is published: the learning rate is that of the 7B, and the released 30B reads
images but was never trained to generate them.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import chameleon_30b, medmax_7b_lora


def get_config() -> ConfigDict:
    config = medmax_7b_lora.get_config()
    config.model.update(chameleon_30b.get_config().model)
    config.mesh.update(data=1, fsdp=16)
    config.train.update(init_from="models/chameleon_30b")
    return config
