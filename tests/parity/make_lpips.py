"""python tests/parity/make_lpips.py: golden LPIPS distances, written out in torch's functions.

Run in an environment of its own with torch. Layers are those of torchvision's AlexNet and VGG16 up
to the five ReLUs that the LPIPS authors read, inputs scaled and features weighed as in their code.
"""

import pathlib

import lpips_cases as cases
import numpy as np
import torch
from torch.nn import functional

HERE = pathlib.Path(__file__).parent
ALEXNET = [  # (stride, padding) of a convolution, "pool", and "tap" after a ReLU
    (4, 2), "tap", "pool", (1, 2), "tap", "pool", (1, 1), "tap", (1, 1), "tap", (1, 1), "tap",
]  # fmt: skip
VGG16 = [
    (1, 1), (1, 1), "tap", "pool", (1, 1), (1, 1), "tap", "pool", (1, 1), (1, 1), (1, 1), "tap",
    "pool", (1, 1), (1, 1), (1, 1), "tap", "pool", (1, 1), (1, 1), (1, 1), "tap",
]  # fmt: skip


def taps(net: str, trunk: dict, x: torch.Tensor) -> list[torch.Tensor]:
    """The five feature maps, channels over their length."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    x, n, maps = (x - shift) / scale, 0, []
    for layer in ALEXNET if net == "alexnet" else VGG16:
        if layer == "tap":
            maps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        elif layer == "pool":
            x = functional.max_pool2d(x, 3 if net == "alexnet" else 2, 2)
        else:
            weights = trunk[f"Conv_{n}"]
            kernel = torch.from_numpy(weights["kernel"]).permute(3, 2, 0, 1)
            x = functional.conv2d(x, kernel, torch.from_numpy(weights["bias"]), *layer).relu()
            n += 1
    return maps


@torch.no_grad()
def distances(net: str) -> np.ndarray:
    """LPIPS of each pair."""
    tree, total = cases.tree(net), torch.zeros(3)
    trunk = tree["AlexNet_0" if net == "alexnet" else "VGG16_0"]
    a, b = (taps(net, trunk, torch.from_numpy(x).permute(0, 3, 1, 2)) for x in cases.pairs())
    for n in range(5):
        head = torch.from_numpy(tree[f"NetLinLayer_{n}"]["Conv_0"]["kernel"]).view(1, -1, 1, 1)
        total += ((a[n] - b[n]).square() * head).sum(1).mean((1, 2))
    return total.numpy()


if __name__ == "__main__":
    results = {net: distances(net) for net in cases.CONVOLUTIONS}
    print(results)
    np.savez(HERE / "lpips.npz", **results)
