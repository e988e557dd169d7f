"""python -m medmax_jax.quickstart --workdir=quickstart_run

Runs the complete pipeline on the embedded images, in minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import eval_tiny, tiny


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.views = 4  # crops per training image, so that 150 images are not memorized
    config.cases = 12  # held-out images on the page
    config.run = tiny.get_config()  # data.train and data.validation are set by the quickstart
    config.run.train.samples = 0  # the quickstart's page shows answers before and after
    config.eval = eval_tiny.get_config()
    config.eval.counts.update(vqa_open=96, captioning=48, visual_chat=48)
    config.eval.counts.update(image_generation=12, multimodal=4)
    return config.lock()
