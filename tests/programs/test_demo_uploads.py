"""Uploads: the pixels of each format, refused files, and that no file is left."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from source_setup import IMAGE_FILES, dicom_dataset

from medmax_jax.demo import uploads
from medmax_jax.models import images


def stored(folder, content, name="scan.png"):
    """Write an upload as gradio does: FOLDER/HASH/NAME."""
    path = folder / "0a1b" / name
    path.parent.mkdir()
    path.write_bytes(content)
    return path


def png_header(width, height):
    """A PNG of a few bytes that states this size."""
    body = b"IHDR" + struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">L", 13) + body + struct.pack(">L", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk


def test_pixels_are_those_of_the_reader_and_the_file_is_deleted(tmp_path):
    content = IMAGE_FILES[0].read_bytes()
    (shown,) = uploads.read(stored(tmp_path, content)).values()
    expected = images.load(content, max_pixels=10**6)
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(expected))
    assert not shown.info and not list(tmp_path.iterdir())


def test_a_ct_in_dicom_has_windows_whatever_its_name(tmp_path):
    values = np.linspace(0, 2_000, 64).round().astype(np.uint16).reshape(8, 8)
    tags = dict(Modality="CT", RescaleSlope=1, RescaleIntercept=-1000, PatientName="Doe^Jane")
    file = io.BytesIO()
    dicom_dataset(values, **tags).save_as(file, enforce_file_format=True)
    shown = uploads.read(stored(tmp_path, file.getvalue(), "IM0001"))
    assert list(shown) == ["", "brain", "soft tissue", "lung", "bone"]
    assert len({image.tobytes() for image in shown.values()}) == 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_header(40_000, 40_000), "40000 x 40000 pixels; the limit is 64000000"),
        (b"%PDF-1.7 secret", "not an image in a supported format"),
        (b"", "not an image in a supported format"),
        (bytes(128) + b"DICM secret", "damaged, or not a supported DICOM file"),
        (IMAGE_FILES[0].read_bytes()[:400], "damaged or truncated"),
    ],
)
def test_refused_files_are_deleted_and_not_named(tmp_path, content, message):
    path = stored(tmp_path, content, "Jane Doe.png")
    with pytest.raises(uploads.UploadError, match=message) as caught:
        uploads.read(path)
    assert str(caught.value).startswith("the file: ")
    assert "secret" not in str(caught.value) and "Doe" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(uploads.UploadError, match="no longer there"):
        uploads.read(path)


def test_the_folder_is_private_and_removed_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with pytest.raises(KeyboardInterrupt), uploads.temporary_folder() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        stored(folder, b"pixels")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir()) and "GRADIO_TEMP_DIR" not in os.environ
