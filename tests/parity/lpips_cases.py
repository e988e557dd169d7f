"""Random LPIPS weights and images for the golden; numpy only, so both sides make the same."""

import numpy as np

# (output, input, kernel) of every convolution
CONVOLUTIONS = {
    "alexnet": [(64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3)],
    "vgg16": [
        (out, given, 3)
        for given, out in zip(
            [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512],
            [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512],
            strict=True,
        )
    ],
}
FEATURES = {"alexnet": [64, 192, 384, 256, 256], "vgg16": [64, 128, 256, 512, 512]}


def tree(net: str) -> dict:
    """The weights in the layout of the published file (kernels HWIO)."""
    rng = np.random.default_rng(len(net))
    trunk = {}
    for n, (out, given, size) in enumerate(CONVOLUTIONS[net]):
        kernel = rng.standard_normal((size, size, given, out)) * (2 / (size * size * given)) ** 0.5
        bias = 0.2 * rng.standard_normal(out)
        trunk[f"Conv_{n}"] = dict(kernel=kernel.astype(np.float32), bias=bias.astype(np.float32))
    heads = {
        f"NetLinLayer_{n}": {
            "Conv_0": {"kernel": rng.uniform(0, 1, (1, 1, c, 1)).astype(np.float32)}
        }
        for n, c in enumerate(FEATURES[net])
    }
    return {"AlexNet_0" if net == "alexnet" else "VGG16_0": trunk, **heads}


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Two stacks of three images [3, 32, 48, 3] in [-1, 1]; the last pair is equal."""
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 48, 3)).astype(np.float32)
    b[2] = a[2]
    return a, b
