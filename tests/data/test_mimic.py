"""Tests of MIMIC-CXR: reports to sections, DICOM to pixels, no patient data in any output."""

import json
import logging
import sys

import numpy as np
import pydicom
import pytest
from pydicom.datadict import DicomDictionary
from source_setup import DICOM_IDS, REPORT, STUDY, SUBJECT, dicom_dataset, mimic_tables, plan

from medmax_jax.data import mixture, prepare
from medmax_jax.data.image_tokens import dicom, document_codes
from medmax_jax.data.records import jsonl, writer
from medmax_jax.data.records.row_streams import SourceError
from medmax_jax.data.sources import reports
from medmax_jax.data.sources.row import RejectedRow, Row, templates
from medmax_jax.models.image_headers import ImageError
from medmax_jax.models.tokenizer import Tokenizer

CANARY = "CANARY7351"  # short enough for every kind of DICOM text
LOWER = "canary7351"  # no value for its place, so pydicom repeats it in warnings and errors
RAMP = np.tile(np.arange(0, 4000, 100, dtype=np.uint16), (30, 1))  # dark left, bright right
SECRETS = (CANARY, LOWER, SUBJECT, STUDY, "17351017", "17351018", "ascites", *DICOM_IDS)


def rows_of(folder, **settings):
    results = list(reports.read(folder, plan("MIMIC-CXR", **settings)))
    return [r for r in results if isinstance(r, Row)], [
        r for r in results if isinstance(r, RejectedRow)
    ]


@pytest.fixture(autouse=True)
def logger_as_before():
    """Reset the logger: a program's main() gives it a handler of that moment's stderr."""
    log = logging.getLogger("medmax_jax.prepare")
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Use a batch of one image on each of the eight devices of the tests."""
    monkeypatch.setattr(document_codes, "BATCH", 2)


@pytest.fixture
def read_image(tmp_path):
    """Return the function that reads a dataset, saved as a file, as an image."""

    def read_image(dataset, **settings):
        dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        return np.asarray(dicom.load(tmp_path / "a.dcm", name="n", **settings)).astype(int)

    return read_image


def test_reports_become_findings_and_impression():
    found = reports.sections(REPORT)
    assert found["IMPRESSION"] == "No acute cardiopulmonary process."
    assert found["FINDINGS"] == (
        "There is no focal consolidation, pleural effusion or pneumothorax."
        " Compared to, the heart is normal."
    )
    twice = "FINDINGS: First.\n IMPRESSION: ___\n ADDENDUM:\n x\n FINDINGS: Last, ___."
    assert reports.sections(twice) == {"FINDINGS": "Last.", "ADDENDUM": "x"}
    assert reports.sections("no headings at all: here") == {}
    assert reports.sections("") == {}


def test_documents_of_both_directions(tmp_path):
    mimic_tables(tmp_path, ["PA"] * 6, ["train"] * 6)
    rows, bad = rows_of(tmp_path)
    assert len(rows) == 6 and not bad
    texts = {"report": [], "radiograph": []}
    for r in rows:
        texts["report" if r.text.startswith("<image>") else "radiograph"].append(r.text)
        assert r.task == mixture.REPORT and r.turns == 1
    assert texts["report"] and texts["radiograph"]
    for text in texts["report"]:
        question, answer = text.removeprefix("<image>").split("<reserved08706>")
        assert question in templates("report")
        assert answer.startswith("Findings: There") and "\nImpression: No acute" in answer
    assert all(t.endswith("process.<reserved08706><image>") for t in texts["radiograph"])
    assert all("___" not in r.text and "ascites" not in r.text for r in rows)
    assert len({r.group for r in rows}) == 1 and len({r.id for r in rows}) == 6


def test_views_splits_and_missing_reports(tmp_path):
    study = mimic_tables(tmp_path, ["PA", "LATERAL", "AP"], ["train", "train", "validate"])
    rows, bad = rows_of(tmp_path)
    assert len(rows) == 1 and [b.by_rule for b in bad] == [True, True]
    assert rows[0].image.endswith(f"s{STUDY}/{DICOM_IDS[0]}.dcm")
    assert [r.split for r in rows_of(tmp_path, split="validation")[0]] == ["validation"]
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    assert len(rows_of(tmp_path)[0]) == 2  # no file states which are frontal
    study.with_suffix(".txt").write_text("FINAL REPORT\n INDICATION: none\n")
    left = {b.reason for b in rows_of(tmp_path)[1] if b.by_rule}
    assert left == {"a report without findings and impression", "of another split"}
    study.with_suffix(".txt").unlink()
    assert not any(b.by_rule for b in rows_of(tmp_path)[1] if "report" in b.reason)


def test_invalid_ids_are_not_used_in_paths(tmp_path):
    mimic_tables(tmp_path, ["PA"], ["train"])
    header = "dicom_id,study_id,subject_id,split\n"
    (tmp_path / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    lines = [f"../../etc,{STUDY},{SUBJECT},train", f"{DICOM_IDS[0]},5/../../../9,{SUBJECT},train"]
    lines += [f"{DICOM_IDS[0]},{STUDY},1,train", f"{DICOM_IDS[0]},{STUDY},{SUBJECT},dev"]
    (tmp_path / "mimic-cxr-2.0.0-split.csv").write_text(header + "\n".join(lines) + "\n")
    rows, bad = rows_of(tmp_path)
    assert not rows and len(bad) == 4 and all("not in the format of MIMIC" in b.reason for b in bad)


def test_pixels_are_scaled_from_minimum_to_maximum(read_image):
    image = read_image(dicom_dataset(RAMP))
    assert image.shape == (30, 40) and image[0, 0] == 0 and image[0, -1] == 255
    assert np.array_equal(image[0], np.round(255 * np.arange(40) / 39).astype(int))


def test_monochrome1_is_inverted(read_image):
    plain = read_image(dicom_dataset(RAMP))
    inverted = read_image(dicom_dataset(RAMP, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(inverted, 255 - plain)


def test_rescale_is_applied_before_the_window(read_image):
    """In rescaled units the window is 1000 .. 3000: values below are black, above white."""
    tags = dict(RescaleSlope="2", RescaleIntercept="-1000", WindowCenter="2000", WindowWidth="2000")
    image = read_image(dicom_dataset(RAMP, **tags))[0]
    rescaled = 2 * RAMP[0].astype(int) - 1000
    assert (image[rescaled <= 1000] == 0).all() and (image[rescaled >= 3000] == 255).all()
    middle = (rescaled > 1000) & (rescaled < 3000)
    expected = 255 * (rescaled[middle] - 1000) / 2000
    np.testing.assert_allclose(image[middle], expected, atol=1)


def test_voi_lut_takes_precedence_over_a_window(read_image):
    lut = pydicom.Dataset()
    lut.add_new("LUTDescriptor", "US", [4, 0, 16])  # values 0 .. 3, and beyond as 3
    lut.add_new("LUTData", "US", [0, 1000, 1000, 4000])
    steps = np.tile(np.arange(4, dtype=np.uint16), (4, 1))
    dataset = dicom_dataset(steps, WindowCenter="1", WindowWidth="2")
    dataset.VOILUTSequence = [lut]
    assert read_image(dataset)[0].tolist() == [0, 64, 64, 255]


def test_flat_image_is_black_and_not_an_error(read_image):
    assert not read_image(dicom_dataset(np.full((4, 5), 7, np.uint16))).any()


@pytest.mark.parametrize(
    "tags, message",
    [
        (dict(Rows=60_000, Columns=60_000), "Rows x Columns x NumberOfFrames is not in the range"),
        (dict(NumberOfFrames="1000000"), "Rows x Columns x NumberOfFrames is not in the range"),
        (dict(Rows=0), "Rows x Columns x NumberOfFrames is not in the range"),
        (dict(NumberOfFrames="2"), "not a single frame of gray pixels"),
        (dict(PhotometricInterpretation="RGB"), "not a single frame of gray pixels"),
        (dict(BurnedInAnnotation="YES"), "BurnedInAnnotation is YES"),
        (dict(Columns=41), "damaged"),
        (dict(PixelData=b"\0\0"), "damaged"),
    ],
)
def test_unsupported_files_are_rejected(read_image, tags, message):
    with pytest.raises(ImageError, match=message) as raised:
        read_image(dicom_dataset(RAMP, **tags))
    assert str(raised.value).startswith("n: ") and raised.value.__cause__ is None


def test_limits_are_checked_before_the_pixels(read_image, monkeypatch):
    monkeypatch.setattr(dicom, "_shown", lambda *_: pytest.fail("decoded"))
    for tags, max_pixels in ((dict(), 1_199), (dict(BurnedInAnnotation="YES"), 10**6)):
        with pytest.raises(ImageError):
            read_image(dicom_dataset(RAMP, **tags), max_pixels=max_pixels)


def test_burned_in_text_is_accepted_on_request(read_image):
    dataset = dicom_dataset(RAMP, BurnedInAnnotation="YES")
    assert read_image(dataset, burned_in=True).max() == 255


def test_missing_file_and_file_that_is_not_dicom(tmp_path):
    with pytest.raises(ImageError, match="n: no such file"):
        dicom.load(tmp_path / "a.dcm", name="n")
    (tmp_path / "a.dcm").write_bytes(b"DICM" * 100)
    with pytest.raises(ImageError, match="n: damaged"):
        dicom.load(tmp_path / "a.dcm", name="n")


def test_missing_pydicom_is_reported_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(SourceError, match="pip install pydicom"):
        dicom.load(tmp_path / "a.dcm", name="n")


def marked_dataset():
    """Return a radiograph whose header contains CANARY in every text element."""
    dataset, filled = dicom_dataset(RAMP), 0
    for tag, (vr, *_, keyword) in DicomDictionary.items():
        if vr in ("LO", "SH", "PN", "LT", "ST", "UC", "UT") and keyword and tag >> 16 > 7:
            if tag >> 16 != 0x28 or keyword.endswith("Explanation"):  # 0028: how to show pixels
                dataset.add_new(tag, vr, CANARY)
                filled += 1
    inner = pydicom.Dataset()
    inner.PatientName = inner.RequestedProcedureDescription = CANARY
    inner.RequestAttributesSequence = [pydicom.Dataset()]
    inner.RequestAttributesSequence[0].ScheduledProcedureStepDescription = CANARY
    dataset.RequestAttributesSequence = [inner]
    dataset.OtherPatientIDsSequence = [inner]
    block = dataset.private_block(0x0011, CANARY, create=True)
    block.add_new(0x01, "LO", CANARY)
    block.add_new(0x02, "OB", CANARY.encode())
    dataset.StudyDate, dataset.PatientBirthDate, dataset.PatientAge = "17351017", "17351018", "073Y"
    assert filled > 500
    return dataset


def set_value(dataset, keyword, vr="CS"):
    """Set a value that pydicom itself would not write."""
    element = pydicom.DataElement(pydicom.tag.Tag(keyword), vr, LOWER, validation_mode=0)
    dataset[keyword] = element


def marked_source(folder):
    """Write a source of six DICOM files: three valid, one with burned-in text, two damaged."""
    folder.mkdir()
    study = mimic_tables(folder, ["PA"] * 6, ["train"] * 6)
    text = REPORT.replace("eval for", f"{CANARY} eval for").replace("None.", f"{CANARY}.")
    study.with_suffix(".txt").write_text(f"{CANARY}\n{text}\n PHYSICIAN:  {CANARY}\n")
    for n, name in enumerate(DICOM_IDS):
        dataset, path = marked_dataset(), study / f"{name}.dcm"
        if n == 3:
            dataset.BurnedInAnnotation = "YES"
        if n == 4:  # pydicom raises an error with the value in it
            dataset.WindowCenter, dataset.WindowWidth = "2000", "1000"
            set_value(dataset, "VOILUTFunction")
        set_value(dataset, "LossyImageCompression" if n == 3 else "BurnedInAnnotation")
        dataset.save_as(path, enforce_file_format=True)
        if n == 5:
            path.write_bytes(path.read_bytes()[:4_000])


def everything_written(folder):
    """Return all contents of records, decoded: file names, JSON, index, documents, texts."""
    records = writer.open_records(folder)
    tokenizer = Tokenizer.from_file(prepare.TINY / "tokenizer.json", records.layout.vocab)
    parts = [p.name for p in folder.iterdir()]
    parts += [p.read_bytes().decode("latin-1") for p in folder.iterdir()]
    for d in records:
        parts += [d.image_path, d.id, d.group, d.source, d.task]
        parts += [jsonl.to_text(d, records.layout, tokenizer)]
    return "\n".join(parts), len(records)


def test_no_patient_data_is_written_or_logged(tmp_path, capsys, caplog, recwarn):
    """Canaries in tags, private tags, sequences, paths, names and reports do not occur anywhere."""
    source = tmp_path / f"{CANARY}-folder"
    marked_source(source)
    command = ["build", "--source", "MIMIC-CXR", "--from", str(source), "--model"]
    command += [str(prepare.TINY), "--out"]
    with caplog.at_level(logging.DEBUG):
        assert prepare.main([*command, str(tmp_path / "no")]) == 1
        assert prepare.main([*command, str(tmp_path / "r"), "--max_bad", "0.6"]) == 0
        assert prepare.main([*command, str(tmp_path / "j"), "--max_bad", "0.6", "--json"]) == 0
        assert prepare.main(["stats", str(tmp_path / "r"), "--json"]) == 0
        assert prepare.main(["check", str(tmp_path / "r")]) == 0
    captured = capsys.readouterr()
    written, count = everything_written(tmp_path / "r")
    assert count == 3 and "Findings: There is no focal consolidation" in written
    meta = json.loads((tmp_path / "r" / "dataset.json").read_text())
    assert sum(meta["notes"]["malformed"].values()) == 3
    assert "are malformed" in captured.err and "BurnedInAnnotation is YES" in written
    warned = "".join(str(w.message) for w in recwarn)
    heaps = dict(
        records=written, out=captured.out, err=captured.err, log=caplog.text, warnings=warned
    )
    assert not [(s, name) for s in SECRETS for name, heap in heaps.items() if s in heap]


def test_damaged_jpg_is_reported_without_details(tmp_path, capsys):
    source = tmp_path / CANARY
    source.mkdir()
    study = mimic_tables(source, ["PA", "PA"], ["train"] * 2)
    (study / f"{DICOM_IDS[0]}.jpg").write_bytes(f"\xff\xd8 {CANARY}".encode())
    command = ["build", "--source", "MIMIC-CXR", "--from", str(source), "--out"]
    assert prepare.main([*command, str(tmp_path / "r"), "--model", str(prepare.TINY)]) == 1
    captured = capsys.readouterr()
    assert "no such file, or damaged" in captured.err
    assert not [s for s in SECRETS if s in captured.err + captured.out]


def test_pydicom_is_silent(tmp_path, caplog):
    """Its warnings, which are errors in tests, and log lines contain values of the header."""
    dataset = marked_dataset()
    set_value(dataset, "SOPInstanceUID", "UI")
    path = tmp_path / "a.dcm"
    with dicom.silence():  # writing warns too
        dataset.save_as(path, enforce_file_format=True)
    with caplog.at_level(logging.DEBUG, logger="pydicom"):
        with dicom.silence():
            assert str(pydicom.dcmread(path).SOPInstanceUID) == LOWER
        assert LOWER not in caplog.text
        with pytest.warns(UserWarning, match=LOWER):  # without the context
            str(pydicom.dcmread(path).SOPInstanceUID)
    assert LOWER in caplog.text


def test_canary_search_finds_them_in_the_source(tmp_path):
    """The same search finds them in the source, so an empty result is meaningful."""
    marked_dataset().save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert (tmp_path / "a.dcm").read_bytes().count(CANARY.encode()) > 500
