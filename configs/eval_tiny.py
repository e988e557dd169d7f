"""python -m eval.run --config=configs/eval_tiny.py --model=native:medmax_jax/tiny --workdir=D

The held-out half of the embedded images, all tasks. Two minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    whole = base.get_config()
    config = ConfigDict()
    config.items = "sample"  # or a JSONL file of rows in the released evaluation schema
    config.images = ""  # folder that image_path is under; empty: where the items lie
    config.split = "test"  # of the sample
    config.counts = ConfigDict(  # items of each family, groups in turn; -1: all
        dict(
            vqa_closed=-1,
            vqa_mcq=-1,
            vqa_open=-1,
            captioning=-1,
            image_generation=16,
            multimodal=8,
            visual_chat=0,  # the sample has none
        )
    )
    config.mode = "strict"  # of generation; paper: as the release asks, with its bounds
    config.baselines = True  # also: answer without looking, and look at somebody else's picture
    config.rows = 32  # prompts at once
    config.seed = 0  # of the choice of items, of swapping, and of the resampling
    config.resamples = 2_000
    config.mesh = whole.mesh
    config.sample = whole.sample
    config.sample.max_gen_len = 96  # the longest answer of the sample has about 80 tokens
    config.sample.repetition_penalty = 1.0  # 1.2 would punish "yes" for standing in the question
    return config.lock()
