"""python -m medmax_jax.train --config=configs/medmax_7b_unimedvl_stages.py --workdir runs/stages

Applies the packed recipe with the three-stage ratios of UniMedVL. Not measured for MedMax.

UniMedVL (arXiv 2510.15710) trains a model of another architecture on data of its own; only its
lengths and ratios are used, as the README of uni-medical/UniMedVL (commit 0202a24) states them:

    stage         steps    understanding  generation  interleaved
    foundation     85K          75             25            0
    instruction   120K          40             45           10
    unified        70K          37             35           25      percent, sums as published

Ours: the steps of medmax_7b_lora.py in these proportions, and one learning-rate schedule over all
of them. Understanding is MedMax's four tasks with text as the answer, in their own proportions;
shares are of documents. MedMax has few documents of the other two tasks, so an epoch repeats them;
the log of a run states how often.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import medmax_7b_lora

# Percent of MedMax's instances, see data/mixture.py.
UNDERSTANDING = {
    "Visual Chat": 46.7,
    "VQA": 19.4,
    "Image Captioning": 18.3,
    "Report Understanding": 6.3,
}
STAGES = ((85, 75, 25, 0), (120, 40, 45, 10), (70, 37, 35, 25))


def get_config() -> ConfigDict:
    config = medmax_7b_lora.get_config()
    whole, stages, start, done = sum(steps for steps, *_ in STAGES), [], 0, 0
    for steps, *ratios in STAGES:
        done += steps
        end = round(config.train.steps * done / whole)
        mixing = dict(by="task", unit="documents", weights=_weights(*ratios))
        stages.append(dict(steps=end - start, mixing=mixing))
        start = end
    config.stages = tuple(stages)
    return config


def _weights(understanding: float, generation: float, interleaved: float) -> str:
    whole = sum(UNDERSTANDING.values())
    weights = {task: understanding * part / whole for task, part in UNDERSTANDING.items()}
    weights |= {"Image Generation": generation, "Multimodal Generation": interleaved}
    return ", ".join(f"{task}={round(weight, 3)}" for task, weight in weights.items())
