"""Convert a DICOM radiograph to a gray image; only pixels leave this module.

    header bounded -> stored values -> modality LUT -> VOI LUT or window -> 0..255 -> MONOCHROME1
                      (no padding)     (rescale)       (what is shown)     min..max   inverted

`load_windows` also shows a CT in the windows of CT_WINDOWS, which replace its own; their ends are
black and white.

Padding (PixelPaddingValue, to PixelPaddingRangeLimit) is excluded from min..max, and black. A
window that cannot be applied, or that would show nothing, is left out, which is logged once.

MIMIC-CXR-JPG was made without the VOI LUT and with histogram equalization, so the two forms of one
radiograph give different codes. Errors contain no value of the header: it may hold a name. The
reader of the sample (data/sample/medical_formats.py) trusts its pinned files and returns their
headers; this module does neither.
Read at: pydicom.github.io, pydicom.pixels.processing.apply_windowing; DICOM PS3.3 C.7.5.1.1.2
(padding), C.11.1 and C.11.2 (LUTs and windows; neither inverts MONOCHROME1).
"""

import contextlib
import functools
import logging
import math
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image

from medmax_jax.data.image_tokens import dicom_bounds
from medmax_jax.data.image_tokens.dicom_bounds import RefusedError
from medmax_jax.data.records.row_streams import SourceError
from medmax_jax.models.image_headers import ImageError
from medmax_jax.models.images import MAX_PIXELS

BAND = 2**18  # pixels that are computed at a time, in float64
# Center and width in Hounsfield units, as radiology uses them: radiopaedia.org, windowing (CT).
CT_WINDOWS = {
    "brain": (40, 80),
    "soft tissue": (50, 400),
    "lung": (-600, 1_500),
    "bone": (400, 1_800),
}
_log = logging.getLogger("medmax_jax.dicom")


def load(
    path: pathlib.Path, *, name: str, max_pixels: int = MAX_PIXELS, burned_in: bool = False
) -> PIL.Image.Image:
    """Return the image; raise ImageError, whose message has `name` and never the path.

    A file whose header states that text is burned into its pixels is rejected unless `burned_in`.
    """
    windows: dict[str, None] = {"": None}
    return _read(path, windows, name=name, max_pixels=max_pixels, burned_in=burned_in)[""]


def load_windows(
    path: pathlib.Path, *, name: str, max_pixels: int = MAX_PIXELS
) -> dict[str, PIL.Image.Image]:
    """Return the image as its file states (""), and a CT also in each of CT_WINDOWS.

    The errors are those of `load`.
    """
    return _read(path, {"": None} | CT_WINDOWS, name=name, max_pixels=max_pixels, burned_in=False)


def _read(
    path: pathlib.Path,
    windows: Mapping[str, tuple[int, int] | None],
    *,
    name: str,
    max_pixels: int,
    burned_in: bool,
) -> dict[str, PIL.Image.Image]:
    """Return the image in each window that applies to it."""
    _check_pydicom()
    problem = "damaged, or not a supported DICOM file; check the file"
    with silence():
        try:
            content = dicom_bounds.read(path)
            head = dicom_bounds.header(content)
            kind = _checked(head, max_pixels, burned_in)
            dicom_bounds.check_decoder(head)
            dataset = dicom_bounds.with_pixels(content)
            dicom_bounds.check_pixels(dataset)
            is_ct = str(head.get("Modality") or "").strip() == "CT"  # so in Hounsfield units
            return {
                label: PIL.Image.fromarray(_shown(dataset, kind, window))
                for label, window in windows.items()
                if window is None or is_ct
            }
        except RefusedError as error:
            problem = str(error)
        except FileNotFoundError:
            problem = "no such file; check the image folder"
        except Exception:  # decoders raise any exception, and may repeat the header in it
            pass
    raise ImageError(f"{name}: {problem}") from None


def _check_pydicom() -> None:
    try:
        import pydicom.pixels  # noqa: F401
    except ImportError as error:
        raise SourceError("DICOM files require pydicom: pip install pydicom") from error


def _checked(head: Any, max_pixels: int, burned_in: bool) -> str:
    frames = int(head.get("NumberOfFrames") or 1)
    rows, columns = int(head.Rows), int(head.Columns)
    if min(rows, columns, frames) < 1 or rows * columns * frames > max_pixels:
        raise RefusedError(f"Rows x Columns x NumberOfFrames is not in the range 1 .. {max_pixels}")
    kind = str(head.PhotometricInterpretation)
    gray = kind in ("MONOCHROME1", "MONOCHROME2") and int(head.SamplesPerPixel) == 1
    if not gray or frames != 1 or int(head.BitsAllocated) not in (8, 16, 32):
        raise RefusedError("not a single frame of gray pixels, so not a radiograph")
    if str(head.get("BurnedInAnnotation") or "").strip().upper() == "YES" and not burned_in:
        raise RefusedError("BurnedInAnnotation is YES: the pixels may show a name")
    return kind


def _shown(dataset: Any, kind: str, window: tuple[int, int] | None) -> np.ndarray:
    stored = dataset.pixel_array
    if stored.shape != (int(dataset.Rows), int(dataset.Columns)):
        raise RefusedError("the pixels are not one image of Rows x Columns")
    padding = _padding(dataset)

    def parts(view: Callable) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yield rows, their displayed values, and which of them are pixels of the image."""
        step = max(1, BAND // stored.shape[1])
        for top in range(0, len(stored), step):
            band = stored[top : top + step]
            inside = np.ones(band.shape, bool) if padding is None else ~padding(band)
            values = np.asarray(view(_rescaled(band, dataset)), np.float64)
            if not np.isfinite(values).all():
                raise RefusedError("the pixels have values that are not finite")
            yield slice(top, top + step), values, inside

    def extent(view: Callable) -> tuple[float, float]:
        ranges = [(v[i].min(), v[i].max()) for _, v, i in parts(view) if i.any()]
        return min((r[0] for r in ranges), default=0.0), max((r[1] for r in ranges), default=0.0)

    view = _view(dataset) if window is None else functools.partial(_in_window, window=window)
    low, high = extent(view) if window is None else (0.0, 1.0)
    if low == high and view is not _plain:
        low, high = extent(_plain)
        if low != high:
            _log_ignored_window("it maps all pixels to one value")
            view = _plain
    image = np.zeros(stored.shape, np.uint8)
    for rows, values, inside in parts(view):
        gray = (values - low) / max(high - low, 1e-9)
        gray = np.round(255 * (1 - gray if kind == "MONOCHROME1" else gray)).clip(0, 255)
        image[rows] = np.where(inside, gray, 0)
    return image


def _padding(dataset: Any) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return a test for stored padding values; None without PixelPaddingValue."""
    if dataset.get("PixelPaddingValue") is None:
        return None
    bits, signed = int(dataset.BitsAllocated), int(dataset.PixelRepresentation) == 1

    def as_stored(value: int) -> int:
        value = int(value) % 2**bits  # writers confuse the signed and the unsigned form
        return value - 2**bits if signed and value >= 2 ** (bits - 1) else value

    first = as_stored(dataset.PixelPaddingValue)
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((first, first if limit is None else as_stored(limit)))
    return lambda values: (low <= values) & (values <= high)


def _rescaled(values: np.ndarray, dataset: Any) -> np.ndarray:
    if items := dataset.get("ModalityLUTSequence"):
        return _looked_up(values, items[0], dataset)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None or intercept is None:
        return values
    return values.astype(np.float64) * float(slope) + float(intercept)


def _looked_up(values: np.ndarray, item: Any, dataset: Any) -> np.ndarray:
    """Return entries of a LUT; pydicom's own wraps values at an entry's width, then clips them."""
    entries, first, _ = (int(n) for n in item.LUTDescriptor)
    data, entries = item.LUTData, entries or 2**16
    if isinstance(data, bytes):
        order = "<" if dataset.original_encoding[1] else ">"
        data = np.frombuffer(data, "u1" if len(data) < 2 * entries else f"{order}u2")
    table = np.atleast_1d(data)[:entries].astype(np.float64)
    index = np.clip(values.astype(np.float64) - first, 0, len(table) - 1)
    return table[index.astype(np.int64)]


def _plain(values: np.ndarray) -> np.ndarray:
    return values


def _view(dataset: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return the VOI LUT, else the first window that can be applied, else unchanged values."""
    from pydicom.pixels import apply_windowing

    items = dataset.get("VOILUTSequence")
    if items and items[0].get("LUTDescriptor") and items[0].get("LUTData") is not None:
        return lambda values: _looked_up(values, items[0], dataset)
    centers, widths = (_numbers(dataset.get(n)) for n in ("WindowCenter", "WindowWidth"))
    if not centers or not widths:
        return _plain
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise RefusedError("VOILUTFunction is not LINEAR, LINEAR_EXACT or SIGMOID; correct it")
    for n, (center, width) in enumerate(zip(centers, widths, strict=False)):
        valid_width = width >= 1 if function == "LINEAR" else width > 0
        if valid_width and math.isfinite(center) and math.isfinite(width):
            return functools.partial(_windowed, dataset=dataset, index=n, apply=apply_windowing)
    _log_ignored_window("its WindowWidth is below 1, or not a number")
    return _plain


def _windowed(values: np.ndarray, *, dataset: Any, index: int, apply: Callable) -> np.ndarray:
    return apply(values, dataset, index=index)


def _in_window(values: np.ndarray, *, window: tuple[int, int]) -> np.ndarray:
    """Map a window to 0..1 and clip: LINEAR_EXACT of DICOM PS3.3 C.11.2.1.3.2."""
    center, width = window
    return ((values.astype(np.float64) - center) / width + 0.5).clip(0, 1)


def _numbers(value: Any) -> list[float]:
    """Return the numbers of an element with one value or several."""
    values = [] if value is None else [value] if isinstance(value, int | float) else list(value)
    return [float(v) for v in values]


@functools.cache  # once per run, whatever the number of files
def _log_ignored_window(reason: str) -> None:
    _log.warning("DICOM: the window of a file is ignored: %s", reason)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Silence pydicom's warnings and log lines, which repeat values of the header.

    Warnings are a setting of the complete process: threads that decode must run inside this
    context as well.
    """
    log = logging.getLogger("pydicom")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before
