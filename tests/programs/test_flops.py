"""Costs by arithmetic, against the tree of parameters and the published figures."""

import dataclasses

import jax
import pytest

from medmax_jax import config, flops
from medmax_jax.config import CHOICES, Mesh
from medmax_jax.configs import base, chameleon_30b, tiny
from medmax_jax.models import chameleon
from medmax_jax.sharding import make_mesh

SEVEN = config.from_config_dict(base.get_config())
ADAPTERS = (SEVEN.model, SEVEN.vocab, SEVEN.lora)
NONE = (SEVEN.model, SEVEN.vocab, dataclasses.replace(SEVEN.lora, rank=0))


@pytest.mark.parametrize("file", [base, chameleon_30b, tiny])
def test_parameter_counts_match_the_tree(file):
    run = config.from_config_dict(file.get_config())
    n = flops.parameters(run.model, run.vocab, run.lora)
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        _, adapters, frozen = chameleon.split_adapters(
            chameleon.abstract_model(run.model, run.vocab, run.lora)
        )
    assert n.lora == chameleon.count_parameters(adapters)
    assert n.base == chameleon.count_parameters(frozen)


def test_the_published_sizes():
    n = flops.parameters(*ADAPTERS)
    assert (round(n.matmul / 1e9, 3), round(n.lora / 1e6, 2)) == (6.744, 39.98)


@pytest.mark.parametrize(
    "length, lora, full",
    [(1024, 28.02, 41.27), (2048, 28.83, 42.08), (4096, 30.44, 43.69), (8192, 33.66, 46.91)],
)
def test_flops_of_a_training_token(length, lora, full):
    assert round(flops.train_flops(*ADAPTERS, trains="lora", length=length) / 1e9, 2) == lora
    assert round(flops.train_flops(*NONE, trains="full", length=length) / 1e9, 2) == full


def test_lora_is_near_two_thirds_of_full():
    """NeMo's published rates and TFLOP/s of Llama2-7B give 0.670."""
    parts = [
        flops.train_flops(*sizes, trains=trains, length=4096)
        for sizes, trains in ((ADAPTERS, "lora"), (NONE, "full"))
    ]
    assert round(parts[0] / parts[1], 3) == 0.697


def test_image_head_training_has_no_backward_pass_below_the_head():
    cost = flops.train_flops(*NONE, trains="image_head", length=2048)
    forward = flops.decode_flops(*NONE, context=1024)  # a causal row sees half of itself
    assert cost == forward + 2 * 4096 * 8192


def test_packed_documents_attend_only_to_themselves():
    assert flops.attended_length([3, 1]) == 2.5
    assert flops.attended_length([2048]) == 2048


def test_every_remat_policy_has_a_flop_count():
    cost = {}
    for remat in CHOICES["model.remat"]:
        model = dataclasses.replace(SEVEN.model, remat=remat)
        cost[remat] = flops.remat_flops(model, trains="lora", length=2048)
    n = flops.parameters(*ADAPTERS)
    assert cost["none"] == 0
    assert cost["all"] == 2 * n.layers + 2 * 2048 * 4096 * 32
    assert 0 < cost["dots"] < cost["qkv_attn"] < cost["attn"] < cost["all"]
    with pytest.raises(ValueError, match="config.model.remat is 'some'"):
        model = dataclasses.replace(SEVEN.model, remat="some")
        flops.remat_flops(model, trains="lora", length=2048)


def test_unknown_training_mode_is_rejected():
    with pytest.raises(ValueError, match="config.train.trains is 'half'"):
        flops.train_flops(*ADAPTERS, trains="half", length=2048)


@pytest.mark.parametrize(
    "name, half", [("v5e", 3417), ("v5p", 7961), ("v6e", 15922), ("A100-80", 5411), ("H100", 17153)]
)
def test_rates_at_half_of_the_peak(name, half):
    need = flops.train_flops(*ADAPTERS, trains="lora", length=2048)
    share = flops.mfu(half * 8, need, chips=8, chip=flops.CHIPS[name])
    assert share == pytest.approx(0.5, abs=1e-4)


def test_full_recomputation_bounds_the_utilization():
    model = dataclasses.replace(SEVEN.model, remat="all")
    need = flops.train_flops(*ADAPTERS, trains="lora", length=2048)
    again = flops.remat_flops(model, trains="lora", length=2048)
    assert flops.hfu(0.68, need, again) == pytest.approx(1.0, abs=0.01)


def test_decoding_reads_weights_and_cache():
    """The published rooflines: 61 tokens/s of one row on v5e, half a MiB of cache a token."""
    assert flops.cache_bytes(SEVEN.model) == 2**19
    read = flops.decode_bytes(*NONE, context=0, rows=1)
    assert round(flops.CHIPS["v5e"].hbm_rate / read) == 61
    more = flops.decode_bytes(*NONE, context=100, rows=3)
    assert more == read + 3 * 100 * 2**19


def test_four_bits_are_a_little_over_half_a_byte():
    for quant, size in (("none", 2), ("int8", 1), ("nf4", 0.5625)):
        assert flops.matrix_bytes(dataclasses.replace(SEVEN.model, quant=quant)) == size


def test_unknown_device_has_no_utilization():
    assert flops.chip("TPU v5 lite").name == "v5e" and flops.chip("NVIDIA H200").name == "H200"
    assert flops.chip("NVIDIA H100 PCIe") is None and flops.chip("cpu") is None
    assert flops.mfu(1e3, 1e9, chips=1, chip=None) is None
    assert flops.hfu(None, 1e9, 1e9) is None
