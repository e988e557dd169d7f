"""Small folders in exactly the published formats of the thirteen sources, with real images."""

import csv
import gzip
import io
import json
import pathlib
import shutil

import numpy as np
import PIL.Image

from medmax_jax.data.sources.row import Plan

IMAGE_FILES = sorted((pathlib.Path(__file__).parents[2] / "data/sample/images").glob("*.jpg"))
DICOM_IDS = tuple(f"{n:08x}-{n:08x}-{n:08x}-{n:08x}-{n:08x}" for n in range(0x2AA4, 0x2AAA))
SUBJECT, STUDY = "10000032", "50414267"
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with new onset ascites  // eval for infection

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  None.

 FINDINGS:

 There is no focal consolidation, pleural effusion or pneumothorax.  Compared to
 ___, the heart is normal.

 IMPRESSION:

 No acute cardiopulmonary process.
"""


def plan(source: str, split: str = "train", seed: int = 0, caption_share: float = 0.5) -> Plan:
    """What a reader is asked for in tests."""
    return Plan(source=source, split=split, seed=seed, caption_share=caption_share)


def place_image(path: pathlib.Path, n: int) -> None:
    """Store the n-th sample image at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = IMAGE_FILES[n % len(IMAGE_FILES)]
    if path.suffix == ".png":
        PIL.Image.open(source).save(path)
    else:
        shutil.copy(source, path)


def write_json(path: pathlib.Path, items: list, indent: int | None = None) -> None:
    """A JSON array, as PubMedVision (one line) or LLaVA-Med (indented) have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=False))


def write_csv(path: pathlib.Path, header: list[str], rows: list[list]) -> None:
    """A CSV file, gzipped where its name says so."""
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    raw = text.getvalue().encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def talk(*parts: str) -> list[dict]:
    """Parts of a conversation, human and gpt in turn."""
    return [{"from": ("human", "gpt")[n % 2], "value": part} for n, part in enumerate(parts)]


def llava_med_pmc(folder: pathlib.Path) -> None:
    """Captions with questions; the misspelt key."""
    items = []
    for n in range(4):
        pair = f"2777{n:04d}_Fig1_1"
        output = talk("<image>\nDescribe the image concisely.", f"CT of the chest, number {n}.")
        items.append({"id": pair, "image": f"{pair}.jpg", "conversatons": output})
        place_image(folder / "images" / f"{pair}.jpg", n)
    write_json(folder / "llava_med_alignment_500k.json", items)


def llava_med_it(folder: pathlib.Path) -> None:
    """Conversations of two turns, the image before or after the first question."""
    items = []
    for n in range(3):
        pair = f"2888{n:04d}_F2"
        asks = "What is shown?\n<image>" if n == 1 else "<image>\nWhat is shown?"
        output = talk(asks, "A chest x-ray.", "Is it normal?", f"Yes, number {n} is.")
        domain = dict(chest_xray=True, mri=False, histology=False, gross=False, ct_scan=False)
        items.append(
            {"id": pair, "image": f"{pair}.jpg", "domain": domain, "conversations": output}
        )
        place_image(folder / "images" / f"{pair}.jpg", n)
    write_json(folder / "llava_med_instruct_60k_inline_mention.json", items, indent=2)


def _pubmedvision(folder: pathlib.Path, name: str, kind: str) -> None:
    items = []
    for n in range(3):
        path = f"images/pmc_{n}_0.jpg"
        items.append(
            {
                "image": [path],
                "id": f"{kind}_VQA_{n}",
                "conversations": talk(f"What do you see, {n}?", f"A microscopic view, {n}."),
                "body_part": "Cell",
                "modality": "Microscopy Images",
            }
        )
        place_image(folder / path, n)
    items.append(items[0] | {"image": ["images/pmc_0_0.jpg", "images/pmc_1_0.jpg"]})
    write_json(folder / name, items)


def pubmedvision_alignment(folder: pathlib.Path) -> None:
    """Three rows of one image and one of two."""
    _pubmedvision(folder, "PubMedVision_Alignment_VQA.json", "Alignment")


def pubmedvision_it(folder: pathlib.Path) -> None:
    """The same form."""
    _pubmedvision(folder, "PubMedVision_InstructionTuning_VQA.json", "InstructionTuning")


def quilt_instruct(folder: pathlib.Path) -> None:
    """Talks about histology."""
    items = []
    for n in range(3):
        name = f"x7Ubz-ZcZr{n}_image_0a1b2c3d-{n}.jpg"
        output = talk("<image>\nWhich stain is this?", "Haematoxylin and eosin.")
        items.append({"id": f"q{n}", "image": name, "conversations": output})
        place_image(folder / "quilt_instruct" / name, n)
    write_json(folder / "quilt_instruct_107k.json", items)


def pmc_oa(folder: pathlib.Path) -> None:
    """One pair a line."""
    lines = []
    for n in range(4):
        name = f"PMC21231{n}_Fig3_4.jpg"
        caption = f"A. Real time image of the translocation, panel {n}."
        lines.append(json.dumps({"image": name, "caption": caption}))
        place_image(folder / "images" / name, n)
    (folder / "pmc_oa.jsonl").write_text("\n".join(lines) + "\n")


QUILT_HEADER = (
    ",caption,image_path,subset,split,pathology,roi_text,noisy_text,corrected_text,"
    "med_umls_ids,magnification,height,width"
)


def quilt_1m(folder: pathlib.Path) -> None:
    """Two captions of one image, a caption over two lines, a validation row."""
    names = [f"KdKl0MGHEMA_image_{n:02d}aa-bb.jpg" for n in (0, 0, 1, 2)]
    captions = ["Glands, H&E.", "Mucosa, low power.", "Two lines,\nquoted.", "Held out."]
    rows = [
        [n, captions[n], names[n], "quilt", "val" if n == 3 else "train", "['GI']", "['gland']",
         "[]", "['glands']", "[[]]", "2.0", 512, 512]
        for n in range(4)
    ]  # fmt: skip
    write_csv(folder / "quilt_1M_lookup.csv", QUILT_HEADER.split(","), rows)
    for n, name in enumerate(names):
        place_image(folder / "quilt_1m" / name, n)


def vqa_rad(folder: pathlib.Path) -> None:
    """Questions of the four phrase types; an answer that is a number."""
    items = []
    for n, kind in enumerate(("freeform", "para", "freeform", "test_freeform", "test_para")):
        name = f"synpic5461{n % 3}.jpg"
        items.append(
            {
                "qid": n + 1,
                "phrase_type": kind,
                "qid_linked_id": f"03f451ca-de62-4617-9679-e836026a7642-{n}",
                "image_case_url": f"https://medpix.nlm.nih.gov/case?id={n}",
                "image_name": name,
                "image_organ": "HEAD",
                "evaluation": "not evaluated",
                "question": "Are regions of the brain infarcted?",
                "question_rephrase": "NULL",
                "question_relation": "NULL",
                "question_frame": "NULL",
                "question_type": "PRES",
                "answer": 5 if n == 2 else "Yes",
                "answer_type": "CLOSED",
            }
        )
        place_image(folder / "VQA_RAD Image Folder" / name, n)
    write_json(folder / "VQA_RAD Dataset Public.json", items, indent=1)


def slake(folder: pathlib.Path) -> None:
    """Three questions in English, one in Chinese."""
    items = []
    for n, lang in enumerate(("en", "en", "en", "zh")):
        name = f"xmlab{n}/source.jpg"
        items.append(
            {
                "img_id": n,
                "img_name": name,
                "question": "图像的模态是什么?" if lang == "zh" else "What modality is used?",
                "answer": "CT",
                "q_lang": lang,
                "location": "Abdomen",
                "modality": "CT",
                "answer_type": "OPEN",
                "base_type": "vqa",
                "content_type": "Modality",
                "triple": ["vhead", "_", "_"],
                "qid": n,
            }
        )
        place_image(folder / "imgs" / name, n)
    write_json(folder / "train.json", items, indent=4)


def parquet_questions(folder: pathlib.Path, split: str = "train") -> None:
    """Two files of a split with the images inside; one image has two questions."""
    import pyarrow
    import pyarrow.parquet

    (folder / "data").mkdir(parents=True, exist_ok=True)
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema(
        [("image", image), ("question", pyarrow.string()), ("answer", pyarrow.string())]
    )
    for part in range(2):
        images = [IMAGE_FILES[3 * part + n].read_bytes() for n in (0, 0, 1)]
        rows = dict(
            image=[{"bytes": p, "path": None} for p in images],
            question=[f"what is shown, {n}?" for n in range(3)],
            answer=["yes", "no", "gastric mucosa"],
        )
        name = f"{split}-{part:05d}-of-00002-6ef2e6ad7d2d2a8c.parquet"
        pyarrow.parquet.write_table(
            pyarrow.table(rows, schema=schema), folder / "data" / name, row_group_size=2
        )


def pmc_vqa(folder: pathlib.Path) -> None:
    """Version 2: the answer is a letter."""
    header = ["index", "Figure_path", "Caption", "Question"]
    header += [*(f"Choice {c}" for c in "ABCD"), "Answer", "split"]
    rows = []
    for n in range(3):
        name = f"PMC86935{n}_fig1_25{n}.jpg"
        choices = [" A: Liver ", " B: Brain ", " C: Heart ", " D: Lung "]
        question = " Which organ is shown? "
        rows.append([n, name, "MRI, axial", question, *choices, "BAD"[n], "train"])
        place_image(folder / "images_2" / "figures" / name, n)
    write_csv(folder / "train_2.csv", header, rows)


def omnimedvqa(folder: pathlib.Path) -> None:
    """Two data sets; two and four options."""
    for name, options in (("ACRIMA", ["No", "Yes"]), ("MRI", ["CT", "MR", "X-ray", "OCT"])):
        items = []
        for n in range(4):
            image = f"Images/{name}/Im{n:03d}_{name}.png"
            item = dict(
                dataset=name,
                question_id=f"{name}_{n:04d}",
                question_type="Modality Recognition",
                question="What is this?",
                gt_answer=options[n % 2],
                image_path=image,
            )
            letters = "ABCD"[: len(options)]
            item |= {f"option_{c}": o for c, o in zip(letters, options, strict=True)}
            items.append(item | {"modality_type": "Fundus Photography"})
            place_image(folder / image, n)
        write_json(folder / "QA_information" / "Open-access" / f"{name}.json", items, indent=4)


def mimic_tables(folder: pathlib.Path, views: list[str], splits: list[str]) -> pathlib.Path:
    """Tables and the report of one study; returns the folder of its radiographs."""
    ids = DICOM_IDS[: len(views)]
    rows = [[i, STUDY, SUBJECT, s] for i, s in zip(ids, splits, strict=True)]
    header = ["dicom_id", "study_id", "subject_id", "split"]
    write_csv(folder / "mimic-cxr-2.0.0-split.csv.gz", header, rows)
    header = ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"]
    rows = [[i, SUBJECT, STUDY, v, 3056, 2544] for i, v in zip(ids, views, strict=True)]
    write_csv(folder / "mimic-cxr-2.0.0-metadata.csv.gz", header, rows)
    study = folder / "files" / f"p{SUBJECT[:2]}" / f"p{SUBJECT}" / f"s{STUDY}"
    study.mkdir(parents=True)
    study.with_suffix(".txt").write_text(REPORT)
    return study


def mimic(folder: pathlib.Path) -> None:
    """Three frontal JPGs, one lateral, one of validation."""
    views, splits = ["PA", "AP", "AP", "LATERAL", "PA"], ["train"] * 4 + ["validate"]
    study = mimic_tables(folder, views, splits)
    for n, dicom in enumerate(DICOM_IDS[:5]):
        place_image(study / f"{dicom}.jpg", n)


def dicom_dataset(pixels: np.ndarray, **tags):
    """A radiograph in DICOM, uncompressed."""
    import pydicom
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.826.0.1.7351"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


FOLDERS = {  # source: (how to make its folder, how many train documents it gives)
    "PMC-OA": (pmc_oa, 4),
    "LLaVA-Med-PMC": (llava_med_pmc, 4),
    "Quilt-1M": (quilt_1m, 3),
    "PubMedVision-Alignment": (pubmedvision_alignment, 3),
    "LLaVA-Med-IT": (llava_med_it, 3),
    "PubMedVision-IT": (pubmedvision_it, 3),
    "Quilt-Instruct": (quilt_instruct, 3),
    "VQA-RAD": (vqa_rad, 3),
    "SLAKE": (slake, 3),
    "PathVQA": (parquet_questions, 6),
    "PMC-VQA": (pmc_vqa, 3),
    "OmniMedVQA": (omnimedvqa, None),  # our split is by hash
    "MIMIC-CXR": (mimic, 3),
}
