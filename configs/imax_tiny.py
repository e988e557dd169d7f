"""python -m medmax_jax.train --config=configs/imax_tiny.py --workdir runs/imax_tiny

Applies image-centric training in three stages to the tiny MedMax. It takes minutes on two cores.

This is an interpretation of IMAX (arXiv 2504.09967), whose procedure was not available to us.
Create the records first, with one task for each image, so that others can be added:
    python -m data.prepare sample --out runs/imax/pool
    python -m data.prepare densify runs/imax/pool --out runs/imax/dense --documents 288 --entries 8
    python -m data.prepare decentralize runs/imax/pool --out runs/imax/train --like runs/imax/dense
    python -m data.prepare sample --out runs/imax/validation --split validation

    stage 0   the mixture, each document once per epoch
    stage 1   windows of all documents of an image, with the answers that the model of stage 0 gave;
              their loss has half the weight
    stage 2   real documents only, while the learning rate ends

After stage 0 the command exports the adapter, prints the command that makes the records of stage 1,
and ends with code 1; run that command, then this one again.
"""

from typing import Any

from ml_collections import ConfigDict

from medmax_jax.configs import tiny

STEPS = 96, 64, 32
PSEUDO = "runs/imax/pseudo"
WINDOW = 44  # documents: about two steps, as the 256 at 7B
WEIGHT = 0.5  # of documents with a generated answer; not measured
ARMS = ("imax", "plain", "plain_longer", "no_windows", "no_pseudo")


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.data.update(train="runs/imax/train", validation="runs/imax/validation")
    config.mixing.update(image_window=WINDOW)
    config.stages = stages("imax", *STEPS, pseudo=PSEUDO)
    config.train.update(steps=sum(STEPS), eval_every=32, checkpoint_every=32, samples=0)
    return config


def stages(
    arm: str, first: int, middle: int, last: int, *, pseudo: str
) -> tuple[dict[str, Any], ...]:
    """Return the stages of one of ARMS, with these numbers of steps.

    imax          the three stages above
    no_windows    the same documents in stage 1 without windows
    no_pseudo     windows in stage 1 without generated answers
    plain         the mixture in all stages
    plain_longer  plain for twice the steps of stages 1 and 2: more real data in place of pseudo
    """
    if arm not in ARMS:
        raise ValueError(f"arm is {arm!r}; use one of {', '.join(ARMS)}")
    twice = 2 if arm == "plain_longer" else 1
    windows = dict(mixing=dict(image_centric=True))
    own = dict(records=pseudo, loss_weights=dict(pseudo=WEIGHT))
    changes = dict(imax=windows | own, no_windows=own, no_pseudo=windows)
    return (
        dict(steps=first),
        dict(steps=twice * middle) | changes.get(arm, {}),
        dict(steps=twice * last),
    )
