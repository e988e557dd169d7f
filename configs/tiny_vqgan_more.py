"""python -m medmax_jax.train_vqgan --config=configs/tiny_vqgan_more.py --workdir=runs/tiny_vqgan_more

Goes on from the end of configs/tiny_vqgan.py with other crops and more weight on the pixels, for
colour: LPIPS hardly sees it. On a CPU, before the command:
    export XLA_FLAGS=--xla_force_host_platform_device_count=2
"""  # noqa: E501

from ml_collections import ConfigDict

from configs import tiny_vqgan


def get_config() -> ConfigDict:
    config = tiny_vqgan.get_config()
    config.mesh.fsdp = 2  # two virtual devices of the CPU: XLA's convolutions use one core each
    config.train.update(
        init_from="runs/tiny_vqgan/vqgan.safetensors",
        plain_steps=-1,
        steps=1_600,
        lpips_weight=0.4,
        saturation=0.5,
        seed=1,
    )
    return config
