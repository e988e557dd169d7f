"""Find equal and nearly equal images and texts by their hashes.

    codes      SHA-256 of an image's codes as little-endian uint16, in raster order
    hash       perceptual hash: pHash (Zauner 2010) of 256 bits: gray, 64 x 64, DCT, the 16 x 16
               lowest frequencies without the constant row and column, each above their median or
               not
    n-grams    13 consecutive words, lower case without punctuation, as GPT-3's appendix C
               (arXiv 2005.14165) searched for benchmarks in its training text

Functions take and return arrays, because the check of records and the evaluation suite use the same
comparisons. Names in columns are 64 bits of SHA-256; two different ones among n agree by chance
with probability n^2 / 2^65, 6e-8 for 1.47 M.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, Int, UInt8, UInt32, UInt64

from medmax_jax.data.image_tokens.encoder import BATCH, Encoder
from medmax_jax.models import image_headers, images, vqgan
from medmax_jax.storage import image_paths
from medmax_jax.storage.folder import file_sha256

NGRAM_SIZE = 13  # words; GPT-3's
COMMON = 10  # a gram in more training documents than this is a phrase, not a leak; GPT-3's
HASH_WORDS = 8  # of 32 bits
NEAR_DUPLICATE_BITS = 15  # of 256; the most that near_duplicate_pairs is sure to find
MIN_CONTRAST = 2.0  # gray levels: an image with less spread has no hash
_SIDE, _KEPT = 64, 16
_WORD = re.compile(r"[^\W_]+")
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: powers of it are all different
_CHUNK = 1 << 20  # candidate pairs compared at once


def code_hash(codes: Int[np.ndarray, "K"]) -> str:
    """Return the hex name of an image's codes."""
    return hashlib.sha256(codes.astype("<u2").tobytes()).hexdigest()


def hash64(name: str | bytes) -> int:
    """Return 64 bits of SHA-256: of bytes, or of a name that is its hex."""
    return int(name[:16] if isinstance(name, str) else hashlib.sha256(name).hexdigest()[:16], 16)


def perceptual_hash(image: PIL.Image.Image) -> UInt32[np.ndarray, "8"] | None:
    """Return the perceptual hash of an image; None if it is flat."""
    small = image.convert("L").resize((_SIDE, _SIDE), PIL.Image.Resampling.LANCZOS)
    return perceptual_hash_of_gray(np.asarray(small, np.float64))


def perceptual_hash_of_gray(gray: Float[np.ndarray, "64 64"]) -> UInt32[np.ndarray, "8"] | None:
    """Return the perceptual hash of 64 x 64 gray levels of 0..255."""
    if gray.std() < MIN_CONTRAST:
        return None
    low = (_DCT @ gray @ _DCT.T).reshape(-1)
    bits = low > np.median(low)
    return np.packbits(bits).view(">u4").astype(np.uint32)


def near_duplicate_pairs(
    ours: UInt32[np.ndarray, "n 8"], theirs: UInt32[np.ndarray, "m 8"], max_bits: int
) -> Iterator[tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"], Int[np.ndarray, "_"]]]:
    """Yield (i, j, distance) of all pairs at most `max_bits` apart; a pair may be repeated.

    Of at most 15 different bits, one of the eight words has at most one: so for each word all of
    `theirs` with that word, or with one bit of it flipped, are looked up in sorted order, 33 x 8
    look-ups per image instead of m. Raises ValueError if `max_bits` is beyond that guarantee.
    """
    if not 0 <= max_bits <= NEAR_DUPLICATE_BITS:
        raise ValueError(
            f"max_bits is {max_bits}; use 0..{NEAR_DUPLICATE_BITS}, within which no pair is missed"
        )
    flips = np.concatenate([[0], 1 << np.arange(32, dtype=np.uint64)]).astype(np.uint32)
    for word in range(HASH_WORDS):
        order = np.argsort(theirs[:, word], kind="stable")
        column = theirs[order, word]
        for flip in flips:
            word_values = ours[:, word] ^ flip
            low = np.searchsorted(column, word_values, side="left")
            count = np.searchsorted(column, word_values, side="right") - low
            for i, position in _ranges(low, count):
                j = order[position]
                distance = np.bitwise_count(ours[i] ^ theirs[j]).sum(1, dtype=np.int64)
                close = distance <= max_bits
                yield i[close], j[close], distance[close]


def connected_components(
    n: int, pairs: Sequence[tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]]
) -> Int[np.ndarray, "n"]:
    """Return each item's group when pairs are linked: the smallest number of its group.

    connected_components(5, [([0, 3], [1, 4])])  ->  [0 0 2 3 3]
    """
    root = np.arange(n)
    if not pairs:
        return root
    left, right = (np.concatenate(side) for side in zip(*pairs, strict=True))
    while True:
        least = np.minimum(root[left], root[right])
        before = root.copy()
        for side in (left, right):
            np.minimum.at(root, side, least)
            np.minimum.at(root, before[side], least)
        root = root[root]
        if np.array_equal(root, before):
            return root


def duplicate_groups(
    names: UInt64[np.ndarray, "n"], kinds: UInt64[np.ndarray, "n"]
) -> list[Int[np.ndarray, "_"]]:
    """Return the indices with equal names that are of more than one kind; name 0 is ignored.

    names a a b a, kinds p p p q  ->  [0 1 3]: a occurs under p and q, b only once
    """
    order = np.lexsort((np.arange(len(names)), kinds, names))
    name, kind = names[order], kinds[order]
    start = np.flatnonzero(np.diff(name, prepend=~name[:1]))  # of each group of equal names
    stop = np.append(start[1:], len(name))
    changes = np.append(np.diff(kind) != 0, False) & np.append(np.diff(name) == 0, False)
    several = np.add.reduceat(changes, start) if len(start) else np.zeros(0, bool)
    chosen = np.flatnonzero((several > 0) & (name[start] != 0))
    return [np.sort(order[start[g] : stop[g]]) for g in chosen]


def normalized_words(text: str) -> list[str]:
    """Return lower-case words without punctuation.

    "No focal-consolidation."  ->  no focal consolidation
    """
    return _WORD.findall(text.lower())


def ngram_hashes(words: Sequence[str], size: int = NGRAM_SIZE) -> UInt64[np.ndarray, "_"]:
    """Return the hash of each `size` consecutive words; none if there are fewer words."""
    if len(words) < size:
        return np.zeros(0, np.uint64)
    hashed = np.array([hash64(word.encode()) for word in words], np.uint64)
    count, total = len(words) - size + 1, np.zeros(1, np.uint64)
    for k in range(size):  # wraps around, as a polynomial modulo 2^64
        total = total * _ODD + hashed[k : k + count]
    return total


class NgramIndex:
    """The grams of an evaluation set, and how many training documents contain each one."""

    def __init__(self, items: Sequence[Sequence[str]]):
        """Build the index; `items`: the words of each item."""
        ngrams = [np.unique(ngram_hashes(item)) for item in items]
        self.sizes = np.array([len(g) for g in ngrams], np.int64)  # 0: too short to be found
        self.item = np.repeat(np.arange(len(ngrams)), self.sizes)
        flat = np.concatenate([*ngrams, np.zeros(0, np.uint64)])
        self._ngrams, self._inverse = np.unique(flat, return_inverse=True)
        self.count = np.zeros(len(self._ngrams), np.int64)
        self.first = np.full(len(self._ngrams), -1, np.int64)

    def add_document(self, words: Sequence[str], document: int) -> None:
        """Count the words of one training document."""
        if not len(self._ngrams) or len(words) < NGRAM_SIZE:
            return
        ngrams = np.unique(ngram_hashes(words))
        position = np.minimum(np.searchsorted(self._ngrams, ngrams), len(self._ngrams) - 1)
        position = position[self._ngrams[position] == ngrams]
        self.first[position[self.count[position] == 0]] = document
        self.count[position] += 1

    def overlaps(self) -> dict[int, tuple[int, int]]:
        """Return item -> (how many of its grams are in training text, a document with one of them).

        Grams in more than COMMON documents are ignored.
        """
        shared = ((self.count > 0) & (self.count <= COMMON))[self._inverse]
        counts = np.bincount(self.item[shared], minlength=len(self.sizes))
        first = np.full(len(self.sizes), -1, np.int64)
        first[self.item[shared][::-1]] = self.first[self._inverse[shared]][::-1]
        return {int(i): (int(counts[i]), int(first[i])) for i in np.flatnonzero(counts)}


def isin(ours: UInt64[np.ndarray, "n"], theirs: UInt64[np.ndarray, "m"]) -> Bool[np.ndarray, "n"]:
    """Return which of `ours` are in `theirs`; 0, which means unknown, is in none."""
    return np.isin(ours, theirs) & (ours != 0)


def _ranges(
    low: Int[np.ndarray, "n"], count: Int[np.ndarray, "n"]
) -> Iterator[tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]]:
    """Yield (i, low[i] + 0 .. count[i] - 1) for all i, in chunks."""
    nonempty = np.flatnonzero(count)
    ends = np.cumsum(count[nonempty])
    start = 0
    while start < len(nonempty):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _CHUNK, side="right")))
        part = nonempty[start:stop]
        i = np.repeat(part, count[part])
        offset = np.arange(len(i)) - np.repeat(np.cumsum(count[part]) - count[part], count[part])
        yield i, low[i] + offset
        start = stop


def _cosines() -> Float[np.ndarray, "16 64"]:
    k, x = np.arange(1, _KEPT + 1)[:, None], np.arange(_SIDE)[None]
    return np.cos(np.pi * k * (2 * x + 1) / (2 * _SIDE))


_DCT = _cosines()  # frequencies 1 .. 16: constant ones encode brightness, not content


def to_gray_image(pixels: UInt8[np.ndarray, "h w 3"]) -> PIL.Image.Image:
    """Return decoded pixels as the image that `perceptual_hash` takes."""
    return PIL.Image.fromarray(pixels)


# ---- Perceptual hashes ----
#
# They are computed from the files, or from codes decoded by the VQGAN.
#
# A hash of a file and one of decoded codes are not compared with each other: the VQGAN's output
# differs from the image by more than a copy does.

PerceptualHash = UInt32[np.ndarray, "8"]


def hash_file(folder: Path, path: str) -> tuple[str, PerceptualHash | None]:
    """Return (SHA-256 of the bytes, perceptual hash, None if flat); raise ImageError."""
    try:
        file = image_paths.resolve(folder, path, label="its path")
    except image_paths.ImagePathError as error:
        raise image_headers.ImageError(str(error)) from error
    image = images.load(file, max_pixels=images.MAX_PIXELS, name="image")
    return file_sha256(file), perceptual_hash(image)


def hash_codes(
    encoder: Encoder, codes: Iterable[Int[np.ndarray, "K"]]
) -> Iterator[PerceptualHash | None]:
    """Yield the perceptual hash of each image, decoded."""
    for pixels in decode_codes(encoder, codes):
        yield perceptual_hash(PIL.Image.fromarray(pixels))


def decode_codes(
    encoder: Encoder, codes: Iterable[Int[np.ndarray, "K"]]
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yield the images of codes, in batches of one shape, which is compiled once."""
    side = encoder.vq_config.codes_per_side
    codes = iter(codes)
    while batch := list(itertools.islice(codes, BATCH)):
        full = np.stack([*batch, *batch[:1] * (BATCH - len(batch))]).astype(np.int32)
        pixels = vqgan.decode_codes(encoder.vq, full.reshape(-1, side, side))
        yield from np.asarray(vqgan.to_uint8(pixels))[: len(batch)]


def encode_files(
    encoder: Encoder, paths: Iterable[Path]
) -> Iterator[tuple[Int[np.ndarray, "K"], ...]]:
    """Yield the codes of image files as they are in records: in each view of its layout."""
    paths, vq = iter(paths), encoder.vq_config
    views = dict.fromkeys((vq.view, vq.answer_view))
    while batch := list(itertools.islice(paths, BATCH)):
        loaded = [images.load(path, max_pixels=images.MAX_PIXELS) for path in batch]
        by_view = []
        for view in views:
            pixels = [images.preprocess(image, vq.image_size, view) for image in loaded]
            full = np.stack([*pixels, *pixels[:1] * (BATCH - len(pixels))])
            codes = np.asarray(vqgan.encode(encoder.vq, full)).reshape(BATCH, -1)
            by_view.append(codes[: len(batch)])
        yield from zip(*by_view, strict=True)
