"""Tests of the loader: rows, weights, reproducible steps, hosts, resuming and errors."""

import dataclasses

import jax
import micro_run
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_jax import config
from medmax_jax.config import Vocab
from medmax_jax.configs import tiny
from medmax_jax.data import loader
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Document, Layout, RecordsError
from medmax_jax.models.vocab import BOI, BOS, EOI, EOS, PAD, SEP, is_image
from medmax_jax.training.batch import Batch

VOCAB = Vocab(size=9_728, image_codes=256, text_start=8_712)
LAYOUT = Layout(vocab=VOCAB, codes_per_image=64, tokenizer="t", vqgan="v")
SEQ, ROWS = 128, 4


def run_config(**changes):
    raw = tiny.get_config()
    raw.data.update(document_limit=SEQ, seq_len=SEQ, batch_size=ROWS)
    with raw.unlocked():
        for name, value in changes.items():
            section, field = name.split("__")
            raw[section][field] = value
    return config.from_config_dict(raw)


def document(tokens, n, turns=0):
    fields = dict(image_path="", task="VQA", source="sample", credential="no", group=f"g{n}")
    return Document(tokens=np.asarray(tokens, np.int32), turns=turns, id=f"d{n}", **fields)


def example(n):
    rng = np.random.default_rng(n)

    def text(k):
        return rng.integers(8_712, 9_728, k).tolist()

    def image_span():
        return [BOI, *rng.integers(4, 4 + VOCAB.image_codes, 64), EOI]

    image = image_span() if n % 2 else []
    answer = image_span() if n % 6 == 0 else text(1 + n % 3)
    return document([BOS, *image, *text(3 + n % 20), SEP, *answer, EOS], n, turns=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "train"
    writer.write(folder, map(example, range(40)), shard_size=16, layout=LAYOUT, notes={})
    return folder


def write(tmp_path, docs):
    writer.write(tmp_path / "r", docs, shard_size=9, layout=LAYOUT, notes={})
    return tmp_path / "r"


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def gather(batch):
    """Return the documents of a batch, row by row, from their segments."""
    documents = []
    for ids, segments in zip(batch.ids, batch.segments, strict=True):
        documents += [ids[segments == s].tolist() for s in range(1, segments.max(initial=0) + 1)]
    return documents


def test_example_of_the_docstring(tmp_path):
    a = document([0, 8_711 + 11, 8_711 + 12, SEP, 8_711 + 13, 2], 0, turns=1)
    b = document([0, 8_711 + 21, 8_711 + 22, 2], 1)
    folder = write(tmp_path, [a, b])
    for weight, expected in [
        ("document", [0, 0, 0, 0, 1 / 4, 1 / 4, 0, 1 / 6, 1 / 6, 1 / 6, 0, 0]),
        ("token", [0, 0, 0, 0, 1 / 5, 1 / 5, 0, 1 / 5, 1 / 5, 1 / 5, 0, 0]),
    ]:
        run = run_config(
            data__document_limit=12, data__seq_len=12, data__batch_size=1, train__loss_weight=weight
        )
        batch = loader.train_batches(run, folder).batch(0)
        ids = [0, 8_722, 8_723, SEP, 8_724, 2, 0, 8_732, 8_733, 2, PAD, PAD]
        assert batch.ids.tolist() == [ids]
        assert batch.segments.tolist() == [[1] * 6 + [2] * 4 + [0] * 2]
        assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 0]]
        np.testing.assert_allclose(batch.weights, [expected], rtol=1e-6)


def test_three_turns(tmp_path):
    """With three turns `release` trains on the later questions too, `answers` does not."""
    q, a = 8_720, 8_730
    turns = [BOS, q, SEP, a, SEP, q, q, SEP, a, a, SEP, q, SEP, a, EOS]
    folder = write(tmp_path, [document(turns, 0, turns=3)])
    answers = np.array([0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1], np.float32)
    release = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], np.float32)
    for mask, expected in (("answers", answers), ("release", release)):
        run = run_config(
            data__document_limit=15, data__seq_len=15, data__batch_size=1, data__mask=mask
        )
        batches = loader.eval_batches(run, folder)
        np.testing.assert_allclose(
            batches.batch(0).weights[0], expected / expected.sum(), rtol=1e-6
        )
        assert batches.stats(0).scored_text == expected.sum() and batches.stats(0).scored_image == 0


@pytest.mark.parametrize("weight", ["document", "token"])
@pytest.mark.parametrize("mask", ["answers", "release"])
@pytest.mark.parametrize("pack", [True, False])
def test_weights_sum_to_one(folder, weight, mask, pack):
    run = run_config(data__mask=mask, data__pack=pack, train__loss_weight=weight)
    batches = loader.train_batches(run, folder)
    for step in (0, 3, 17):
        batch, stats = batches.batch(step), batches.stats(step)
        assert abs(batch.weights.sum() - 1) < 1e-5 and batch.weights.dtype == np.float32
        assert not batch.weights[:, 0].any()
        begins = np.diff(batch.segments, axis=1, prepend=0) != 0
        assert not batch.weights[begins].any() and not batch.weights[batch.segments == 0].any()
        image = is_image(batch.ids, VOCAB) & (batch.weights > 0)
        assert stats.scored_image == image.sum()
        assert stats.scored_text == (batch.weights > 0).sum() - image.sum()
        assert stats.tokens == (batch.segments > 0).sum()
        assert stats.fill == stats.tokens / batch.ids.size
        assert stats.documents == len(gather(batch))


def test_every_document_once_per_epoch(folder):
    batches = loader.eval_batches(run_config(), folder)
    documents = [d for step in range(len(batches)) for d in gather(batches.batch(step))]
    expected = [example(n).tokens.tolist() for n in range(40)]
    assert sorted(documents) == sorted(expected)
    assert sum(batches.stats(s).documents for s in range(len(batches))) == 40


def test_unpacked_rows_have_one_document(folder):
    batches = loader.eval_batches(run_config(data__pack=False), folder)
    assert len(batches) == 10
    assert all(batches.batch(s).segments.max() == 1 for s in range(10))


def test_last_batch_of_a_pass_is_padded(tmp_path):
    folder = write(tmp_path, map(example, range(5)))
    batches = loader.eval_batches(run_config(data__pack=False), folder)
    assert len(batches) == 2
    last = batches.batch(1)
    assert last.ids.shape == (4, SEQ) and not last.segments[1:].any()
    assert (last.ids[1:] == PAD).all() and abs(last.weights.sum() - 1) < 1e-6
    assert batches.stats(1).documents == 1


def test_epochs_differ_and_steps_are_reproducible(folder):
    run = run_config()
    first, second = loader.train_batches(run, folder), loader.train_batches(run, folder)
    late = [second.batch(s) for s in (200, 31, 0)]  # in another order
    assert [first.stats(s).epoch for s in (0, 200)] == [0, first.stats(200).epoch]
    assert first.stats(200).epoch > 5
    assert all(equal(first.batch(s), b) for s, b in zip((200, 31, 0), late, strict=True))
    assert not equal(late[0], late[2])


def test_stream_resumes_anywhere(folder):
    run = run_config(train__steps=40)
    batches = loader.train_batches(run, folder)
    expected = list(batches.stream(0))
    assert len(expected) == len(batches) == 40
    rest = list(loader.train_batches(run, folder).stream(33))
    assert all(equal(a, b) for a, b in zip(expected[33:], rest, strict=True))
    assert list(batches.stream(40)) == []
    longer = loader.train_batches(run_config(train__steps=60), folder)
    assert equal(longer.batch(39), expected[39])


def test_hosts_share_a_step_in_blocks(folder):
    run = run_config()
    expected = loader.train_batches(run, folder).batch(7)
    for hosts in (2, 4):
        parts = [
            loader.BatchLoader(run, folder, one_pass=False, host=h, hosts=hosts).batch(7)
            for h in range(hosts)
        ]
        assert equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), expected)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    hosts=st.sampled_from([1, 2, 4]),
    weights=st.sampled_from(["", "VQA=2"]),
    centric=st.booleans(),
    seed=st.integers(0, 3),
)
def test_any_number_of_hosts_reads_the_same_rows(folder, steps, hosts, weights, centric, seed):
    """Batches are equal row by row in any order of steps, so a run may change its hosts."""
    run = run_config(
        data__seed=seed, train__steps=61, mixing__by="task", mixing__weights=weights,
        mixing__image_centric=centric and not weights,
    )  # fmt: skip
    complete = loader.train_batches(run, folder)
    parts = [
        loader.BatchLoader(run, folder, one_pass=False, host=h, hosts=hosts) for h in range(hosts)
    ]
    assert len({part.plan for part in (complete, *parts)}) == 1
    for step in steps:
        rows = [part.batch(step) for part in parts]
        assert all(r.ids.shape == (ROWS // hosts, SEQ) for r in rows)
        assert equal(jax.tree.map(lambda *x: np.concatenate(x), *rows), complete.batch(step))


def test_run_resumes_with_another_number_of_hosts(folder):
    """Six steps on one host, more on four, the rest on two have the documents of one run."""
    run, documents = run_config(train__steps=18), []
    expected = [b for s in range(18) for b in gather(loader.train_batches(run, folder).batch(s))]
    for hosts, steps in ((1, range(6)), (4, range(6, 12)), (2, range(12, 18))):
        streams = [
            loader.BatchLoader(run, folder, one_pass=False, host=h, hosts=hosts).stream(steps[0])
            for h in range(hosts)
        ]
        for _ in steps:
            documents += [d for stream in streams for d in gather(next(stream))]
    assert documents == expected


def test_long_documents_are_excluded_and_listed(folder):
    """Documents are never cut, so none loses its answer or half of its image."""
    lengths = np.array([len(example(n).tokens) for n in range(40)])
    run = run_config(data__document_limit=84)
    batches = loader.eval_batches(run, folder)
    documents = [d for step in range(len(batches)) for d in gather(batches.batch(step))]
    kept = np.flatnonzero(lengths <= 84)
    assert sorted(documents) == sorted(example(n).tokens.tolist() for n in kept)
    long = np.flatnonzero(lengths > 84)
    names = ", ".join(f"d{n}" for n in long[:5])
    assert batches.describe()[-1].startswith("excluded, longer than data.document_limit = 84")
    assert f"{len(long)} documents: {names}, ...;" in batches.describe()[-1] and len(long) > 5
    assert "left out" not in " ".join(loader.train_batches(run_config(), folder).describe())


def test_description_has_both_shares(tmp_path):
    docs = [example(n) for n in range(30)]
    docs = [
        dataclasses.replace(d, task="Visual Chat" if n < 20 else "VQA") for n, d in enumerate(docs)
    ]
    folder = write(tmp_path, docs)
    run = run_config(mixing__by="task", mixing__weights="Visual Chat=1, VQA=1")
    lines = loader.train_batches(run, folder).describe()
    tokens = np.array([len(d.tokens) for d in docs])
    vqa = tokens[20:].mean() / (tokens[20:].mean() + tokens[:20].mean())
    head, *rows = (line.split() for line in lines[1:])
    assert (
        head[:3] == ["task", "documents", "tokens"]
        and ["VQA", "50.0%", f"{vqa:.1%}", "1.5"] in rows
    )
    assert len({len(line) for line in lines[1:]}) == 1  # aligned
    assert "an epoch draws 30 into" in lines[0]
    validation = loader.eval_batches(run, folder)  # validation is not weighted
    assert sum(validation.stats(s).documents for s in range(len(validation))) == 30
    assert any(w.split()[:2] == ["VQA", "33.3%"] for w in validation.describe())


def test_batches_are_pytrees(folder):
    batch = loader.train_batches(run_config(), folder).batch(0)
    assert [x.shape for x in jax.tree.leaves(batch)] == [(ROWS, SEQ)] * 5
    assert isinstance(jax.tree.map(np.asarray, batch), Batch)


def test_kinds_are_the_pairs_of_source_and_task(tmp_path):
    """Each token has the number of its pair, padding 0; too many pairs are rejected."""
    documents = [
        dataclasses.replace(d, source=f"s{n % 3}", task="VQA" if n % 2 else "Visual Chat")
        for n, d in enumerate(micro_run.documents(12, seed=0))
    ]
    layout = Layout(vocab=micro_run.run().vocab, codes_per_image=4, tokenizer="", vqgan="")
    writer.write(tmp_path / "r", documents, shard_size=16, layout=layout, notes={})
    run = micro_run.run(data__train=str(tmp_path / "r"), data__batch_size=8)
    data = loader.eval_batches(run, str(tmp_path / "r"))
    assert len(data.kinds) == 6 and data.kinds == sorted(data.kinds)
    pair_of = {tuple(d.tokens.tolist()): (d.source, d.task) for d in documents}
    met = 0
    for step in range(len(data)):
        batch = data.batch(step)
        for ids, segments, kinds in zip(batch.ids, batch.segments, batch.kinds, strict=True):
            assert not kinds[segments == 0].any()
            for n in range(1, segments.max() + 1):
                (kind,) = set(kinds[segments == n].tolist())
                assert data.kinds[kind] == pair_of[tuple(ids[segments == n].tolist())]
                met += 1
    assert met == 12
    many = [dataclasses.replace(documents[0], id=str(n), source=f"s{n}") for n in range(129)]
    writer.write(tmp_path / "many", many, shard_size=200, layout=layout, notes={})
    with pytest.raises(RecordsError, match="129 pairs of source and task; at most 128"):
        loader.eval_batches(run, str(tmp_path / "many"))


def test_refusals(folder, tmp_path):
    run = run_config(train__steps=5)
    batches = loader.train_batches(run, folder)
    for step in (-1, 5):
        with pytest.raises(IndexError, match=f"step {step} of 5"):
            batches.batch(step)
    with pytest.raises(RecordsError, match="config.vocab is"):
        vocab = dataclasses.replace(run.vocab, size=9_800)
        loader.train_batches(dataclasses.replace(run, vocab=vocab), folder)
    with pytest.raises(RecordsError, match="64 codes, but config.vq produces 16"):
        vq = dataclasses.replace(run.vq, image_size=32)
        loader.train_batches(dataclasses.replace(run, vq=vq), folder)
    with pytest.raises(RecordsError, match="multiple of the 3 hosts"):
        loader.BatchLoader(run, folder, one_pass=False, host=0, hosts=3)
    with pytest.raises(ValueError, match=r"all 40 documents exceed .*limit = 5; the long"):
        loader.train_batches(run_config(data__document_limit=5), folder)
    with pytest.raises(RecordsError, match="no such folder"):
        loader.train_batches(run, tmp_path / "absent")


def test_damaged_shard_is_an_error(tmp_path):
    folder = write(tmp_path, map(example, range(20)))
    shard = folder / "00001-of-00003.array_record"
    raw = bytearray(shard.read_bytes())
    place = np.flatnonzero(np.frombuffer(raw, np.uint8))[200]
    raw[place] ^= 4
    shard.write_bytes(raw)
    with pytest.raises(RecordsError, match="00001-of-00003"):
        list(loader.eval_batches(run_config(), folder).stream(0))
