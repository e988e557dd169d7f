"""Tests of hashes and of the pairs found by them, against brute force."""

import io
import itertools

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_setup import IMAGE_FILES

from medmax_jax.data import prepare
from medmax_jax.data.analysis import near_duplicates
from medmax_jax.data.sample.manifest import read_manifest

SEEDS = st.integers(0, 2**32 - 1)


def changed(table, rng, max_bits):
    """Return each hash with 0..max_bits random bits flipped, spread over its words."""
    bits = np.unpackbits(table.astype(">u4").view(np.uint8), axis=1)
    for row in bits:
        row[rng.choice(256, rng.integers(0, max_bits + 1), replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(">u4").astype(np.uint32)


def distances(a, b):
    return np.bitwise_count(a[:, None] ^ b[None]).sum(2, dtype=np.int64)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, near_duplicates.NEAR_DUPLICATE_BITS))
def test_pairs_agree_with_brute_force(seed, max_bits):
    rng = np.random.default_rng(seed)
    theirs = rng.integers(0, 2**32, (40, 8), dtype=np.uint32)
    ours = changed(theirs[rng.integers(0, 40, 30)], rng, 20)
    far = distances(ours, theirs)
    pairs_found = {
        (i, j): d
        for part in near_duplicates.near_duplicate_pairs(ours, theirs, max_bits)
        for i, j, d in zip(*part, strict=True)
    }
    assert pairs_found == {(i, j): far[i, j] for i, j in np.argwhere(far <= max_bits)}


def test_frequent_words_are_compared_in_chunks(monkeypatch):
    """Hashes that share a word, as those of dark images, are candidates of each other."""
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


def test_distances_beyond_the_guarantee_are_rejected():
    none = np.zeros((0, 8), np.uint32)
    assert not [p for p in near_duplicates.near_duplicate_pairs(none, none, 15) if len(p[0])]
    with pytest.raises(ValueError, match="max_bits is 16; use 0..15"):
        list(near_duplicates.near_duplicate_pairs(none, none, 16))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29))))
def test_groups_are_connected_components(n, pairs):
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


def hashes_of(change):
    hashes = []
    for path in IMAGE_FILES:
        with PIL.Image.open(path) as image:
            hashes.append(near_duplicates.perceptual_hash(change(image.convert("RGB"))))
    return np.stack(hashes)


def as_jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return PIL.Image.open(file)


def test_hashes_match_copies_and_separate_images():
    """On the real sample a copy is nearly always near, another image never."""
    plain = hashes_of(lambda p: p)

    def distance_to(change):
        return np.bitwise_count(plain ^ hashes_of(change)).sum(1, dtype=int)

    for copy in (as_jpeg, lambda p: p.resize([s // 2 for s in p.size])):
        assert (distance_to(copy) <= near_duplicates.NEAR_DUPLICATE_BITS).mean() > 0.94
    for other in (cropped, lambda p: p.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)):
        assert (
            distance_to(other) > near_duplicates.NEAR_DUPLICATE_BITS
        ).all()  # sides are facts; a crop is a known miss
    rows = {r["file"]: r["group"] for r in read_manifest(prepare.SAMPLE / "manifest.jsonl")}
    group = np.array([rows[f"images/{p.name}"] for p in IMAGE_FILES])
    i, j = np.triu_indices(len(plain), 1)
    far, same_group = distances(plain, plain)[i, j], group[i] == group[j]
    assert (
        far[~same_group].min() > 80
        and far[same_group].min() > near_duplicates.NEAR_DUPLICATE_BITS
        and same_group.any()
    )


def cropped(image):
    width, height = image.size
    edge = max(1, round(0.02 * width))
    return image.crop((edge, edge, width - edge, height - edge))


def test_flat_images_have_no_hash():
    assert near_duplicates.perceptual_hash(PIL.Image.new("RGB", (50, 40), (7, 7, 7))) is None


def test_words_and_ngrams():
    assert near_duplicates.normalized_words("No focal-consolidation; T2_FLAIR, Ärzte!") == [
        *("no", "focal", "consolidation", "t2", "flair", "ärzte")
    ]
    text = [str(n) for n in range(20)]
    hashes = near_duplicates.ngram_hashes(text)
    assert len(hashes) == len(set(hashes.tolist())) == 8
    assert near_duplicates.ngram_hashes(text[3:16]).tolist() == [hashes[3]]
    assert len(near_duplicates.ngram_hashes(text[:12])) == 0
    swapped = [*text[:2], text[3], text[2], *text[4:13]]
    assert near_duplicates.ngram_hashes(swapped)[0] != hashes[0]  # the order counts


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_shared_ngrams_agree_with_brute_force(seed):
    rng = np.random.default_rng(seed)
    pool = [[str(w) for w in rng.integers(0, 4, rng.integers(1, 40))] for _ in range(30)]
    items = [pool[i] for i in rng.integers(0, 30, 6)]
    index = near_duplicates.NgramIndex(items)
    for n, words in enumerate(pool):
        index.add_document(words, n)

    def ngrams_of(words):
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    where = {}
    for n, words in enumerate(pool):
        for gram in ngrams_of(words):
            where.setdefault(gram, []).append(n)
    expected = {}
    for n, item in enumerate(items):
        shared = [g for g in ngrams_of(item) if len(where[g]) <= near_duplicates.COMMON]
        if shared:
            expected[n] = len(shared)
    overlaps = index.overlaps()
    assert {n: count for n, (count, _) in overlaps.items()} == expected
    for n, (_, document) in overlaps.items():
        assert ngrams_of(pool[document]) & ngrams_of(items[n])
    assert index.sizes.tolist() == [len(ngrams_of(item)) for item in items]


def test_common_phrases_are_not_a_leak():
    phrase = [f"w{n}" for n in range(13)]
    for documents, expected in (
        (near_duplicates.COMMON, {0: (1, 0)}),
        (near_duplicates.COMMON + 1, {}),
    ):
        index = near_duplicates.NgramIndex([phrase])
        for n in range(documents):
            index.add_document([*phrase, *itertools.repeat(f"d{n}", 3)], n)
        assert index.overlaps() == expected


def test_hashes_of_codes():
    codes = np.arange(4)
    assert near_duplicates.hash64(near_duplicates.code_hash(codes)) == near_duplicates.hash64(
        codes.astype("<u2").tobytes()
    )
    assert near_duplicates.code_hash(codes) != near_duplicates.code_hash(codes[::-1])
