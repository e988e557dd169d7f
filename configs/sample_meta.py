"""python -m medmax_jax.generate --config=configs/sample_meta.py --model=M --prompt=P --out=D

Selects the sampling settings of Meta's Chameleon release.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import base, sampling


def get_config() -> ConfigDict:
    config = base.get_config()
    config.sample.update(sampling.SETS["meta"])
    return config
