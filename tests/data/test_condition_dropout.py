"""Tests of data.condition_dropout: the streams of decoding, draws, plans, batches, who_saw."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import micro_run
import numpy as np
import pytest
from generate_setup import CODES, MODEL, SAMPLE, VOCAB

from medmax_jax import config
from medmax_jax.data import loader, prepare
from medmax_jax.data.analysis import near_duplicates, provenance
from medmax_jax.data.packing import condition_dropout, plan_file
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Document, Layout, RecordsError
from medmax_jax.generation import engine, requests, sampling_params, scheduler
from medmax_jax.generation.slots import SlotTable
from medmax_jax.models import chameleon
from medmax_jax.models.guidance_streams import FULL, IMAGE_ONLY, STREAMS, TEXT_ONLY, UNCONDITIONAL
from medmax_jax.models.vocab import BOI, BOS, EOI, EOS, IMAGE_START, SEP, is_image
from medmax_jax.sharding import make_mesh

ONE = config.Mesh(data=1, fsdp=1, tp=1)
HALF = dict(text=0.3, image=0.3, all=0.2)
FORMS = ("to_image", "edit", "vqa", "two_images", "later_question", "text")


def tokens_of(form: str, rng: np.random.Generator) -> tuple[list[int], int]:
    """Return the tokens of a document of a form without BOS and EOS, and its turns."""
    texts = [rng.integers(VOCAB.text_start, VOCAB.text_start + 60, n) for n in (3, 2, 4, 2)]
    image = lambda: [BOI, *(rng.integers(0, 16, CODES) + IMAGE_START), EOI]  # noqa: E731
    return {
        "to_image": ([*texts[0], SEP, *image()], 1),
        "edit": ([*image(), *texts[0], SEP, *texts[1], *image(), *texts[2]], 1),
        "vqa": ([*image(), *texts[0], SEP, *texts[1]], 1),
        "two_images": ([*texts[0], SEP, *image(), *texts[1], SEP, *texts[2], SEP, *image()], 2),
        # The last image is a question's, so only the first one is scored.
        "later_question": ([*texts[0], SEP, *image(), SEP, *image(), *texts[1], SEP, *texts[3]], 2),
        "text": ([*texts[0], SEP, *texts[1]], 1),
    }[form]


def documents(count: int = 240) -> list[Document]:
    rng, made = np.random.default_rng(0), []
    for n in range(count):
        form = FORMS[n % len(FORMS)]
        tokens, turns = tokens_of(form, rng)
        fields = dict(image_path=f"{n}.png", source="s", credential="no", group=str(n), id=f"d{n}")
        tokens = np.array([BOS, *tokens, EOS], np.int32)
        made.append(Document(tokens=tokens, task=form, turns=turns, **fields))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("records") / "r"
    layout = Layout(vocab=VOCAB, codes_per_image=CODES, tokenizer="", vqgan="")
    writer.write(path, documents(), shard_size=50, layout=layout, notes={})
    return str(path)


def run_of(folder: str, dropout: dict[str, float] | None = None, **changes) -> config.Run:
    dropout = dropout or dict(text=0.0, image=0.0, all=0.0)
    settings = micro_run.settings(data__train=folder, data__condition_dropout=dropout, **changes)
    settings.vocab.update(size=VOCAB.size, image_codes=16, text_start=VOCAB.text_start)
    settings.train.steps = 40
    return config.from_config_dict(settings)


def trained(batches: loader.BatchLoader, steps: int) -> list[tuple[int, int, np.ndarray, list]]:
    """Return (document, stream, tokens, scored) of every document of some steps."""
    found = []
    for step in range(steps):
        batch, rows = batches.batch(step), batches._rows(step)
        for row, ids, segments, weights in zip(
            rows, batch.ids, batch.segments, batch.weights, strict=True
        ):
            for n, (number, length, stream) in enumerate(zip(*row, strict=True), start=1):
                inside = segments == n
                assert inside.sum() == length
                scored = (weights[inside] > 0).tolist()
                found.append((int(number), int(stream), ids[inside], scored))
    return found


# ---- the streams of decoding ----


@pytest.fixture(scope="module")
def model():
    mesh, one_layer = make_mesh(ONE), dataclasses.replace(MODEL, num_layers=1)  # compiles faster
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        return mesh, chameleon.create_model(one_layer, VOCAB, chameleon.NO_LORA, key=key)


def new_engine(model) -> engine.Engine:
    mesh, network = model
    sizes = engine.EngineSizes(batch_size=1, num_slots=3, cache_length=64, cache_dtype="model")
    return engine.make_engine(network, VOCAB, mesh, sizes, codes=CODES)


def decode(model, prompt: np.ndarray, monkeypatch) -> tuple[np.ndarray, list]:
    """Return the codes that answer a prompt; tokens and cached keys of each stream in order."""
    e, held, release = new_engine(model), [], SlotTable.release

    def record(table, slot, tokens):
        held.append((slot, tokens))
        release(table, slot, tokens)

    monkeypatch.setattr(SlotTable, "release", record)
    settings = sampling_params.resolve(SAMPLE, VOCAB, mode="image", codes=CODES)
    made = requests.make_requests(
        [prompt], SAMPLE, VOCAB, mode="image", names=None, codes=CODES, context=64
    )
    for outputs in scheduler.run_requests(e, made, settings, seed=0):
        codes = outputs[0].tokens
    monkeypatch.undo()
    return codes, [(tokens, cached(e, slot, len(tokens))) for slot, tokens in held]


def cached(e: engine.Engine, slot: int, length: int) -> list[np.ndarray]:
    return [np.asarray(x)[:, slot, :, :length] for x in jax.tree.leaves(e.cache)]


def test_trained_streams_are_those_of_decoding(model, monkeypatch):
    """The tokens of each stream, and by the cache also what the model has computed of them."""
    rng, text = np.random.default_rng(1), [VOCAB.text_start + n for n in (5, 6, 7)]
    image = [BOI, *(rng.integers(0, 16, CODES) + IMAGE_START), EOI]
    records = SimpleNamespace(layout=SimpleNamespace(vocab=VOCAB, codes_per_image=CODES))
    for prompt, streams in (
        ([BOS, *image, *text, SEP], (FULL, UNCONDITIONAL, IMAGE_ONLY)),
        ([BOS, *text, SEP], (FULL, UNCONDITIONAL)),
    ):
        codes, held = decode(model, np.array(prompt, np.int32), monkeypatch)
        assert len(held) == len(streams) and len(codes) == CODES
        answered = np.array([*prompt, BOI, *codes, EOI, EOS], np.int32)
        document = Document(
            tokens=answered, image_path="", task="", source="", credential="no", turns=1,
            group="", id="d",
        )  # fmt: skip
        for stream, (tokens, keys) in zip(streams, held, strict=True):
            ours, scored = condition_dropout.trained_tokens(document, stream, records, "answers")
            if stream == FULL:  # decoding ends with the last code, which it does not feed
                ours = ours[:-2]
            else:
                assert scored.sum() == CODES and ours[scored].tolist() == codes.tolist()
            assert ours[:-1].tolist() == tokens.tolist() and ours[-1] == codes[-1]
            e = new_engine(model)
            (slot,) = engine.prefill_prompts(e, [ours[:-1]], guide=False)
            for got, want in zip(keys, cached(e, slot, len(tokens)), strict=True):
                np.testing.assert_allclose(got, want, atol=1e-5)
        if IMAGE_ONLY in streams:  # without the image the text-only stream is the full one
            ours, _ = condition_dropout.trained_tokens(document, TEXT_ONLY, records, "answers")
            without = np.array([BOS, *text, SEP], np.int32)
            codes, ((tokens, _), *_) = decode(model, without, monkeypatch)
            opened = len(without) + 1
            assert ours[:opened].tolist() == tokens[:opened].tolist()
            assert ours[-CODES:].tolist() == answered[-CODES - 2 : -2].tolist()


# ---- draws ----


def streams_of(folder: str, epoch: int, **changes) -> np.ndarray:
    run = run_of(folder, HALF, **changes)
    records = writer.open_records(folder)
    everything = np.arange(len(records), dtype=np.int32)
    return condition_dropout.streams_by_epoch(records, run.data, everything)(epoch).stream


def test_each_form_of_document_has_its_streams(folder):
    forms = np.array([d.task for d in documents()])
    possible = {
        "to_image": {FULL, UNCONDITIONAL},
        "edit": {FULL, UNCONDITIONAL, IMAGE_ONLY, TEXT_ONLY},
        "vqa": {FULL},
        "two_images": {FULL, UNCONDITIONAL, IMAGE_ONLY, TEXT_ONLY},
        "later_question": {FULL, UNCONDITIONAL},
        "text": {FULL},
    }
    drawn = np.stack([streams_of(folder, epoch) for epoch in range(20)])
    for form, streams in possible.items():
        assert set(np.unique(drawn[:, forms == form])) == streams
    # The probabilities, over 20 epochs of 40 documents: within four standard deviations.
    for form, stream, probability in (
        ("edit", IMAGE_ONLY, 0.3), ("edit", TEXT_ONLY, 0.3), ("edit", UNCONDITIONAL, 0.2),
        ("to_image", UNCONDITIONAL, 0.5),
    ):  # fmt: skip
        share = (drawn[:, forms == form] == stream).mean()
        assert abs(share - probability) < 4 * np.sqrt(probability * (1 - probability) / 800)


def test_draws_depend_on_seed_epoch_and_document_alone(folder):
    drawn = streams_of(folder, 1)
    np.testing.assert_array_equal(streams_of(folder, 1, data__pack=False), drawn)
    assert (streams_of(folder, 2) != drawn).any()
    assert (streams_of(folder, 1, data__seed=1) != drawn).any()
    records = writer.open_records(folder)
    few = np.array([7, 31, 100], np.int32)
    of_few = condition_dropout.streams_by_epoch(records, run_of(folder, HALF).data, few)(1)
    np.testing.assert_array_equal(of_few.stream[few], drawn[few])


# ---- plans and batches ----


@pytest.mark.parametrize("pack", [True, False])
def test_batches_hold_the_streams_of_the_plan(folder, pack):
    run = run_of(folder, HALF, data__pack=pack)
    batches, originals = loader.train_batches(run, folder), documents()
    steps = 24 if pack else 32  # more than an epoch
    found = trained(batches, steps)
    by_document = {}
    for number, stream, tokens, scored in found:
        wanted, mask = condition_dropout.trained_tokens(
            originals[number], stream, batches.records, "answers"
        )
        assert tokens.tolist() == wanted.tolist() and scored == mask.tolist()
        by_document.setdefault(number, []).append(stream)
    assert {s for streams in by_document.values() for s in streams} == set(range(len(STREAMS)))
    draws = np.stack([streams_of(folder, epoch) for epoch in range(4)])
    for number, streams in by_document.items():  # once per epoch, in order
        assert streams == draws[: len(streams), number].tolist()
    for step in range(steps):
        batch, stats = batches.batch(step), batches.stats(step)
        scored, image = batch.weights > 0, is_image(batch.ids, run.vocab)
        assert stats.scored_image == (scored & image).sum()
        assert stats.scored_text == (scored & ~image).sum()
        assert stats.tokens == (batch.segments > 0).sum()
        assert batch.weights.sum() == pytest.approx(1, rel=1e-5)


def test_plan_is_packed_with_the_lengths_of_the_streams(folder):
    complete = loader.train_batches(run_of(folder), folder)
    dropped = loader.train_batches(run_of(folder, HALF), folder)
    plans = [batches._epochs.plan(0) for batches in (complete, dropped)]
    assert len(plans[1]) < len(plans[0])
    fills = [plan.lengths.sum() / (32 * len(plan)) for plan in plans]
    assert fills[1] > fills[0] - 0.02
    assert plans[0].fingerprint != plans[1].fingerprint
    line = next(line for line in dropped.describe() if line.startswith("condition dropout"))
    counts = np.bincount(plans[1].streams)
    assert line == "condition dropout: " + ", ".join(
        f"{n} {name}" for name, n in zip(STREAMS, counts, strict=True)
    )


def test_hosts_and_a_resumed_run_read_the_same(folder):
    run = run_of(folder, HALF)
    complete = loader.train_batches(run, folder)
    expected = {step: complete.batch(step) for step in (0, 13, 14, 15, 16)}
    resumed = loader.train_batches(run, folder).stream(13)
    for step in range(13, 17):
        for ours, theirs in zip(
            jax.tree.leaves(next(resumed)), jax.tree.leaves(expected[step]), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    hosts = [loader.BatchLoader(run, folder, one_pass=False, host=h, hosts=2) for h in range(2)]
    for step in (0, 13):
        parts = [host.batch(step) for host in hosts]
        joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        assert all(map(np.array_equal, jax.tree.leaves(joined), jax.tree.leaves(expected[step])))


def test_without_it_and_in_validation_documents_are_complete(folder):
    for batches in (
        loader.train_batches(run_of(folder), folder),
        loader.eval_batches(run_of(folder, HALF), folder),
    ):
        assert not batches._epochs.plan(0).streams.any()
        assert not any("condition dropout" in line for line in batches.describe())


# ---- programs ----

FLAGS = ["--seq_len", "32", "--condition_dropout", "text=0.3, image=0.3, all=0.2"]


def test_program_shows_and_saves_the_plan_of_a_run(folder, tmp_path, capsys):
    path = tmp_path / "p.npz"
    command = ["plan", folder, *FLAGS, "--row", "2", "--json"]
    assert prepare.main([*command, "--save", str(path)]) == 0
    summary = json.loads(capsys.readouterr().out)
    plan = loader.train_batches(run_of(folder, HALF), folder)._epochs.first
    assert summary["plan"] == plan.fingerprint
    assert summary["streams"] == condition_dropout.stream_counts(plan)
    saved = plan_file.load(path)
    assert saved.plan.fingerprint == plan.fingerprint
    np.testing.assert_array_equal(saved.plan.streams, plan.streams)
    row = [{k: v for k, v in d.items() if k not in ("id", "image_path")} for d in summary["row 2"]]
    assert saved.row_documents(2) == row
    assert any("stream" in d for r in range(len(plan)) for d in saved.row_documents(r))
    run = run_of(folder, HALF, data__plan=saved.header["run"])
    loader.train_batches(run, folder)
    other = dict(text=0.3, image=0.2, all=0.2)
    with pytest.raises(RecordsError, match="data.plan"):
        loader.train_batches(run_of(folder, other, data__plan=saved.header["run"]), folder)


def test_image_that_a_stream_leaves_out_was_not_seen(folder):
    """who_saw: rows of a plan whose trained tokens have the image's codes, and no others."""
    records = writer.open_records(folder)
    plan, originals = loader.train_batches(run_of(folder, HALF), folder)._epochs.first, documents()
    checked = 0
    for number in range(1, 120, 6):  # edits: the first image is the condition, the second trained
        places = np.flatnonzero(originals[number].tokens == BOI)
        (draw,) = np.flatnonzero(plan.documents == number)
        row, stream = int(np.searchsorted(plan.starts, draw, "right")), plan.streams[draw]
        for place, shown in ((0, stream in (FULL, IMAGE_ONLY)), (1, True)):
            start = places[place] + 1
            codes = originals[number].tokens[start : start + CODES] - IMAGE_START
            name = near_duplicates.hash64(near_duplicates.code_hash(codes))
            found = provenance.Matches(records, np.array([number]), {name})
            assert found.rows_of(plan, "answers").tolist() == ([row - 1] if shown else [])
            checked += not shown
        by_name = provenance.Matches(records, np.array([number]), set())
        assert by_name.rows_of(plan, "answers").tolist() == [row - 1]
    assert checked > 3


@pytest.mark.parametrize(
    "dropout, message",
    [
        (dict(text=1.5, image=0.0, all=0.0), "condition_dropout.text is 1.5; it must be a prob"),
        (dict(text=0.0, image=-0.1, all=0.0), "condition_dropout.image is -0.1; it must be a prob"),
        (dict(text=0.0, image=0.0, all=float("nan")), "condition_dropout.all is nan; it must be"),
        (dict(text=0.5, image=0.5, all=0.5), "such that text, image and all sum to at most 1"),
        (dict(text=0.5, image=0.5), "condition_dropout.all is missing"),
        (dict(text=0.5, image=0.0, all=0.0, audio=0.1), "condition_dropout.audio is not a field"),
        (0.1, "condition_dropout is 0.1; it must be a section with the fields text, image, all"),
    ],
)
def test_invalid_probabilities_are_refused_by_name(dropout, message):
    settings = config.to_dict(micro_run.run())
    settings["data"]["condition_dropout"] = dropout
    with pytest.raises(config.ConfigError, match=message):
        config.from_config_dict(settings)


@pytest.mark.parametrize("flag", ["text=2", "text", "words=0.1", "text=0.6, all=0.6"])
def test_program_refuses_invalid_probabilities(folder, flag, capsys):
    assert prepare.main(["plan", folder, "--seq_len", "32", "--condition_dropout", flag]) != 0
    assert "condition" in capsys.readouterr().err


def test_settings_of_older_runs_mean_no_dropout():
    settings = config.to_dict(micro_run.run())
    del settings["data"]["condition_dropout"]
    assert config.from_config_dict(settings) == micro_run.run()
