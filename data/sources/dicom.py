"""A DICOM radiograph to a grey picture; only pixels leave this file.

    header bounded -> stored values -> modality LUT -> VOI LUT or window -> 0..255 -> MONOCHROME1
                                       (rescale)       (what is shown)     min..max   inverted

MIMIC-CXR-JPG was made without the VOI LUT and with histogram equalisation, so the two forms of one
radiograph give different codes. Errors carry no value of the header: it may hold a name. The reader
of the sample (data/sample/decode.py) trusts its pinned files and hands their headers on; this one
does neither.
Read at: pydicom.github.io, pydicom.pixels.processing.apply_modality_lut and apply_voi_lut (their
order; neither inverts MONOCHROME1).
"""

import contextlib
import logging
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image

from data.sources.row import SourceError
from medmax_jax.images import MAX_PIXELS, ImageError

MAX_BYTES = 2**29  # 512 MiB; a radiograph has about 10 to 30 MiB
_HEADER = [
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "BitsAllocated",
    "PhotometricInterpretation",
    "BurnedInAnnotation",
]


def load(
    path: pathlib.Path, *, name: str, max_pixels: int = MAX_PIXELS, burned_in: bool = False
) -> PIL.Image.Image:
    """The picture; raises ImageError, which says `name` and never the path.

    A file that says that text is burned into its pixels is refused unless `burned_in`.
    """
    pydicom = _pydicom()
    problem = "damaged, or not a DICOM file that is read here; check the file"
    with silence():
        try:
            if path.stat().st_size > MAX_BYTES:
                raise _RefusedError(f"more than {MAX_BYTES} bytes")
            head = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER)
            kind = _checked(head, max_pixels, burned_in)
            return PIL.Image.fromarray(_shown(pydicom.dcmread(path), kind))
        except _RefusedError as error:
            problem = str(error)
        except FileNotFoundError:
            problem = "no such file; check the image folder"
        except Exception:  # decoders raise anything, and may repeat the header in it
            pass
    raise ImageError(f"{name}: {problem}") from None


class _RefusedError(ValueError):
    """A file that is whole but not taken; the message has no value of it."""


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise SourceError("DICOM files need pydicom: pip install pydicom") from error
    return pydicom


def _checked(head: Any, max_pixels: int, burned_in: bool) -> str:
    frames = int(head.get("NumberOfFrames") or 1)
    rows, columns = int(head.Rows), int(head.Columns)
    if min(rows, columns, frames) < 1 or rows * columns * frames > max_pixels:
        raise _RefusedError(f"Rows x Columns x NumberOfFrames is not within 1 .. {max_pixels}")
    kind = str(head.PhotometricInterpretation)
    grey = kind in ("MONOCHROME1", "MONOCHROME2") and int(head.SamplesPerPixel) == 1
    if not grey or frames != 1:
        raise _RefusedError("not one frame of grey pixels, so not a radiograph")
    if str(head.get("BurnedInAnnotation") or "").strip().upper() == "YES" and not burned_in:
        raise _RefusedError("BurnedInAnnotation is YES: the pixels may show a name")
    return kind


def _shown(dataset: Any, kind: str) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    values = apply_modality_lut(dataset.pixel_array, dataset)
    values = np.asarray(apply_voi_lut(values, dataset), np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise _RefusedError("the pixels are not one finite picture")
    low, high = values.min(), values.max()
    grey = (values - low) / max(high - low, 1e-9)
    return np.round(255 * (1 - grey if kind == "MONOCHROME1" else grey)).astype(np.uint8)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """pydicom's warnings and log lines repeat values of the header.

    Warnings are the whole process's: threads that decode need this around them all as well.
    """
    log = logging.getLogger("pydicom")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before
