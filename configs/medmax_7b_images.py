"""python -m medmax_jax.train --config=configs/medmax_7b_images.py --workdir runs/images

Applies the packed recipe with what other work does for the generation of images.

MedMax and Anole were trained without any of this, and none of it has been measured for MedMax.

    condition dropout   5 % without the text, 5 % without the images, 5 % without both, as in
                        InstructPix2Pix (arXiv 2211.09800), whose form of guidance decoding uses. An
                        image from text alone is generated without its condition in 10 % of cases
    z-loss              1e-5 for text and image codes, as Lumina-mGPT (its exps/7B.sh); Chameleon
                        was pre-trained and fine-tuned with one
    residual dropout    off: Chameleon's fine-tuning and Lumina-mGPT have 0.05, for all weights;
                        here adapters train, which have their own (lora.dropout)

Where documents are dropped, fewer rows hold an epoch; the steps are those of medmax_7b_lora.py.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import medmax_7b_lora


def get_config() -> ConfigDict:
    config = medmax_7b_lora.get_config()
    config.data.condition_dropout.update(text=0.05, image=0.05, all=0.05)
    config.loss.z.update(text=1e-5, image=1e-5)
    return config
