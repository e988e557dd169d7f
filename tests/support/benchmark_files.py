"""Writes small files in exactly the published formats of the benchmarks, with real images.

Each function writes to a folder and returns its rows; a test changes rows before it writes them
again. The images are those of data/sample.
"""

import base64
import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from medmax_jax.data import prepare

IMAGES = sorted((prepare.TINY.parents[1] / "data" / "sample" / "images").glob("*.jpg"))


def image(number: int) -> bytes:
    """Return the bytes of a real image."""
    return IMAGES[number % len(IMAGES)].read_bytes()


def encoded(number: int) -> str:
    """Return a real image in base64."""
    return base64.b64encode(image(number)).decode()


def put(folder: Path, name: str, content: str | bytes) -> None:
    """Write a file and its folders."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def put_parquet(folder: Path, name: str, rows: list[dict]) -> None:
    """Write rows in row groups of two."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=2)


def medframeqa(number: int) -> dict:
    """Return a row of test-*.parquet; 2 to 5 frames."""
    frames = 2 + number % 4
    return dict(
        question_id=f"q{number}",
        system="respiratory system",
        organ="lung",
        keyword="pneumonia",
        modality="X-ray",
        video_id=f"v{number // 2}",
        question="What changes over the frames?",
        options=["An effusion grows.", "Nothing", "The heart", "A catheter. It moves"],
        correct_answer="ABCD"[number % 4],
        reasoning_chain="The first frame shows ..",
        **{
            f"image_{n}": dict(bytes=image(number + n), path=None) if n <= frames else None
            for n in range(1, 6)
        },
    )


def put_medframeqa(folder: Path, rows: list[dict]) -> None:
    put_parquet(folder, "data/test-00000-of-00001.parquet", rows)


def kormedmcqa_v(number: int) -> dict:
    """Return a row of doctor/test_full-*.parquet; images as the JSON of a list."""
    images = [
        dict(pic_num=str(n + 1), modality="xray", image_base64=encoded(number + n))
        for n in range(1 + number % 3)
    ]
    return dict(
        subject="doctor",
        year=2012 + number % 12,
        period=1,
        q_number=number,
        question="이 환자의 진단은?",
        **dict(zip("ABCDE", ("폐렴", "결핵", "기흉", "폐암", "천식"), strict=True)),
        answer=1 + number % 5,
        images=json.dumps(images),
    )


def put_kormedmcqa_v(folder: Path, rows: list[dict]) -> None:
    put_parquet(folder, "doctor/test_full-00000-of-00001.parquet", rows)


def medbookvqa(number: int) -> dict:
    """Return an entry of data.json, with the spaces of the published sample entry."""
    answer = "ABCD"[number % 4]
    return {
        "_id": f"id{number}",
        "QAtype": "Anatomy Identification",
        "Question": " What structure is in the center? ",
        "Answer": " Lactiferous sinus zone",
        "Distractors": ["Mammary ductal system", "Fibroglandular tissue area", "Areolar complex"],
        "correct_choice": answer,
        "other_choices": [letter for letter in "ABCD" if letter != answer],
        "image_path": f"./figures/id{number}.jpg",
        "LABEL": {
            "Modality": ["X-ray", "Mammography"],
            "Anatomy": ["Integumentary", "Integumentary", "Mammary gland", "Mammary gland"],
            "Department": ["Obstetrics and Gynecology", "Obstetrics and Gynecology"],
        },
    }


def put_medbookvqa(folder: Path, rows: list[dict]) -> None:
    put(folder, "data.json", json.dumps(rows))
    for number in range(len(rows)):
        put(folder, f"figures/id{number}.jpg", image(number))


def medxpertqa_mm(number: int) -> dict:
    """Return a row of MM/test.jsonl."""
    texts = ("Lateral repair", "Capsular plication", "Replacement", "Fixation", "Medial repair")
    options = dict(zip("ABCDE", texts, strict=True))
    listed = " ".join(f"({letter}) {text}" for letter, text in options.items())
    return dict(
        id=f"MM-{number}",
        question=f"Which step helps most?\nAnswer Choices: {listed}",
        options=options,
        label="ABCDE"[number % 5],
        images=[f"MM-{number}-{letter}.jpeg" for letter in "ab"[: 1 + number % 2]],
        medical_task="Treatment",
        body_system="Skeletal",
        question_type="Reasoning",
    )


def put_medxpertqa_mm(folder: Path, rows: list[dict]) -> None:
    put(folder, "MM/test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for number in range(len(rows)):
        for n, letter in enumerate("ab"):
            put(folder, f"images/MM-{number}-{letter}.jpeg", image(number + n))


def gmai_mmbench(number: int) -> dict:
    """Return a row of GMAI-MMBench_VAL.tsv; four of five options."""
    return {
        "index": number,
        "image": encoded(number),
        "question": 'Which "modality"\tis it?',
        "A": "CT",
        "B": "MRI, T2",
        "C": "X-ray",
        "D": "Ultrasound",
        "E": "",
        "answer": "ABCD"[number % 4],
        "category": "Disease Diagnosis",
        "split": "VAL",
        "clinical VQA task": "Disease Diagnosis",
        "department": "Radiology",
        "perceptual granularity": "image level",
    }


def put_gmai_mmbench(folder: Path, rows: list[dict]) -> None:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    put(folder, "GMAI-MMBench_VAL.tsv", out.getvalue())


def r_rad(number: int, *, opened: bool = False) -> dict:
    """Return a row of R-RAD/closed-end/testset.json, or of open-end/."""
    return dict(
        question="Is there a fracture?",
        choices=["the left rib"] if opened else ["yes", "no"],
        answer=0 if opened else number % 2,
        solution="The ribs are intact. No line crosses them.",
        image=f"synpic{number}.jpg",
    )


def r_slake(number: int, *, opened: bool = False) -> dict:
    """Return a row of R-SLAKE/closed-end/test.json, or of open-end/."""
    row = r_rad(number, opened=opened)
    del row["image"]
    return row | dict(img_id=number, img_name=f"xmlab{number}/source.jpg", modality="CT")


def put_medthink(folder: Path, name: str, closed: list[dict], opened: list[dict]) -> None:
    file = "testset.json" if name == "r_rad" else "test.json"
    for kind, rows in (("closed", closed), ("open", opened)):
        content = {str(number): row for number, row in enumerate(rows)}
        put(folder, f"{kind}-end/{file}", json.dumps(content))
        for row in rows:
            path = row.get("image") or f"xmlab{row['img_id']}/source.jpg"
            put(folder, f"images/{path}", image(len(path)))


def put_r_rad(folder: Path, rows: list[dict]) -> None:
    put_medthink(folder, "r_rad", rows, [r_rad(n, opened=True) for n in range(len(rows))])


def put_r_slake(folder: Path, rows: list[dict]) -> None:
    put_medthink(folder, "r_slake", rows, [r_slake(n, opened=True) for n in range(len(rows))])
