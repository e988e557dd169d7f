"""What the conversion tests share: tiny random checkpoints in Meta's layout, and how to read files.

Numbers are random in every tensor, gains and biases too, so that a forgotten one shows.
"""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy
import yaml

from medmax_jax.checkpoints import torch_file
from medmax_jax.storage.folder import Folder

TINY = pathlib.Path(__file__).parents[2] / "medmax_jax" / "tiny"
NUMPY = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model in Meta's words."""

    dim: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    ffn: int = 96
    shards: int = 1
    swin: bool = False
    vocab: int = 9_728  # of the shipped tokenizer, whose text begins at 8712

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


BASE = Sizes()
SWIN = Sizes(heads=8, kv_heads=4, shards=4, swin=True)  # heads are not kv_heads squared


def params(sizes: Sizes) -> dict:
    """The settings of params.json."""
    return dict(
        dim=sizes.dim, n_layers=sizes.layers, n_heads=sizes.heads, n_kv_heads=sizes.kv_heads,
        vocab_size=sizes.vocab, norm_eps=1e-5, rope_theta=10_000.0, qk_normalization=True,
        swin_norm=sizes.swin, multiple_of=sizes.ffn,
        ffn_dim_multiplier=min(1.0, sizes.ffn / (8 * sizes.dim // 3)),
    )  # fmt: skip


def shards(sizes: Sizes, *, dtypes: tuple[str, ...], seed: int) -> list[dict[str, np.ndarray]]:
    """One state dict a file, as Meta's loader wants them; dtypes go round over the tensors."""
    rng, n = np.random.default_rng(seed), sizes.shards
    d, h, local = sizes.dim, sizes.head_dim, sizes.ffn // n
    wide, narrow = sizes.heads * h // n, sizes.kv_heads * h // n
    found: list[dict[str, np.ndarray]] = [{} for _ in range(n)]

    def put(name: str, shape: tuple[int, ...], *, size: float, mean: float = 0.0, same=False):
        dtype = NUMPY[dtypes[len(found[0]) % len(dtypes)]]
        drawn = [mean + size * rng.standard_normal(shape) for _ in range(n)]
        for shard, array in zip(found, drawn, strict=True):
            shard[name] = (drawn[0] if same else array).astype(dtype)

    put("tok_embeddings.weight", (sizes.vocab, d // n), size=1.0)
    for i in range(sizes.layers):
        at = f"layers.{i}."
        put(at + "attention.wq.weight", (wide, d), size=d**-0.5)
        put(at + "attention.wk.weight", (narrow, d), size=d**-0.5)
        put(at + "attention.wv.weight", (narrow, d), size=d**-0.5)
        put(at + "attention.wo.weight", (d, wide), size=d**-0.5)
        for each in "qk":
            put(f"{at}attention.{each}_normalization.weight", (h,), size=0.3, mean=1.0)
            put(f"{at}attention.{each}_normalization.bias", (h,), size=0.3)
        put(at + "attention_norm.weight", (d,), size=0.3, mean=1.0, same=True)
        put(at + "ffn_norm.weight", (d,), size=0.3, mean=1.0, same=True)
        put(at + "feed_forward.w1.weight", (local, d), size=d**-0.5)
        put(at + "feed_forward.w3.weight", (local, d), size=d**-0.5)
        put(at + "feed_forward.w2.weight", (d, local), size=sizes.ffn**-0.5)
    put("norm.weight", (d,), size=0.3, mean=1.0, same=True)
    put("output.weight", (sizes.vocab // n, d), size=0.25)
    return found


def write_meta(
    folder: pathlib.Path, sizes: Sizes, states: list[dict[str, np.ndarray]], *, vqgan: bool
) -> pathlib.Path:
    """A folder as Meta's download leaves it, with the shipped tokenizer. `vqgan`: a random one."""
    models, tools = folder / "models" / "7b", folder / "tokenizer"
    models.mkdir(parents=True)
    tools.mkdir()
    for i, state in enumerate(states):
        name = "consolidated.pth" if len(states) == 1 else f"consolidated.{i:02}.pth"
        write_pth(models / name, state | {"rope.freqs": np.ones(4, np.float32)}, wrap=None)
    (models / "params.json").write_text(json.dumps({"model": params(sizes), "seed": 7}))
    (models / "consolidate_params.json").write_text(
        json.dumps({"model_parallel_size": len(states)})
    )
    text = json.loads((TINY / "tokenizer.json").read_text())
    names = text["model"]["vocab"]
    names["<reserved08707>"] = names.pop("<image>")
    text["added_tokens"] = []
    (tools / "text_tokenizer.json").write_text(json.dumps(text))
    if vqgan:
        state = {n: a for n, a in random_vqgan(seed=1).items()}
        state["loss.discriminator.main.0.weight"] = np.ones((2, 3, 4, 4), np.float32)
        write_pth(tools / "vqgan.ckpt", state, wrap="state_dict")
        net = dict(
            double_z=False, z_channels=8, resolution=32, in_channels=3, out_ch=3, ch=32,
            ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[], dropout=0.0,
        )  # fmt: skip
        content = {"model": {"params": dict(embed_dim=8, n_embed=16, ddconfig=net)}}
        (tools / "vqgan.yaml").write_text(yaml.safe_dump(content))
    return folder


def random_vqgan(*, seed: int) -> dict[str, np.ndarray]:
    """A VQGAN of the sizes above by taming's names: 32 channels, two levels, 16 codes of 8."""
    rng, found = np.random.default_rng(seed), {}

    def conv(name: str, i: int, o: int, k: int):
        found[f"{name}.weight"] = rng.standard_normal((o, i, k, k)) * (i * k * k) ** -0.5
        found[f"{name}.bias"] = 0.1 * rng.standard_normal(o)

    def norm(name: str, width: int):
        found[f"{name}.weight"] = 1 + 0.3 * rng.standard_normal(width)
        found[f"{name}.bias"] = 0.3 * rng.standard_normal(width)

    def block(name: str, i: int, o: int):
        norm(f"{name}.norm1", i)
        conv(f"{name}.conv1", i, o, 3)
        norm(f"{name}.norm2", o)
        conv(f"{name}.conv2", o, o, 3)
        if i != o:
            conv(f"{name}.nin_shortcut", i, o, 1)

    def middle(name: str, width: int):
        block(f"{name}.block_1", width, width)
        norm(f"{name}.attn_1.norm", width)
        for each in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{each}", width, width, 1)
        block(f"{name}.block_2", width, width)

    conv("encoder.conv_in", 3, 32, 3)
    block("encoder.down.0.block.0", 32, 32)
    conv("encoder.down.0.downsample.conv", 32, 32, 3)
    block("encoder.down.1.block.0", 32, 64)
    middle("encoder.mid", 64)
    norm("encoder.norm_out", 64)
    conv("encoder.conv_out", 64, 8, 3)
    conv("decoder.conv_in", 8, 64, 3)
    middle("decoder.mid", 64)
    block("decoder.up.1.block.0", 64, 64)
    block("decoder.up.1.block.1", 64, 64)
    conv("decoder.up.1.upsample.conv", 64, 64, 3)
    block("decoder.up.0.block.0", 64, 32)
    block("decoder.up.0.block.1", 32, 32)
    norm("decoder.norm_out", 32)
    conv("decoder.conv_out", 32, 3, 3)
    conv("quant_conv", 8, 8, 1)
    conv("post_quant_conv", 8, 8, 1)
    found["quantize.embedding.weight"] = rng.standard_normal((16, 8))
    return {name: array.astype(np.float32) for name, array in found.items()}


def write_pth(path: pathlib.Path, state: dict[str, np.ndarray], *, wrap: str | None) -> None:
    """A .pth file of these arrays."""
    names = {np.dtype(v): k for k, v in NUMPY.items()}
    names |= {np.dtype(np.int64): "I64", np.dtype(np.float64): "F64"}
    with open(path, "wb") as out:
        entries = [(n, a.shape, names[a.dtype], lambda a=a: a) for n, a in state.items()]
        torch_file.write(out, entries, wrap=wrap)


def read_pth(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a .pth file."""
    file = Folder(path.parent).file(path.name)
    return {
        name: torch_file.read(file, entry) for name, entry in torch_file.open_file(file).items()
    }


def read_safetensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of the safetensors files of a folder, by the safetensors library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(path)
    return found


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Same names, dtypes and bits."""
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name
