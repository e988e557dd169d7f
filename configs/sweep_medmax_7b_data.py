"""python -m medmax_jax.sweep expand --config=configs/sweep_medmax_7b_data.py --workdir runs/data

Repeats the paper's data scaling, 25, 50, 75 and 100% of the images, on a v5e-16.
The fractions are nested, each with a schedule of its own length. `config.price`, USD per chip-hour,
is an example: set your own.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import medmax_7b_lora as lora


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "medmax-7b-data"
    config.config = "configs/medmax_7b_lora.py"
    config.axes = (
        {
            "data_fraction": {
                "fractions": (0.25, 0.5, 0.75, 1.0),
                "steps": lora.get_config().train.steps,
            }
        },
        {"fixed": {"model.attention": "splash"}},
    )
    config.topology = "v5e:4x4"
    config.slices = 1
    config.utilisation = 0.5
    config.price = 1.2
    config.fill = 0.99  # of rows of 8,192: benchmarks/loader.py
    config.said = {"tuning": "none at these sizes: the peak rate is the published one, scaled"}
    return config.lock()
