"""Image files that cost a reader the most, and what they cost ours.

    python tests/support/worst_images.py        each in a process of its own: bytes, peak memory,
                                                seconds

REFUSED are files of a few bytes to a few MB that made Pillow allocate gigabytes or take minutes.
ACCEPTED are the largest of each format and mode that `medmax_jax.images` takes.
"""

import io
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 9_400  # 88 million pixels


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def png(
    width: int, height: int, *, depth: int, color: int, extra: bytes = b"", row: bytes = b""
) -> bytes:
    """A PNG with the same row in every line."""
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(b"\0" + row) for _ in range(height if row else 0))
    header = struct.pack(">LLBBBBB", width, height, depth, color, 0, 0, 0)
    body = extra + chunk(b"IDAT", body + packer.flush())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def apng() -> bytes:
    """Pillow fills the canvas of the first frame while it opens the file."""
    frame = struct.pack(">LLLLLHHBB", 0, 30_000, 30_000, 0, 0, 1, 1, 1, 0)
    extra = chunk(b"acTL", struct.pack(">LL", 1, 0)) + chunk(b"fcTL", frame)
    return png(30_000, 30_000, depth=8, color=6, extra=extra)


def tiff(tags: list[tuple[int, int, int, int | None]], body: bytes) -> bytes:
    """A little-endian TIFF; a value of None is the place of the body."""
    place = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHLL", t, k, n, place if v is None else v) for t, k, n, v in tags]
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + b"".join(entries) + bytes(4) + body


def shared_tags() -> bytes:
    """20,000 tags that all point to the same 60,000 bytes: 1.2 GB once each is copied."""
    return tiff([(1000 + n, 7, 60_000, None) for n in range(20_000)], bytes(60_000))


def exif_jpeg() -> bytes:
    """The same directory as EXIF, in five segments."""
    file = io.BytesIO()
    Image.new("L", (16, 16)).save(file, "JPEG")
    plain, exif = file.getvalue(), shared_tags()
    parts = [b"Exif\0\0" + exif[n : n + 65_000] for n in range(0, len(exif), 65_000)]
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(p) + 2) + p for p in parts)
    return plain[:2] + segments + plain[20:]  # without JFIF, whose density Pillow takes first


def small_tiff(*more: tuple[int, int, int, int | None], body: bytes) -> bytes:
    """16 x 16 grey pixels, with these tags in addition."""
    tags = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    return tiff(sorted([*tags, *more]), body)


def tile_tiff() -> bytes:
    """16 x 16 pixels in a tile of 30,000 x 30,000."""
    packer = zlib.compressobj(9)
    row = bytes(30_000)
    body = b"".join(packer.compress(row) for _ in range(30_000)) + packer.flush()
    tile = [(322, 4, 1, 30_000), (323, 4, 1, 30_000), (324, 4, 1, None), (325, 4, 1, len(body))]
    return small_tiff((259, 3, 1, 8), *tile, body=body)


def strip_tiff() -> bytes:
    """A strip of 16,384 x 4,096 pixels of five samples of 16 bits: 640 MiB."""
    tags = [(256, 4, 1, 16_384), (257, 4, 1, 4_096), (258, 3, 1, 16), (259, 3, 1, 8)]
    tags += [(262, 3, 1, 2), (273, 4, 1, None), (277, 3, 1, 5), (278, 4, 1, 4_096), (279, 4, 1, 9)]
    return tiff(tags, bytes(9))


def strips_tiff() -> bytes:
    """Two million strips of one byte each, an object for each."""
    n = 2_000_000
    strips = [(259, 3, 1, 1), (273, 1, n, None), (278, 4, 1, 1), (279, 1, n, None)]
    return small_tiff(*strips, body=bytes(n))


def scans_jpeg() -> bytes:
    """A progressive JPEG whose last scan comes 300 times."""
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "JPEG", progressive=True)
    plain = file.getvalue()
    scan = plain[plain.rindex(b"\xff\xda") : -2]
    return plain[:-2] + 300 * scan + plain[-2:]


def delta_bmp() -> bytes:
    """Six bytes of run-length code that skip 255 rows of 4 million pixels."""
    palette = b"".join(bytes([255 - n, 0, n, 0]) for n in range(256))
    header = struct.pack("<LllHHLLllLL", 40, 4_000_000, 2, 1, 8, 1, 4, 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<LHHL", start + 4, 0, 0, start) + header + palette + b"\0\2\0\xff"


def comment_gif() -> bytes:
    """A comment of 8 MB, which Pillow joins 255 bytes at a time."""
    head = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + b"!\xfe" + (b"\xff" + b"a" * 255) * 32_000 + b"\0,"


def text_png() -> bytes:
    """A hundred compressed texts of a megabyte each."""
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 1), 9))
    return png(4, 4, depth=8, color=0, extra=100 * text, row=bytes(4))


REFUSED = {
    f.__name__: f
    for f in (
        apng,
        shared_tags,
        exif_jpeg,
        tile_tiff,
        strip_tiff,
        strips_tiff,
        scans_jpeg,
        delta_bmp,
    )
} | {"comment_gif": comment_gif, "text_png": text_png}


def saved(mode: str, kind: str, color: int | tuple = 0, **options: object) -> bytes:
    """An image of one colour as a file."""
    file = io.BytesIO()
    Image.new(mode, (SIDE, SIDE), color).save(file, kind, **options)
    return file.getvalue()


def many_scans(mode: str) -> bytes:
    """As many scans as are accepted."""
    plain = saved(mode, "JPEG", progressive=True, quality=90, subsampling=0)
    scan = plain[plain.rindex(b"\xff\xda") : -2]
    return plain[:-2] + (100 - plain.count(b"\xff\xda")) * scan + plain[-2:]


def webp() -> bytes:
    """As many pixels as are accepted of this format, in 34 bytes."""
    file = io.BytesIO()
    Image.new("RGBA", (8_192, 8_192)).save(file, "WEBP", lossless=True, quality=0, method=0)
    return file.getvalue()


def rle_bmp() -> bytes:
    """88 million pixels in runs of 255."""
    palette = b"".join(bytes([255 - n, 0, n, 0]) for n in range(256))
    row = b"\xff\0" * (SIDE // 255) + bytes([SIDE % 255, 0]) + b"\0\0"
    body = row * SIDE + b"\0\1"
    header = struct.pack("<LllHHLLllLL", 40, SIDE, SIDE, 1, 8, 1, len(body), 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    size = struct.pack("<LHHL", start + len(body), 0, 0, start)
    return b"BM" + size + header + palette + body


def wide_tiff() -> bytes:
    """16-bit RGBA in one deflated strip, whose values are below 4096, so that it is read twice."""
    packer = zlib.compressobj(1)
    side = 8_191  # of 512 MiB in this form
    row = struct.pack("<4H", 9, 9, 9, 65_535) * side
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 16), (259, 3, 1, 8), (262, 3, 1, 2)]
    tags += [(273, 4, 1, None), (277, 3, 1, 4), (278, 4, 1, side), (279, 4, 1, len(body))]
    return tiff([*tags, (338, 3, 1, 2)], body)


def dicom() -> bytes:
    """16 bits with a window, one frame."""
    from source_setup import dicom_dataset

    made = dicom_dataset(np.zeros((SIDE, SIDE), np.uint16), WindowCenter="9", WindowWidth="9")
    made.save_as(file := io.BytesIO(), enforce_file_format=True)
    return file.getvalue()


WIDE = struct.pack(">4H", 9, 9, 9, 0)
ACCEPTED = {
    "PNG, RGBA": lambda: png(SIDE, SIDE, depth=8, color=6, row=bytes(4 * SIDE)),
    "PNG, grey of 16 bits": lambda: png(SIDE, SIDE, depth=16, color=0, row=bytes(2 * SIDE)),
    "PNG, dark RGBA of 16 bits": lambda: png(SIDE, SIDE, depth=16, color=6, row=WIDE * SIDE),
    "PNG, palette with alpha": lambda: saved("P", "PNG", transparency=b"\0" * 256),
    "JPEG, RGB, 100 scans": lambda: many_scans("RGB"),
    "JPEG, CMYK, 100 scans": lambda: many_scans("CMYK"),
    "TIFF, dark RGBA of 16 bits": wide_tiff,
    "TIFF, 32 bits": lambda: saved("I", "TIFF", compression="tiff_deflate"),
    "TIFF, CMYK": lambda: saved("CMYK", "TIFF", compression="tiff_deflate"),
    "BMP, run-length": rle_bmp,
    "GIF, transparent": lambda: saved("P", "GIF", transparency=0),
    "WebP, lossless with alpha": webp,
    "PPM": lambda: saved("RGB", "PPM"),
    "PPM, maximum 4095": lambda: b"P5 4096 4096 4095\n" + bytes(2**25),
    "DICOM, 16 bits with a window": dicom,
}
READ = """
import pathlib, sys, time
from medmax_jax.data.image_tokens import dicom
from medmax_jax.models import image_headers
from medmax_jax.models import images

path, said = pathlib.Path(sys.argv[1]), "accepted"
begin = time.monotonic()
try:
    if path.suffix == ".dcm":
        dicom.load(path, name="file")
    else:
        images.preprocess(images.load(path, max_pixels=images.MAX_PIXELS, name="file"), 512)
except image_headers.ImageError as error:
    said = str(error)
# of this process alone; ru_maxrss may be that of its parent
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(f"{int(peak.split()[1]) / 2**20:.2f} GB {time.monotonic() - begin:.1f} s: {said}")
"""


def cost(content: bytes, suffix: str = ".img") -> str:
    """Peak memory with the imports, seconds and the outcome of reading, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(content)
        done = subprocess.run(
            [sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=False
        )
    return done.stdout.strip() or done.stderr.strip()[-200:]


def main() -> None:
    """The table of docs/reference/image_files.md."""
    for name, make in {**REFUSED, **ACCEPTED}.items():
        begin = time.monotonic()
        content = make()
        made = time.monotonic() - begin
        output = cost(content, ".dcm" if name.startswith("DICOM") else ".img")
        print(f"{name}: {len(content)} bytes (made in {made:.0f} s): {output}", flush=True)


if __name__ == "__main__":
    sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    main()
