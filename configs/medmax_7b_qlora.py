"""python -m medmax_jax.train --config=configs/medmax_7b_qlora.py --workdir runs/qlora

Applies the packed recipe to a base in 4 bits (nf4), for one device.
Create the base first:
    python -m medmax_jax.convert --from models/anole --to models/anole_nf4 --format native --quant nf4
"""  # noqa: E501

from ml_collections import ConfigDict

from medmax_jax.configs import medmax_7b_lora


def get_config() -> ConfigDict:
    config = medmax_7b_lora.get_config()
    config.mesh.update(data=1, fsdp=1)
    config.model.update(quant="nf4", remat="all")
    config.optim.update(accumulate=config.data.batch_size)  # one row at a time: the same step
    config.train.update(init_from="models/anole_nf4")
    return config
