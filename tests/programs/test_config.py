"""Config files become frozen settings; the error of a wrong setting names its field and the fix."""

import functools
import importlib
import math
import pathlib
import re

import numpy as np
import pytest

from medmax_jax import config
from medmax_jax.configs import base, medmax_7b_lora, medmax_7b_unimedvl_stages, tiny
from medmax_jax.data import mixture
from medmax_jax.data.packing import mixing

LAUNCHES = {  # sections of docs/guides/launch.md: devices, and whether they are GPUs
    "One GPU box": (8, True),
    "A TPU VM pod on spot, re-created and resumed by one loop": (16, False),
    "Two slices": (32, False),
    "GKE by xpk": (32, False),
    "SLURM": (32, True),
}


@pytest.mark.parametrize(
    "name",
    ["base", "tiny", "tiny_base", "tiny_instruct", "chameleon_30b", "medmax_7b_paper",
     "medmax_7b_lora", "medmax_7b_images", "medmax_7b_qlora", "medmax_7b_full",
     "medmax_7b_unimedvl_stages", "chameleon_30b_lora", "imax_tiny", "imax_7b"],
)  # fmt: skip
def test_every_config_file_builds_and_survives_a_round_trip(name):
    run = config.from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    assert config.from_config_dict(config.to_dict(run)) == run
    assert hash(run) is not None


def test_codes_per_image_follow_from_the_vqgan():
    assert config.from_config_dict(base.get_config()).vq.codes_per_image == 1_024
    assert config.from_config_dict(tiny.get_config()).vq.codes_per_image == 64


def test_stages_of_unimedvl_have_its_proportions_of_the_tasks_of_medmax():
    run = config.from_config_dict(medmax_7b_unimedvl_stages.get_config())
    understanding = medmax_7b_unimedvl_stages.UNDERSTANDING
    assert understanding == {task: mixture.TASKS[task] for task in understanding}
    shares = [(75, 25, 0), (40, 45, 10), (37, 35, 25)]
    for stage, steps, expected in zip(run.stages, (85, 120, 70), shares, strict=True):
        assert stage.steps == pytest.approx(run.train.steps * steps / 275, abs=1)
        parsed = mixing.parse(stage.mixing.weights, [*mixture.TASKS])
        weights = dict(zip(mixture.TASKS, parsed, strict=True))
        found = (
            sum(weights[task] for task in understanding),
            weights[mixture.GENERATION],
            weights[mixture.INTERLEAVED],
        )
        assert found == pytest.approx(expected, abs=0.01)


def test_positions_are_exact_in_fp32():
    """RoPE's positions are fp32 numbers: 2^24 + 1 would be 2^24."""
    settings = base.get_config().to_dict()
    limit = config.MAX_POSITIONS
    assert np.float32(limit - 1) != np.float32(limit) == np.float32(limit + 1)
    settings["model"]["context_length"] = settings["data"]["seq_len"] = 2 * limit
    settings["data"]["document_limit"] = limit
    config.from_config_dict(settings)
    settings["data"]["document_limit"] = limit + 1
    with pytest.raises(config.ConfigError, match=f"document_limit is {limit + 1}.*and {limit}"):
        config.from_config_dict(settings)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optim.lr", 1e-3, "config.optim.lr is not a field; did you mean config.optim.peak_lr\\?"),
        ("optim.peak_lr", None, "config.optim.peak_lr is missing"),
        ("optim.peak_lr", "fast", "config.optim.peak_lr is 'fast'.*float"),
        ("train.steps", 0, "config.train.steps is 0; it must be above 0"),
        ("loss.weights.text", -1.0, "config.loss.weights.text is -1.0; it must be at least 0"),
        ("loss.weights.image", float("inf"), "config.loss.weights.image is inf; .* finite"),
        (
            "loss.weights.audio",
            1.0,
            "config.loss.weights.audio is not a field; the fields are text",
        ),
        ("loss.weights.tasks", "VQA", "config.loss.weights.tasks is 'VQA'; .* 'VQA' is not"),
        ("loss.weights.tasks", "VQA=-1", "loss.weights.tasks is 'VQA=-1'; .* 'VQA=-1' is not"),
        ("loss.weights.tasks", "A=1, A=2", "loss.weights.tasks is 'A=1, A=2'; .* 'A=2' is not"),
        ("train.steps", 1.5, "config.train.steps is 1.5.*int"),
        ("train.trains", "bias", "config.train.trains is 'bias'.*lora, full"),
        ("model.num_kv_heads", 3, "config.model.num_heads is 32.*num_kv_heads"),
        ("vq.num_codes", 512, "config.vq.num_codes is 512; it must be 8192"),
        ("vq.channels", 48, "a multiple of vq.norm_groups = 32"),
        ("vq.norm_groups", 0, "config.vq.norm_groups is 0; it must be above 0"),
        ("model.num_kv_heads", 0, "config.model.num_kv_heads is 0; it must be above 0"),
        ("vq.channel_mult", (1, 2.5), "integers"),
        ("data.seq_len", 2_000, "config.data.document_limit is 2048; it must be in 1..2000"),
        ("data.document_limit", 4_097, "in 1..2048: at most data.seq_len and model.context_length"),
        ("data.document_limit", 0, "config.data.document_limit is 0; it must be in 1..2048"),
        ("mixing.by", "image", "config.mixing.by is 'image'; it must be one of source, task"),
        ("mixing.unit", "rows", "one of documents, tokens"),
        ("optim.schedule", "cosine", "config.optim.schedule is 'cosine'; .* one of run, stage"),
        ("stages", 3, "config.stages is 3; it must be a list of at most 64 sections"),
        ("mixing.weights", 2, "config.mixing.weights is 2 .int.; it must be str"),
        ("data.batch_size", 3, None),
        ("mesh.fsdp", 3, "config.data.batch_size is 8; it must be a multiple"),
        ("vocab.text_start", 100, "config.vocab.text_start is 100"),
        ("lora.dropout", 1.0, r"in \[0, 1\)"),
        ("lora.rank", 0, "above 0"),
    ],
)
def test_wrong_settings_are_reported(path, value, message):
    settings = base.get_config().to_dict()
    *sections, field = path.split(".")
    part = functools.reduce(lambda part, name: part[name], sections, settings)
    if value is None:
        del part[field]
    else:
        part[field] = value
    if message is None:
        config.from_config_dict(settings)
    else:
        with pytest.raises(config.ConfigError, match=message):
            config.from_config_dict(settings)


def test_fingerprint_depends_on_every_field():
    run = config.from_config_dict(base.get_config())
    settings = config.to_dict(run)
    settings["optim"]["eps"] = 1e-7
    assert config.fingerprint(run) != config.fingerprint(config.from_config_dict(settings))


@pytest.mark.parametrize("title", LAUNCHES)
def test_commands_of_launch_md_fit_their_machines(title):
    devices, gpus = LAUNCHES[title]
    text = (pathlib.Path(__file__).parents[2] / "docs" / "guides" / "launch.md").read_text()
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    found = re.findall(r"medmax_7b_lora\.py(.*?)--workdir", section, re.S)
    assert found
    for flags in found:
        settings = medmax_7b_lora.get_config()
        for path, value in re.findall(r"--config\.([\w.]+)=(\S+)", flags):
            *names, last = path.split(".")
            part = settings
            for name in names:
                part = part[name]
            part[last] = type(part[last])(value)
        run = config.from_config_dict(settings)  # batch and mesh agree, or this raises
        sizes = (run.mesh.data, run.mesh.fsdp, run.mesh.tp)
        assert math.prod(sizes) == devices
        kinds = ("cudnn", "default") if gpus else ("splash", "gather")
        assert (run.model.attention, run.train.compile) == kinds
