"""Hashes, and who meets whom by them, against the long way round."""

import io
import itertools

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_setup import PICTURES

from medmax_jax.data import prepare
from medmax_jax.data.analysis import near_duplicates
from medmax_jax.data.sample.manifest import read_manifest

SEEDS = st.integers(0, 2**32 - 1)


def changed(table, rng, most):
    """Each look with 0..most random bits flipped, spread over its words."""
    bits = np.unpackbits(table.astype(">u4").view(np.uint8), axis=1)
    for row in bits:
        row[rng.choice(256, rng.integers(0, most + 1), replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(">u4").astype(np.uint32)


def distances(a, b):
    return np.bitwise_count(a[:, None] ^ b[None]).sum(2, dtype=np.int64)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, near_duplicates.NEAR_DUPLICATE_BITS))
def test_no_pair_is_missed_and_none_is_invented(seed, most):
    rng = np.random.default_rng(seed)
    theirs = rng.integers(0, 2**32, (40, 8), dtype=np.uint32)
    ours = changed(theirs[rng.integers(0, 40, 30)], rng, 20)
    far = distances(ours, theirs)
    found = {
        (i, j): d
        for part in near_duplicates.near_duplicate_pairs(ours, theirs, most)
        for i, j, d in zip(*part, strict=True)
    }
    assert found == {(i, j): far[i, j] for i, j in np.argwhere(far <= most)}


def test_crowded_words_are_compared_in_parts(monkeypatch):
    """Looks that share a word, as dark pictures do, are all candidates of each other."""
    monkeypatch.setattr(near_duplicates, "_CHUNK", 50)
    rng = np.random.default_rng(0)
    table = rng.integers(0, 2**32, (60, 8), dtype=np.uint32)
    table[:, 3] = 7
    table[1] = table[0] ^ np.uint32(0)
    table[1, 0] ^= 5
    pairs = {
        (int(i), int(j))
        for p in near_duplicates.near_duplicate_pairs(table, table, 15)
        for i, j, _ in zip(*p, strict=True)
    }
    assert pairs == {(i, i) for i in range(60)} | {(0, 1), (1, 0)}


def test_beyond_the_guarantee_is_refused():
    none = np.zeros((0, 8), np.uint32)
    assert not [p for p in near_duplicates.near_duplicate_pairs(none, none, 15) if len(p[0])]
    with pytest.raises(ValueError, match="most is 16; use 0..15"):
        list(near_duplicates.near_duplicate_pairs(none, none, 16))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29))))
def test_groups_are_the_connected_ones(n, pairs):
    pairs = [(i % n, j % n) for i, j in pairs]
    expected = list(range(n))
    for _ in range(n):
        for i, j in pairs:
            expected[i] = expected[j] = min(expected[i], expected[j])
    sides = [np.array(side, np.int64) for side in zip(*pairs, strict=True)]
    assert (
        near_duplicates.connected_components(n, [tuple(sides)] if pairs else []).tolist()
        == expected
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=40))
def test_repeated_names_of_several_kinds(rows):
    names, kinds = (np.array([r[k] for r in rows], np.uint64) for k in (0, 1))
    expected = []
    for name in range(1, 6):
        places = [i for i, row in enumerate(rows) if row[0] == name]
        if len({rows[i][1] for i in places}) > 1:
            expected.append(places)
    assert [g.tolist() for g in near_duplicates.duplicate_groups(names, kinds)] == expected


def looks_of(change):
    found = []
    for path in PICTURES:
        with PIL.Image.open(path) as picture:
            found.append(near_duplicates.perceptual_hash(change(picture.convert("RGB"))))
    return np.stack(found)


def as_jpeg(picture):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=50)
    return PIL.Image.open(file)


def test_looks_survive_copies_and_tell_pictures_apart():
    """On the real sample: a copy is nearly always near, another picture never."""
    plain = looks_of(lambda p: p)

    def apart(change):
        return np.bitwise_count(plain ^ looks_of(change)).sum(1, dtype=int)

    for copy in (as_jpeg, lambda p: p.resize([s // 2 for s in p.size])):
        assert (apart(copy) <= near_duplicates.NEAR_DUPLICATE_BITS).mean() > 0.94
    for other in (cropped, lambda p: p.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)):
        assert (
            apart(other) > near_duplicates.NEAR_DUPLICATE_BITS
        ).all()  # sides are facts; a crop is a known miss
    rows = {r["file"]: r["group"] for r in read_manifest(prepare.SAMPLE / "manifest.jsonl")}
    group = np.array([rows[f"images/{p.name}"] for p in PICTURES])
    i, j = np.triu_indices(len(plain), 1)
    far, alike = distances(plain, plain)[i, j], group[i] == group[j]
    assert (
        far[~alike].min() > 80
        and far[alike].min() > near_duplicates.NEAR_DUPLICATE_BITS
        and alike.any()
    )


def cropped(picture):
    width, height = picture.size
    edge = max(1, round(0.02 * width))
    return picture.crop((edge, edge, width - edge, height - edge))


def test_flat_pictures_have_no_look():
    assert near_duplicates.perceptual_hash(PIL.Image.new("RGB", (50, 40), (7, 7, 7))) is None


def test_words_and_grams():
    assert near_duplicates.normalized_words("No focal-consolidation; T2_FLAIR, Ärzte!") == [
        *("no", "focal", "consolidation", "t2", "flair", "ärzte")
    ]
    text = [str(n) for n in range(20)]
    found = near_duplicates.ngram_hashes(text)
    assert len(found) == len(set(found.tolist())) == 8
    assert near_duplicates.ngram_hashes(text[3:16]).tolist() == [found[3]]
    assert len(near_duplicates.ngram_hashes(text[:12])) == 0
    swapped = [*text[:2], text[3], text[2], *text[4:13]]
    assert near_duplicates.ngram_hashes(swapped)[0] != found[0]  # the order counts


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_shared_grams_against_the_long_way(seed):
    rng = np.random.default_rng(seed)
    pool = [[str(w) for w in rng.integers(0, 4, rng.integers(1, 40))] for _ in range(30)]
    items = [pool[i] for i in rng.integers(0, 30, 6)]
    grams = near_duplicates.NgramIndex(items)
    for n, words in enumerate(pool):
        grams.add_document(words, n)

    def stretches(words):
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    where = {}
    for n, words in enumerate(pool):
        for gram in stretches(words):
            where.setdefault(gram, []).append(n)
    expected = {}
    for n, item in enumerate(items):
        held = {g: where[g] for g in stretches(item) if len(where[g]) <= near_duplicates.COMMON}
        if held:
            expected[n] = len(held)
    found = grams.overlaps()
    assert {n: many for n, (many, _) in found.items()} == expected
    for n, (_, document) in found.items():
        assert stretches(pool[document]) & stretches(items[n])
    assert grams.sizes.tolist() == [len(stretches(item)) for item in items]


def test_phrases_of_many_documents_are_no_leak():
    phrase = [f"w{n}" for n in range(13)]
    for documents, expected in (
        (near_duplicates.COMMON, {0: (1, 0)}),
        (near_duplicates.COMMON + 1, {}),
    ):
        grams = near_duplicates.NgramIndex([phrase])
        for n in range(documents):
            grams.add_document([*phrase, *itertools.repeat(f"d{n}", 3)], n)
        assert grams.overlaps() == expected


def test_names_of_codes():
    codes = np.arange(4)
    assert near_duplicates.hash64(near_duplicates.code_hash(codes)) == near_duplicates.hash64(
        codes.astype("<u2").tobytes()
    )
    assert near_duplicates.code_hash(codes) != near_duplicates.code_hash(codes[::-1])
