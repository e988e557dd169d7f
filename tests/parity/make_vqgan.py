"""python tests/parity/make_vqgan.py: golden outputs of HF's Chameleon encoder, a taming decoder.

Run in an environment of its own with torch and transformers; the tests read only the files
that it writes next to itself. HF has no decoder for Chameleon, but Janus's is the same
taming-transformers net once the attention of its lowest level is taken out; it counts its levels
the other way round.
"""

import pathlib

import numpy as np
import torch
import vqgan_cases as cases
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

HERE = pathlib.Path(__file__).parent


def build(case: cases.Case) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(encoder with codebook, decoder) with the case's weights."""
    shared = dict(
        base_channels=case.channels,
        latent_channels=case.z_channels,
        channel_multiplier=list(case.channel_mult),
        num_res_blocks=case.num_res_blocks,
        dropout=0.0,
    )
    vq = ChameleonVQVAE(
        ChameleonVQVAEConfig(
            embed_dim=case.embed_dim,
            num_embeddings=case.num_codes,
            resolution=case.height,
            attn_resolutions=None,
            **shared,
        )
    )
    decoder = JanusVQVAEDecoder(JanusVQVAEConfig(out_channels=3, **shared))
    decoder.up[0].attn = torch.nn.ModuleList()
    fill(vq, "", len(case.channel_mult))
    fill(decoder, "decoder.", len(case.channel_mult))
    return vq.eval(), decoder.eval()


def fill(module: torch.nn.Module, prefix: str, levels: int) -> None:
    """Every parameter by its name in this project."""
    for name, parameter in module.named_parameters():
        parts = (prefix + name).split(".")
        if parts[:2] == ["decoder", "up"]:
            parts[2] = str(levels - 1 - int(parts[2]))
        if parts[-1] == "weight":
            parts[-1] = "kernel" if parameter.ndim == 4 else "scale"
        shape = tuple(parameter.shape)
        if parts[:2] == ["quantize", "embedding"]:
            value = cases.weight("quantize.embedding", shape)
        elif parameter.ndim == 4:
            value = cases.weight(".".join(parts), shape[2:] + shape[1::-1]).transpose(3, 2, 0, 1)
        else:
            value = cases.weight(".".join(parts), shape)
        parameter.data = torch.from_numpy(np.ascontiguousarray(value))


@torch.no_grad()
def golden(case: cases.Case) -> dict[str, np.ndarray]:
    """Latents, codes and images, in the layout of this project."""
    vq, decoder = build(case)
    pixels = torch.from_numpy(cases.pixels(case)).permute(0, 3, 1, 2)
    latents = vq.quant_conv(vq.encoder(pixels))
    rows, _, codes = vq.quantize(latents)
    assert torch.equal(codes, vq.encode(pixels).image_tokens.flatten())
    made = decoder(vq.post_quant_conv(rows))
    codes = codes.view(latents.shape[0], *latents.shape[2:]).numpy()
    margin = torch.cdist(
        latents.permute(0, 2, 3, 1).reshape(-1, case.embed_dim).double(),
        vq.quantize.embedding.weight.double(),
    ).topk(2, largest=False)
    gap = (margin.values[:, 1] ** 2 - margin.values[:, 0] ** 2).min().item()
    print(
        f"{case.name}: {len(np.unique(codes))} codes, smallest gap of squared distances {gap:.2g}, "
        f"latents std {latents.std():.2f}, pixels {made.min():.2f}..{made.max():.2f}"
    )
    assert len(np.unique(codes)) >= 200 and gap > 2e-5, "rename the case for other draws"
    return dict(
        codes=codes.astype(np.int16),
        latents=latents.permute(0, 2, 3, 1).numpy(),
        pixels=made.permute(0, 2, 3, 1)[:2].numpy(),  # two images keep the file small
        uint8=((made.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy(),
    )


if __name__ == "__main__":
    for case in cases.CASES.values():
        np.savez_compressed(HERE / f"vqgan_{case.name}.npz", **golden(case))
