"""Shares of docs/explanation/objective.md: for a folder, the loader's weights summed by task."""

import collections
import dataclasses
import importlib
import pathlib
import subprocess
import sys

import micro_run
import numpy as np
import pytest

from medmax_jax import config
from medmax_jax.configs import medmax_7b_lora as lora
from medmax_jax.configs import medmax_7b_paper as paper
from medmax_jax.data import loader, mixture, objective
from medmax_jax.data.packing import pack
from medmax_jax.data.records import document, synthetic, writer
from medmax_jax.models.vocab import is_image

ROOT = pathlib.Path(__file__).parents[2]
UNWEIGHTED = dict(text=1.0, image=1.0, tasks="")
WEIGHTED = dict(text=0.5, image=3.0, tasks="VQA=0, Visual Chat=2.5")
TASKS = ("VQA", "Image Generation", "Visual Chat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Write documents of three tasks, one task for each form."""
    documents = [
        dataclasses.replace(d, task=TASKS[n % 3])
        for n, d in enumerate(micro_run.documents(50, seed=0))
    ]
    layout = document.Layout(vocab=micro_run.run().vocab, codes_per_image=4, tokenizer="", vqgan="")
    path = tmp_path_factory.mktemp("records") / "r"
    writer.write(path, documents, shard_size=16, layout=layout, notes={})
    return str(path)


@pytest.mark.parametrize("mask", ["answers", "release"])
@pytest.mark.parametrize("choice", ["document", "token"])
@pytest.mark.parametrize("factors", [UNWEIGHTED, WEIGHTED])
def test_shares_of_records_are_the_training_weights(folder, choice, mask, factors):
    run = micro_run.run(
        data__train=folder, data__batch_size=50, data__pack=False, data__mask=mask,
        train__loss_weight=choice, loss__weights=factors,
    )  # fmt: skip
    batches = loader.train_batches(run, folder)  # the first of 50 rows: every document once
    batch, task = batches.batch(0), {d.tokens.tobytes(): d.task for d in batches.records}
    total, image = collections.Counter(), collections.Counter()
    for ids, segments, weights in zip(batch.ids, batch.segments, batch.weights, strict=True):
        if segments.any():
            name = task[ids[segments == 1].tobytes()]
            total[name] += 100 * weights.sum()
            image[name] += 100 * weights[is_image(ids, run.vocab)].sum()
    weights = config.build(config.LossWeights, factors)
    table = objective.shares(objective.groups_in_records(folder, mask), weights)
    assert set(table) == set(TASKS)
    for name, row in table.items():
        np.testing.assert_allclose(row[choice], total[name], rtol=1e-5)
        np.testing.assert_allclose(row[f"{choice}_image"], image[name], rtol=1e-5)


def test_example_of_the_docstring():
    kinds = [
        objective.DocumentGroup(task="VQA", percent=50, text=1, image=0),
        objective.DocumentGroup(task="Image Generation", percent=50, text=1, image=2),
    ]
    table = objective.shares(kinds, config.LossWeights.off())
    assert table["VQA"] == dict(document=50, document_image=0, token=25, token_image=0)
    expected = dict(document=50, document_image=100 / 3, token=75, token_image=50)
    assert table["Image Generation"] == pytest.approx(expected)
    # Half the weight of the codes: 1/3 + 1/3 of 50 against 50, and one token of each kind.
    half = objective.shares(kinds, config.LossWeights(text=1.0, image=0.5, tasks="", pseudo=1.0))
    assert half["VQA"] == pytest.approx(
        dict(document=60, document_image=0, token=100 / 3, token_image=0)
    )
    twice = objective.shares(
        kinds, config.LossWeights(text=1.0, image=1.0, tasks="VQA=2", pseudo=1.0)
    )
    assert twice["VQA"]["document"] == pytest.approx(200 / 3)
    assert twice["VQA"]["token"] == pytest.approx(40)


@pytest.mark.parametrize("question", [0, 15, 60])
def test_length_model_has_the_published_mean(question):
    """Return the tokens of all documents, including questions and input images."""
    kinds = objective.published_groups(question=question, caption_share=mixture.CAPTION_SHARE)
    long = max(k.text for k in kinds if not k.image) - 1
    tokens = 0.0
    for k in kinds:
        text = objective.VQA_ANSWER if k.task == mixture.VQA else long
        question_tokens = 0 if k.task == mixture.GENERATION else question
        tokens += k.percent * (objective.IMAGE + objective.CONTROL + question_tokens + text)
    percent = sum(k.percent for k in kinds)
    assert percent == pytest.approx(sum(mixture.TASKS.values()))
    assert tokens / percent == pytest.approx(objective.MEAN)


def test_question_longer_than_the_text_is_rejected():
    with pytest.raises(ValueError, match="--question is 200"):
        objective.published_groups(question=200, caption_share=0.5)


def test_documentation_table_is_the_output_of_the_command():
    command = [sys.executable, "-m", "data.objective"]
    text = (ROOT / "docs" / "explanation" / "objective.md").read_text()
    for flags in ([], ["--captions", "0.5"], ["--image", "7.5"]):
        done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip() in text, flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "-1"], "loss.weights.image is -1.0; it must be at least 0"),
        (["--text", "0", "--image", "0"], "above 0 for text or image"),
        (["--tasks", "VQ=1"], "no document has the task 'VQ'; use names from"),
        (["--tasks", "VQA"], "'VQA' is not"),
    ],
)
def test_invalid_weights_are_errors(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["objective", *flags])
    with pytest.raises(SystemExit, match=message):
        objective.main()


def test_missing_records_are_an_error(tmp_path):
    command = [sys.executable, "-m", "data.objective", "--records", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no such folder" in done.stderr


# ---- the configs say what they say they do


def test_paper_config_is_the_published_recipe():
    run = config.from_config_dict(paper.get_config())
    assert mixture.INSTANCES == paper.DOCUMENTS
    assert (run.data.batch_size, run.data.pack, run.data.mask) == (8, False, "release")
    assert run.train.steps == 551_250 and run.train.loss_weight == "document"
    o = run.optim
    assert (o.peak_lr, o.warmup_ratio, o.final_lr_ratio, o.weight_decay) == (1e-4, 0.1, 0.0, 0.0)
    assert (o.b1, o.b2, o.eps, o.clip_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert (run.lora.rank, run.lora.alpha, run.lora.dropout) == (16, 16.0, 0.05)
    assert run.data.document_limit == 2_048 and not run.mixing.weights


def test_packed_config_scales_it_by_its_stated_rule():
    run, published = lora.get_config(), paper.get_config()
    grown = lora.DOCUMENTS_A_STEP / 8
    assert 13 < grown < 13.5
    np.testing.assert_allclose(run.optim.peak_lr, 1e-4 * grown**0.5, rtol=1e-2)
    seen = run.train.steps * lora.DOCUMENTS_A_STEP, published.train.steps * 8
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-4)  # the same epochs
    changed = {"peak_lr"}
    for name in published.optim:
        assert (run.optim[name] == published.optim[name]) == (name not in changed), name


@pytest.mark.slow  # plans 1.47 M documents
def test_rows_of_an_epoch_are_the_planned_ones():
    lengths = synthetic.lengths(paper.DOCUMENTS, seed=0)
    short = lengths[lengths <= 2_048]
    rows = [
        len(pack.plan(short, seq_len=lora.ROW_TOKENS, pack=True, seed=0, epoch=epoch))
        for epoch in range(paper.EPOCHS)
    ]
    assert sum(rows) // paper.EPOCHS == lora.ROWS_AN_EPOCH
    assert sum(rows) // lora.ROWS == lora.get_config().train.steps


@pytest.mark.parametrize("name", ["medmax_7b_qlora", "medmax_7b_full", "chameleon_30b_lora"])
def test_other_configs_use_the_same_documents(name):
    other = importlib.import_module(f"configs.{name}").get_config()
    base = lora.get_config()
    assert other.data == base.data and other.train.steps == base.train.steps
