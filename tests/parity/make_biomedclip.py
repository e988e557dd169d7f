"""python tests/parity/make_biomedclip.py [--full]: golden embeddings of open_clip, inputs included.

Run in an environment of its own with torch, transformers, timm, ftfy and open_clip_torch; its
torchvision may be built for CUDA, its Pillow must be 12, as here: 13 rounds some pixels otherwise.
--full: at the published sizes and random weights.
"""

import json
import pathlib
import sys
import tempfile

import biomedclip_cases as cases
import numpy as np
import torch
import transformers
from PIL import Image

LIBRARY = torch.library.Library("torchvision", "DEF")  # what a CUDA build lacks on a CPU
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip  # noqa: E402
import timm  # noqa: E402
from open_clip.tokenizer import HFTokenizer  # noqa: E402
from open_clip.transform import image_transform  # noqa: E402

HERE = pathlib.Path(__file__).parent
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FULL = dict(
    embed_dim=512,
    image=dict(size=224, patch=16, width=768, layers=12, heads=12, mlp=3072),
    text=dict(
        vocab=30522, positions=512, context=256, width=768, layers=12, heads=12, mlp=3072, head=640
    ),
)


@timm.models.register_model
def biomedclip_case_vit(pretrained=False, **kwargs):
    """timm's ViT at the sizes of the running case."""
    s = SIZES["image"]
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=s["size"], patch_size=s["patch"], embed_dim=s["width"], depth=s["layers"],
        num_heads=s["heads"], mlp_ratio=s["mlp"] / s["width"], num_classes=0,
    )  # fmt: skip
    model.default_cfg = {}
    return model


def build(sizes: dict, folder: pathlib.Path) -> torch.nn.Module:
    """open_clip's model with the case's weights."""
    t = sizes["text"]
    config = transformers.BertConfig(
        vocab_size=t["vocab"], hidden_size=t["width"], num_hidden_layers=t["layers"],
        num_attention_heads=t["heads"], intermediate_size=t["mlp"],
        max_position_embeddings=t["positions"],
    )  # fmt: skip
    config.save_pretrained(folder)
    name = "vit_base_patch16_224" if sizes is FULL else "biomedclip_case_vit"
    model = open_clip.CustomTextCLIP(
        embed_dim=sizes["embed_dim"],
        vision_cfg=dict(
            timm_model_name=name, timm_model_pretrained=False, timm_pool="", timm_proj="linear",
            image_size=sizes["image"]["size"],
        ),
        text_cfg=dict(
            hf_model_name=str(folder), hf_model_pretrained=False, hf_proj_type="mlp",
            hf_pooler_type="cls_last_hidden_state_pooler", context_length=t["context"],
        ),
    )  # fmt: skip
    state = {
        k: torch.tensor(cases.weight(k, tuple(v.shape))) for k, v in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def outputs(sizes: dict, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Embeddings of the case's arrays."""
    model = build(sizes, folder)
    print(sum(v.numel() for v in model.state_dict().values()), "parameters")
    pixels = torch.tensor(cases.pixels(sizes["image"]["size"], 2 if sizes is FULL else 3))
    ids = torch.tensor(cases.ids(sizes["text"]["vocab"], sizes["text"]["context"]))
    names = {k: list(v.shape) for k, v in model.state_dict().items()}
    return {
        "image": model.encode_image(pixels, normalize=True).numpy(),
        "text": model.encode_text(ids, normalize=True).numpy(),
        "names": np.frombuffer(json.dumps(names).encode(), np.uint8),
    }


def inputs(sizes: dict, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Ids of the texts; pixels of the images as the release preprocesses them."""
    (folder / "vocab.txt").write_text("\n".join(cases.WORDS) + "\n", "utf-8")
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    context = sizes["text"]["context"]
    tokenizer = HFTokenizer(str(folder), context_length=context)
    transform = image_transform(sizes["image"]["size"], is_train=False, mean=MEAN, std=STD)
    found = {"ids": tokenizer(list(cases.TEXTS), context_length=context).numpy()}
    for name in cases.IMAGE_NAMES:
        image = as_image(name)
        image = image.convert("RGB") if image.mode == "RGBA" else image  # as the release
        found[f"pixels_{name}"] = transform(image).numpy()
    return found


def as_image(name: str) -> Image.Image:
    """The image in its mode."""
    mode, array = cases.image_array(name)
    image = Image.fromarray(array)
    assert image.mode == mode, (image.mode, mode)
    return image.quantize(16) if name == "palette" else image


if __name__ == "__main__":
    full = "--full" in sys.argv
    SIZES = FULL if full else cases.TINY
    with tempfile.TemporaryDirectory() as name:
        found = outputs(SIZES, pathlib.Path(name))
    if not full:
        with tempfile.TemporaryDirectory() as name:
            pathlib.Path(name, "config.json").write_text('{"model_type": "bert"}')
            found |= inputs(SIZES, pathlib.Path(name))
        print(found["ids"])
    np.savez_compressed(HERE / f"biomedclip_{'full' if full else 'tiny'}.npz", **found)
