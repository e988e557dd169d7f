"""python -m medmax_jax.sweep expand --config=configs/sweep_tiny_lora.py --workdir runs/sweep_lora

Trains four LoRA ranks x three amounts of data x two seeds on the shipped base.
A run uses its data at most once. The records are instructions about the embedded images:
    python -m data.prepare sample --out runs/sweep/lora_train --kind instruction
    python -m data.prepare sample --out runs/sweep/lora_validation --kind instruction \\
        --split validation
"""

from ml_collections import ConfigDict

from medmax_jax.configs import sweep_tiny

STEPS = 48


def get_config() -> ConfigDict:
    config = sweep_tiny.get_config().unlock()
    config.name = "tiny-lora"
    config.config = "configs/tiny.py"
    config.axes = (
        {"lora_rank": {"ranks": (2, 4, 8, 16), "alpha_over_rank": 1.0}},
        {"data_fraction": {"fractions": (0.25, 0.5, 1.0), "steps": STEPS}},
        {"seeds": (0, 1)},
        {
            "fixed": {
                "data.train": "runs/sweep/lora_train",
                "data.validation": "runs/sweep/lora_validation",
                "train.eval_every": 10_000,  # the last step only
                "train.samples": 0,
                "train.checkpoint_every": 20,
                "train.keep": 1,
            }
        },
    )
    config.said = {"tuning": "none: the rate of configs/tiny.py at every rank"}
    return config.lock()
