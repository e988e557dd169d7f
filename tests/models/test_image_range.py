"""Samples of more than 8 bits: the stated range, the image's own, and what must not change."""

import io
import logging
import struct

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from worst_images import chunk

from medmax_jax.models import image_headers, image_range, images

RAMP = np.linspace(0, 1, 64)


def png_of(values, sbit=None):
    """Return a 16-bit PNG: gray, or channels by the last axis: 2 (gray, alpha), 3 or 4."""
    import zlib

    height, width = values.shape[:2]
    color = {2: 0, 3: {2: 4, 3: 2, 4: 6}.get(values.shape[-1])}[values.ndim]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 16, color, 0, 0, 0))
    stated = chunk(b"sBIT", bytes(sbit)) if sbit else b""
    body = header + stated + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_of(values, **tags):
    """Return a TIFF by Pillow with additional tags."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        directory[int(tag[1:])] = value
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF", tiffinfo=directory)
    return file.getvalue()


def gray(content):
    rgb = np.asarray(images.load(content, max_pixels=10**6)).astype(int)
    assert (rgb[..., :1] == rgb).all()
    return rgb[..., 0]


def ramp(top, dtype=np.uint16):
    return np.round(RAMP * top).astype(dtype)[None].repeat(2, 0)


@pytest.fixture(autouse=True)
def clear_log_cache():
    """Forget what was logged in this process."""
    image_range._log_range.cache_clear()


@pytest.mark.parametrize(
    "top, shift",
    [(255, 0), (200, 0), (256, 4), (1023, 4), (4095, 4), (4096, 8), (16_383, 8), (65_535, 8)],
)
@pytest.mark.parametrize("form", ["png", "tiff"])
def test_8_and_12_bits_in_a_16_bit_file_are_not_black(form, top, shift):
    """The depth is the first of 8, 12 and 16 bits that holds the largest value."""
    values = ramp(top)
    content = png_of(values) if form == "png" else tiff_of(values)
    np.testing.assert_array_equal(gray(content), values >> shift)


def test_range_of_an_array():
    np.testing.assert_array_equal(
        np.asarray(images.to_rgb(Image.fromarray(ramp(4095))))[..., 0], ramp(4095) >> 4
    )


def test_significant_bits_of_a_png():
    """Samples may be stored unscaled, or scaled to 16 bits as the standard requires."""
    plain = ramp(1023)
    np.testing.assert_array_equal(gray(png_of(plain, [10])), plain >> 2)
    scaled = plain << 6 | plain >> 4
    np.testing.assert_array_equal(gray(png_of(scaled, [10])), scaled >> 8)
    dark = (ramp(15) << 6).astype(np.uint16)  # below 1024, but scaled: no lower bit is set
    np.testing.assert_array_equal(gray(png_of(dark, [10])), dark >> 8)
    np.testing.assert_array_equal(gray(png_of(ramp(900), [16])), ramp(900) >> 8)
    np.testing.assert_array_equal(gray(png_of(ramp(14_000), [14])), ramp(14_000) >> 6)


def test_stated_range_of_a_tiff():
    values = ramp(1000)
    np.testing.assert_array_equal(gray(tiff_of(values, t281=1023)), values >> 2)
    np.testing.assert_array_equal(gray(tiff_of(values, t341=65_535)), values >> 8)
    signed = ramp(4000).astype(np.int32) - 1000
    shown = gray(tiff_of(signed, t340=-1024, t341=3071))
    np.testing.assert_array_equal(shown, (signed + 1024) >> 4)
    contradicted = gray(tiff_of(ramp(4095), t281=100))
    np.testing.assert_array_equal(contradicted, ramp(4095) >> 4)


def test_tiff_of_12_bits_per_sample():
    values = np.array([[0, 1, 255, 256, 4080, 4095]])
    packed = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2)
    )
    tags = [
        (256, 6),
        (257, 1),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 134),
        (277, 1),
        (278, 1),
        (279, 9),
    ]
    entries = b"".join(struct.pack("<HHLL", tag, 3, 1, value) for tag, value in tags)
    content = struct.pack("<2sHLH", b"II", 42, 8, len(tags)) + entries + bytes(134 - 10 - 12 * 9)
    np.testing.assert_array_equal(gray(content + packed), values >> 4)
    dark = gray(content + bytes([0, 0, 200] * 3))  # states 12 bits, so these are not read as 8
    assert dark.max() == 12


def test_signed_and_32_bit_values_use_their_own_range():
    """A CT in Hounsfield units has negative values; no depth is customary for it."""
    signed = ramp(4095).astype(np.int32) - 1024
    np.testing.assert_array_equal(gray(tiff_of(signed)), ramp(4095) >> 4)
    large = (RAMP * 2**30).astype(np.int32)[None]
    shown = gray(tiff_of(large))
    assert shown[0, 0] == 0 and shown[0, -1] == 255 and (np.diff(shown[0]) >= 0).all()


def test_unsigned_32_bits_are_not_negative():
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    content = tiff_of(values.view(np.int32))
    signed, unsigned = (struct.pack("<HHLL", 339, 3, 1, n) for n in (2, 1))
    assert signed in content
    content = content.replace(signed, unsigned)
    assert gray(content)[0].tolist() == [0, 128, 255]


def test_white_is_zero():
    """Pillow inverts up to 8 bits only; 16 bits are inverted here."""
    for top, dtype in ((255, np.uint8), (65_535, np.uint16)):
        content = bytearray(tiff_of(ramp(top, dtype)))
        offset = content.index(struct.pack("<HHLL", 262, 3, 1, 1))
        content[offset + 8] = 0
        shown = gray(bytes(content))[0]
        assert shown[0] == 255 and shown[-1] == 0 and (np.diff(shown) <= 0).all()


def test_floats_use_their_stated_range():
    values = np.array([[0.0, 0.25, 1.0, 1.5]], np.float32)
    assert gray(tiff_of(values, t340=0.0, t341=1.0))[0].tolist() == [0, 64, 255, 255]
    with pytest.raises(image_headers.ImageError, match="a float image that states no range"):
        gray(tiff_of(values))
    values[0, 0] = np.nan
    with pytest.raises(image_headers.ImageError, match="not finite"):
        gray(tiff_of(values, t340=0.0, t341=1.0))


def test_pgm_states_its_range():
    """Pillow scales to 16 bits by the maximum of the header, so a dark image stays dark."""
    pgm = lambda most, value: b"P5 1 1 %d\n" % most + struct.pack(">H", value)  # noqa: E731
    assert (
        gray(pgm(4095, 4095)) == 255 and gray(pgm(4095, 100)) == 6 and gray(pgm(65_535, 900)) == 3
    )
    with pytest.raises(image_headers.ImageError, match="a float image that states no range"):
        gray(b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5))


@pytest.mark.parametrize("top, shift", [(255, 0), (4095, 4), (4096, 8), (65_535, 8)])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_color_of_16_bits(top, shift, channels):
    """Pillow keeps only the upper bytes, which are zero for 8-bit values."""
    values = np.stack([ramp(top), ramp(top) // 2, ramp(top) // 3, ramp(top)], -1)[..., :channels]
    if channels % 2 == 0:
        values[..., -1] = 65_535  # opaque
    shown = np.asarray(images.load(png_of(values), max_pixels=10**6))
    gray_only = channels == 2
    expected = (values[..., :1].repeat(3, -1) if gray_only else values[..., :3]) >> shift
    np.testing.assert_array_equal(shown, expected)


def test_color_of_16_bits_in_tiff():
    for order, compression in (("<", 1), ("<", 8), (">", 1), (">", 8)):
        values = np.stack([ramp(4095), ramp(4095) // 2, ramp(4095) // 3], -1)
        content = color_tiff(values, order, compression)
        shown = np.asarray(images.load(content, max_pixels=10**6))
        np.testing.assert_array_equal(shown, values >> 4)


def color_tiff(values, order, compression):
    import zlib

    body = values.astype(f"{order}u2").tobytes()
    body = body if compression == 1 else zlib.compress(body)
    height, width = values.shape[:2]
    tags = [
        (256, width),
        (257, height),
        (258, 16),
        (259, compression),
        (262, 2),
        (273, 0),
        (277, 3),
    ]
    tags += [(278, height), (279, len(body))]
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, value in tags:
        value = offset if tag == 273 else value
        entries += struct.pack(f"{order}HHL", tag, 4, 1) + struct.pack(f"{order}L", value)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}LH", 8, len(tags))
    return head + entries + bytes(4) + body


def test_stated_16_bits_keep_dark_color_dark():
    values = np.full((2, 2, 3), 900, np.uint16)
    assert (np.asarray(images.load(png_of(values, [16] * 3), max_pixels=4)) == 3).all()


def test_the_transparent_value_of_16_bit_gray_is_white(tmp_path):
    Image.fromarray(np.array([[0, 500, 65_535]], np.uint16)).save(
        tmp_path / "a.png", transparency=500
    )
    shown = np.asarray(images.load(tmp_path / "a.png", max_pixels=9))[0, :, 0]
    assert shown.tolist() == [0, 255, 255]


def test_assumed_range_is_logged_once_without_file_names(caplog):
    with caplog.at_level(logging.WARNING, logger="medmax_jax.models.images"):
        for _ in range(3):
            gray(png_of(ramp(4095)))
        gray(png_of(ramp(65_535)))
        gray(png_of(ramp(1023), [10]))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "images of 16 or 32 bits per sample that state no range are mapped as 12 bits"
        " (no value above 4095)"
    ]
