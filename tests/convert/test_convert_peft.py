"""PEFT's settings: which are computed, which are refused by name, and exact merging."""

import json
import math
import pathlib

import numpy as np
import pytest
from convert_setup import BASE, read_safetensors, shards, write_meta
from safetensors.numpy import save_file
from test_convert import convert

from medmax_jax.convert import adapters, inspect_checkpoint
from medmax_jax.convert import convert as conversion
from medmax_jax.convert.state_dict import ConvertError

HERE = pathlib.Path(__file__).parents[1]
GOLDEN = json.loads((HERE / "parity" / "peft_scales.json").read_text())  # see make_peft_scales.py
SIZES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}  # fmt: skip
PLAIN = dict(peft_type="LORA", r=4, lora_alpha=6, lora_dropout=0.0, bias="none", task_type=None)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    """An HF folder of two layers."""
    folder = tmp_path_factory.mktemp("base")
    meta = write_meta(folder / "meta", BASE, shards(BASE, dtypes=("F32",), seed=0), vqgan=False)
    return convert(meta, folder / "hf", "hf")


def adapter(folder, *, ranks=None, modules=SIZES, layers=(0, 1), shape=None, **settings):
    """A PEFT folder of random matrices. `ranks`: canonical module -> rank, 4 elsewhere."""
    rng, tensors = np.random.default_rng(0), {}
    for layer in layers:
        for module in modules:
            out, in_ = SIZES[module]
            name = f"model.layers.{layer}.{module}"
            r = (ranks or {}).get(name, 4)
            for letter, size in (("A", (r, in_)), ("B", (out, r))):
                array = rng.standard_normal(shape or size).astype(np.float32)
                tensors[f"base_model.model.{name}.lora_{letter}.weight"] = array
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | settings))
    return folder


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: json.dumps(case["settings"]))
def test_ranks_and_factors_match_peft(case):
    settings = case["settings"]
    names = [f"{module}.weight" for module in case["layers"]]
    ranks, scales = adapters._scales(
        settings, names, "here", rank=settings["r"], alpha=float(settings["lora_alpha"])
    )
    assert len(names) == 84
    for module, (rank, scale) in case["layers"].items():
        assert ranks[f"{module}.weight"] == rank
        assert scales[f"{module}.weight"] == scale, module


@pytest.mark.parametrize(
    "settings",
    [
        dict(use_rslora=True),
        dict(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 3}, alpha_pattern={"o_proj": 5}),
        dict(rank_pattern={"k_proj": 7}, alpha_pattern={"k_proj": 2.5}, use_rslora=True),
    ],
)
def test_merging_matches_the_formula(base, tmp_path, settings):
    """W + alpha / r B A, or alpha / sqrt(r) B A of rsLoRA, against a sum in float64."""
    ranks, factors = {}, {}
    for layer in (0, 1):
        for module in SIZES:
            name, last = f"model.layers.{layer}.{module}", module.rpartition(".")[2]
            of_rank = settings.get("rank_pattern", {})
            r = of_rank.get(last, of_rank.get(name.removeprefix("model."), 4))
            alpha = settings.get("alpha_pattern", {}).get(last, 6)
            ranks[name], factors[name] = r, alpha / (r**0.5 if settings.get("use_rslora") else r)
    source = adapter(tmp_path / "adapter", ranks=ranks, **settings)
    merged = read_safetensors(convert(source, tmp_path / "merged", "hf", base=str(base)))
    plain, lora = read_safetensors(base), read_safetensors(source)
    for name, factor in factors.items():
        a, b = (
            lora[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB"
        )  # fmt: skip
        weight = f"{name}.weight"
        np.testing.assert_allclose(merged[weight], plain[weight] + factor * b @ a, atol=1e-5)
        assert np.abs(merged[weight] - plain[weight]).max() > 0.1
    others = set(plain) - {f"{name}.weight" for name in factors}
    assert all(np.array_equal(merged[name], plain[name]) for name in others)


def test_rslora_converts_to_a_native_adapter(base, tmp_path):
    source = adapter(tmp_path / "adapter", use_rslora=True)
    native = convert(source, tmp_path / "native", "native", base=str(base))
    config = json.loads((native / "adapter_config.json").read_text())
    assert config["rank"] == 4 and math.isclose(config["alpha"] / config["rank"], 6 / math.sqrt(4))
    one, two = (
        read_safetensors(convert(path, tmp_path / path.name[::-1], "hf", base=str(base)))
        for path in (source, native)
    )
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=0, atol=1e-6)


def test_several_ranks_do_not_convert_to_a_native_adapter(base, tmp_path):
    ranks = {f"model.layers.{i}.self_attn.q_proj": 2 for i in (0, 1)}
    source = adapter(tmp_path / "ranks", ranks=ranks, rank_pattern={"q_proj": 2})
    assert inspect_checkpoint.describe(conversion.read_checkpoint(source))["lora"]["ranks"] == [
        2,
        4,
    ]
    factors = adapter(tmp_path / "factors", alpha_pattern={"q_proj": 2})
    for path in (source, factors):
        for layout in ("native", "peft"):
            with pytest.raises(ConvertError, match=r"q_proj.*only merging .* \(--format hf"):
                convert(path, tmp_path / "out", layout, base=str(base))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(init_lora_weights="loftq"), "init_lora_weights is 'loftq'.*other base weights"),
        (dict(init_lora_weights="pissa_niter_4"), "'pissa_niter_4'.*other base weights"),
        (dict(init_lora_weights="olora"), "'olora'"),
        (dict(init_lora_weights="eva"), "'eva'"),
        (dict(init_lora_weights="corda"), "'corda'"),
        (dict(init_lora_weights="lora_ga"), "'lora_ga'"),
        (dict(init_lora_weights="mica"), "'mica'"),
        (dict(init_lora_weights="of 2031"), "'of 2031'"),
        (dict(loftq_config={"loftq_bits": 4}), "loftq_config is .*other base weights"),
        (dict(eva_config={"rho": 2.0}), "eva_config is"),
        (dict(corda_config={"corda_method": "ipm"}), "corda_config is"),
        (
            dict(alora_invocation_tokens=[5, 6]),
            "alora_invocation_tokens is .*after these tokens",
        ),
        (dict(use_dora=True), "use_dora is True.*DoRA"),
        (dict(lora_bias=True), "lora_bias is True"),
        (dict(bias="all"), "bias is 'all'"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out is True"),
        (dict(layer_replication=[[0, 2], [1, 2]]), "layer_replication is .*repeats layers"),
        (dict(layers_to_transform=[0]), "layers_to_transform is .*layers only"),
        (dict(layers_to_transform=1, layers_pattern="layers"), "layers_to_transform is 1"),
        (dict(layers_pattern=["h"]), "layers_pattern is"),
        (dict(exclude_modules=["q_proj"]), "exclude_modules is"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save is .*other than the LoRA"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices is"),
        (dict(target_parameters=["mlp.experts"]), "target_parameters is"),
        (dict(megatron_config={"a": 1}), "megatron_config is"),
        (dict(megatron_core="other.core"), "megatron_core is 'other.core'"),
        (dict(use_qalora=True), "use_qalora is True"),
        (dict(use_bdlora={"a": 1}), "use_bdlora is"),
        (dict(kasa_config={"a": 1}), "kasa_config is"),
        (dict(ensure_weight_tying=True), "ensure_weight_tying is True"),
        (dict(use_lora_of_2031=True), "use_lora_of_2031 is True.*changes what the adapter"),
        (dict(scale_of_2031=2), "scale_of_2031 is 2"),
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (dict(peft_type=["LORA"]), "peft_type is"),
        (dict(use_rslora="yes"), "use_rslora is 'yes'; it must be true or false"),
        (dict(r=0), "r is 0"),
        (dict(r=1 << 40), "r is 1099511627776; it must be in 0..16384"),
        (dict(r=4.0), "r is 4.0; it must be an integer"),
        (dict(lora_alpha=None), "lora_alpha is missing"),
        (dict(lora_dropout="no"), "lora_dropout is 'no'"),
        (dict(rank_pattern=["q_proj"]), "rank_pattern is .*must be a table"),
        (dict(rank_pattern={"(a*)*b": 2}), r"rank_pattern has the key '\(a\*\)\*b'"),
        (dict(rank_pattern={"q_proj": "2"}), "rank_pattern: q_proj is '2'"),
        (dict(rank_pattern={"q_proj": 0}), "q_proj to 0; it must be above 0"),
        (dict(alpha_pattern={"q_proj": True}), "alpha_pattern: q_proj is True"),
        (dict(target_modules=["q_proj"]), "which is not in target_modules"),
        (dict(target_modules=["proj"]), "target_modules has 'proj', but the file has no"),
        (dict(target_modules=[*"abc"]), "target_modules has 'a'"),
        (dict(target_modules=5), "target_modules is 5; it must be a list of names"),
    ],
)
def test_unsupported_settings_are_rejected_by_name(tmp_path, settings, message):
    source = adapter(tmp_path / "adapter", **settings)
    with pytest.raises(ConvertError, match=f"adapter_config.json: .*{message}"):
        conversion.read_checkpoint(source)


@pytest.mark.parametrize(
    "settings",
    [
        dict(init_lora_weights="gaussian"),
        dict(init_lora_weights="orthogonal", megatron_core="megatron.core"),
        dict(init_lora_weights=False, inference_mode=True, revision="main", qalora_group_size=16),
        dict(of_2031=None, also_of_2031={}, more_of_2031=False, and_of_2031=0, last_of_2031=[]),
        dict(target_modules=[name.rpartition(".")[2] for name in SIZES]),
        dict(target_modules="all-linear", auto_mapping={"parent_library": "x"}),
        dict(peft_version="0.99.0", runtime_config={"ephemeral_gpu_offload": False}),
        dict(bias=None, init_lora_weights=None, rank_pattern=None, modules_to_save=[]),
    ],
)
def test_neutral_settings_are_accepted(tmp_path, settings):
    found = conversion.read_checkpoint(adapter(tmp_path / "adapter", **settings))
    assert found.lora.rank == 4 and found.scale(next(iter(found.matrices))) == 6 / 4


def test_adapters_without_weights_are_explained(base, tmp_path):
    empty = adapter(tmp_path / "empty", layers=())
    with pytest.raises(ConvertError, match=r"contains no tensors; .*ZeRO-3.* Gather them and save"):
        convert(empty, tmp_path / "out", "native", base=str(base))
    zero = adapter(tmp_path / "zero", shape=(0,))
    with pytest.raises(ConvertError, match="28 of 28 tensors have no elements .*ZeRO-3"):
        convert(zero, tmp_path / "out", "hf", base=str(base))
    assert not (tmp_path / "out").exists()


def test_adapters_on_some_layers_are_refused(base, tmp_path):
    source = adapter(tmp_path / "some", layers=(1,))
    with pytest.raises(ConvertError, match=r"no LoRA on model.layers.0.*copy is incomplete"):
        convert(source, tmp_path / "out", "hf", base=str(base))
    far = adapter(tmp_path / "far", layers=(10**9,))
    with pytest.raises(ConvertError, match="layers.1000000000.* is unexpected"):
        conversion.read_checkpoint(far)


def test_adapters_on_some_modules_are_merged(base, tmp_path):
    modules = ("self_attn.q_proj", "self_attn.v_proj")
    source = adapter(tmp_path / "two", modules=modules, target_modules=["q_proj", "v_proj"])
    merged = read_safetensors(convert(source, tmp_path / "out", "hf", base=str(base)))
    plain = read_safetensors(base)
    changed = {name for name in plain if not np.array_equal(plain[name], merged[name])}
    assert changed == {f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in modules}


@pytest.mark.parametrize(
    "facts",
    [
        [1], {"base": 5}, {"sources": [1]}, {"sources": {"a": "b"}}, {"credentials": 1},
        {"config": {"optim": 3}}, {"step": "five"}, {"data": None},
    ],
)  # fmt: skip
def test_invalid_adapter_facts_are_rejected(tmp_path, facts):
    source = adapter(tmp_path / "adapter")
    (source / "medmax_jax.json").write_text(json.dumps(facts))
    with pytest.raises(ConvertError, match="medmax_jax.json: .*export the adapter again"):
        conversion.read_checkpoint(source)
