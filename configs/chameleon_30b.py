"""python -m medmax_jax.train --config=configs/chameleon_30b.py --workdir runs/30b

Defines Chameleon-30B, which has 34.3 B parameters.
It has swin-norm, 8 KV heads and q/k-norm gains of 4 model-parallel shards.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.update(
        hidden_size=8_192,
        num_layers=48,
        num_heads=64,
        num_kv_heads=8,
        intermediate_size=22_016,
        qk_norm_shards=4,
        swin_norm=True,
    )
    return config
