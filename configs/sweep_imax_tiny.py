"""python -m medmax_jax.sweep expand --config=configs/sweep_imax_tiny.py --workdir runs/sweep_imax

Trains the five arms of configs/imax_tiny.py from the shipped base, with three seeds.
The records are those of configs/imax_tiny.py, which is run first: it makes runs/imax/pseudo.

Arms are compared at equal scored tokens, the targets of the loss. Rows of stage 1 have other
numbers of them with other documents, so each arm has its own number of steps in stage 2: LAST, for
62 pseudo documents, with which the arms but plain_longer differ by at most 1%. Other records have
other numbers. This prints the scored tokens of each run, and the steps for those of the first:
    python -m data.prepare plan runs/imax/train --sweep runs/sweep_imax
plain_longer is left as it is: it has twice the steps of stages 1 and 2.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import imax_tiny

LAST = dict(imax=32, plain=29, plain_longer=32, no_windows=29, no_pseudo=32)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "imax-tiny"
    config.config = "configs/imax_tiny.py"
    first, middle, _ = imax_tiny.STEPS
    arms = [
        imax_tiny.stages(arm, first, middle, LAST[arm], pseudo=imax_tiny.PSEUDO)
        for arm in imax_tiny.ARMS
    ]
    steps = tuple(sum(stage["steps"] for stage in stages) for stages in arms)
    config.axes = (
        {"zip": {"stages": tuple(arms), "train.steps": steps}},
        {"seeds": (0, 1, 2)},
        {"fixed": {"train.fisher_every": 80, "train.eval_every": 10_000, "train.keep": 1}},
    )
    config.topology = ""
    config.slices = 1
    config.utilisation = 0.0
    config.price = 0.0
    config.fill = 0.9
    config.said = {"tuning": "none: the rate of configs/tiny.py in every arm"}
    return config.lock()
