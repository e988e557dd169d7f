"""Samples during training: prompts from held-out documents, and a self-contained page."""

import pathlib

import micro_run
import numpy as np
import pytest

from medmax_jax import config, train
from medmax_jax.data.records import reader
from medmax_jax.models.vocab import SEP, is_image
from medmax_jax.training import samples

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "medmax_jax" / "tiny"


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> reader.Records:
    return reader.open_records(
        pathlib.Path(micro_run.write(tmp_path_factory.mktemp("held") / "r", count=9))
    )


def test_prompts_end_after_the_question(records):
    run = micro_run.run()
    prompts = samples.select_prompts(records, 4, run)
    assert len(prompts) == 4
    for prompt, document in zip(
        prompts, [records[0], records[1], records[2], records[4]], strict=True
    ):
        tokens = np.concatenate([prompt.prompt, prompt.answer])
        np.testing.assert_array_equal(tokens, document.tokens)
        assert prompt.prompt[-1] == SEP and (prompt.prompt[:-1] != SEP).all()
        assert (prompt.mode == "image") == bool(is_image(prompt.answer, run.vocab).any())
    assert len(samples.select_prompts(records, 99, run)) == 7  # two of the nine have no separator


def test_samples_require_a_model_folder():
    with pytest.raises(
        config.ConfigError, match="train.samples is 2; it must be 0 unless train.init"
    ):
        micro_run.run(train__samples=2)


@pytest.mark.slow
def test_run_writes_a_samples_page_at_each_evaluation(tmp_path):
    """On the tiny model and embedded images; about a minute on an idle machine."""
    from medmax_jax.configs import tiny
    from medmax_jax.data import prepare

    for split in ("train", "validation"):
        prepare.prepare_sample(
            tmp_path / split, model_folder=TINY, split=split, kind="instruction", views=1, seed=0
        )
    settings = tiny.get_config()
    settings.data.update(train=str(tmp_path / "train"), validation=str(tmp_path / "validation"))
    settings.train.update(steps=2, eval_every=1, samples=5, checkpoint_every=2)
    settings.sample.update(max_gen_len=16)
    train.run(config.from_config_dict(settings), tmp_path / "w")
    pages = sorted((tmp_path / "w" / "samples").iterdir())
    assert [p.name for p in pages] == ["000001.html", "000002.html"]
    text = pages[1].read_text()
    assert text.count("<section>") == 5 and "data:image/png" in text and "<script" not in text
    assert "after step 2" in text and "Not for clinical use" in text
