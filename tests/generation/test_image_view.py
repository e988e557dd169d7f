"""The view of images at generation: the trained one by default, another one with a warning."""

import json
import logging
import pathlib
import shutil

import numpy as np
import PIL.Image
import pytest

from medmax_jax import config, generate
from medmax_jax.generation import model_bundle
from medmax_jax.generation.requests import GenerateError
from medmax_jax.models import images, vqgan

PACKAGE = pathlib.Path(model_bundle.__file__).parents[1]
TINY, ADAPTER = PACKAGE / "tiny", PACKAGE / "tiny_adapter"


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """The shipped adapter as a run on padded images would have written it."""
    folder = tmp_path_factory.mktemp("adapters") / "padded"
    shutil.copytree(ADAPTER, folder)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings["config"]["vq"] |= {"view": "pad", "answer_view": "released"}
    file.write_text(json.dumps(settings))
    return folder


@pytest.fixture
def image():
    noise = np.random.default_rng(0).integers(0, 255, (40, 90, 3), np.uint8)
    return PIL.Image.fromarray(noise)


def load(adapter, view=""):
    return model_bundle.load(TINY, adapter=adapter, view=view)


def test_the_view_is_that_of_the_training(padded, image, caplog):
    before, trained = model_bundle.load(TINY), load(padded)
    assert (before.vq_config.view, trained.vq_config.view) == ("released", "pad")
    assert "view" not in json.loads((TINY / "config.json").read_text())["vq"]  # an older folder
    assert load(ADAPTER).vq_config.view == "released"  # of an older run
    assert not caplog.records
    for g, view in ((before, "released"), (trained, "pad")):
        pixels = images.preprocess(image, 64, view)[None]
        expected = np.asarray(vqgan.encode(g.vq, pixels)).reshape(-1)
        (tokens,) = model_bundle.prompt_tokens(g, [[image, "A CT?"]], end_of_turn=True)
        np.testing.assert_array_equal(tokens[2 : 2 + 64] - 4, expected)
    (answer,) = model_bundle.encode(trained, [image], view="released")
    (asked,) = model_bundle.encode(before, [image])
    np.testing.assert_array_equal(answer, asked)


@pytest.mark.parametrize("adapter, view", [("padded", "released"), (None, "pad")])
def test_another_view_is_a_warning_that_names_both(padded, adapter, view, caplog):
    with caplog.at_level(logging.WARNING):
        g = load(padded if adapter else None, view)
    assert g.vq_config.view == view
    trained = "pad" if adapter else "released"
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{padded if adapter else TINY} was trained on images with view {trained}, "
        f"answer_view released, but is used with view {view}, answer_view released: it reads other "
        "pixels than it has learned, and may answer worse"
    )


def test_unknown_views_are_refused_before_the_weights(padded, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(model_bundle, "_load_model", refuse)
    with pytest.raises(config.ConfigError, match="vq.view is 'squash'; it must be one of released"):
        load(None, "squash")
    shutil.copytree(padded, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(file.read_text().replace('"view": "pad"', '"view": ["pad"]'))
    with pytest.raises(
        GenerateError, match=r"a: config\.view is \['pad'\] \(list\); it must be str"
    ):
        load(tmp_path / "a")


def test_requests_state_a_view_that_is_not_the_release(padded, image, tmp_path):
    image.save(tmp_path / "a.png")
    prompt = f"{{{tmp_path / 'a.png'}}} CT?"
    generate.generate(TINY, [prompt], tmp_path / "out", adapter=padded)
    assert json.loads((tmp_path / "out" / "request.json").read_text())["view"] == "pad"
    with pytest.raises(GenerateError, match="request with another value of view"):
        generate.generate(TINY, [prompt], tmp_path / "out", adapter=padded, view="released")
