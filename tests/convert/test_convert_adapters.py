"""Adapters and runs in and out: PEFT's files, merging, and what the model card says."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import micro_run
import numpy as np
import pytest
from convert_setup import BASE, SWIN, assert_equal, read_pth, read_safetensors, shards, write_meta
from flax import nnx
from safetensors.numpy import save_file
from test_convert import GOLDEN, IDS, convert, logits

from medmax_jax import train
from medmax_jax.checkpoints import export, safetensors_file
from medmax_jax.config import ConfigError, Lora, Mesh
from medmax_jax.convert import convert as conversion
from medmax_jax.convert import inspect_checkpoint
from medmax_jax.convert.state_dict import ConvertError
from medmax_jax.models import chameleon
from medmax_jax.sharding import make_mesh

PEFT = pathlib.Path(__file__).parents[1] / "parity" / "peft_adapter"  # saved by peft itself


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    """The native base that PEFT's golden adapter was made on."""
    folder = tmp_path_factory.mktemp("base")
    meta = write_meta(folder / "meta", BASE, shards(BASE, dtypes=("F32",), seed=0), vqgan=True)
    return convert(meta, folder / "native", "native")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """(model folder, workdir of a LoRA run on it), by the training program."""
    folder = tmp_path_factory.mktemp("trained")
    data = dict(data__train=micro_run.write(folder / "records"))
    whole = micro_run.run(**data, train__trains="full", lora__rank=0, train__steps=1)
    train.run(whole, folder / "whole")
    model = folder / "whole" / "model"
    tuned = micro_run.run(**data, train__init_from=str(model), train__steps=4)
    train.run(tuned, folder / "run")
    return model, folder / "run"


def adapted_logits(model: pathlib.Path, adapter: pathlib.Path, ids: np.ndarray) -> np.ndarray:
    """Logits with a separate adapter, as training and generation compute them."""
    found, facts = (
        conversion.read_checkpoint(model),
        json.loads((adapter / "adapter_config.json").read_text()),
    )
    lora = Lora(**{name: facts[name] for name in ("rank", "alpha", "dropout")})
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        like = chameleon.abstract_model(found.model, found.vocab, lora)
        graph, adapters, rest = chameleon.split_adapters(like)
        adapters = safetensors_file.load(adapter / "adapter.safetensors", adapters)
        net = nnx.merge(graph, adapters, export.load(model, rest))
        positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))
        rows = (jnp.asarray(ids), jnp.ones_like(ids), jnp.asarray(positions))
        return np.asarray(net.logits(net.hidden(*rows, key=None)))


def test_peft_adapter_gives_the_same_logits_as_in_peft(base, tmp_path):
    wanted = GOLDEN["peft_logits"]
    tolerance = 2e-5 * max(1.0, float(wanted.std()))
    native = convert(PEFT, tmp_path / "adapter", "native", base=str(base))
    separate = adapted_logits(base, native, IDS)
    np.testing.assert_allclose(separate[..., GOLDEN["columns"]], wanted, rtol=0, atol=tolerance)
    merged = convert(PEFT, tmp_path / "merged", "native", base=str(base), merge_native=True)
    np.testing.assert_allclose(
        logits(merged)[..., GOLDEN["columns"]], wanted, rtol=0, atol=tolerance
    )
    assert np.abs(logits(base)[..., GOLDEN["columns"]] - wanted).max() > 1e3 * tolerance


def test_adapters_round_trip_exactly(base, tmp_path):
    native = convert(PEFT, tmp_path / "native", "native", base=str(base))
    peft = convert(native, tmp_path / "peft", "peft")
    assert_equal(read_safetensors(PEFT), read_safetensors(peft))
    again = convert(peft, tmp_path / "again", "native")  # its base is in medmax_jax.json
    assert_equal(read_safetensors(native), read_safetensors(again))
    one, two = (json.loads((p / "adapter_config.json").read_text()) for p in (native, again))
    assert one == two and one["rank"] == 4 and one["alpha"] == 6 and one["dropout"] == 0.05
    assert one["base"] == export.base_fingerprint(base)
    settings = json.loads((peft / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 6, 0.05)


@pytest.mark.parametrize("layout", ["hf", pytest.param("meta", marks=pytest.mark.slow)])
def test_a_run_is_merged_into_its_base(trained, layout, tmp_path):
    model, run = trained
    there = convert(run, tmp_path / layout, layout, base=str(model))
    back = convert(there, tmp_path / "native", "native")
    found = conversion.read_checkpoint(back)
    ids = np.random.default_rng(0).integers(0, 8_776, (2, 24)).astype(np.int32)
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        net = export.load(
            back, chameleon.abstract_model(found.model, found.vocab, chameleon.NO_LORA)
        )
        rows = (jnp.asarray(ids), jnp.ones_like(ids), jnp.tile(jnp.arange(24), (2, 1)))
        merged = np.asarray(net.logits(net.hidden(*rows, key=None)))
    separate = adapted_logits(model, run / "adapter", ids)
    np.testing.assert_allclose(
        merged, separate, rtol=0, atol=2e-5 * max(1.0, float(separate.std()))
    )
    assert export.base_fingerprint(back) != export.base_fingerprint(model)


def test_merging_is_in_fp32_and_rounds_once(base, tmp_path):
    rounded = shards(BASE, dtypes=("BF16",), seed=0)
    half = write_meta(tmp_path / "half", BASE, rounded, vqgan=False)
    adapter = read_safetensors(PEFT)
    merged = convert(PEFT, tmp_path / "merged", "meta", base=str(half))
    found = read_pth(merged / "models/model/consolidated.pth")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    delta = 6 / 4 * adapter[name.format("B")] @ adapter[name.format("A")]
    weight = rounded[0]["layers.1.feed_forward.w2.weight"]
    wanted = (weight.astype(np.float32) + delta.astype(np.float32)).astype(weight.dtype)
    off = found["layers.1.feed_forward.w2.weight"].astype(np.float32) - wanted.astype(np.float32)
    assert (off != 0).mean() < 1e-3  # sums of four products in another order, at a tie
    np.testing.assert_array_equal(found["output.weight"], rounded[0]["output.weight"])


def test_model_card_lists_the_training_data(trained, tmp_path):
    model, run = trained
    peft = convert(run, tmp_path / "peft", "peft", base=str(model))
    text = (peft / "README.md").read_text()
    assert text.startswith("Trained on no credentialed data.")
    for wanted in (
        "Research only, not for clinical use", "Chameleon Research License", "| generated | 40 |",
        export.base_fingerprint(model), "rank 4, alpha 4, dropout 0.1", "Trained for 4 steps",
    ):  # fmt: skip
        assert wanted in text, wanted
    facts = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert facts["data"] in text and "`optim`: " in text
    facts["sources"] = {"MIMIC-CXR": 3, "PathVQA": 2}
    facts["credentials"] = {"yes": 3, "no": 2}
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(facts))
    card = (convert(adapter, tmp_path / "peft2", "peft") / "README.md").read_text()
    assert card.startswith("**Trained on credentialed data: MIMIC-CXR.**")
    assert "| MIMIC-CXR | 3 | yes | PhysioNet credentialed access |" in card


def test_interrupted_run_is_read_from_its_newest_checkpoint(trained, tmp_path):
    _, run = trained
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "adapter")
    native = convert(cut, tmp_path / "native", "native")
    assert_equal(read_safetensors(native), read_safetensors(run / "adapter"))
    (cut / "checkpoints" / "4" / "sha256.json").unlink()
    output = inspect_checkpoint.describe(conversion.read_checkpoint(cut))
    assert output["facts"]["step"] == 2 and output["lora"]["rank"] == 4


def test_inspect_reads_rank_alpha_and_targets(trained):
    output = inspect_checkpoint.describe(conversion.read_checkpoint(PEFT))
    assert output["layout"] == "peft adapter"
    assert output["lora"]["rank"] == 4 and output["lora"]["alpha"] == 6
    assert output["lora"]["targets"] == sorted(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    )
    assert "rank 4" in inspect_checkpoint.format_description(output)


def edited(tmp_path, **changes) -> pathlib.Path:
    folder = tmp_path / "edited"
    shutil.copytree(PEFT, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(use_dora=True), "use_dora is True"),
        (dict(rank_pattern={"q_proj": 8}), "q_proj.* has rank 8"),
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (
            dict(init_lora_weights="pissa"),
            "init_lora_weights is 'pissa', which starts from other",
        ),
        (dict(r=8), r"has rank 8; config and weights belong"),
        (dict(lora_alpha="16"), "lora_alpha is '16'; it must be a number"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(base, tmp_path, changes, message):
    with pytest.raises(ConvertError, match=message):
        convert(edited(tmp_path, **changes), tmp_path / "out", "hf", base=str(base))
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_base_is_refused(base, trained, tmp_path):
    model, run = trained
    native = convert(PEFT, tmp_path / "native", "native", base=str(base))
    other = write_meta(tmp_path / "other", BASE, shards(BASE, dtypes=("F32",), seed=5), vqgan=False)
    with pytest.raises(ConvertError, match="was trained on base weights"):
        convert(native, tmp_path / "out", "hf", base=str(other))
    wide = write_meta(tmp_path / "swin", SWIN, shards(SWIN, dtypes=("F32",), seed=5), vqgan=False)
    with pytest.raises(ConvertError, match="adapter belongs to another base"):
        convert(PEFT, tmp_path / "out", "hf", base=str(wide))
    with pytest.raises(ConvertError, match="set --base"):
        convert(run, tmp_path / "out", "hf")
    with pytest.raises(ConvertError, match="does not state the weights"):
        convert(PEFT, tmp_path / "out", "native")
    with pytest.raises(ConvertError, match="is not an adapter; omit --base"):
        convert(base, tmp_path / "out", "hf", base=str(model))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "lost"), [("BF16", True), ("F32", False)])
def test_a_change_below_the_steps_of_the_base_is_reported(tmp_path, dtype, lost):
    """After a few steps an adapter's change of 7B is below half a step of bfloat16."""
    meta = write_meta(tmp_path / "meta", BASE, shards(BASE, dtypes=(dtype,), seed=0), vqgan=True)
    base, adapter, lines = convert(meta, tmp_path / "base", "native"), tmp_path / "adapter", []
    shutil.copytree(PEFT, adapter)
    small = {
        name: array * (1e-3 if "lora_B" in name else 1)
        for name, array in read_safetensors(PEFT).items()
    }
    save_file(small, adapter / "adapter_model.safetensors")
    words = dict(base=str(base), say=lines.append)
    conversion.convert(str(adapter), str(tmp_path / "hf"), layout="hf", **words)
    warned = [line for line in lines if "of the adapter's change" in line]
    assert bool(warned) == lost
    if lost:
        assert "keeps about" in warned[0] and "keep the adapter separate" in warned[0]
        share = float(re.search(r"about (\d+)%", warned[0])[1])
        assert share < 70


def test_the_view_of_a_run_is_kept_where_it_can_be(trained, tmp_path):
    """A merged native model states the view of its adapter; other layouts cannot, and warn."""
    model, run = trained
    shutil.copytree(run / "adapter", tmp_path / "padded")
    file = tmp_path / "padded" / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings["config"]["vq"]["view"] = "pad"
    file.write_text(json.dumps(settings))
    said = []

    def write(adapter, layout, **options):
        target = tmp_path / f"{len(said)}_{layout}"
        conversion.convert(str(adapter), str(target), layout=layout, say=said.append, **options)
        return target

    warning = "trained on images with view pad, answer_view released, but other programs crop"
    merged = write(tmp_path / "padded", "native", base=str(model), merge_native=True)
    assert json.loads((merged / "config.json").read_text())["vq"]["view"] == "pad"
    assert not any(warning in line for line in said)
    peft = write(tmp_path / "padded", "peft", base=str(model))
    assert any(warning in line for line in said)
    again = write(peft, "native")
    assert json.loads((again / "adapter_config.json").read_text())["config"]["vq"]["view"] == "pad"
    said.clear()
    write(run / "adapter", "peft", base=str(model))
    assert not any("trained on images" in line for line in said)
    settings["config"]["vq"]["view"] = "squash"
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="vq.view is 'squash'; it must be one of released, pad"):
        write(tmp_path / "padded", "native", base=str(model), merge_native=True)
