"""Read the image formats: NRRD, NIfTI and DICOM bytes to upright arrays, without guesses.

volume  canonical [z, y, x]: z towards the head, y towards the back, x towards the patient's left
axial     rows front -> back,  columns patient's right -> left   (seen from the feet)
coronal   rows head -> feet,   columns patient's right -> left
sagittal  rows head -> feet,   columns front -> back
"""

import gzip
import io
import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num, Shaped

NRRD_TYPES = {"short": "i2", "int": "i4", "uchar": "u1", "unsigned char": "u1", "float": "f4"}
NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 512: "u2"}  # NIfTI-1 datatype codes
MAX_VOXELS = 2**26  # 64 Mi: the largest volume used has 16 Mi; protects against a false header
Facts = dict[str, tuple[object, str]]  # name: (value, its source)


@dataclass(frozen=True)
class SampleImage:
    """One candidate: gray [h, w] or color [h, w, 3] bytes, and its known facts."""

    pixels: Shaped[np.ndarray, "..."]
    package: str
    path: str
    frame: int
    group: str
    facts: Facts


@dataclass(frozen=True)
class Volume:
    """Voxels in canonical order with their size in millimetres (z, y, x)."""

    data: Shaped[np.ndarray, "z y x"]
    spacing: tuple[float, float, float]

    def slice(self, plane: str, k: int) -> Shaped[np.ndarray, "h w"]:
        """Return one upright slice; coronal and sagittal slices require cubic voxels."""
        if plane == "axial":
            return self.data[k]
        if max(self.spacing) > 1.01 * min(self.spacing):
            raise ValueError(
                f"plane: {plane!r} of voxels {self.spacing} mm; only 'axial' is true to scale"
            )
        return self.data[::-1, k, :] if plane == "coronal" else self.data[::-1, :, k]


def read_nrrd(content: bytes) -> Volume:
    """Read the volume of an NRRD file in left-posterior-superior space, raw or gzip encoded."""
    head, gap, body = content.partition(b"\n\n")
    if not head.startswith(b"NRRD000") or not gap:
        raise ValueError(
            "not an NRRD file: it must start with 'NRRD000' and have an empty line after its header"
        )
    rows = [
        line.split(":", 1)
        for line in head.decode("ascii").splitlines()
        if re.match(r"[a-z ]+:", line)
    ]
    field = {key.strip(): value.strip() for key, value in rows}
    if field["space"] != "left-posterior-superior":
        raise ValueError(f"space: {field['space']!r}; only 'left-posterior-superior' is supported")
    sizes = [int(n) for n in field["sizes"].split()]
    order = {"little": "<", "big": ">"}[field.get("endian", "little")]
    dtype = np.dtype(order + NRRD_TYPES[field["type"]])
    if field["encoding"] in ("gzip", "gz"):
        body = _gunzip(body)
    elif field["encoding"] != "raw":
        raise ValueError(f"encoding: {field['encoding']!r}; only 'raw' and 'gzip' are supported")
    axes = np.array(
        [
            [float(n) for n in v.split(",")]
            for v in re.findall(r"\(([^)]*)\)", field["space directions"])
        ]
    )
    return _canonical(_voxels(body, dtype, sizes), axes)


def read_nifti(content: bytes) -> Volume:
    """Read the volume of a (gzipped) NIfTI-1 file by its sform: axes point right, front and up."""
    content = _gunzip(content) if content[:2] == b"\x1f\x8b" else content
    order = (
        "<" if int(np.frombuffer(content, "<i4", 1)[0]) == 348 else ">"
    )  # 348: size of a NIfTI-1 header
    if content[344:347] != b"n+1":
        raise ValueError(f"magic: {content[344:348]!r} is not 'n+1', a single-file NIfTI-1")
    dim = np.frombuffer(content, order + "i2", 8, 40)
    code = int(np.frombuffer(content, order + "i2", 1, 70)[0])
    offset = int(np.frombuffer(content, order + "f4", 1, 108)[0])
    if int(np.frombuffer(content, order + "i2", 1, 254)[0]) == 0:
        raise ValueError("sform_code: 0; the file does not state the orientation of its axes")
    srow = np.frombuffer(content, order + "f4", 12, 280).reshape(3, 4)[:, :3].astype(float)
    voxels = _voxels(
        content[offset:], np.dtype(order + NIFTI_TYPES[code]), [int(n) for n in dim[1:4]]
    )
    return _canonical(voxels, (np.diag([-1.0, -1.0, 1.0]) @ srow).T)


def _gunzip(content: bytes) -> bytes:
    with gzip.open(io.BytesIO(content)) as stream:
        data = stream.read(8 * MAX_VOXELS + 1)
    if len(data) > 8 * MAX_VOXELS:
        raise ValueError(f"the compressed body has more than {8 * MAX_VOXELS} bytes")
    return data


def _voxels(body: bytes, dtype: np.dtype, sizes: list[int]) -> Shaped[np.ndarray, "k j i"]:
    count = int(np.prod(sizes))
    if len(sizes) != 3 or not 0 < count <= MAX_VOXELS or len(body) < count * dtype.itemsize:
        raise ValueError(f"sizes: {sizes} do not fit a body of {len(body)} bytes of {dtype}")
    return np.frombuffer(body, dtype, count).reshape(sizes[::-1])  # the first axis is contiguous


def _canonical(data: Shaped[np.ndarray, "k j i"], axes: Float[np.ndarray, "3 3"]) -> Volume:
    """Return voxels in canonical order.

    The stored axes point along the rows of `axes` (left, back, up).
    """
    main = np.abs(axes).argmax(axis=1)  # which body axis each stored axis is along
    length = np.abs(axes).max(axis=1)
    if sorted(main) != [0, 1, 2] or (length < 0.99 * np.linalg.norm(axes, axis=1)).any():
        raise ValueError(
            f"axes: {axes.tolist()} are oblique; only axes along those of the body are supported"
        )
    for stored, body_axis in enumerate(main):
        if axes[stored, body_axis] < 0:
            data = np.flip(data, 2 - stored)
    where = [int(np.nonzero(main == body_axis)[0][0]) for body_axis in (2, 1, 0)]
    return Volume(data.transpose([2 - w for w in where]), tuple(float(length[w]) for w in where))


def to_bytes(
    pixels: Num[np.ndarray, "h w"], window: tuple[float, float] | None
) -> Shaped[np.ndarray, "h w"]:
    """Return gray values 0..255, linear inside `window` or else inside percentiles 0.5..99.5."""
    pixels = pixels.astype(np.float64)
    low, high = window if window else np.percentile(pixels, (0.5, 99.5))
    return np.round(255 * np.clip((pixels - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)


def read_dicom(content: bytes):
    """Return (dataset, frames): upright frames, [n, h, w] numbers or [n, h, w, 3] color bytes."""
    import pydicom
    from pydicom.pixels import apply_color_lut

    dataset = pydicom.dcmread(io.BytesIO(content), force=True)
    pixels = (
        dataset.pixel_array
    )  # pydicom >= 3 has already turned YBR into RGB: do not convert again
    kind = dataset.PhotometricInterpretation
    if int(dataset.get("NumberOfFrames") or 1) == 1 and pixels.ndim == 2 + (
        dataset.SamplesPerPixel > 1
    ):
        pixels = pixels[None]
    if kind == "PALETTE COLOR":
        pixels = np.stack([apply_color_lut(frame, dataset) for frame in pixels])
        pixels = (pixels >> 8 if pixels.dtype == np.uint16 else pixels).astype(np.uint8)
    if pixels.ndim == 3:
        pixels = pixels * float(dataset.get("RescaleSlope") or 1) + float(
            dataset.get("RescaleIntercept") or 0
        )
        if kind == "MONOCHROME1":  # stored with white as zero
            pixels = pixels.max() - pixels + pixels.min()
    axes = dataset.get("ImageOrientationPatient")
    if axes and float(axes[4]) < -0.9:  # if rows point to the front, turn them to point to the back
        pixels = pixels[:, ::-1]
    return dataset, pixels


def dicom_plane(dataset) -> str | None:
    """Return 'axial', 'coronal' or 'sagittal' if the slice is within 26 degrees of it, or None."""
    axes = dataset.get("ImageOrientationPatient")
    if not axes:
        return None
    numbers = np.array([float(n) for n in axes])
    normal = np.abs(np.cross(numbers[:3], numbers[3:]))
    return ("sagittal", "coronal", "axial")[int(normal.argmax())] if normal.max() > 0.9 else None
