"""Tests of mixing: floor or ceiling of a share, no repeats in a window, images together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_jax import config
from medmax_jax.data.packing import mixing, pack
from medmax_jax.data.packing.pack import PackError

NAMES = ["A", "B", "C"]
SEEDS = st.integers(0, 2**32 - 1)
GROUPS = st.lists(st.integers(0, 2), min_size=1, max_size=200).map(np.array)
WEIGHTS = st.tuples(*[st.sampled_from([0.0, 0.3, 1.0, 2.0, 7.0])] * 3).map(list)
DATA = config.Data(
    train="", validation="", document_limit=64, seq_len=128, batch_size=4, pack=True,
    mask="answers", seed=5, plan="", condition_dropout=config.ConditionDropout.off(),
)  # fmt: skip


def mixed(
    weights="",
    by="source",
    unit="documents",
    image_centric=False,
    leave_out="",
    fraction=1.0,
    image_window=256,
):
    return config.Mixing(
        by=by, unit=unit, weights=weights, image_centric=image_centric,
        image_window=image_window, leave_out=leave_out, pseudo=True, fraction=fraction,
        fraction_seed=0,
    )  # fmt: skip


class FakeRecords:
    """A stand-in for a folder of records with what mixing.py requires: index, names, length."""

    folder = "F"

    def __init__(self, length, group, image_path=None):
        self.index = dict(length=np.asarray(length), source=np.asarray(group))
        self.index |= dict(task=self.index["source"], image_path=np.asarray(image_path))

    def __len__(self):
        return len(self.index["length"])

    def names(self, label):
        return NAMES


def random_records(group, seed, longest=64):
    length = np.random.default_rng(seed).integers(1, longest + 1, len(group))
    return FakeRecords(length, group, np.zeros(len(group)))


def has_documents(group, weights):
    return sum(w for g, w in enumerate(weights) if (group == g).any()) > 0


@settings(max_examples=150, deadline=None)
@given(GROUPS, WEIGHTS, SEEDS, st.sampled_from(["documents", "tokens"]), st.integers(1, 6))
def test_repeats_are_floor_or_ceiling_of_the_share(group, weights, seed, unit, last):
    if not has_documents(group, weights):
        return
    lengths = np.random.default_rng(seed).integers(1, 65, len(group))
    draws = mixing.sample_group(group, lengths, weights, unit)
    total = np.zeros(len(group), int)
    for epoch in range(last):
        times = mixing.repeat_documents(group, draws, seed=seed, epoch=epoch)
        share = draws[group] / np.bincount(group, minlength=3)[group]
        assert ((times == np.floor(share)) | (times == np.ceil(share))).all()
        assert (np.bincount(group, times, 3) == draws).all()
        total += times
    assert ((total >= np.floor(last * share)) & (total <= np.ceil(last * share))).all()


@settings(max_examples=150, deadline=None)
@given(GROUPS, WEIGHTS, SEEDS, st.integers(0, 3))
def test_no_window_contains_a_document_twice(group, weights, seed, epoch):
    if not has_documents(group, weights):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "WINDOW", 16)
        draws = mixing.sample_group(group, np.ones(len(group), int), weights, "documents")
        times = mixing.repeat_documents(group, draws, seed=seed, epoch=epoch)
        documents = np.arange(len(group)) + 100
        windows = mixing.shuffled_windows(documents, times, seed=seed, epoch=epoch)
    assert all(len(np.unique(w)) == len(w) <= 16 for w in windows)
    documents_drawn, counts = np.unique(np.concatenate(windows), return_counts=True)
    assert dict(zip(documents_drawn - 100, counts, strict=True)) == {
        i: n for i, n in enumerate(times) if n
    }
    sizes = [len(w) for w in windows]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=100, deadline=None)
@given(GROUPS, WEIGHTS, SEEDS, st.sampled_from(["documents", "tokens"]))
def test_plan_agrees_with_the_shares(group, weights, seed, unit):
    if not has_documents(group, weights):
        return
    records = random_records(group, seed)
    weight_text = ", ".join(f"{n}={w}" for n, w in zip(NAMES, weights, strict=True))
    plan = mixing.epochs(records, DATA, mixed(weight_text, unit=unit)).first
    groups = group[plan.documents]
    shares = mixing.mixture_shares(records, DATA, mixed(weight_text, unit=unit))
    by_documents = np.bincount(groups, minlength=3) / len(groups)
    assert np.allclose(by_documents, [s[0] for s in shares.values()])
    assert all(len(set(plan.row(i))) == len(plan.row(i)) for i in range(len(plan)))
    assert all(records.index["length"][plan.row(i)].sum() <= 128 for i in range(len(plan)))


def test_weights_of_tokens_are_shares_of_tokens():
    """For documents a tenth as long, the same share of tokens has ten times the documents."""
    group = np.repeat([0, 1, 2], [4_000, 4_000, 2_000])
    records = FakeRecords(np.where(group == 0, 6, 60), group, np.zeros(10_000))
    shares = mixing.mixture_shares(records, DATA, mixed("A=1, B=1, C=2", unit="tokens"))
    assert [round(t, 2) for _, t, _ in shares.values()] == [0.25, 0.25, 0.5]
    documents = [d for d, _, _ in shares.values()]
    assert documents[0] == pytest.approx(10 * documents[1], rel=0.01)
    plan = mixing.epochs(records, DATA, mixed("A=1, B=1, C=2", unit="tokens")).first
    tokens = np.bincount(group[plan.documents], records.index["length"][plan.documents])
    assert np.allclose(tokens / tokens.sum(), [0.25, 0.25, 0.5], atol=0.01)
    assert tokens.sum() == pytest.approx(records.index["length"].sum(), rel=0.01)


def test_examples_of_the_docstrings():
    group, lengths = np.array([0] * 6 + [1] * 2), np.array([10] * 6 + [20] * 2)
    assert mixing.sample_group(group, lengths, [1, 1], "documents").tolist() == [4, 4]
    assert mixing.sample_group(group, lengths, [1, 1], "tokens").tolist() == [5, 2]
    five = np.zeros(5, int)
    turns = [mixing.repeat_documents(five, np.array([7]), seed=0, epoch=e) for e in range(5)]
    assert [sorted(t.tolist()) for t in turns] == [[1, 1, 1, 2, 2]] * 5
    assert sum(turns).tolist() == [7] * 5
    names = ["VQA", "Visual Chat"]
    assert mixing.parse("VQA=2, Visual Chat=0.5", names) == [2.0, 0.5]
    assert mixing.parse("Visual Chat=0, VQA = 1e-3", names) == [0.001, 0.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("A=1, B=1", "'C' is invalid or missing"),
        ("A=1, B=1, C=1, D=1", "'D' is invalid"),
        ("A=1, B=x, C=1", "'B=x' is invalid"),
        ("A=1, B=-2, C=1", "'B' is invalid"),
        ("A=1, B=nan, C=1", "'B' is invalid"),
        ("A=0, B=0, C=0", "all weights are 0"),
        ("A", "'A' is invalid"),
    ],
)
def test_invalid_weights_are_rejected(weights, message):
    with pytest.raises(PackError, match=f"{message}.*one for each of A, B, C; 0 excludes a name"):
        mixing.parse(weights, NAMES)


def test_documents_over_the_limit_are_excluded():
    records = FakeRecords([10, 65, 64, 90, 30], [0, 0, 1, 1, 2], np.zeros(5))
    for weights in ("", "A=1, B=5, C=1"):
        for epoch in range(3):
            epochs = mixing.epochs(records, DATA, mixed(weights))
            rows = [epochs.row(i).documents for i in range(9) if epochs.epoch(i) <= epoch]
            assert not set(np.concatenate(rows)) & {1, 3}
    with pytest.raises(PackError, match="F: all 2 documents exceed .* = 64; the longest has 9"):
        mixing.epochs(FakeRecords([65, 90], [0, 0]), DATA, mixed())
    only_long = FakeRecords([65, 10], [0, 1])
    with pytest.raises(PackError, match="draws no document within data.document_limit"):
        mixing.epochs(only_long, DATA, mixed("A=1, B=0, C=0"))


@settings(max_examples=50, deadline=None)
@given(GROUPS, SEEDS)
def test_default_mixing_is_the_plain_plan(group, seed):
    """The default plan is that of pack.plan: each document once."""
    records = random_records(group, seed)
    ours = mixing.epochs(records, DATA, mixed()).first
    plan_settings = dict(seq_len=128, pack=True, seed=5, epoch=0)
    assert ours.fingerprint == pack.plan(records.index["length"], **plan_settings).fingerprint
    times = mixing.mixture_shares(records, DATA, mixed())
    assert all(n == 1 for g, (_, _, n) in enumerate(times.values()) if (group == g).any())


IMAGES = st.lists(st.integers(-1, 40), min_size=1, max_size=300).map(np.array)


@settings(max_examples=100, deadline=None)
@given(IMAGES, SEEDS, st.integers(0, 3))
def test_each_image_is_in_one_window(images, seed, epoch):
    documents = np.arange(len(images)) * 2
    windows = mixing.group_by_image(documents, images, size=20, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(windows)) == documents.tolist()
    where = np.concatenate([[n] * len(w) for n, w in enumerate(windows)])
    window_of = dict(zip(np.concatenate(windows), where, strict=True))
    for image in set(images.tolist()) - {-1}:
        assert len({window_of[d] for d in documents[images == image]}) == 1
    largest = max(np.bincount(images[images >= 0]), default=1)
    assert max(map(len, windows)) < 20 + max(largest, 1)


def test_image_centric_plans_are_reshuffled_and_complete():
    images = np.repeat(np.arange(500), 4)
    records = FakeRecords(np.full(2_000, 20), np.zeros(2_000, int), images)
    epochs = mixing.epochs(records, DATA, mixed(image_centric=True))
    first = epochs.first
    assert sorted(first.documents) == list(range(2_000))
    row_of = np.repeat(np.arange(len(first)), np.diff(first.starts))
    rows = [row_of[images[first.documents] == p] for p in range(500)]
    assert max(np.ptp(r) for r in rows) <= 50  # a window of 256 documents has 43 rows of 6
    small = mixing.epochs(records, DATA, mixed(image_centric=True, image_window=40)).first
    row_of = np.repeat(np.arange(len(small)), np.diff(small.starts))
    assert max(np.ptp(row_of[images[small.documents] == p]) for p in range(500)) <= 8
    second = np.concatenate([epochs.row(len(first) + i).documents for i in range(len(first))])
    assert sorted(second) == list(range(2_000)) and not np.array_equal(second, first.documents)


def test_rare_documents_repeat_but_not_within_a_row():
    group = np.array([0] * 100 + [1])
    records = FakeRecords(np.full(101, 10), group, np.zeros(101))
    plan = mixing.epochs(records, DATA, mixed("A=1, B=1, C=1")).first
    assert np.bincount(group[plan.documents]).tolist() == [50, 50]
    assert all((group[plan.row(i)] == 1).sum() <= 1 for i in range(len(plan)))


def drawn(records, **changes):
    """Return the documents of the first epoch."""
    plan = mixing.epochs(records, DATA, mixed(**changes)).plan(0)
    return {int(d) for d in plan.documents}


def test_excluded_names_are_never_drawn():
    records = random_records(np.arange(90) % 3, seed=0)
    assert drawn(records, leave_out="B") == {d for d in range(90) if d % 3 != 1}
    assert drawn(records, leave_out="C, A", by="task") == {d for d in range(90) if d % 3 == 1}
    shares = mixing.mixture_shares(records, DATA, mixed(leave_out="B"))
    assert shares["B"][0] == 0 and shares["A"][0] == pytest.approx(0.5)
    with pytest.raises(PackError, match="has no source 'D'; use names from A, B, C"):
        drawn(records, leave_out="A, D")
    with pytest.raises(PackError, match="leave no document.*exclude fewer names"):
        drawn(records, leave_out="A, B, C")


def test_fraction_is_the_same_in_every_epoch_and_nested():
    group = np.arange(400) % 3
    records = FakeRecords(
        np.full(400, 8), group, np.arange(400) // 6 * 3 + group
    )  # two documents each
    quarter, half = drawn(records, fraction=0.25), drawn(records, fraction=0.5)
    assert quarter < half < drawn(records) and len(half) == pytest.approx(200, abs=6)
    epochs = mixing.epochs(records, DATA, mixed(fraction=0.25))
    assert {int(d) for d in epochs.plan(7).documents} == quarter
    without = drawn(records, fraction=0.25, leave_out="B")
    assert without == {d for d in quarter if d % 3 != 1}, "the same images with and without B"
    weighted = drawn(records, fraction=0.25, weights="A=1, B=1, C=0")
    assert weighted <= quarter and len(weighted) < len(quarter)
