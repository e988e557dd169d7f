"""Tests of the sample: facts, groups within one split, licenses, sizes, balanced questions."""

import copy
import gzip
import json
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmax_jax.data.release import chat_answers
from medmax_jax.data.sample.build import MAX_CORRELATION, PER_GROUP, drop_near_copies, thumbnail
from medmax_jax.data.sample.documents import (
    IMAGE,
    SEPARATOR,
    eval_items,
    instruction_documents,
    pretraining_documents,
)
from medmax_jax.data.sample.manifest import (
    FACTS,
    SOURCES,
    check_groups,
    check_row,
    read_manifest,
    split_of,
)
from medmax_jax.data.sample.medical_formats import SampleImage, read_nifti, read_nrrd, to_bytes
from medmax_jax.data.sample.packages import PACKAGES, Archive
from medmax_jax.data.sample.phrases import NOUNS, caption, image_phrase, with_article
from medmax_jax.data.sample.questions import checklists, closed_questions, mcq_questions

FOLDER = Path(__file__).parents[2] / "data" / "sample"
MAX_BYTES = 5_000_000  # of images, manifest and NOTICE together


@pytest.fixture(scope="module")
def rows():
    return read_manifest(FOLDER / "manifest.jsonl", check_files=True)


@pytest.fixture(scope="module")
def documents(rows):
    return instruction_documents(rows, seed=0)


@pytest.fixture(scope="module")
def items(rows):
    return eval_items(rows, seed=0)


def test_sample_size_is_within_its_limits(rows):
    assert len(rows) >= 150
    assert len({row["group"] for row in rows}) >= 45
    assert len({row["modality"] for row in rows}) >= 8
    assert max(Counter(row["group"] for row in rows).values()) <= 16
    files = [*(FOLDER / "images").iterdir(), FOLDER / "manifest.jsonl", FOLDER / "NOTICE"]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {f"images/{p.name}" for p in (FOLDER / "images").iterdir()} == {r["file"] for r in rows}


def test_every_image_opens_and_has_contrast(rows):
    for row in rows:
        with Image.open(FOLDER / row["file"]) as image:
            image.load()
            assert image.size == (row["width"], row["height"]), row["id"]
            assert min(image.size) == 128, row["id"]
            assert np.asarray(image.convert("L")).std() > 5, f"{row['id']} is blank"
            assert not image.getexif(), f"{row['id']} carries metadata"


def test_neighboring_slices_are_thinned(rows):
    """No two images of a group are near-copies, because the builder drops the second."""
    groups = defaultdict(list)
    for row in rows:
        with Image.open(FOLDER / row["file"]) as image:
            groups[row["group"]].append(thumbnail(np.asarray(image.convert("RGB"))))
    for group, vectors in groups.items():
        correlation = np.array(vectors) @ np.array(vectors).T - np.eye(len(vectors))
        assert correlation.max() <= MAX_CORRELATION, group
    grain = np.random.default_rng(0).integers(0, 200, (40, 64, 64), dtype=np.uint8)
    slices = [grain[0], grain[0] + 3, *grain[1:]]
    kept = drop_near_copies([SampleImage(s, "p", "f", n, "g", {}) for n, s in enumerate(slices)])
    assert len(kept) == PER_GROUP and 1 not in {image.frame for image in kept}


def test_every_fact_has_an_allowed_source(rows):
    for row in rows:
        with_value = {field for field in FACTS if row[field] is not None}
        assert with_value == set(row["facts"]), row["id"]
        assert set(row["facts"].values()) <= set(SOURCES), row["id"]


def test_groups_stay_in_the_split_of_the_table(rows):
    check_groups(rows)
    assert all(row["split"] == split_of(row["group"]) for row in rows)
    groups = defaultdict(set)
    for row in rows:
        groups[row["split"]].add(row["group"])
    assert len(groups["test"]) >= 18 and len(groups["validation"]) >= 4
    assert not groups["test"] & groups["train"]
    assert sum(row["split"] == "test" for row in rows) >= 80
    kinds = {split: {r["modality"] for r in rows if r["split"] == split} for split in groups}
    assert kinds["test"] | kinds["validation"] <= kinds["train"]


def test_licenses_and_notice_cover_every_package(rows):
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    for row in rows:
        name = row["source_package"].split("==")[0]
        assert row["source_package"] in notice
        assert not PACKAGES[name].extra, f"{name} may not be committed"
        assert row["licence"] == PACKAGES[name].licence
        assert "GPL" not in row["licence"] and "NC" not in row["licence"]
    assert "10.17632/rscbjbr9sj" in notice  # the attribution that CC BY requires


def test_nothing_names_a_person_or_a_hospital(rows):
    text = json.dumps(rows) + "".join(path.name for path in (FOLDER / "images").iterdir())
    for word in ("baptist", "westway", "cleveland", "PatientName", "CQ500"):
        assert word.lower() not in text.lower()


def test_documents_parse(documents):
    assert len({d["id"] for d in documents}) == len(documents)
    for document in documents:
        parts = document["text"].split(SEPARATOR)
        assert len(parts) == 2 * document["turns"], document["id"]
        assert all(part.strip() for part in parts), document["id"]
        assert document["text"].count(IMAGE) == 1
        assert document["image_path"] and document["credential"] == "no"
        assert len(document["text"].split()) <= 70, document["id"]
    tasks = {
        "VQA",
        "Image Captioning",
        "Image Generation",
        "Report Understanding",
        "Visual Chat",
        "Multimodal Generation",
    }
    assert {d["task"] for d in documents if d["split"] == "train"} == tasks
    assert {d["turns"] for d in documents if d["task"] == "Visual Chat"} == {2, 3}


def test_generation_and_interleaved_answers_contain_the_image(documents):
    for document in documents:
        answer = document["text"].split(SEPARATOR)[-1]
        makes = document["task"] in ("Image Generation", "Multimodal Generation")
        if document["task"] != "Report Understanding":
            assert (IMAGE in answer) == makes, document["id"]


def test_pretraining_has_no_questions_about_an_image(rows):
    for document in pretraining_documents(rows, seed=0):
        assert document["text"].count(SEPARATOR) == document["turns"]
        assert not document["image_path"] or "?" not in document["text"]
        assert document["turns"] <= 1 and document["task"] == "Pretraining"
        assert document["text"].count(IMAGE) == (document["image_path"] != "")


def test_caption_states_every_fact(rows):
    import random

    for row in rows:
        text = caption(row, random.Random(0)).lower()
        for field in ("plane", "sequence", "stain", "sex", "view", "organ", "species", "age_group"):
            assert not row[field] or str(row[field]).lower() in text, (row["id"], field)
        assert row["age"] is None or str(row["age"]) in text
        assert len(text.split()) <= 25


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("split", ["train", "test"])
def test_closed_questions_are_balanced_per_template_and_asked_value(rows, split, seed):
    chosen = [row for row in rows if row["split"] == split]
    template, value = Counter(), Counter()
    for question in closed_questions(chosen, seed, 1):
        sign = 1 if question.answer == "yes" else -1
        template[question.template] += sign
        value[question.template, question.value] += sign
        field = question.template.split("/")[1]
        if field in FACTS and field != "lesion":
            assert (question.row[field] == question.value) == (question.answer == "yes")
    assert set(template.values()) == set(value.values()) == {0}
    assert len(template) == 6


def test_checklists_are_true_and_balanced(rows):
    chosen = [row for row in rows if row["split"] == "train"]
    counts = Counter()
    kinds = {with_article(noun) for noun in NOUNS.values()}
    for row, text in checklists(chosen, seed=0):
        own = with_article(NOUNS[row["modality"]])
        for words, answer in (line.split(":") for line in text.split("\n")):
            counts[words, answer] += 1
            if words in kinds:
                assert (words == own) == (answer == "yes"), (row["id"], text)
            if words in ("axial", "coronal", "sagittal"):
                assert (words == row["plane"]) == (answer == "yes"), (row["id"], text)
    assert {words for words, _ in counts} >= kinds
    assert all(counts[words, "yes"] == counts[words, "no"] for words, _ in counts)


def test_eval_answers_fit_their_kind(rows, items):
    test_groups = {row["group"] for row in rows if row["split"] == "test"}
    assert {item["group"] for item in items} <= test_groups
    assert len({item["id"] for item in items}) == len(items)
    closed = [item for item in items if item["question_type"] == "closed"]
    assert {item["answer"] for item in closed} == {"yes", "no"}
    per_image = Counter(item["image_path"] for item in closed)
    assert len(closed) >= 4 * sum(row["split"] == "test" for row in rows)
    assert min(per_image.values()) >= 2
    letters = Counter(i["answer"] for i in items if i["question_type"] == "mcq")
    assert set(letters) == set("ABCD") and max(letters.values()) - min(letters.values()) <= 2
    kinds = {item["task_name"] for item in items}
    assert kinds == {
        "sample_vqa", "image_captioning", "image_generation", "mm_out", "visual_chat",
    }  # fmt: skip
    chats = [item for item in items if item["task_name"] == "visual_chat"]
    answers = [chat_answers.read(item["answer"]) for item in chats]
    assert len(chats) == len({item["image_path"] for item in chats})
    assert {answer.domain for answer in answers} == {
        "",
        "chest_xray",
        "ct_scan",
        "histology",
        "mri",
    }
    assert all(answer.reference and answer.caption for answer in answers)


def test_mcq_options_contain_the_answer_once(items, rows):
    by_path = {row["file"]: row for row in rows}
    for item in items:
        if item["question_type"] == "mcq":
            options = dict(re.findall(r"^([A-D]): (.+)$", item["prompt"], re.M))
            field = item["template"].split("/")[1]
            assert len(set(options.values())) == 4
            assert options[item["answer"]] == by_path[item["image_path"]][field]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mcq_is_not_solved_by_the_most_common_value(rows, seed):
    train = [row for row in rows if row["split"] == "train"]
    test_rows = [row for row in rows if row["split"] == "test"]
    right = Counter()
    questions = mcq_questions(test_rows, seed)
    for question in questions:
        field = question.template.split("/")[1]
        common = Counter(row[field] for row in train)
        options = dict(re.findall(r"^([A-D]): (.+)$", question.prompt, re.M))
        guess = max(options, key=lambda letter: common[options[letter]])
        right[question.template] += guess == question.answer
    assert sum(right.values()) / len(questions) < 0.40, right


def test_documents_depend_on_the_seed(rows, documents, items):
    assert instruction_documents(rows, seed=0) == documents
    assert eval_items(rows, seed=0) == items
    assert instruction_documents(rows, seed=1) != documents


def test_manifest_errors_state_row_field_and_fix(tmp_path, rows):
    bad = copy.deepcopy(rows[0])
    bad["facts"]["modality"] = "seen"
    with pytest.raises(ValueError, match=r"row 7: facts.modality: 'seen' must be one of"):
        check_row(bad, "row 7")
    bad = {key: value for key, value in rows[0].items() if key != "licence"}
    with pytest.raises(ValueError, match=r"missing fields \['licence'\]"):
        check_row(bad, "row 1")
    other = {**rows[0], "id": "other", "split": "test"}
    with pytest.raises(ValueError, match="belongs to one split"):
        check_groups([{**rows[0], "split": "train"}, other])
    (tmp_path / "images").mkdir()
    (tmp_path / rows[0]["file"]).write_bytes(b"not the image")
    (tmp_path / "manifest.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="sha256: the file has"):
        read_manifest(tmp_path / "manifest.jsonl", check_files=True)


def test_image_phrases(rows):
    by_id = {row["id"]: row for row in rows}
    assert image_phrase(by_id["mri-pd-brain_00"]) == "axial proton density MRI of the brain"
    assert image_phrase(by_id["film-cat_00"]) == "X-ray of the chest of a cat"
    assert image_phrase(by_id["blood-smear_00"]) == "blood smear"


def nrrd(array, directions, encoding="gzip"):
    """Return the NRRD bytes of a [k, j, i] int16 array."""
    sizes = " ".join(str(n) for n in array.shape[::-1])
    head = (
        "NRRD0004\n# comment\ntype: short\ndimension: 3\nspace: left-posterior-superior\n"
        f"sizes: {sizes}\nspace directions: {directions}\nendian: little\nencoding: {encoding}\n\n"
    )
    body = array.astype("<i2").tobytes()
    return head.encode() + (gzip.compress(body) if encoding == "gzip" else body)


@pytest.mark.parametrize("encoding", ["gzip", "raw"])
def test_nrrd_is_converted_to_canonical_axes(encoding):
    array = np.arange(24).reshape(2, 3, 4)
    volume = read_nrrd(nrrd(array, "(2,0,0) (0,-3,0) (0,0,5)", encoding))
    np.testing.assert_array_equal(volume.data, array[:, ::-1, :])  # rows ran towards the front
    assert volume.spacing == (5.0, 3.0, 2.0)
    np.testing.assert_array_equal(volume.slice("axial", 1), array[1, ::-1])
    with pytest.raises(ValueError, match="true to scale"):
        volume.slice("coronal", 0)


def test_nrrd_permuted_axes():
    array = np.arange(24).reshape(2, 3, 4)  # first axis runs up, second left, third back
    volume = read_nrrd(nrrd(array, "(0,0,1) (1,0,0) (0,1,0)"))
    np.testing.assert_array_equal(volume.data, array.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("directions", "message"),
    [("(1,1,0) (1,-1,0) (0,0,1)", "oblique"), ("(1,0,0) (1,0,0) (0,0,1)", "oblique")],
)
def test_nrrd_with_oblique_axes_is_rejected(directions, message):
    with pytest.raises(ValueError, match=message):
        read_nrrd(nrrd(np.zeros((2, 2, 2)), directions))


def test_nrrd_with_a_short_body_is_rejected():
    content = nrrd(np.zeros((2, 3, 4)), "(1,0,0) (0,1,0) (0,0,1)", "raw")
    with pytest.raises(ValueError, match="do not fit"):
        read_nrrd(content[:-1])


def nifti(array, affine, order="<"):
    """Return the NIfTI-1 bytes of a [k, j, i] uint8 array with an sform."""
    head = bytearray(352)
    head[0:4] = np.array(348, order + "i4").tobytes()
    head[40:56] = np.array([3, *array.shape[::-1], 1, 1, 1, 1], order + "i2").tobytes()
    head[70:72] = np.array(2, order + "i2").tobytes()
    head[108:112] = np.array(352, order + "f4").tobytes()
    head[254:256] = np.array(1, order + "i2").tobytes()
    head[280:328] = np.hstack([affine, np.zeros((3, 1))]).astype(order + "f4").tobytes()
    head[344:348] = b"n+1\0"
    return bytes(head) + array.astype("u1").tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_nifti_axes_right_and_front_become_left_and_back(order, pack):
    array = np.arange(24).reshape(2, 3, 4)
    volume = read_nifti(pack(nifti(array, np.eye(3), order)))
    np.testing.assert_array_equal(volume.data, array[:, ::-1, ::-1])
    np.testing.assert_array_equal(volume.slice("coronal", 0), array[::-1, 2, ::-1])
    np.testing.assert_array_equal(volume.slice("sagittal", 3), array[::-1, ::-1, 0])


def test_window_maps_to_bytes():
    gray = to_bytes(np.array([[-2000.0, -1000.0, -300.0, 400.0, 3000.0]]), (-1000, 400))
    np.testing.assert_array_equal(gray, [[0, 0, 128, 255, 255]])


def test_deb_member_is_read_without_unpacking(tmp_path):
    import io
    import tarfile

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as tar:
        info = tarfile.TarInfo("./usr/share/note")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    body = inner.getvalue()
    parts = [(b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (b"data.tar.xz", body)]
    content = b"!<arch>\n"
    for name, data in parts:
        head = name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"100644".ljust(8)
        content += (
            head + str(len(data)).encode().ljust(10) + b"`\n" + data + b"\n" * (len(data) % 2)
        )
    path = tmp_path / "x.deb"
    path.write_bytes(content)
    assert Archive(path).read("./usr/share/note") == b"hello"


def test_documents_are_made_quickly(rows):
    start = time.perf_counter()
    instruction_documents(rows, seed=3)
    assert time.perf_counter() - start < 5
