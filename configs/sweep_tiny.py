"""python -m medmax_jax.sweep expand --config=configs/sweep_tiny.py --workdir runs/sweep_tiny

Trains four sizes x four amounts of data x two seeds, from scratch, on the embedded images.
The models are small enough for two cores. Every run uses its data at most once: 128 steps are 97%
of an epoch. The records are those of configs/tiny_base.py, but fewer:
    python -m data.prepare sample --out runs/sweep/train --kind pretraining --views 8 --rounds 1
    python -m data.prepare sample --out runs/sweep/validation --kind pretraining --split validation
"""

from ml_collections import ConfigDict

SIZES = tuple(  # hidden size, layers; heads of 16, a feed-forward of three times the width
    {
        "model.hidden_size": width,
        "model.num_layers": layers,
        "model.num_heads": width // 16,
        "model.num_kv_heads": width // 16,
        "model.head_dim": 16,
        "model.intermediate_size": 3 * width,
    }
    for width, layers in ((16, 2), (32, 2), (64, 2), (96, 3))
)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "tiny"
    config.config = "configs/tiny_base.py"
    config.axes = (
        {"zip": {name: tuple(size[name] for size in SIZES) for name in SIZES[0]}},
        {"data_fraction": {"fractions": (0.125, 0.25, 0.5, 1.0), "steps": 128}},
        {"seeds": (0, 1)},
        {
            "fixed": {
                "data.train": "runs/sweep/train",
                "data.validation": "runs/sweep/validation",
                "train.eval_every": 10_000,  # the last step only
                "train.checkpoint_every": 20,
                "train.keep": 1,
            }
        },
    )
    config.topology = ""
    config.slices = 1
    config.utilisation = 0.0
    config.price = 0.0
    config.fill = 0.97
    config.said = {"tuning": "none: the rate of configs/tiny_base.py at every size"}
    return config.lock()
