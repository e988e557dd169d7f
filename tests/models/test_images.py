"""Image files to pixels: modes, alpha, resizing, crops, and unusable files."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from medmax_jax.models import image_headers, images

LIMIT = 1_000_000


def save(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def ramp(shape, top=255):
    return np.linspace(0, top, int(np.prod(shape))).reshape(shape)


def test_rgb_is_unchanged(tmp_path):
    values = ramp((4, 5, 3)).astype(np.uint8)
    image = images.load(save(tmp_path, Image.fromarray(values)), max_pixels=LIMIT)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), values)


def test_alpha_is_blended_on_white_and_truncated(tmp_path):
    rgba = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [10, 20, 30, 128], [0, 101, 254, 77]]])
    image = images.load(save(tmp_path, Image.fromarray(rgba.astype(np.uint8))), max_pixels=LIMIT)
    # 255 (1 - a) + a v by hand: a = 128/255 gives 132.0, 137.04, 142.06; a = 77/255 gives 178,
    # 208.498, 254.698, cut and not rounded
    expected = [[255, 255, 255], [10, 20, 30], [132, 137, 142], [178, 208, 254]]
    np.testing.assert_array_equal(np.asarray(image)[0], expected)


def test_opaque_alpha_is_dropped():
    rgba = np.dstack([ramp((3, 3, 3)), np.full((3, 3), 255)]).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(images.to_rgb(Image.fromarray(rgba))), rgba[..., :3])


def test_gray_gray_with_alpha_and_one_bit():
    gray = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
    np.testing.assert_array_equal(np.asarray(images.to_rgb(gray))[0, :, 1], [0, 100, 255])
    with_alpha = gray.copy().convert("LA")
    with_alpha.putalpha(Image.fromarray(np.array([[255, 0, 51]], np.uint8)))
    assert with_alpha.mode == "LA"
    np.testing.assert_array_equal(np.asarray(images.to_rgb(with_alpha))[0, :, 0], [0, 255, 255])
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    np.testing.assert_array_equal(np.asarray(images.to_rgb(bits))[0], [[0] * 3, [255] * 3])


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.putdata([0, 1, 2])
    plain = images.load(save(tmp_path, image), max_pixels=LIMIT)
    np.testing.assert_array_equal(np.asarray(plain)[0], np.eye(3, dtype=int) * 200)
    holed = images.load(save(tmp_path, image, "b.png", transparency=1), max_pixels=LIMIT)
    np.testing.assert_array_equal(np.asarray(holed)[0], [[200, 0, 0], [255, 255, 255], [0, 0, 200]])


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = images.load(save(tmp_path, image, "a.tiff"), max_pixels=LIMIT)
    assert red.mode == "RGB" and red.getpixel((3, 3)) == (255, 0, 0)


def test_sixteen_bit_gray_keeps_its_range(tmp_path):
    values = np.array([[0, 255, 256, 32_768, 65_535]], np.uint16)
    for name in ("a.png", "a.tiff"):
        file = save(tmp_path, Image.fromarray(values), name)
        with Image.open(file) as image:
            assert image.mode.startswith("I")
        loaded = np.asarray(images.load(file, max_pixels=LIMIT))
        np.testing.assert_array_equal(loaded[0, :, 0], [0, 0, 1, 128, 255])


def test_float_image_without_a_range_raises(tmp_path):
    file = save(tmp_path, Image.fromarray(ramp((4, 4), 1.0).astype(np.float32)), "a.tiff")
    with pytest.raises(image_headers.ImageError, match=r"a\.tiff: a float image.*8- or 16-bit"):
        images.load(file, max_pixels=LIMIT)


@pytest.mark.parametrize(
    ("width", "height", "size", "scaled"),
    [
        (10, 25, 5, (5, 12)),  # 12.5: halves go to even
        (10, 27, 5, (5, 14)),  # 13.5
        (100, 100, 64, (64, 64)),
        (48, 32, 64, (96, 64)),  # enlarged
        (341, 128, 64, (170, 64)),  # 170.5
    ],
)
def test_resizing_and_cropping(width, height, size, scaled):
    values = (np.random.default_rng(0).random((height, width, 3)) * 255).astype(np.uint8)
    image = Image.fromarray(values)
    resized = np.asarray(image.resize(scaled, Image.Resampling.LANCZOS), np.float32)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    expected = resized[top : top + size, left : left + size] / 255 * 2 - 1
    ours = images.preprocess(image, size)
    assert ours.shape == (size, size, 3) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    other = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC), np.float32)
    other = other[top : top + size, left : left + size] / 255 * 2 - 1
    assert scaled == image.size or np.abs(ours - other).max() > 1e-2  # another filter is detected


@pytest.mark.parametrize(
    ("width", "height", "size", "scaled"),
    [
        (10, 4, 5, (5, 2)),
        (25, 10, 15, (15, 6)),
        (16, 5, 8, (8, 2)),  # 2.5: halves go to even
        (48, 32, 64, (64, 43)),  # enlarged; one more white row below
        (900, 1, 64, (64, 1)),  # 0.07: at least one row is left
        (21, 60, 10, (4, 10)),  # 3.5
    ],
)
def test_pad_shows_the_complete_image_on_white(width, height, size, scaled):
    values = (np.random.default_rng(0).random((height, width, 3)) * 255).astype(np.uint8)
    image = Image.fromarray(values)
    resized = np.asarray(image.resize(scaled, Image.Resampling.LANCZOS), np.float32)
    expected = np.full((size, size, 3), 255, np.float32)
    left, top = (size - scaled[0]) // 2, (size - scaled[1]) // 2
    expected[top : top + scaled[1], left : left + scaled[0]] = resized
    ours = images.preprocess(image, size, "pad")
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected / 255 * 2 - 1, atol=1e-6)
    assert images.area_lost(width, height, "pad") == 0
    assert images.area_lost(width, height, "released") == 1 - min(width, height) / max(
        width, height
    )


def test_views_of_a_square_are_equal_and_the_release_is_the_default():
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 4), np.uint8)
    wide, square = Image.fromarray(noise), Image.fromarray(noise[:, :30])
    pixels = [images.preprocess(square, 16, view) for view in images.VIEWS]
    np.testing.assert_array_equal(*pixels)
    np.testing.assert_array_equal(
        images.preprocess(wide, 16), images.preprocess(wide, 16, "released")
    )
    gray = images.preprocess(wide.convert("LA"), 16, "pad")  # alpha is blended before it is scaled
    assert (gray[:2] == 1).all() and (gray[-2:] == 1).all() and (gray[2:-2] < 1).any()
    np.testing.assert_array_equal(
        images.preprocess(images.to_rgb(wide), 16, "pad"), images.preprocess(wide, 16, "pad")
    )


def test_unknown_views_are_refused_by_name():
    with pytest.raises(ValueError, match="view is 'squash'; use one of released, pad"):
        images.preprocess(Image.new("RGB", (2, 1)), 4, "squash")
    with pytest.raises(ValueError, match="squash"):
        images.area_lost(2, 1, "squash")


def test_pixels_are_in_minus_one_to_one():
    image = Image.fromarray(np.array([[[0, 255, 127]]], np.uint8))
    np.testing.assert_allclose(images.preprocess(image, 1), [[[-1, 1, 127 / 127.5 - 1]]], atol=1e-7)


def valid_file(tmp_path, name="valid.png"):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    return save(tmp_path, Image.fromarray(noise), name)


def test_missing_file_folder_and_not_an_image(tmp_path):
    with pytest.raises(image_headers.ImageError, match=r"none\.png: no such file"):
        images.load(tmp_path / "none.png", max_pixels=LIMIT)
    with pytest.raises(image_headers.ImageError, match="is a folder"):
        images.load(tmp_path, max_pixels=LIMIT)
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(image_headers.ImageError, match=r"text\.png: not an image"):
        images.load(tmp_path / "text.png", max_pixels=LIMIT)
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(image_headers.ImageError, match=r"empty\.jpg: not an image"):
        images.load(tmp_path / "empty.jpg", max_pixels=LIMIT)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "a.bmp", "a.gif", "a.webp"])
def test_truncated_file_raises(tmp_path, name):
    file = valid_file(tmp_path, name)
    images.load(file, max_pixels=LIMIT)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(
        image_headers.ImageError, match=rf"{name}: (damaged or truncated|not an image)"
    ):
        images.load(file, max_pixels=LIMIT)


def test_damaged_file_raises(tmp_path):
    file = valid_file(tmp_path)
    bytes_ = bytearray(file.read_bytes())
    bytes_[200:260] = bytes(60)
    file.write_bytes(bytes_)
    with pytest.raises(image_headers.ImageError, match=r"valid\.png: damaged or truncated"):
        images.load(file, max_pixels=LIMIT)


def png_with_header(file, width, height):
    """Write a PNG of a few bytes whose header states width x height."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    with open(file, "wb") as out:
        out.write(b"\x89PNG\r\n\x1a\n")
        for name, body in parts:
            out.write(struct.pack(">I", len(body)) + name + body)
            out.write(struct.pack(">I", zlib.crc32(name + body)))
    return file


def test_decompression_bomb_raises_before_it_is_decoded(tmp_path):
    with pytest.raises(image_headers.ImageError, match=r"bomb\.png: .*the limit is 1000000"):
        images.load(png_with_header(tmp_path / "bomb.png", 20_000, 20_000), max_pixels=LIMIT)
    with pytest.raises(
        image_headers.ImageError, match="10000 x 12000 pixels; the limit is 1000000"
    ):
        # large enough for Pillow's warning, not for its error
        images.load(png_with_header(tmp_path / "large.png", 10_000, 12_000), max_pixels=LIMIT)
    assert images.load(valid_file(tmp_path), max_pixels=64 * 64).size == (64, 64)
    with pytest.raises(image_headers.ImageError, match="64 x 64"):
        images.load(valid_file(tmp_path), max_pixels=64 * 64 - 1)


def test_formats_that_run_programs_are_not_opened(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(image_headers.ImageError, match="not an image"):
        images.load(file, max_pixels=LIMIT)


def test_too_narrow_image_raises():
    """With its short side scaled to 512 the image would need gigabytes."""
    with pytest.raises(image_headers.ImageError, match="too narrow .1 x 9000 pixels.; crop"):
        images.preprocess(Image.new("RGB", (1, 9_000)), 512)
    assert images.preprocess(Image.new("RGB", (1, 9)), 4).shape == (4, 4, 3)
