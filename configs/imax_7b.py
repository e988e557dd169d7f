"""python -m medmax_jax.train --config=configs/imax_7b.py --workdir runs/imax_7b

Applies image-centric training in three stages to the packed 7B recipe. Not measured for MedMax.

The stages are those of configs/imax_tiny.py, an interpretation of IMAX (arXiv 2504.09967): here the
steps of medmax_7b_lora.py divided 1/2, 1/3 and 1/6, one learning-rate schedule over all of them,
and windows of 256 documents, about two steps.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import imax_tiny, medmax_7b_lora

PSEUDO = "records/pseudo"


def get_config() -> ConfigDict:
    config = medmax_7b_lora.get_config()
    first, middle = config.train.steps // 2, config.train.steps // 3
    last = config.train.steps - first - middle
    config.stages = imax_tiny.stages("imax", first, middle, last, pseudo=PSEUDO)
    return config
