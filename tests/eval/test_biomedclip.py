"""BiomedCLIP against open_clip at random weights: embeddings, names, pixels, ids; its files."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import save_file

from medmax_jax.checkpoints import safetensors_file, torch_file
from medmax_jax.checkpoints.safetensors_file import WeightsError
from medmax_jax.config import build
from medmax_jax.eval.encoders import biomedclip
from medmax_jax.eval.encoders.biomedclip import Embedder
from medmax_jax.models import image_headers

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import biomedclip_cases as cases  # noqa: E402

TINY = build(biomedclip.Sizes, cases.TINY)
FULL = build(biomedclip.Sizes, ConfigDict(biomedclip.PUBLISHED_SIZES))


def golden(case):
    with np.load(PARITY / f"biomedclip_{case}.npz") as file:
        result = dict(file)
    return result | {"names": json.loads(result["names"].tobytes())}


def tensors(case):
    """Return open_clip's state dict of a case."""
    return {key: cases.weight(key, tuple(shape)) for key, shape in golden(case)["names"].items()}


def model(case="tiny", sizes=TINY):
    shapes = golden(case)["names"].items()
    reads = {k: lambda k=k, shape=tuple(v): cases.weight(k, shape) for k, v in shapes}
    return biomedclip.from_tensors(case, reads, sizes)


@pytest.fixture(scope="module")
def tiny():
    return model()


def nhwc(pixels):
    return jnp.asarray(pixels.transpose(0, 2, 3, 1))


def test_embeddings_equal_open_clip(tiny):
    theirs = golden("tiny")
    image = biomedclip.image_embeddings(tiny, nhwc(cases.pixels(32, 3)))
    text = biomedclip.text_embeddings(tiny, jnp.asarray(cases.ids(48, 16)))
    np.testing.assert_allclose(image, theirs["image"], atol=2e-6, rtol=0)
    np.testing.assert_allclose(text, theirs["text"], atol=2e-6, rtol=0)
    assert np.abs(theirs["image"][0] - theirs["image"][1]).max() > 0.02  # not all alike
    assert np.abs(theirs["text"][0] - theirs["text"][1]).max() > 0.02


@pytest.mark.parametrize(
    ("what", "value", "tower"),
    [
        ("IMAGE_EPS", 1e-5, "image"),
        ("TEXT_EPS", 1e-6, "text"),
        ("PAD", -1, "text"),  # padding is attended to
        ("_gelu", jax.nn.gelu, "image"),  # the tanh approximation
        ("_gelu", jax.nn.gelu, "text"),
    ],
)
def test_the_golden_file_detects_small_errors(monkeypatch, what, value, tower):
    monkeypatch.setattr(biomedclip, what, value)
    clip, theirs = model(), golden("tiny")[tower]
    if tower == "image":
        raw = clip.visual(nhwc(cases.pixels(32, 3)))
    else:
        raw = clip.text(jnp.asarray(cases.ids(48, 16)))
    assert np.abs(biomedclip._unit(raw) - theirs).max() > 1e-5


@pytest.mark.slow
def test_embeddings_at_the_published_sizes():
    theirs, ours = golden("full"), model("full", FULL)
    image = biomedclip.image_embeddings(ours, nhwc(cases.pixels(224, 2)))
    text = biomedclip.text_embeddings(ours, jnp.asarray(cases.ids(30_522, 256)))
    np.testing.assert_allclose(image, theirs["image"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(text, theirs["text"], atol=1e-5, rtol=0)


def test_all_351_tensor_names_are_mapped_once():
    names = golden("full")["names"]
    like = safetensors_file.flatten_named(biomedclip.abstract(FULL))
    used = [key for name in like for key in biomedclip.published_keys(name, FULL)]
    assert sorted(used) == sorted(names) and len(set(used)) == len(used) == 351
    assert sum(int(np.prod(leaf.shape)) for leaf in like.values()) == 195_902_721


def test_every_tensor_of_every_layer_affects_the_output(tiny):
    """Only tensors that cannot matter have no gradient."""

    def total(clip):
        image = biomedclip.image_embeddings(clip, nhwc(cases.pixels(32, 3)))
        text = biomedclip.text_embeddings(clip, jnp.asarray(cases.ids(48, 16)))
        return (image[:, ::2] ** 3).sum() + (text[:, ::2] ** 3).sum()

    slopes = safetensors_file.flatten_named(jax.jit(jax.grad(total))(tiny))
    largest = {}
    for name, slope in slopes.items():
        stacked = name.startswith(("visual.blocks.", "text.layers."))
        largest |= {
            (name, n): float(jnp.abs(part).max())
            for n, part in enumerate(slope if stacked else slope[None])
        }
    # softmax is blind to a shift of all keys; no score has a temperature
    blind = {("logit_scale", 0)} | {("text.layers.key.bias", n) for n in range(3)}
    assert {key for key, slope in largest.items() if slope < 1e-5} == blind


def test_padding_and_batches_change_nothing(tiny):
    ids = cases.ids(48, 16).astype(np.int32)
    short = biomedclip.text_embeddings(tiny, jnp.asarray(ids[2:, :4]))
    whole = biomedclip.text_embeddings(tiny, jnp.asarray(ids))
    np.testing.assert_allclose(short[0], whole[2], atol=1e-6)

    embedder = Embedder(tiny, batch=1)  # eight devices: 19 images are three batches
    pixels = nhwc(cases.pixels(32, 19))
    result = embedder.images(np.asarray(p) for p in pixels)
    np.testing.assert_allclose(result, biomedclip.image_embeddings(tiny, pixels), atol=2e-6)
    rows = np.tile(ids, (4, 1))[:11]
    np.testing.assert_allclose(
        embedder.texts(rows), biomedclip.text_embeddings(tiny, jnp.asarray(rows)), atol=2e-6
    )
    assert embedder.images([]).shape == (0, 24) and embedder.texts(rows[:0]).shape == (0, 24)


def test_texts_are_cut_to_their_length(tiny):
    """Long contexts: a batch of short texts runs at 32 tokens and equals the padded one."""
    sizes = build(biomedclip.Sizes, {**cases.TINY, "text": {**cases.TINY["text"], "positions": 70}})
    names = golden("tiny")["names"] | {
        "text.transformer.embeddings.position_embeddings.weight": [70, 40]
    }
    reads = {k: lambda k=k, s=tuple(v): cases.weight(k, s) for k, v in names.items()}
    wide = biomedclip.from_tensors("wide", reads, sizes)
    ids = np.random.default_rng(0).integers(1, 48, (16, 70)).astype(np.int32)
    for row, length in enumerate([3, 70, 20, 40, 64, 65, 2, 30] * 2):
        ids[row, length:] = 0
    result = Embedder(wide, batch=1).texts(ids)
    np.testing.assert_allclose(result, biomedclip.text_embeddings(wide, ids), atol=2e-6)


# ---- inputs


@pytest.fixture
def vocab(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(cases.WORDS) + "\n", "utf-8")
    return tmp_path / "vocab.txt"


def test_token_ids_equal_hugging_face(vocab):
    tokenizer = biomedclip.WordPiece(vocab, size=48, context=16)
    np.testing.assert_array_equal(tokenizer.ids(cases.TEXTS), golden("tiny")["ids"])


def case_image(name):
    image = Image.fromarray(cases.image_array(name)[1])
    return image.quantize(16) if name == "palette" else image


@pytest.mark.parametrize("name", cases.IMAGE_NAMES)
def test_pixels_equal_the_release(name):
    ours = biomedclip.pixels(case_image(name), size=32, released=True)
    theirs = golden("tiny")[f"pixels_{name}"].transpose(1, 2, 0)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_both_conversions_agree_where_the_release_is_correct():
    both = {
        name: [biomedclip.pixels(case_image(name), size=32, released=r) for r in (True, False)]
        for name in cases.IMAGE_NAMES
    }
    apart = {name: float(np.abs(a - b).max()) for name, (a, b) in both.items()}
    assert {name for name, far in apart.items() if far == 0} == {
        "wide", "tall", "exact", "tiny", "grey",
    }  # fmt: skip
    assert apart["palette"] > 0.1 and apart["bit"] > 1
    released, right = both["deep"]  # 16 bits
    assert released.min() > 1.9 and right.min() < -1  # saturated to white; dark to bright


def test_an_image_of_one_line_is_refused():
    with pytest.raises(image_headers.ImageError, match="too narrow"):
        biomedclip.pixels(Image.new("RGB", (1, 5000)), size=224, released=False)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (cases.WORDS[1:], r"has no \[PAD\]"),
        (cases.WORDS[::-1], r"\[PAD\] is word 47, but the model masks 0"),
        (cases.WORDS[:-1], "47 lines and 47 words, but the model has 48"),
        (cases.WORDS[:-1] + ["e"], "48 lines and 47 words, but the model has 48"),
    ],
)
def test_other_vocabularies_are_refused(tmp_path, words, problem):
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    with pytest.raises(biomedclip.InputError, match=problem):
        biomedclip.WordPiece(tmp_path / "vocab.txt", size=48, context=16)
    with pytest.raises(biomedclip.InputError, match="cannot be read"):
        biomedclip.WordPiece(tmp_path / "none.txt", size=48, context=16)


# ---- files

CONFIG = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"timm_pool": "", "timm_proj": "linear", "image_size": 32},
        "text_cfg": {
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 16,
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}


@pytest.fixture
def folder(tmp_path, vocab):
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def write_bin(folder, state):
    with (folder / biomedclip.BIN).open("wb") as out:
        names = {np.dtype("int64"): "I64", np.dtype("float32"): "F32"}
        torch_file.write(
            out,
            [(k, v.shape, names[v.dtype], lambda v=v: v) for k, v in state.items()],
            wrap=None,
        )


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_both_published_forms_load(folder, tiny, kind):
    state = tensors("tiny")
    state["text.transformer.embeddings.position_ids"] = np.arange(16)[None]  # of old transformers
    if kind == "bin":
        write_bin(folder, state)
    else:
        save_file(state, folder / biomedclip.SAFE)
    result, tokenizer = biomedclip.load(str(folder), TINY)
    for ours, same in zip(jax.tree.leaves(result), jax.tree.leaves(tiny), strict=True):
        np.testing.assert_array_equal(ours, same)
    assert tokenizer.ids(["Chest"]).tolist() == [[2, 5, 3] + [0] * 13]


def test_other_files_are_refused(folder):
    state = tensors("tiny")
    with pytest.raises(WeightsError, match=r"open_clip_pytorch_model.bin is missing; download"):
        biomedclip.load(str(folder), TINY)

    def refused(changed, match):
        write_bin(folder, changed)
        with pytest.raises(WeightsError, match=match):
            biomedclip.load(str(folder), TINY)

    name = "visual.trunk.blocks.1.attn.qkv.bias"
    refused({k: v for k, v in state.items() if k != name}, rf"1 arrays are missing .*{name}")
    refused(
        state | {"text.transformer.pooler.dense.bias": state[name]}, "1 are unexpected .*pooler"
    )
    turned = {"text.proj.0.weight": state["text.proj.0.weight"].T}
    refused(
        state | turned, r"text.proj.0.weight has shape \(40, 32\).*\(32, 40\); expected \(40, 32\)"
    )
    refused(state | {name: state[name][1:]}, rf"{name} has shape \(95,\)")
    refused(state | {name: state[name] * np.float32(np.nan)}, f"{name} contains NaN")
    (folder / biomedclip.SAFE).write_bytes(b"\x08\0\0\0\0\0\0\0half")
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        biomedclip.load(str(folder), TINY)
    with pytest.raises(WeightsError, match="copy the folder to one"):
        biomedclip.load("gs://bucket/biomedclip", TINY)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("text_cfg", "hf_pooler_type", "mean_pooler"),
        ("text_cfg", "context_length", 77),
        ("vision_cfg", "image_size", 384),
        ("vision_cfg", "timm_pool", None),
    ],
)
def test_other_settings_are_refused(folder, section, field, value):
    write_bin(folder, tensors("tiny"))
    changed = json.loads(json.dumps(CONFIG))
    changed["model_cfg"][section][field] = value
    (folder / "open_clip_config.json").write_text(json.dumps(changed))
    with pytest.raises(WeightsError, match=f"{field} is {value!r}, but this port supports"):
        biomedclip.load(str(folder), TINY)
