"""Tests of DICOM radiographs: padding, windows, LUTs, missing decoders and memory limits."""

import io
import logging
import struct
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import encaps, uid
from source_setup import dicom_dataset

from medmax_jax.data.image_tokens import dicom, dicom_bounds
from medmax_jax.models.image_headers import ImageError

RAMP = np.linspace(0, 4095, 64).round()[None].repeat(16, 0)
PLAIN = np.round(255 * RAMP / 4095).astype(int)


@pytest.fixture
def read_image(tmp_path):
    """Return the function that reads a dataset, saved as a file, as an image."""

    def read_image(dataset):
        path = tmp_path / "a.dcm"
        if isinstance(dataset, bytes):
            path.write_bytes(dataset)
        else:
            dataset.save_as(path, enforce_file_format=True)
        return np.asarray(dicom.load(path, name="n")).astype(int)

    dicom._log_ignored_window.cache_clear()
    return read_image


def made(values, **tags):
    """Return a ramp dataset; signed values have PixelRepresentation 1."""
    return dicom_dataset(values, PixelRepresentation=int(values.dtype.kind == "i"), **tags)


def bytes_of(dataset):
    dataset.save_as(file := io.BytesIO(), enforce_file_format=True)
    return file.getvalue()


def encapsulated(frame, syntax, **tags):
    """Return the ramp's header with a compressed frame."""
    dataset = made(RAMP.astype(np.uint16), **tags)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encaps.encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    return dataset


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    "dtype, padding, tags",
    [
        (np.int16, -32_768, dict(PixelPaddingValue=-32_768)),
        (np.uint16, 65_535, dict(PixelPaddingValue=65_535)),
        (np.uint16, 60_000, dict(PixelPaddingValue=65_535, PixelPaddingRangeLimit=50_000)),
        (np.uint16, 60_000, dict(PixelPaddingValue=50_000, PixelPaddingRangeLimit=65_535)),
    ],
)
def test_padding_is_background(read_image, kind, dtype, padding, tags):
    """Without PixelPaddingValue the ramp has the top 28 gray levels, or the lowest 16."""
    values = RAMP.astype(dtype)
    values[:4] = padding
    image = read_image(made(values, PhotometricInterpretation=kind, **tags))
    expected = 255 - PLAIN if kind == "MONOCHROME1" else PLAIN
    assert not image[:4].any()
    np.testing.assert_array_equal(image[4:], expected[4:])


def test_padding_of_the_other_sign_and_images_of_padding_only(read_image):
    values = RAMP.astype(np.int16)
    values[:4] = -2000
    dataset = made(values)
    dataset.add_new("PixelPaddingValue", "US", 63_536)  # -2000 as unsigned
    np.testing.assert_array_equal(read_image(dataset)[4:], PLAIN[4:])
    assert not read_image(made(np.full((4, 4), 9, np.uint16), PixelPaddingValue=9)).any()


def test_padding_is_black_under_a_window(read_image):
    """Padding is black although the window would show its value as white."""
    values = RAMP.astype(np.uint16)
    values[:4] = 65_535
    tags = dict(PixelPaddingValue=65_535, WindowCenter="2048", WindowWidth="2048")
    image = read_image(made(values, **tags))
    assert not image[:4].any() and image[4:, 0].max() == 0 and image[4:, -1].min() == 255


@pytest.mark.parametrize(
    "tags, reason",
    [
        (dict(WindowCenter="2048", WindowWidth="0"), "its WindowWidth is below 1, or not a number"),
        (dict(WindowCenter="9000", WindowWidth="10"), "it maps all pixels to one value"),
        (dict(WindowCenter="-9000", WindowWidth="10"), "it maps all pixels to one value"),
    ],
)
def test_window_without_contrast_is_ignored(read_image, caplog, tags, reason):
    with caplog.at_level(logging.WARNING, logger="medmax_jax.dicom"):
        for _ in range(2):
            np.testing.assert_array_equal(read_image(made(RAMP.astype(np.uint16), **tags)), PLAIN)
    assert [r.getMessage() for r in caplog.records] == [
        f"DICOM: the window of a file is ignored: {reason}"
    ]


def test_first_valid_window_is_applied(read_image):
    two = dict(WindowCenter=["0", "2048"], WindowWidth=["0", "1000"])
    valid = dict(WindowCenter="2048", WindowWidth="1000")
    values = RAMP.astype(np.uint16)
    np.testing.assert_array_equal(
        read_image(made(values, **two)), read_image(made(values, **valid))
    )
    exact = dict(WindowCenter="2048", WindowWidth="0.5", VOILUTFunction="LINEAR_EXACT")
    assert set(np.unique(read_image(made(values, **exact)))) == {0, 255}


def test_unknown_voi_function_is_reported_without_its_value(read_image):
    tags = dict(WindowCenter="1", WindowWidth="2", VOILUTFunction="CANARY")
    with pytest.raises(ImageError, match="n: VOILUTFunction is not LINEAR") as raised:
        read_image(made(RAMP.astype(np.uint16), **tags))
    assert "CANARY" not in str(raised.value)


def lut(descriptor, data):
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", descriptor)
    item.add_new("LUTData", "OW" if isinstance(data, bytes) else "US", data)
    return [item]


def test_luts_of_8_and_16_bit_entries(read_image):
    """Test 4096 entries of 8 bits, as in radiographs: as a list, as words and as bytes."""
    table = [n // 16 for n in range(4096)]
    expected = np.round(255 * (RAMP // 16) / 255).astype(int)
    forms = table, np.array(table, "<u2").tobytes(), np.array(table, "u1").tobytes()
    for data in forms:
        dataset = made(RAMP.astype(np.uint16))
        dataset.VOILUTSequence = lut([4096, 0, 8], data)
        np.testing.assert_array_equal(read_image(dataset), expected)


def test_modality_lut_of_12_bits(read_image):
    """A descending LUT swaps dark and bright; values beyond its ends get the last entry."""
    dataset = made(RAMP.astype(np.uint16))
    dataset.ModalityLUTSequence = lut([3000, 1000, 12], list(range(3000, 0, -1)))
    dataset.ModalityLUTSequence[0].ModalityLUTType = "US"
    clipped = RAMP.clip(1000, 3999)
    np.testing.assert_allclose(read_image(dataset), 255 * (3999 - clipped) / 2999, atol=0.51)


@pytest.mark.parametrize(
    "syntax, bits, message",
    [
        (uid.JPEGLSLossless, 12, r"JPEG-LS Lossless \(1.2.840.10008.1.2.4.80\).*install pyjpegls"),
        (uid.JPEGExtended12Bit, 12, r"JPEG Extended, 12 bits .*: pip install pylibjpeg-libjpeg"),
        (uid.JPEGLosslessSV1, 16, r"JPEG Lossless SV1 .*: pip install pylibjpeg-libjpeg"),
        (uid.HTJ2KLossless, 16, r"HTJ2K Lossless .*: pip install pylibjpeg-openjpeg"),
    ],
)
def test_missing_decoder_is_reported_with_its_package(
    read_image, monkeypatch, syntax, bits, message
):
    """The result does not depend on the installed decoders."""
    decoder = pydicom.pixels.get_decoder(syntax)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(ImageError, match=f"n: no decoder for transfer syntax {message}"):
        read_image(encapsulated(b"\xff\xd8", syntax, BitsStored=bits, HighBit=bits - 1))


def jpeg(size):
    file = io.BytesIO()
    Image.fromarray(PLAIN.astype(np.uint8)).resize(size).save(file, "JPEG", quality=95)
    return file.getvalue()


EIGHT = dict(BitsAllocated=8, BitsStored=8, HighBit=7)


def test_compressed_frame_of_another_size_is_rejected(read_image):
    near = read_image(encapsulated(jpeg((64, 16)), uid.JPEGBaseline8Bit, **EIGHT))
    np.testing.assert_allclose(near, PLAIN, atol=6)
    with pytest.raises(
        ImageError, match="n: the size of the compressed pixels is not Rows x Columns"
    ):
        read_image(encapsulated(jpeg((640, 160)), uid.JPEGBaseline8Bit, **EIGHT))
    file = io.BytesIO()
    Image.fromarray(PLAIN.astype(np.uint8)).resize((99, 9)).save(file, "JPEG2000", no_jp2=True)
    with pytest.raises(
        ImageError, match="n: the size of the compressed pixels is not Rows x Columns"
    ):
        read_image(encapsulated(file.getvalue(), uid.JPEG2000Lossless, **EIGHT))
    many = jpeg((64, 16))
    many = many[:-2] + many[many.index(b"\xff\xda") : -2] * 200 + many[-2:]
    with pytest.raises(ImageError, match="n: the compressed pixels have more than 100 scans"):
        read_image(encapsulated(many, uid.JPEGBaseline8Bit, **EIGHT))


def test_run_lengths_beyond_the_image_are_rejected(read_image):
    head = struct.pack("<16L", 1, 64, *[0] * 14)
    frame = head + b"\x81\x07" * 8  # 1,024 pixels of 7
    assert not read_image(encapsulated(frame, uid.RLELossless, **EIGHT)).any()
    with pytest.raises(ImageError, match="n: the compressed pixels exceed Rows x Columns"):
        read_image(encapsulated(head + b"\x81\x07" * 1000, uid.RLELossless, **EIGHT))


def test_deflated_file_is_read_within_the_limit(read_image, monkeypatch):
    """A deflated file gives the same image; one that inflates above the limit is rejected."""
    dataset = made(RAMP.astype(np.uint16))
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    content = bytes_of(dataset)
    np.testing.assert_array_equal(read_image(content), PLAIN)
    monkeypatch.setattr(dicom_bounds, "MAX_BYTES", 2_000)
    assert len(content) < 2_000
    with pytest.raises(ImageError, match="n: the file has more than 2000 bytes when inflated"):
        read_image(content)


def test_a_million_empty_items_are_rejected(read_image):
    """Without the limit 8 MB of them take 0.7 GB and 40 s before the pixels."""
    content = bytes_of(made(RAMP.astype(np.uint16)))
    place, _ = dicom_bounds._meta(content)
    items = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * 200_000
    sequence = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, len(items)) + items
    start = content.index(struct.pack("<HH2s", 0x0028, 0x0002, b"US"), place)
    with pytest.raises(ImageError, match="n: the sequences have more than 100000 items"):
        read_image(content[:start] + sequence + content[start:])


def test_endless_header_is_rejected(read_image, monkeypatch):
    monkeypatch.setattr(dicom_bounds, "MAX_HEADER", 1_200)
    dataset = made(RAMP.astype(np.uint16))
    np.testing.assert_array_equal(read_image(dataset), PLAIN)
    dataset.add_new(0x00291000, "OB", bytes(4_000))
    with pytest.raises(ImageError, match="n: no pixels within the first 1200 bytes"):
        read_image(dataset)


def test_elements_after_the_pixels_are_not_parsed(read_image):
    content = bytes_of(made(RAMP.astype(np.uint16)))
    broken = struct.pack("<HH2sHL", 0xFFFA, 0xFFFA, b"SQ", 0, 0xFFFFFFFF) + b"\xfe\xff" * 9
    np.testing.assert_array_equal(read_image(content + broken), PLAIN)


def test_bands_of_rows_give_the_complete_image(read_image, monkeypatch):
    dataset = made(RAMP.astype(np.uint16), WindowCenter="2000", WindowWidth="3000")
    expected = read_image(dataset)
    monkeypatch.setattr(dicom, "BAND", 65)
    np.testing.assert_array_equal(read_image(dataset), expected)
    assert zlib.crc32(expected.astype(np.uint8).tobytes())  # not all of one value


def test_ct_windows_replace_that_of_the_file_and_other_images_have_none(tmp_path):
    units = np.array([[-1105, -600, 10, 40, 80, 250, 400, 1400]], np.int16).repeat(4, 0)
    dataset = made(units, Modality="CT", RescaleSlope=1, RescaleIntercept=0)
    dataset.WindowCenter, dataset.WindowWidth = 0, 1
    path = tmp_path / "a.dcm"
    dataset.save_as(path, enforce_file_format=True)
    shown = dicom.load_windows(path, name="n")
    assert list(shown) == ["", "brain", "soft tissue", "lung", "bone"]
    np.testing.assert_array_equal(np.asarray(shown[""]), np.asarray(dicom.load(path, name="n")))
    expected = {  # by hand: 255 (units - center + width / 2) / width, clipped
        "brain": [0, 0, 32, 128, 255, 255, 255, 255],
        "soft tissue": [0, 0, 102, 121, 147, 255, 255, 255],
        "lung": [42, 128, 231, 236, 243, 255, 255, 255],
        "bone": [0, 0, 72, 76, 82, 106, 128, 255],
    }
    for label, row in expected.items():
        np.testing.assert_array_equal(np.asarray(shown[label])[0], row, err_msg=label)
    dataset.Modality = "DX"
    dataset.save_as(path, enforce_file_format=True)
    assert list(dicom.load_windows(path, name="n")) == [""]
    dataset.BurnedInAnnotation = "YES"
    dataset.save_as(path, enforce_file_format=True)
    with pytest.raises(ImageError, match="BurnedInAnnotation"):
        dicom.load_windows(path, name="n")
