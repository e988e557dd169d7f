"""The sizes of BiomedCLIP, microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224.

From its open_clip_config.json: timm's vit_base_patch16_224 and BiomedBERT-base with an mlp head.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            embed_dim=512,
            image=dict(size=224, patch=16, width=768, layers=12, heads=12, mlp=3072),
            text=dict(
                vocab=30_522,
                positions=512,  # rows of the table; a text uses the first `context`
                context=256,
                width=768,
                layers=12,
                heads=12,
                mlp=3072,
                head=640,  # (768 + 512) // 2: open_clip's mlp projection
            ),
        )
    )
