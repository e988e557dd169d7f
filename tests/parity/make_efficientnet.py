"""python tests/parity/make_efficientnet.py: golden features of timm's tf_efficientnet_lite0.

Run in an environment of its own with torch and timm. Also writes a file as torch before 1.6 did.
"""

import pathlib

import efficientnet_cases as cases
import numpy as np
import torch

LIBRARY = torch.library.Library("torchvision", "DEF")  # what a CUDA build lacks on a CPU
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402

HERE = pathlib.Path(__file__).parent
PARTS = {  # timm's layer -> the file's; the first block expands nothing
    "conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
    "conv_pwl": "_project_conv", "bn3": "_bn2",
}  # fmt: skip
FIRST = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
TOP = {
    "conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1",
    "classifier": "_fc",
}  # fmt: skip


def published(name: str, numbers: dict[tuple[str, str], int]) -> str:
    """timm's name as the file's."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return ".".join([TOP[parts[0]], *parts[1:]])
    table = FIRST if parts[1] == "0" else PARTS
    return f"_blocks.{numbers[parts[1], parts[2]]}.{table[parts[3]]}.{parts[4]}"


if __name__ == "__main__":
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    state = model.state_dict()
    blocks = dict.fromkeys(tuple(k.split(".")[1:3]) for k in state if k.startswith("blocks."))
    numbers = {block: n for n, block in enumerate(blocks)}
    names = {k: published(k, numbers) for k in state}
    assert len(set(names.values())) == len(names)
    shapes = {names[k]: tuple(v.shape) for k, v in state.items()}
    model.load_state_dict(
        {k: torch.tensor(cases.weight(names[k], shapes[names[k]])) for k in state}
    )
    with torch.no_grad():
        maps = model.forward_features(torch.tensor(cases.pixels()))
        found = model.global_pool(maps).numpy()
    table = np.array([f"{k} {','.join(map(str, s))}" for k, s in shapes.items()])
    np.savez_compressed(HERE / "efficientnet.npz", features=found, shapes=table)
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    old = {"a": base, "turned": base.T, "part": base[1:, 2:4], "n": torch.tensor(7)}
    torch.save(old, HERE / "torch_old.pth", _use_new_zipfile_serialization=False)
    print(found.shape, found.std(), np.abs(found[0] - found[1]).max())
