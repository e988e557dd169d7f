"""Read MIMIC-CXR: chest radiographs, as JPG or DICOM, with the reports of their studies.

    file in the folder                                   what is read of it
    mimic-cxr-2.0.0-split.csv.gz (or .csv)               dicom_id, study_id, subject_id, split
    mimic-cxr-2.0.0-metadata.csv.gz, if it exists        dicom_id, ViewPosition
    files/p10/p10000032/s50414267.txt                    the report of a study
    files/p10/p10000032/s50414267/<dicom_id>.jpg, .dcm   a radiograph

The tables come with MIMIC-CXR-JPG, the reports and DICOM files with MIMIC-CXR; reports may be
stored under mimic-cxr-reports/, as in their zip. split is train, validate or test.

    report      "    FINAL REPORT\\n EXAMINATION:  CHEST (PA AND LAT)\\n\\n FINDINGS: \\n ..
                 \\n IMPRESSION: \\n ..", with ___ where an identifier was removed
    document    "<image>Examine this ..<reserved08706>Findings: ..\\nImpression: .."
                "Generate a chest x-ray for ..<reserved08706><image>"

Half of the radiographs, by hash, request the report, half the image, as in MedMax. Only the last
section of each of the two names is kept: indications and comparisons describe the patient. A
placeholder is dropped. Which views MedMax took is not published: PA and AP if the metadata are
available, otherwise all. Ids and paths of MIMIC are never written, only hashes of them: users who
have the data can find a row, and no other reader learns anything. No message about a row repeats
any of it.
Read at: mimic.mit.edu/docs/iv/modules/cxr (ids and tables; the files of mimic-cxr and mimic-cxr-jpg
2.0.0 as public code that uses them names them, PhysioNet's own pages were not read);
github.com/MIT-LCP/mimic-cxr txt/section_parser.py, whose list of exceptions for single studies is
not applied here.
"""

import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from medmax_jax.data.mixture import REPORT
from medmax_jax.data.records.document import pseudonym
from medmax_jax.data.records.row_streams import RowLocation, csv_rows
from medmax_jax.data.sources.row import (
    ExcludedRow,
    Plan,
    RejectedRow,
    Row,
    RowError,
    choose_template,
    clean,
    collect_rows,
    first_file,
    join_turns,
    seeded_rng,
)
from medmax_jax.models.tokenizer import IMAGE_NAME, SEP_NAME

NAME = "mimic-cxr-2.0.0"
SPLITS = {"train": "train", "validate": "validation", "test": "test"}
FRONTAL = ("PA", "AP")
MAX_REPORT = 2**17  # bytes; the longest have a few thousand
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z ,/()&-]{2,60}):", re.MULTILINE)
_PLACEHOLDER = re.compile(r"_{2,}")
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}")  # 40 hexadecimal digits in five groups


def read(folder: pathlib.Path, plan: Plan) -> Iterator[Row | RejectedRow]:
    """Yield a document for each radiograph of the split that has a report with findings."""
    path = first_file(folder, (f"{NAME}-split.csv.gz", f"{NAME}-split.csv"), plan.source)
    rows = csv_rows(path, ("dicom_id", "study_id", "subject_id", "split"))
    return collect_rows(rows, functools.partial(_row, folder, plan, _frontal(folder)))


def sections(report: str) -> dict[str, str]:
    """Return the last section of each heading, in one line, without placeholders.

    sections("FINDINGS:  Clear\\n lungs, ___.\\n IMPRESSION: Normal.")
    ->  {"FINDINGS": "Clear lungs.", "IMPRESSION": "Normal."}
    """
    marks = list(_HEADING.finditer(report))
    edges = [m.start() for m in marks] + [len(report)]
    kept = {}
    for mark, end in zip(marks, edges[1:], strict=True):
        text = _PLACEHOLDER.sub("", report[mark.end() : end])
        text = re.sub(r"\s+", " ", text).strip()
        text = re.sub(r"[\s,;:]+([.])", r"\1", re.sub(r"\s+([.,;:])", r"\1", text))
        if text:
            kept[mark.group(1).strip()] = text
    return kept


def _frontal(folder: pathlib.Path) -> set[str] | None:
    """Return the ids of frontal radiographs, or None if the folder does not state them."""
    names = (f"{NAME}-metadata.csv.gz", f"{NAME}-metadata.csv")
    if not any((folder / name).is_file() for name in names):
        return None
    rows = csv_rows(first_file(folder, names, "MIMIC-CXR"), ("dicom_id", "ViewPosition"))
    return {row["dicom_id"] for _, row in rows if row and row["ViewPosition"] in FRONTAL}


def _row(
    folder: pathlib.Path,
    plan: Plan,
    frontal: set[str] | None,
    place: RowLocation,
    item: dict[str, Any],
) -> Row:
    dicom, study, subject = item["dicom_id"], item["study_id"], item["subject_id"]
    # They become parts of a path, so they must have the form that MIMIC documents.
    if not (_ID.fullmatch(dicom) and re.fullmatch(r"5\d{7}", study)):
        raise RowError("dicom_id or study_id: not in the format of MIMIC")
    if not re.fullmatch(r"1\d{7}", subject) or item["split"] not in SPLITS:
        raise RowError("subject_id or split: not in the format of MIMIC")
    split = SPLITS[item["split"]]
    if split != plan.split:
        raise ExcludedRow("of another split")
    if frontal is not None and dicom not in frontal:
        raise ExcludedRow("not a frontal view")
    patient = f"files/p{subject[:2]}/p{subject}"
    text = _report(folder, f"{patient}/s{study}.txt")
    stem = f"{patient}/s{study}/{dicom}"
    image = stem + (".jpg" if (folder / f"{stem}.jpg").is_file() else ".dcm")
    name = pseudonym(dicom)
    return Row(
        id=f"{plan.source}/{name}",
        text=_document(plan, name, text),
        image=image,
        image_path=name,
        task=REPORT,
        source=plan.source,
        split=split,
        group=pseudonym(subject),
        turns=1,
    )


def _document(plan: Plan, name: str, report: str) -> str:
    if seeded_rng("direction", name).random() < 0.5:
        return join_turns([(choose_template("report", plan, name), report)], image="start")
    return f"{choose_template('radiograph', plan, name).format(report)}{SEP_NAME}{IMAGE_NAME}"


def _report(folder: pathlib.Path, path: str) -> str:
    for root in ("", "mimic-cxr-reports"):
        try:
            with open(folder / root / path, "rb") as file:
                raw = file.read(MAX_REPORT + 1)
        except OSError:
            continue
        if len(raw) > MAX_REPORT:
            raise RowError("report: too long")
        kept = sections(raw.decode("utf-8", "replace"))
        lines = [f"{n.capitalize()}: {kept[n]}" for n in ("FINDINGS", "IMPRESSION") if n in kept]
        if not lines:
            raise ExcludedRow("a report without findings and impression")
        return clean("\n".join(lines), "report")
    raise RowError("report: no such file, or unreadable")
