"""Limit the memory that pydicom allocates for a DICOM file, and name the decoder a file requires.

A deflated file can be a thousand times larger in memory than on disk, a million empty items of a
sequence fit into 8 MB and take 0.7 GB, and a compressed frame may have another size than the header
states. Messages name constants of the standard only, never a value of the header.
"""

import io
import pathlib
import struct
import zlib
from typing import Any

from medmax_jax.models.image_headers import MAX_SCANS

MAX_BYTES = 2**29  # 512 MiB; a radiograph has about 10 to 30 MiB
MAX_HEADER = 2**23  # 8 MiB before the pixels; a LUT or an overlay has 1 MiB at most
MAX_ITEMS = 100_000  # of all sequences together
_DEFLATED, _PLAIN = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.1"
# Transfer syntaxes of compressed pixels: name, package with a decoder (a plugin of pydicom 3)
SYNTAXES = {
    "1.2.840.10008.1.2.4.50": ("JPEG Baseline", "pylibjpeg-libjpeg"),
    "1.2.840.10008.1.2.4.51": ("JPEG Extended, 12 bits", "pylibjpeg-libjpeg"),
    "1.2.840.10008.1.2.4.57": ("JPEG Lossless", "pylibjpeg-libjpeg"),
    "1.2.840.10008.1.2.4.70": ("JPEG Lossless SV1", "pylibjpeg-libjpeg"),
    "1.2.840.10008.1.2.4.80": ("JPEG-LS Lossless", "pyjpegls"),
    "1.2.840.10008.1.2.4.81": ("JPEG-LS Near-lossless", "pyjpegls"),
    "1.2.840.10008.1.2.4.90": ("JPEG 2000 Lossless", "pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.4.91": ("JPEG 2000", "pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.4.201": ("HTJ2K Lossless", "pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.4.202": ("HTJ2K Lossless RPCL", "pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.4.203": ("HTJ2K", "pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.5": ("RLE Lossless", "pylibjpeg-rle"),
}
_FIRST_PIXELS, _PIXELS = 0x7FE00008, 0x7FE00010  # FloatPixelData, PixelData
_EXTENDED, _RLE = "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.5"


class RefusedError(ValueError):
    """A valid file that is not accepted; the message contains no value of it."""


def read(path: pathlib.Path) -> bytes:
    """Return the bytes of a file, inflated; raise RefusedError above MAX_BYTES."""
    if path.stat().st_size > MAX_BYTES:
        raise RefusedError(f"the file has more than {MAX_BYTES} bytes")
    content = path.read_bytes()
    end, syntax = _meta(content)
    if syntax == _DEFLATED:
        packed = zlib.decompressobj(-zlib.MAX_WBITS)
        rest = packed.decompress(content[end:], MAX_BYTES)
        if packed.unconsumed_tail:
            raise RefusedError(f"the file has more than {MAX_BYTES} bytes when inflated")
        plain = _PLAIN.ljust(len(_DEFLATED), "\0")  # a UID is padded with zeros
        content = content[:end].replace(_DEFLATED.encode(), plain.encode()) + rest
    return content


def header(content: bytes) -> Any:
    """Return the dataset before its pixels; raise RefusedError if parsing it costs gigabytes."""
    from pydicom.filereader import read_partial

    start, reached = content[:MAX_HEADER], []
    items = start.count(b"\xfe\xff\x00\xe0") + start.count(b"\xff\xfe\xe0\x00")
    if items > MAX_ITEMS:
        raise RefusedError(f"the sequences have more than {MAX_ITEMS} items")

    def at_pixels(tag: int, *_: Any) -> bool:
        reached.extend([tag] if int(tag) >= _FIRST_PIXELS else [])
        return bool(reached)

    dataset = read_partial(io.BytesIO(start), stop_when=at_pixels)
    if not reached and len(content) > MAX_HEADER:
        raise RefusedError(f"no pixels within the first {MAX_HEADER} bytes")
    return dataset


def with_pixels(content: bytes) -> Any:
    """Return the dataset up to its PixelData; anything after it is not parsed."""
    from pydicom.filereader import read_partial

    return read_partial(io.BytesIO(content), stop_when=lambda tag, *_: int(tag) > _PIXELS)


def check_decoder(head: Any) -> None:
    """Raise RefusedError, naming transfer syntax and package, if no decoder is installed."""
    from pydicom.pixels import get_decoder

    syntax = str(head.file_meta.TransferSyntaxUID)
    if syntax not in SYNTAXES:
        return
    decoder = get_decoder(syntax)
    plugins = set(decoder.available_plugins) if decoder.is_available else set()
    if syntax == _EXTENDED and int(head.BitsStored) > 8:
        plugins.discard("pillow")  # for 8 bits only
    if not plugins:
        name, package = SYNTAXES[syntax]
        raise RefusedError(
            f"no decoder for transfer syntax {name} ({syntax}) is installed: pip install {package}"
        )


def check_pixels(dataset: Any) -> None:
    """Raise RefusedError for a compressed frame that is larger than the header states."""
    from pydicom.encaps import get_frame

    syntax = str(dataset.file_meta.TransferSyntaxUID)
    if syntax not in SYNTAXES:
        return
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if syntax == _RLE:
        max_bytes = rows * columns * int(dataset.BitsAllocated) // 8
        if _rle_length(frame[64:], 2 * max_bytes + 2**16) > 2 * max_bytes + 2**16:
            raise RefusedError("the compressed pixels exceed Rows x Columns")
        return
    if frame.count(b"\xff\xda") > MAX_SCANS:
        raise RefusedError(f"the compressed pixels have more than {MAX_SCANS} scans")
    size = _frame_size(frame)
    if size and size != (rows, columns):
        raise RefusedError("the size of the compressed pixels is not Rows x Columns")


def _meta(content: bytes) -> tuple[int, str]:
    """Return where the file's meta information ends, and its transfer syntax."""
    position, syntax = 132, ""
    while content[position : position + 2] == b"\x02\x00" and len(content) >= position + 12:
        long = content[position + 4 : position + 6] in (b"OB", b"OW", b"UN", b"UT", b"SQ")
        start = position + (12 if long else 8)
        (length,) = struct.unpack(
            "<L" if long else "<H", content[start - (4 if long else 2) : start]
        )
        if content[position + 2 : position + 4] == b"\x10\x00":
            syntax = content[start : start + length].rstrip(b"\0 ").decode("latin-1")
        position = start + length
    return position, syntax


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """Return rows and columns of a JPEG, JPEG-LS or JPEG 2000 codestream; None if it has none."""
    if (start := frame[:4096].find(b"\xff\x4f\xff\x51")) >= 0:
        right, bottom, left, top = struct.unpack_from(">4L", frame, start + 8)
        return bottom - top, right - left
    position = 2
    while frame[:2] == b"\xff\xd8" and len(frame) >= position + 9 and frame[position] == 0xFF:
        marker = frame[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker == 0xF7 or 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return struct.unpack_from(">HH", frame, position + 5)
        position += 2 + struct.unpack_from(">H", frame, position + 2)[0]
    return None


def _rle_length(packed: bytes, limit: int) -> int:
    """Return the unpacked bytes of an RLE frame's segments, counted up to `limit` only."""
    position = total = 0
    while position < len(packed) and total <= limit:
        code = packed[position]
        if code < 128:
            total, position = total + code + 1, position + code + 2
        elif code > 128:
            total, position = total + 257 - code, position + 2
        else:
            position += 1
    return total
