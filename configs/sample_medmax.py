"""python -m medmax_jax.generate --config=configs/sample_medmax.py --model=M --prompt=P --out=D

Selects the sampling settings of MedMax's copy of the Chameleon inference code.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import base, sampling


def get_config() -> ConfigDict:
    config = base.get_config()
    config.sample.update(sampling.SETS["medmax"])
    return config
