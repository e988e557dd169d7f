"""Limits what an image file can make its decoder allocate, before Pillow reads the file.

Pillow checks width x height after it has parsed a file. This module reads the header and checks
what these formats can make Pillow do before that, or in addition to the pixels:

    PNG    an APNG of 124 bytes allocates its complete canvas while it is opened
    JPEG   each scan of a progressive file passes over all coefficients again;
           EXIF is a TIFF directory (see there)
    TIFF   65,535 tags may point to the same bytes, each of which is copied; a tile may be larger
           than the image; offsets of strips become one object each
    GIF    comments are joined 255 bytes at a time, in quadratic time

WebP, BMP and PPM need only the limits of `check_size` and MAX_BYTES.
"""

import io
import os
import stat
import struct
from collections.abc import Iterator

MAX_BYTES = 2**29  # 512 MiB: 64 million pixels of 16-bit RGBA, uncompressed
MAX_SIDE = 2**16  # a run-length code of BMP skips up to 255 rows at once, all of them allocated
MAX_SCANS = 100  # of a JPEG; progressive encoders write about 10
MAX_COMMENT = 2**20  # bytes of a GIF before its first frame
MAX_TILE = 2**24  # pixels of a TIFF tile, where the limit of the image is smaller
MAX_VALUES = 2**20  # of one TIFF tag; each becomes a Python object
SLACK = 2**20  # bytes that the tags of a valid TIFF may share
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_TIFF_SIZES |= {16: 8, 17: 8, 18: 8}  # BigTIFF
_OFFSETS, _SUBDIRECTORIES = (273, 279, 324, 325), (34665, 34853, 40965)
_WIDTH, _HEIGHT, _BITS, _SAMPLES, _ROWS_PER_STRIP = 256, 257, 258, 277, 278
_TILE_WIDTH, _TILE_LENGTH = 322, 323


class ImageError(ValueError):
    """Raised for an image that cannot be used; the message gives the file, problem and fix."""


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise ImageError above `max_pixels` = width x height, or MAX_SIDE on one side."""
    if width * height > max_pixels:
        raise ImageError(
            f"{width} x {height} pixels; the limit is {max_pixels}: scale the image down first"
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{width} x {height} pixels; the limit per side is {MAX_SIDE}: crop it")


def check_regular(path: str | os.PathLike) -> None:
    """Raise ImageError for a pipe or device, which would be read without end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ImageError("not a regular file; use an image file")


def check_header(file: io.BufferedIOBase, *, max_pixels: int) -> int:
    """Raise ImageError for a file that would cost too much; return the bits that a PNG states.

    Returns 0 for a file without an sBIT chunk. A damaged header is left to Pillow.
    """
    size = file.seek(0, os.SEEK_END)
    if size > MAX_BYTES:
        raise ImageError(
            f"{size} bytes; the limit is {MAX_BYTES}: compress the image or scale it down"
        )
    file.seek(0)
    start, bits = file.read(16), 0
    try:
        if start.startswith(b"\x89PNG\r\n\x1a\n"):
            bits = _check_png(file, max_pixels)
        elif start.startswith(b"\xff\xd8\xff"):
            _check_jpeg(file)
        elif start[:2] in (b"II", b"MM"):
            _check_tiff(file, size, max_pixels)
        elif start.startswith(b"GIF8"):
            _check_gif(file)
    except (struct.error, IndexError):
        pass  # truncated: Pillow reports the problem
    file.seek(0)
    return bits


def _check_png(file: io.BufferedIOBase, max_pixels: int) -> int:
    file.seek(8)
    bits = 0
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">L4s", head)
        here = file.tell()
        if kind == b"IHDR":
            check_size(*struct.unpack(">LL", file.read(8)), max_pixels)
        elif kind == b"sBIT" and 1 <= length <= 4:
            stated = file.read(length)
            bits = max(stated[:3] if length >= 3 else stated[:1])  # color; alpha is the last
        elif kind == b"IDAT":
            break
        file.seek(here + length + 4)  # the CRC
    return bits


def _check_jpeg(file: io.BufferedIOBase) -> None:
    exif = b""
    file.seek(2)
    while len(head := file.read(2)) == 2 and head != b"\xff\xda":
        if head[0] != 0xFF or head[1] in (0x00, 0x01, 0xFF) or 0xD0 <= head[1] <= 0xD8:
            file.seek(-1, os.SEEK_CUR)  # fill bytes, or a marker without a length
            continue
        body = file.read(struct.unpack(">H", file.read(2))[0] - 2)
        if head == b"\xff\xe1" and body.startswith(b"Exif\0\0"):
            exif += body[6:]
    if len(exif) > 2**16:  # a single segment is small enough, whatever it contains
        _check_tiff(io.BytesIO(exif), len(exif), MAX_TILE)
    file.seek(0)
    scans, tail = 0, b""
    while part := file.read(2**20):
        scans += (tail + part).count(b"\xff\xda")
        tail = part[-1:] if part[-1:] == b"\xff" else b""
    if scans > MAX_SCANS:
        raise ImageError(f"a JPEG of {scans} scans; the limit is {MAX_SCANS}: save the image again")


def _check_tiff(file: io.BufferedIOBase, size: int, max_pixels: int) -> None:
    file.seek(0)
    start = file.read(16)
    order = ">" if start[:2] == b"MM" else "<"
    big = 43 in start[2:4]
    (first,) = struct.unpack(order + ("Q" if big else "L"), start[8:16] if big else start[4:8])
    todo, total, seen, inline = [first], 0, set(), {}
    while todo and len(seen) < 8:
        seen.add(offset := todo.pop())
        for tag, kind, count, value in _tiff_tags(file, offset, order, big):
            width = _TIFF_SIZES.get(kind, 0)
            if count * (width > 1 or tag in _OFFSETS) > MAX_VALUES:
                raise ImageError(f"TIFF tag {tag} has {count} values; the limit is {MAX_VALUES}")
            total += width * count if width * count <= size else 0  # otherwise truncated
            if tag in _SUBDIRECTORIES and value not in seen:
                todo.append(value)
            if len(seen) == 1:  # the image's own directory; the others are EXIF's
                inline[tag] = (count, value)
    if total > size + SLACK:
        raise ImageError(f"TIFF tags of {total} bytes in {size}; save the image without metadata")
    _check_block(file, inline, order, max_pixels)


def _check_block(
    file: io.BufferedIOBase, tags: dict[int, tuple[int, int]], order: str, max_pixels: int
) -> None:
    """Check the size of a strip or tile, which libtiff decodes into a separate buffer."""
    value = lambda tag, default=0: tags[tag][1] if tag in tags else default  # noqa: E731
    width, length = value(_TILE_WIDTH), value(_TILE_LENGTH)
    if width * length > max(max_pixels, MAX_TILE):
        raise ImageError(
            f"TIFF tiles of {width} x {length} pixels; save the image in smaller tiles"
        )
    width = width or value(_WIDTH)
    length = length or min(value(_HEIGHT), value(_ROWS_PER_STRIP, MAX_BYTES))
    count, bits = tags.get(_BITS, (1, 1))
    if count > 2:  # too many for the directory entry, whose value is then an offset
        file.seek(min(bits, MAX_BYTES))
        (bits,) = struct.unpack(order + "H", file.read(2))
    size = width * length * value(_SAMPLES, 1) * bits // 8
    if size > MAX_BYTES:
        raise ImageError(f"TIFF strips of {size} bytes; save the image in smaller strips")


def _tiff_tags(
    file: io.BufferedIOBase, offset: int, order: str, big: bool
) -> Iterator[tuple[int, int, int, int]]:
    """Yield tag, type, count, and the first value where it is stored in the directory itself."""
    if offset >= MAX_BYTES:
        return
    file.seek(offset)
    (tags,) = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))
    if tags > 2**16:
        raise ImageError(f"TIFF directory of {tags} tags; save the image without metadata")
    head, head_size, size = ("HHQ", 12, 20) if big else ("HHL", 8, 12)
    table = file.read(tags * size)
    for start in range(0, len(table) - size + 1, size):
        entry = table[start : start + size]
        tag, kind, count = struct.unpack(order + head, entry[:head_size])
        code = {3: "H", 16: "Q", 18: "Q"}.get(kind, "L")
        end = head_size + struct.calcsize("=" + code)
        value = struct.unpack(order + code, entry[head_size:end])[0]
        yield tag, kind, count, value


def _check_gif(file: io.BufferedIOBase) -> None:
    file.seek(10)
    flags = file.read(3)[0]
    file.seek(13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
    comment = 0
    while file.read(1) == b"!":
        kind = file.read(1)[0]
        while length := file.read(1)[0]:
            file.seek(length, os.SEEK_CUR)
            comment += length if kind == 0xFE else 0
            if comment > MAX_COMMENT:
                raise ImageError(
                    f"GIF comments above {MAX_COMMENT} bytes; save the image without them"
                )
