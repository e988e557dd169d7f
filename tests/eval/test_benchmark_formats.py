"""Benchmarks beyond MedMax's, in their published formats: read whole, or refused by name."""

import csv
import json
import tracemalloc

import benchmark_files as files
import PIL.Image
import pytest

from medmax_jax.data.records.row_streams import SourceError
from medmax_jax.eval.benchmarks import gmai_mmbench
from medmax_jax.eval.metrics import per_record
from medmax_jax.eval.records import EvalRecord
from medmax_jax.eval.tasks import benchmark_import, catalog
from medmax_jax.eval.tasks import items as task_items

FORMS = {
    name: (getattr(files, name), getattr(files, f"put_{name}"))
    for name in (
        *("medframeqa", "kormedmcqa_v", "medbookvqa", "medxpertqa_mm"),
        *("gmai_mmbench", "r_rad", "r_slake"),
    )
}
ROWS = 6


def convert(folder, name, **changes):
    """Return the content of import.json, and the items as the suite reads them."""
    fixed = dict(prefix="", allow_counts=True, max_bad=0.0) | changes
    out = folder / "out"
    summary = benchmark_import.eval_items(name, folder, out, **fixed)
    rows = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    return summary, task_items.from_rows(rows)


def make(folder, name, count=ROWS, **changes):
    """Write a file of `count` rows, of which the second has the changes."""
    row_of, put = FORMS[name]
    rows = [row_of(number) for number in range(count)]
    rows[1] |= changes
    put(folder, rows)
    return rows


@pytest.mark.parametrize("name", FORMS)
def test_every_row_is_read_and_every_image_can_be_opened(tmp_path, name):
    make(tmp_path, name)
    summary, items = convert(tmp_path, name, prefix="p")
    assert (summary["malformed"], summary["left_out"], summary["reasons"]) == (0, 0, [])
    is_medthink = name.startswith("r_")
    assert len(items) == ROWS * (2 if is_medthink else 1)
    assert {item.task for item in items} <= set(catalog.TASKS)
    embedded = name in ("medframeqa", "kormedmcqa_v", "gmai_mmbench")
    for item in items:
        card = catalog.TASKS[item.task]
        assert (item.data_class, item.family) == (card.data_class, card.family)
        for path in item.images:
            folder = tmp_path / "out" if embedded else tmp_path
            with PIL.Image.open(folder / path.removeprefix("p/")) as shown:
                shown.load()


def test_medframeqa(tmp_path):
    make(tmp_path, "medframeqa")
    _, items = convert(tmp_path, "medframeqa")
    assert [len(item.images) for item in items] == [2, 3, 4, 5, 2, 3]
    assert [item.group for item in items] == ["v0", "v0", "v1", "v1", "v2", "v2"]
    assert items[1].answer == "B" and dict(items[1].slices) == {
        "frames": "3", "modality": "X-ray", "organ": "lung", "system": "respiratory system",
    }  # fmt: skip
    assert items[0].prompt.splitlines()[1:] == [
        "A: An effusion grows.", "B: Nothing", "C: The heart", "D: A catheter. It moves",
    ]  # fmt: skip
    first = tmp_path / "out" / items[0].images[0]
    assert first.read_bytes() == files.image(1)  # unchanged, in order


def test_kormedmcqa_v(tmp_path):
    rows = make(tmp_path, "kormedmcqa_v", answer=5, E=None)
    with pytest.raises(SourceError, match="the answer is not one of the options"):
        convert(tmp_path, "kormedmcqa_v")  # of four options
    rows[1] = files.kormedmcqa_v(1) | {"answer": 2}
    files.put_kormedmcqa_v(tmp_path, rows)
    _, items = convert(tmp_path, "kormedmcqa_v")
    assert [len(item.images) for item in items] == [1, 2, 3, 1, 2, 3]
    assert [item.answer for item in items] == list("ABCDEA")
    assert items[0].prompt == "이 환자의 진단은?\nA: 폐렴\nB: 결핵\nC: 기흉\nD: 폐암\nE: 천식"
    assert items[1].group == "doctor-2013-1-1"
    assert dict(items[1].slices) == {"year": "2013", "modality": "xray", "images": "2"}


def test_kormedmcqa_v_also_has_images_as_lists_and_data_urls(tmp_path):
    rows = [files.kormedmcqa_v(number) for number in range(2)]
    for row in rows:
        row["images"] = json.loads(row["images"])
        for shown in row["images"]:
            shown["image_base64"] = f"data:image/jpeg;base64,{shown['image_base64']}"
    files.put_kormedmcqa_v(tmp_path, rows)
    _, items = convert(tmp_path, "kormedmcqa_v")
    assert (tmp_path / "out" / items[1].images[1]).read_bytes() == files.image(2)


def test_medbookvqa(tmp_path):
    make(tmp_path, "medbookvqa")
    _, items = convert(tmp_path, "medbookvqa", prefix="book")
    assert [item.answer for item in items] == list("ABCDAB")
    assert items[2].prompt.splitlines() == [
        "What structure is in the center?", "A: Mammary ductal system",
        "B: Fibroglandular tissue area", "C: Lactiferous sinus zone", "D: Areolar complex",
    ]  # fmt: skip
    assert items[2].image == "book/figures/id2.jpg"
    assert dict(items[2].slices)["organ"] == "Mammary gland"
    assert dict(items[2].slices)["department"] == "Obstetrics and Gynecology"


def test_medxpertqa_in_both_forms(tmp_path):
    rows = make(tmp_path, "medxpertqa_mm")
    _, items = convert(tmp_path, "medxpertqa_mm")
    assert items[1].images == ("images/MM-1-a.jpeg", "images/MM-1-b.jpeg")
    assert items[0].prompt.startswith("Which step helps most?\nA: Lateral repair\nB: ")
    other = tmp_path / "other"
    for row in rows:  # as the authors' notebook makes it
        row["options"] = [dict(letter=k, content=v) for k, v in row["options"].items()]
        row["label"], row["images"] = [row["label"]], [dict(image_path=i) for i in row["images"]]
    files.put_medxpertqa_mm(other, rows)
    (other / "MM" / "test.jsonl").rename(other / "medxpertqa_mm_input.jsonl")
    _, same = convert(other, "medxpertqa_mm")
    assert [(i.prompt, i.answer, i.images) for i in same] == [
        (i.prompt, i.answer, i.images) for i in items
    ]


def test_gmai_mmbench(tmp_path):
    make(tmp_path, "gmai_mmbench", image="0", E="Doppler")  # the image of the row with index 0
    _, items = convert(tmp_path, "gmai_mmbench")
    assert items[1].image == items[0].image and items[1].group == items[0].group
    assert items[1].prompt.endswith("\nD: Ultrasound\nE: Doppler")
    assert items[0].prompt.startswith('Which "modality"\tis it?\nA: CT\nB: MRI, T2\n')
    assert dict(items[0].slices) == {
        "category": "Disease Diagnosis", "clinical_task": "Disease Diagnosis",
        "department": "Radiology", "granularity": "image level",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["r_rad", "r_slake"])
def test_medthink(tmp_path, name):
    make(tmp_path, name)
    summary, items = convert(tmp_path, name)
    assert summary["tasks"] == {f"{name}_open": ROWS, f"{name}_rationale": ROWS}
    closed, opened = items[1], items[ROWS]
    assert (closed.family, closed.answer) == ("vqa_rationale", "B")
    assert closed.prompt == "Question: Is there a fracture?\nOptions: (A) yes (B) no"
    assert closed.context == "The ribs are intact. No line crosses them."
    assert task_items.prompt_text(closed, "chat").endswith(
        "\nAnswer with 'The answer is (A).', with the letter of one option, then 'Solution:' and "
        "the reasons only."
    )
    assert (opened.family, opened.answer) == ("vqa_open", "the left rib")
    text = f"The answer is (B).\nSolution: {closed.context}"
    scores = per_record.record_scores(EvalRecord.of(closed, text=text))
    assert {name: score.value for name, score in scores.items()} == {
        "accuracy": 1.0, "rationale_rouge_l": 1.0,
    }  # fmt: skip
    halved = "No line crosses them. The answer is (A)."
    scores = per_record.record_scores(EvalRecord.of(closed, text=halved))
    assert scores["accuracy"].value == 0.0 and 0.5 < scores["rationale_rouge_l"].value < 0.8
    if name == "r_slake":
        row = files.r_slake(3)
        del row["img_name"]
        files.put_r_slake(tmp_path / "old", [row])
        assert convert(tmp_path / "old", name)[1][0].image == "images/xmlab3/source.jpg"


# What is refused: by name and number, and nothing is lost.

NOT_BASE64 = "%" * 200
BAD_ROWS = [
    ("medframeqa", dict(correct_answer="E"), "the answer is not one of the options"),
    ("medframeqa", dict(image_1=None), "image_1 to image_5: not two or more"),
    ("medframeqa", dict(image_2=dict(bytes=b"", path=None)), "image_2: no bytes"),
    ("medframeqa", dict(image_2=dict(bytes=b"text", path=None)), "not an image of a known format"),
    ("medframeqa", dict(options=["one"]), "options: not a list of 2 to 26"),
    ("kormedmcqa_v", dict(images="[1]"), "images: not a list of"),
    ("kormedmcqa_v", dict(images='[{"image'), "images: not JSON"),
    ("kormedmcqa_v", dict(images="[]"), "images: not 1 to 16 images"),
    ("kormedmcqa_v", dict(images=json.dumps([dict(image_base64=NOT_BASE64)])), "not base64"),
    ("kormedmcqa_v", dict(answer=6), "the answer is not one of the options"),
    ("kormedmcqa_v", dict(B=None), "an option before the last one is missing"),
    ("medbookvqa", dict(correct_choice="E"), "not A to D, each once"),
    ("medbookvqa", dict(Distractors=["x", "y"]), "not three of each"),
    ("medbookvqa", dict(image_path="./figures/gone.jpg"), "an image is missing in the folder"),
    ("medbookvqa", dict(image_path="../../etc/passwd"), "leads out of the folder"),
    ("medbookvqa", dict(LABEL={"Modality": ["X-ray"]}), "LABEL: Modality has not 2 levels"),
    ("medxpertqa_mm", dict(images=["gone.jpeg"]), "an image is missing in the folder"),
    ("medxpertqa_mm", dict(images=[]), "images: not 1 to 16"),
    ("medxpertqa_mm", dict(label="F"), "the answer is not one of the options"),
    ("medxpertqa_mm", dict(options={"A": "x", "C": "y"}), "the letters are not A, B, C"),
    ("gmai_mmbench", dict(image=NOT_BASE64), "image: not base64"),
    ("gmai_mmbench", dict(image="99"), "neither base64 nor the index of a row before it"),
    ("gmai_mmbench", dict(answer="E"), "the answer is not one of the options"),
    ("gmai_mmbench", dict(B=""), "an option before the last one is empty"),
    ("r_rad", dict(answer=2), "answer: not the index of a choice"),
    ("r_rad", dict(choices=["yes"]), "choices: not two of a closed question"),
    ("r_rad", dict(solution=None), "solution: missing or not text"),
    ("r_slake", dict(img_name="xmlab9/gone.jpg"), "an image is missing in the folder"),
]


@pytest.mark.parametrize("name, changes, reason", BAD_ROWS)
def test_a_bad_row_is_named_and_counted(tmp_path, name, changes, reason):
    make(tmp_path, name, **changes)
    whole = ROWS * (2 if name.startswith("r_") else 1)
    with pytest.raises(SourceError, match=rf"1 of {whole} rows are malformed.*row 2") as caught:
        convert(tmp_path, name)
    assert reason in str(caught.value)
    summary, items = convert(tmp_path, name, max_bad=0.5)
    assert len(items) == whole - 1 and summary["malformed"] == 1
    assert reason in summary["reasons"][0]["reason"]


@pytest.mark.parametrize(
    "name, column",
    [("medframeqa", "correct_answer"), ("kormedmcqa_v", "images"), ("gmai_mmbench", "question")],
)
def test_a_renamed_column_is_named(tmp_path, name, column):
    row_of, put = FORMS[name]
    rows = [row_of(number) for number in range(ROWS)]
    put(tmp_path, [{f"{k}_2" if k == column else k: v for k, v in row.items()} for row in rows])
    with pytest.raises(SourceError, match=f"columns .*{column}.* are missing"):
        convert(tmp_path, name)


def test_a_renamed_field_of_json_is_a_reason(tmp_path):
    for name, old in (("medbookvqa", "Question"), ("medxpertqa_mm", "options"), ("r_rad", "image")):
        rows = make(tmp_path / name, name)
        FORMS[name][1](
            tmp_path / name, [{"new" if k == old else k: v for k, v in r.items()} for r in rows]
        ) if name != "r_rad" else files.put_medthink(
            tmp_path / name, name, [{k: v for k, v in r.items() if k != old} | {"img_id": 1}
                                    for r in rows], [],
        )  # fmt: skip
        with pytest.raises(SourceError, match=f"6 of 6 rows are malformed.*{old}"):
            convert(tmp_path / name, name)


@pytest.mark.parametrize("name", [n for n in FORMS if catalog.TASKS.get(f"{n}_mcq")])
def test_another_number_of_rows_is_refused(tmp_path, name):
    counts = catalog.TASKS[f"{name}_mcq"].counts
    make(tmp_path, name)
    if counts is None:  # not published
        assert convert(tmp_path, name, allow_counts=False)[0]["other_counts"] == []
        return
    with pytest.raises(SourceError, match=f"6 rows of {name}_mcq, published: {counts}"):
        convert(tmp_path, name, allow_counts=False)


def test_a_truncated_file_loses_no_row_silently(tmp_path):
    make(tmp_path, "gmai_mmbench")
    path = tmp_path / "GMAI-MMBench_VAL.tsv"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 2_000])  # in the image of the last row, or after it
    with pytest.raises(SourceError, match="1 of 6 rows are malformed.*not a complete row"):
        convert(tmp_path, "gmai_mmbench")
    summary, items = convert(tmp_path, "gmai_mmbench", max_bad=0.5)
    assert len(items) == 5 and summary["malformed"] == 1
    make(tmp_path / "parquet", "medframeqa")
    parquet = tmp_path / "parquet" / "data" / "test-00000-of-00001.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-100])
    with pytest.raises(SourceError, match="damaged .*download it again"):
        convert(tmp_path / "parquet", "medframeqa")


def test_files_of_git_lfs_are_named(tmp_path):
    make(tmp_path, "r_rad")
    (tmp_path / "closed-end" / "testset.json").write_text("version https://git-lfs.github.com/..")
    with pytest.raises(SourceError, match="a pointer of Git LFS; fetch the file"):
        convert(tmp_path, "r_rad")


def test_a_row_of_gmai_mmbench_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(gmai_mmbench, "MAX_ROW", 1_000)
    make(tmp_path, "gmai_mmbench")
    with pytest.raises(SourceError, match="line 2 has more than 1000 characters"):
        convert(tmp_path, "gmai_mmbench")


@pytest.mark.parametrize("megabytes", [5, 50])
def test_gmai_mmbench_is_read_in_flat_memory(tmp_path, megabytes):
    row = files.gmai_mmbench(0)
    size = 1_000_000  # characters of an image; the published ones have two million
    data = files.encoded(0)
    row["image"] = data + "A" * (size - len(data) - (size - len(data)) % 4)
    with open(tmp_path / "GMAI-MMBench_VAL.tsv", "w") as file:
        writer = csv.DictWriter(file, list(row), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for number in range(megabytes):
            writer.writerow(row | {"index": number})
    tracemalloc.start()
    count = sum(1 for _ in gmai_mmbench.read(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == megabytes and peak < 16 * size  # some copies of one row, of any number of rows
