"""MediConfusion, SMMILE, DeepTumorVQA-2D, Kvasir-VQA-x1, MedGEN-Bench in published formats."""

import json
from pathlib import Path

import benchmark_files as files
import PIL.Image
import pytest
from test_benchmark_formats import convert

from medmax_jax.data.records.row_streams import SourceError
from medmax_jax.eval import evaluate
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.metrics import full_reference
from medmax_jax.eval.tasks import catalog, selection
from medmax_jax.eval.tasks import items as task_items


def pair(number, **changes):
    """Return an entry of MediConfusion's dataset.json."""
    return (
        dict(
            im_1=f"train/radiology/images/ROCO_{number}.jpg",
            im_2=f"train/radiology/images/ROCO_{number + 50}.jpg",
            im_1_local=20_000 + number,
            im_2_local=20_050 + number,
            cap_1=" One.",
            cap_2=" Two.",
            category_1=["Cerebral", "Vascular"],
            category_2=["Cerebral"],
            BiomedCLIP_sim=0.92,
            DINO_sim=0.67,
            question="What do you see on this angiogram?",
            option_A="Terminating into the ophthalmic artery",
            option_B="Showing a pseudoaneurysm",
            im_1_correct="AB"[number % 2],
            im_2_correct="BA"[number % 2],
        )
        | changes
    )


def put_mediconfusion(folder, count=3, **changes):
    pairs = {str(10_001 + n): pair(n) for n in range(count)}
    pairs["10002"] |= changes
    files.put(folder, "dataset.json", json.dumps(pairs, indent=4))
    for n in range(count):
        for place, local in enumerate((20_000 + n, 20_050 + n)):
            files.put(folder, f"images/{local}.jpg", files.image(2 * n + place))


def triplet(problem, order, **changes):
    """Return a row of SMMILE's parquet."""
    return (
        dict(
            problem_id=f"01e87e12-{problem}",
            order=order,
            question="What color can be seen in the abnormal lesion?",
            answer=("White.", "Red.", "Black.", "Red.")[(problem + order) % 4],
            image=dict(bytes=files.image(4 * problem + order), path=None),
            image_url="https://x.org/1.png",
            speciality="Dermatology",
            flag_task="diagnosis",
        )
        | changes
    )


def put_smmile(folder, rows):
    files.put_parquet(folder, "data/train-00000-of-00001.parquet", rows)


def tumor(number, **changes):
    """Return a question of DeepTumorVQA's test_qa.json."""
    forms = (
        ("organ volume measurement", "What is the volume?", "1438.5 cm^3"),
        ("liver lesion existence", "Is there a lesion?", "Yes"),
        ("splenomegaly grading", "Which grade?", "Normal (no splenomegaly)"),
    )
    subtype, question, answer = forms[number % 3]
    return (
        dict(
            qid=f"bench_{number:05}",
            image_id=f"BDMAP_{number // 2:08}",
            spacing="[0.83 0.83 5.0]",
            shape="(512, 512, 116)",
            sex="F" if number else None,
            age=None,
            question=question,
            answer=answer,
            mc_question=f"{question} A: Normal (none) B: Moderate C: Severe D: Mild",
            correct_option="ABCD"[number % 4],
            organ="spleen",
            lesion=False,
            question_type="medical reasoning",
            question_subtype=subtype,
            requires_tools=["measure"],
        )
        | changes
    )


def put_deeptumorvqa(folder, rows, suffix="json"):
    content = dict(version=4, num_questions=len(rows), questions=rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = json.dumps(content) if suffix == "json" else lines
    files.put(folder, f"benchmark/test_qa.{suffix}", text)
    for row in rows:
        with PIL.Image.open(files.IMAGES[0]) as image:
            path = folder / "benchmark/images_2d/whole" / f"{row['image_id']}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def kvasir(number, **changes):
    """Return a row of Kvasir-VQA-x1."""
    return (
        dict(
            img_id=f"clb0kvxvm{number // 2}",
            complexity=1 + number % 3,
            question="What is shown?",
            answer="A polyp of 5 to 10 mm.",
            original='[{"q": "Is there a polyp?", "a": "yes"}]',
            question_class=["polyp_type", "polyp_size"],
        )
        | changes
    )


def put_kvasir(folder, rows):
    files.put_parquet(folder, "data/test-00000-of-00001.parquet", rows)
    for number, row in enumerate(rows):
        files.put(folder, f"images/{row['img_id']}.jpg", files.image(number))


def test_mediconfusion(tmp_path):
    put_mediconfusion(tmp_path)
    summary, items = convert(tmp_path, "mediconfusion", prefix="m")
    assert summary["tasks"] == {"mediconfusion_mcq": 6}
    assert summary["other_counts"] == ["6 rows of mediconfusion_mcq, published: 352"]
    assert [item.answer for item in items] == list("ABBAAB")
    assert [item.image for item in items[:2]] == ["m/images/20000.jpg", "m/images/20050.jpg"]
    assert items[0].group == items[1].group != items[2].group
    assert items[0].slices == (("category", "Cerebral"), ("category", "Vascular"))
    assert items[0].prompt.splitlines()[1:] == [
        "A: Terminating into the ophthalmic artery", "B: Showing a pseudoaneurysm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(im_2_local="20051"), "im_2_local: missing or not a number"),
        (dict(im_2_local=30_000), "an image is missing in the folder"),
        (dict(im_2_correct="C"), "the answer is not one of the options"),
        (dict(category_1="Cerebral"), "category_1: not a list"),
        (dict(option_B=None), "option_B: missing"),
    ],
)
def test_half_a_pair_is_left_out_as_a_whole(tmp_path, changes, reason):
    put_mediconfusion(tmp_path, **changes)
    with pytest.raises(SourceError, match="2 of 6 rows are malformed.*row 2") as caught:
        convert(tmp_path, "mediconfusion")
    assert reason in str(caught.value)
    summary, items = convert(tmp_path, "mediconfusion", max_bad=0.5)
    assert len(items) == 4 and summary["malformed"] == 2


def test_smmile_brings_its_shots_and_images(tmp_path):
    rows = [triplet(problem, order) for problem in range(3) for order in (2, 1, 3)]
    put_smmile(tmp_path, rows)
    summary, items = convert(tmp_path, "smmile", prefix="s")
    assert summary["tasks"] == {"smmile_mcq": 3, "smmile_open": 3}
    assert summary["other_counts"] == [
        "3 rows of smmile_mcq, published: 111", "3 rows of smmile_open, published: 111",
    ]  # fmt: skip
    opened = items[0]
    assert [shot.answer for shot in opened.shots] == ["Red.", "Black."]  # in their order
    assert opened.answer == "Red." and opened.group == "01e87e12-0"
    assert dict(opened.slices) == {"shots": "2", "speciality": "Dermatology", "task": "diagnosis"}
    for number, name in enumerate((opened.shots[0].images[0], opened.shots[1].images[0])):
        path = tmp_path / "out" / name.removeprefix("s/")
        assert path.read_bytes() == files.image(number + 1)
    choice = items[3]
    options = choice.prompt.splitlines()[1:]
    assert sorted(line[3:] for line in options) == ["Black.", "Red."]
    assert options["AB".index(choice.answer)].endswith("Red.") and len(choice.shots) == 2


def test_smmile_of_one_answer_has_no_choice_and_is_counted(tmp_path):
    put_smmile(tmp_path, [triplet(n, order, answer="Red.") for n in (0, 1) for order in (1, 2)])
    summary, items = convert(tmp_path, "smmile_plus_plus")
    assert summary["left_out"] == 2 and {item.family for item in items} == {"vqa_open"}
    assert "2 rows of smmile_plus_plus_mcq, published: 1038" in summary["other_counts"]


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(image=None), "image: no bytes"),
        (dict(image=dict(bytes=b"text", path=None)), "not an image of a known format"),
        (dict(order=2), "order: not a different number"),
        (dict(answer=None), "answer: missing"),
    ],
)
def test_a_problem_with_a_bad_example_is_named(tmp_path, changes, reason):
    rows = [triplet(n, order) for n in (0, 1) for order in (1, 2)]
    rows[0] |= changes
    put_smmile(tmp_path, rows)
    with pytest.raises(SourceError, match="2 of 4 rows are malformed.*row 1") as caught:
        convert(tmp_path, "smmile")  # its open question, and that of multiple choice
    assert reason in str(caught.value)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_deeptumorvqa(tmp_path, suffix):
    put_deeptumorvqa(tmp_path, [tumor(n) for n in range(6)], suffix)
    summary, items = convert(tmp_path, "deeptumorvqa")
    assert summary["tasks"] == {
        "deeptumorvqa_closed": 2, "deeptumorvqa_mcq": 6, "deeptumorvqa_numeric": 2,
        "deeptumorvqa_open": 2,
    }  # fmt: skip
    assert "6 rows of deeptumorvqa_mcq, published: 10000" in summary["other_counts"]
    choice, number, closed = items[1], items[6], items[7]
    assert choice.prompt.splitlines()[1:] == [
        "Patient: sex=F.", "Is there a lesion? A: Normal (none) B: Moderate C: Severe D: Mild",
    ]  # fmt: skip
    assert choice.answer == "B" and dict(choice.slices)["subtype"] == "liver lesion existence"
    assert (number.family, number.answer) == ("vqa_numeric", "1438.5 cm^3")
    assert "Voxel spacing (mm): [0.83 0.83 5.0]" in number.prompt
    assert (closed.answer, closed.group) == ("yes", "BDMAP_00000000")


def test_free_forms_without_the_form_of_their_kind_are_counted(tmp_path):
    rows = [tumor(0, answer="3 to 5"), tumor(1, answer="Resectable"), tumor(2)]
    put_deeptumorvqa(tmp_path, rows)
    summary, _ = convert(tmp_path, "deeptumorvqa")
    assert summary["left_out"] == 2 and summary["malformed"] == 0
    assert "1 rows of deeptumorvqa_numeric, published: 4188" in summary["other_counts"]
    assert "1 rows of deeptumorvqa_closed, published: 2819" in summary["other_counts"]


def test_deeptumorvqa_of_another_schema_is_refused(tmp_path):
    put_deeptumorvqa(tmp_path, [tumor(n) | {"question_subtype": "other"} for n in range(3)])
    with pytest.raises(SourceError, match="question_subtype: not one of the 42"):
        convert(tmp_path, "deeptumorvqa")
    files.put(tmp_path, "benchmark/test_qa.json", "[]")
    with pytest.raises(SourceError, match="no list named questions"):
        convert(tmp_path, "deeptumorvqa")
    put_deeptumorvqa(tmp_path, [tumor(n) for n in range(4)])
    (tmp_path / "benchmark/images_2d/whole/BDMAP_00000001.png").unlink()
    with pytest.raises(SourceError, match="4 of 8 rows are malformed.*an image is missing"):
        convert(tmp_path, "deeptumorvqa")


def test_the_counts_of_deeptumorvqa_are_those_of_its_schema():
    counts = {kind: catalog.TASKS[f"deeptumorvqa_{kind}"].counts for kind in ("mcq", "numeric")}
    assert counts == {"mcq": 10_000, "numeric": 4_188}
    free = ("numeric", "closed", "open")
    assert sum(catalog.TASKS[f"deeptumorvqa_{kind}"].counts for kind in free) == 10_000


def test_kvasir_vqa_x1(tmp_path):
    put_kvasir(tmp_path, [kvasir(n) for n in range(4)])
    summary, items = convert(tmp_path, "kvasir_vqa_x1")
    assert summary["tasks"] == {"kvasir_vqa_x1_open": 4}
    assert items[1].slices == (
        ("complexity", "2"), ("question_class", "polyp_size"), ("question_class", "polyp_type"),
    )  # fmt: skip
    assert items[0].group == items[1].group and items[0].image == "images/clb0kvxvm0.jpg"


def test_kvasir_vqa_x1_of_another_schema_is_refused(tmp_path):
    put_kvasir(tmp_path, [kvasir(0), kvasir(1, complexity=4), kvasir(2, question_class=None)])
    with pytest.raises(SourceError, match="2 of 3 rows.*complexity: not 1, 2 or 3"):
        convert(tmp_path, "kvasir_vqa_x1")
    put_kvasir(tmp_path, [{k: v for k, v in kvasir(0).items() if k != "question_class"}])
    with pytest.raises(SourceError, match="columns .*question_class.* are missing"):
        convert(tmp_path, "kvasir_vqa_x1")


def put_medgen(folder, *, count=2, **changes):
    """Write the three formats of MedGEN-Bench; the second row of each has the changes."""
    tasks = dict(
        VQA="multiple-choice", ImageEditing="style-transfer", MultimodalGeneration="report"
    )
    for kind, task in tasks.items():
        rows = []
        for n in range(count):
            names = [f"images/{n}.jpg"] + (["images/9.jpg"] if kind == "VQA" else [])
            row = dict(
                sample_id=f"{kind}-{n}",
                instruction="Add the finding.",
                input_image=names,
                ground_truth_image=[] if kind == "VQA" else [f"images/gt{n}.jpg"],
                answer=""
                if kind == "ImageEditing"
                else {"finding": "none"}
                if n
                else "Clear lungs",
                category="CT",
                paper_task=task,
                modality="CT",
            )
            rows.append(row | {"sub-category": "x"} | (changes if n == 1 else {}))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        files.put(folder, f"{kind}/{task}/data.jsonl", text)
        for number, name in enumerate(["0", "1", "9", "gt0", "gt1"]):
            files.put(folder, f"{kind}/{task}/images/{name}.jpg", files.image(number))


def test_medgen_bench(tmp_path):
    put_medgen(tmp_path)
    summary, items = convert(tmp_path, "medgen_bench", prefix="g")
    assert summary["tasks"] == {
        f"medgen_bench_{kind}": 2 for kind in ("editing", "generation", "open")
    }
    assert "2 rows of medgen_bench_editing, published: 3872" in summary["other_counts"]
    by_family = {item.family: item for item in items}  # the second row of each
    question, edit = by_family["vqa_open"], by_family["image_editing"]
    assert len(question.images) == 2 and question.answer == '{"finding": "none"}'
    assert edit.reference_image == "g/ImageEditing/style-transfer/images/gt1.jpg"
    assert edit.image == "g/ImageEditing/style-transfer/images/1.jpg"
    assert dict(edit.slices)["task"] == "style-transfer"
    total = sum(catalog.TASKS[task].counts for task in summary["tasks"])
    assert total == 6_623


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(ground_truth_image=["a.jpg", "b.jpg"]), "an image is missing in the folder"),
        (dict(input_image=[]), "input_image: empty"),
        (dict(input_image=["../../x.jpg"]), "input_image: leads out of the folder"),
        (dict(instruction=None), "instruction: missing"),
    ],
)
def test_a_bad_row_of_medgen_bench_is_named(tmp_path, changes, reason):
    put_medgen(tmp_path, **changes)
    with pytest.raises(SourceError, match="3 of 6 rows are malformed.*row 2") as caught:
        convert(tmp_path, "medgen_bench")
    assert reason in str(caught.value)


class Editor:
    """Returns the image it was shown, with a text where one is expected."""

    name = fingerprint = "editor"

    def generate(self, requests):
        answers = []
        for request in requests:
            shown = [PIL.Image.open(p).convert("RGB") for p in request.parts if isinstance(p, Path)]
            texts = [] if request.mode == "image" else ["Clear lungs"]
            answers.append([*texts, *([shown[0]] if request.id.endswith("1") else [])])
        return answers


def test_edits_are_compared_with_their_reference(tmp_path):
    put_medgen(tmp_path)
    convert(tmp_path, "medgen_bench")
    options = dict(images=tmp_path, progress=lambda line: None, baselines="", probes="")
    counts = dict(vqa_open=0)
    path = tmp_path / "out" / "items.jsonl"
    summary = evaluate(Editor(), path, tmp_path / "w", counts=counts, options=False, **options)
    rows = {(row["task"], row["metric"]): row for row in summary["scores"]}
    psnr = rows["medgen_bench_editing", "psnr"]
    with PIL.Image.open(files.IMAGES[0]) as a, PIL.Image.open(files.IMAGES[3]) as b:
        expected = full_reference.scores(a.convert("RGB"), b.convert("RGB"))
    assert psnr["headline"] and psnr["n"] == 2
    assert psnr["value"] == pytest.approx(expected["psnr"] / 2)  # the other has no image: 0
    assert rows["medgen_bench_generation", "ssim"]["value"] == pytest.approx(expected["ssim"] / 2)
    assert rows["medgen_bench_generation", "has_image"]["value"] == 0.5
    page = (tmp_path / "w" / "items.html").read_text()
    assert "reference" in page and (tmp_path / "w" / "reference_scores.jsonl").exists()


def test_a_missing_image_is_named_before_an_evaluation(tmp_path):
    put_kvasir(tmp_path, [kvasir(n) for n in range(4)])
    _, items = convert(tmp_path, "kvasir_vqa_x1")
    (tmp_path / "images/clb0kvxvm1.jpg").unlink()
    eval_set = selection.EvalSet(items=items, train=[], training_images=[], folder=tmp_path)
    with pytest.raises(EvalError, match="1 of 2 images are missing .*clb0kvxvm1.jpg"):
        selection.check_images(eval_set)


def test_shots_that_are_not_read_are_refused():
    row = dict(task_name="x", question_type="open", prompt="?", answer="a", image_path="a.png")
    shot = dict(prompt="?", answer="b", image_path="b.png")
    (item,) = task_items.from_rows([row | {"shots": [shot]}])
    assert item.shots[0].images == ("b.png",) and item.files == ("a.png", "b.png")
    for bad, reason in (
        ([shot | {"image_path": "../b.png"}], "shot 1: image_path: '../b.png' leads out"),
        ([shot | {"answer": None}], "shot 1: prompt or answer is missing"),
        ([shot] * 33, "not a list of at most 32"),
        ("text", "not a list"),
    ):
        with pytest.raises(task_items.TaskError, match=reason):
            task_items.from_rows([row | {"shots": bad}])
