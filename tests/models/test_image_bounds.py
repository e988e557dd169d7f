"""Limits of image files: peak memory, files that raise, and a single function that opens them."""

import io
import re
import struct
import subprocess
import sys
import types
from pathlib import Path

import eval_setup
import numpy as np
import pytest
import worst_images
from PIL import Image, TiffImagePlugin

from medmax_jax.eval.models import baselines, endpoint, predictions
from medmax_jax.eval.pipeline import image_scoring
from medmax_jax.eval.reporting import page as reporting_page
from medmax_jax.models import image_headers, image_range, images

ROOT = Path(__file__).parents[2]
SIDE = 4_000
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
PEAKS = """
import pathlib, sys
from medmax_jax.models import image_headers
from medmax_jax.models import images

def peak():
    return int(next(n for n in open("/proc/self/status") if n.startswith("VmHWM")).split()[1])

before = peak()
for name in sys.argv[1:]:
    try:
        images.load(pathlib.Path(name), max_pixels=images.MAX_PIXELS)
        print("accepted", name)
    except image_headers.ImageError as error:
        print(error)
print((peak() - before) * 1024)
"""


def peak_of(*paths):
    """Return the lines of output and the peak memory of loading these files in a new process."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, *map(str, paths)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    *lines, last = done.stdout.splitlines()
    return lines, int(last)


def test_alpha_is_blended_in_bands_of_rows(tmp_path):
    """The peak is 12 bytes per pixel: the RGBA of the file, the RGB, a band."""
    row = bytes([200, 100, 0, 128]) * SIDE
    (tmp_path / "a.png").write_bytes(worst_images.png(SIDE, SIDE, depth=8, color=6, row=row))
    (line,), peak = peak_of(tmp_path / "a.png")
    assert line.startswith("accepted") and peak < 12 * SIDE * SIDE
    assert 12 * images.MAX_PIXELS < 1.5 * 2**30


def test_bands_equal_the_complete_image(monkeypatch):
    rgba = np.random.default_rng(0).integers(0, 256, (37, 41, 4), np.uint8)
    rgba[:5, :, 3] = 255
    alpha = rgba[..., 3:] / 255.0
    blended = ((1 - alpha) * 255.0 + alpha * rgba[..., :3]).astype(np.uint8)
    monkeypatch.setattr(image_range, "BAND", 100)
    np.testing.assert_array_equal(np.asarray(images.to_rgb(Image.fromarray(rgba))), blended)
    wide = np.random.default_rng(1).integers(0, 65_536, (37, 41)).astype(np.uint16)
    gray = np.asarray(images.to_rgb(Image.fromarray(wide)))[..., 0]
    np.testing.assert_array_equal(gray, wide >> 8)


def test_every_value_under_every_alpha():
    """The table of all 65,536 pairs equals the formula."""
    value, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    rgba = np.dstack([value, value, value, alpha])
    share = rgba[..., 3:] / 255.0
    blended = ((1 - share) * 255.0 + share * rgba[..., :3]).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(images.to_rgb(Image.fromarray(rgba))), blended)


MESSAGES = {
    "apng": "30000 x 30000 pixels; the limit is 89478485",
    "shared_tags": "TIFF tags of 1200000000 bytes",
    "exif_jpeg": "TIFF tags of 1200000000 bytes",
    "tile_tiff": "TIFF tiles of 30000 x 30000 pixels",
    "strip_tiff": "TIFF strips of 671088640 bytes",
    "strips_tiff": "TIFF tag 273 has 2000000 values; the limit is 1048576",
    "scans_jpeg": r"a JPEG of \d+ scans; the limit is 100",
    "delta_bmp": "4000000 x 2 pixels; the limit per side is 65536",
    "comment_gif": "GIF comments above 1048576 bytes",
    "text_png": "damaged or truncated .Too much memory used in text chunks",
}


def test_files_that_need_too_much_memory_or_time_raise(tmp_path):
    """Without the limits each takes gigabytes or many seconds."""
    assert MESSAGES.keys() == worst_images.REFUSED.keys()
    for name, make in worst_images.REFUSED.items():
        (tmp_path / name).write_bytes(make())
    lines, peak = peak_of(*(tmp_path / name for name in MESSAGES))
    for line, (name, message) in zip(lines, MESSAGES.items(), strict=True):
        assert re.match(rf"{re.escape(str(tmp_path / name))}: {message}", line), line
    assert peak < 400 * 2**20


def test_ordinary_metadata_is_accepted(tmp_path):
    """Files with EXIF, profiles, tiles larger than the image, comments and ten scans are loaded."""
    image = Image.new("RGB", (50, 40), (9, 9, 9))
    exif = Image.Exif()
    exif[0x010E], exif.get_ifd(0x8769)[0x9286] = "a" * 9_000, b"b" * 9_000
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    directory[270] = "description " * 1000
    profile = bytes(9_000)
    files = {
        "a.jpg": dict(exif=exif, icc_profile=profile, progressive=True, comment="c" * 9_000),
        "a.tif": dict(tiffinfo=directory, icc_profile=profile, compression="tiff_lzw"),
        "a.png": dict(exif=exif, icc_profile=profile),
        "a.webp": dict(exif=exif, icc_profile=profile, lossless=True),
        "a.gif": dict(comment=b"c" * 9_000),
    }
    for name, options in files.items():
        image.save(tmp_path / name, **options)
        assert images.load(tmp_path / name, max_pixels=40 * 50).size == (50, 40)


def test_large_file_and_device_raise(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    monkeypatch.setattr(image_headers, "MAX_BYTES", 50)
    with pytest.raises(image_headers.ImageError, match=r"a\.png: \d+ bytes; the limit is 50"):
        images.load(tmp_path / "a.png", max_pixels=81)
    with pytest.raises(image_headers.ImageError, match="a device: not a regular file"):
        images.load("/dev/zero", max_pixels=81, name="a device")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM"])
def test_damaged_files_are_image_errors(kind):
    """Bytes changed at random give an image or an ImageError, no other error."""
    file, draw = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 255, (16, 16, 3), np.uint8)).save(file, kind)
    for _ in range(300):
        content = bytearray(file.getvalue())
        for offset in draw.integers(0, min(len(content), 400), draw.integers(1, 6)):
            content[offset] = draw.integers(0, 256)
        try:
            images.load(bytes(content[: draw.integers(20, 2 * len(content))]), max_pixels=10**6)
        except image_headers.ImageError:
            pass


def test_one_function_opens_image_files():
    opening = re.compile(r"\bImage\.open\(|\bImageFile\.Parser|\bimread\(|\bcv2\b|\bimageio\b")
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("medmax_jax", "data", "eval", "benchmarks", "configs")
        for path in (ROOT / folder).rglob("*.py")
        if opening.search(path.read_text())
    }
    assert modules == {"medmax_jax/models/images.py"}, "open image files with models.images.load"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """Install a replacement of gs that records when it was started."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\necho 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=":")
    yield
    assert not (tmp_path / "ran").exists()


def test_evaluation_never_starts_ghostscript(tmp_path, ghostscript):
    path = tmp_path / "evil.png"
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(endpoint.ServiceError, match=r"evil\.png: not an image in a supported"):
        endpoint.png(path)
    with pytest.raises(image_headers.ImageError, match="not an image"):
        reporting_page.png(path)
    assert image_scoring._mode(path) == ""
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"id": "1", "text": "no", "images": ["evil.png"]}\n')
    with pytest.raises(predictions.PredictionsError, match="not an image"):
        predictions.Predictions(lines, [types.SimpleNamespace(id="1", data_class="public")])._image(
            "1", "evil.png", ""
        )
    model = baselines.Baseline("random", [], tmp_path, seed=0)
    model._images = ["evil.png"]
    with pytest.raises(image_headers.ImageError, match="not an image"):
        model._image("1")


def test_report_names_an_image_that_cannot_be_shown(tmp_path):
    (tmp_path / "evil.png").write_bytes(POSTSCRIPT)
    item = eval_setup.item("x", "vqa_closed", 7, id="7", image="evil.png")
    record = eval_setup.record(item, "t")
    page = reporting_page.examples([record], tmp_path, tmp_path)
    assert "7: shown to the model: " in page and "not an image in a supported format" in page


def test_endpoints_receive_the_pixels_that_local_models_read(tmp_path):
    ramp = np.linspace(0, 65_535, 64)[None].repeat(8, 0)
    rgba = np.zeros((8, 64, 4), np.uint8)
    rgba[:4, :, 3] = 255
    kinds = {"16.png": ramp.astype(np.uint16), "12.png": (ramp / 16).astype(np.uint16)}
    for name, pixels in (kinds | {"alpha.png": rgba}).items():
        Image.fromarray(pixels).save(tmp_path / name)
        own = np.asarray(images.load(tmp_path / name, max_pixels=10**6))
        with Image.open(io.BytesIO(endpoint.png(tmp_path / name))) as sent:
            np.testing.assert_array_equal(np.asarray(sent), own)
        assert 100 < own.mean() < 150


def test_loaded_images_have_no_metadata(tmp_path):
    """A color profile may contain a name, as EXIF may."""
    image = Image.new("RGB", (8, 8))
    image.save(tmp_path / "a.png", icc_profile=b"CANARY", dpi=(7, 7))
    assert images.load(tmp_path / "a.png", max_pixels=64).info == {}
    assert b"iCCP" not in endpoint.png(tmp_path / "a.png")


def test_orientation_is_that_of_the_medmax_release(tmp_path):
    """JPEG, PNG and WebP stay as stored, as in the released scripts; Pillow rotates TIFF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size in {
        "a.jpg": (20, 10),
        "a.png": (20, 10),
        "a.webp": (20, 10),
        "a.tif": (10, 20),
    }.items():
        Image.new("RGB", (20, 10)).save(tmp_path / name, exif=exif)
        assert images.load(tmp_path / name, max_pixels=200).size == size


def test_jpeg_markers_in_a_comment_count_as_scans_up_to_the_limit(tmp_path):
    """20 markers in a comment are below the limit."""
    Image.new("L", (8, 8)).save(tmp_path / "a.jpg", comment=b"\xff\xda" * 20)
    assert images.load(tmp_path / "a.jpg", max_pixels=64).size == (8, 8)
    assert struct.calcsize("<HHL4s") == 12  # an entry of a TIFF directory, as it is counted


def test_formats_with_their_own_limit(monkeypatch):
    """WebP is limited for memory, PPM of an unusual maximum for the time of Pillow's decoder."""
    monkeypatch.setattr(images, "MAX_WEBP", 63)
    monkeypatch.setattr(images, "MAX_PYTHON", 63)
    for kind, message in (("WEBP", "the limit is 63"), ("PNG", ""), ("PPM", "")):
        Image.new("RGB", (8, 8)).save(file := io.BytesIO(), kind)
        if message:
            with pytest.raises(image_headers.ImageError, match=message):
                images.load(file.getvalue(), max_pixels=64)
        else:
            assert images.load(file.getvalue(), max_pixels=64).size == (8, 8)
    for head in (b"P5 8 8 4095 ", b"P2 8 8 255 "):
        with pytest.raises(image_headers.ImageError, match="the limit is 63"):
            images.load(head + bytes(128), max_pixels=64)
