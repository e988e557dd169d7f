"""Predictions of other programs: read in their formats, scored again, compared, matched to items.

The files are written here in the form that SMMILE's authors publish, and that lmms-eval, VLMEvalKit
and MedEvalKit write.
"""

import csv
import json
import pathlib
import random
import shutil
import zipfile

import openpyxl
import pytest
from eval_setup import item
from smmile_files import write_smmile

from medmax_jax.config import build
from medmax_jax.configs import eval_tiny
from medmax_jax.eval import rescore
from medmax_jax.eval.config import Settings
from medmax_jax.eval.models import predictions
from medmax_jax.eval.pipeline import stages
from medmax_jax.eval.prediction_files import formats, matching, rescoring, tables
from medmax_jax.eval.stats.intervals import Resampling

SAMPLE = pathlib.Path(__file__).parents[2] / "data" / "sample"
RESAMPLING = Resampling(0, 2_000)
ECHO = (  # as LLaVA's files have it
    "USER:  \nIs it?\n\nPlease select the best answer from the following options:\nC. No\nB. Yes.\n"
    "\nYour task:\n1. Think.\n<answer>Correct letter.</answer>\n ASSISTANT: {answer}"
)


def rows_of(path):
    file = formats.read_predictions(path)
    scores = rescoring.item_scores(file)
    return file, rescoring.rescore(file, scores, resampling=RESAMPLING)


def write_csv(path, rows, delimiter=",", quoting=csv.QUOTE_MINIMAL, bom=False):
    with open(path, "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_xlsx(path, rows):
    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    book.save(path)
    return path


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- SMMILE


def test_the_scores_in_files_of_smmile_are_reproduced(tmp_path):
    write_smmile(tmp_path)
    file, (row,) = rows_of(tmp_path / "result_qwen72B_0-shot_mcqa.csv")
    assert (file.model, file.benchmark, row["n"], row["verdict"]) == (
        *("qwen72B 0-shot", "SMMILE"),
        *(111, "is_correct"),
    )
    assert row["published"] == row["strict"] == 58 / 111 and row["reasons"] == {}
    assert row["published_low"] < row["published"] < row["published_high"]
    assert "no text of the model" in file.notes[0]
    file, rows = rows_of(tmp_path / "result_majority_ICL.csv")
    assert [(r["verdict"], r["published"], r["stated"]) for r in rows] == [
        ("exact match", 30 / 111, pytest.approx(30 / 111)),
        ("judge", 30 / 111, pytest.approx(30 / 111)),
    ]
    assert rows[0]["strict"] == 30 / 111 and rescoring.notes_of(file) == []
    file, (row,) = rows_of(tmp_path / "result_llavamed_ICL_mcqa.csv")
    assert row["published"] == row["stated"] == 0 and row["n_unparsed"] == 107


def smmile_rows(**changes):
    row = dict(
        problem_id="p_perm_0", final_question="Is it?", true_answer="Yes.", correct_option="B",
        selected_option="B", is_correct="True", generated_answer="Yes.", full_response="B",
    )  # fmt: skip
    return [row | changes]


@pytest.mark.parametrize(
    "changes, value, reason",
    [
        (dict(full_response="<answer>B</answer>"), 1, None),
        (dict(full_response="Yes."), 1, None),  # the words that the row gives for its letter
        (dict(full_response="maybe"), 0, "accepted an answer that states no option"),
        (dict(full_response="C"), 0, "accepted an answer that states another option"),
        (dict(full_response=""), 0, "accepted an empty answer"),
        (dict(full_response="It is B.</think>"), 0,
         "accepted reasoning without an answer after it"),
        (dict(full_response="B", is_correct="False", selected_option="EXTRACTION_FAILED"), 1,
         "rejected the reference's option"),
        (dict(full_response=ECHO.format(answer="C. Yes.")),
         0, "accepted a letter with the text of another option"),
        (dict(full_response=ECHO.format(answer=" Yes.")),
         1, None),
    ],
)  # fmt: skip
def test_the_reason_of_each_difference_is_named(tmp_path, changes, value, reason):
    path = write_csv(tmp_path / "result_llava_7b_ICL_mcqa.csv", smmile_rows(**changes))
    _, (row,) = rows_of(path)
    assert row["strict"] == value and row["reasons"] == ({reason: 1} if reason else {})


def test_permutations_of_one_problem_are_one_group(tmp_path):
    rows = [r for n in range(6) for r in smmile_rows(problem_id=f"p{n // 3}_perm_{n % 3}")]
    file, (row,) = rows_of(write_csv(tmp_path / "result_a_ICL_mcqa.csv", rows))
    assert file.benchmark == "SMMILE++" and (row["n"], row["groups"]) == (6, 2)


def test_a_judge_that_accepts_other_words_is_counted(tmp_path):
    rows = [
        dict(problem_id=f"p{n}", final_question="What?", true_answer="CT",
             generated_answer="A computed tomography.", full_response="")
        for n in range(4)
    ]  # fmt: skip
    path = write_csv(tmp_path / "result_a_ICL_open.csv", rows)
    verdicts = {f"p{n}": 100.0 * (n < 3) for n in range(4)}
    content = dict(accuracy=50.0, problem_accuracies=verdicts)
    (tmp_path / "result_a_ICL_open_evaluationllm.json").write_text(json.dumps(content))
    file, (row,) = rows_of(path)
    assert row["reasons"] == {"the judge accepted other words than the reference's": 3}
    assert (row["published"], row["strict"], row["diff"]) == (0.75, 0.0, -0.75)
    assert rescoring.notes_of(file) == [
        "judge: published is 0.5000, the rows here have a mean of 0.7500"
    ]


# ---- lmms-eval


def lmms_samples(text=lambda n: "B", n=4):
    return [
        dict(
            doc_id=k, input=f"<image>\nWhat is in image {k}?\nA. CT\nB. MRI\nAnswer with a letter.",
            target="B", filtered_resps=[text(k)], doc_hash="0", token_counts=[None],
            accuracy={"is_correct": text(k) == "B", "answer": "B"}, other=7.5,
        )
        for k in range(n)
    ]  # fmt: skip


def test_samples_of_lmms_eval(tmp_path):
    folder = tmp_path / "org__model"
    text = ["B", "The answer is (B).", "A", "I do not know"].__getitem__
    path = write_jsonl(folder / "20260101_000000_samples_slake_en.jsonl", lmms_samples(text))
    results = {"results": {"slake_en": {"accuracy,none": 0.25, "alias": "slake_en"}}}
    (folder / "20260101_000000_results.json").write_text(json.dumps(results))
    file, (row,) = rows_of(path)
    assert (file.model, file.benchmark, file.format) == ("org__model", "slake_en", "lmms_eval")
    assert (row["verdict"], row["published"], row["stated"]) == ("accuracy", 0.25, 0.25)
    assert (row["strict"], row["n_unparsed"]) == (0.5, 1)
    assert row["reasons"] == {"rejected the reference's option": 1}
    assert file.answers[0].options == {"A": "CT", "B": "MRI\nAnswer with a letter."}


def test_a_truncated_last_line_and_likelihoods_are_left_out_by_name(tmp_path):
    samples = lmms_samples(n=3)
    samples[1]["filtered_resps"] = [["-1.5", "False"], ["-0.1", "True"]]
    path = write_jsonl(tmp_path / "d_samples_t.jsonl", [*samples, samples[0]])
    path.write_text(path.read_text() + json.dumps(samples[2])[:50])
    file, (row,) = rows_of(path)
    assert row["n"] == 2
    counted = {reason.split(" (")[0]: places for reason, places in file.left_out.items()}
    assert counted == {
        "not JSON": ["line 5"],
        "several responses, or likelihoods instead of a text": ["line 2"],
        "a row occurs twice": ["line 4"],
    }


def test_an_older_sample_holds_its_document(tmp_path):
    doc = dict(question="Is it a CT?", img_name="a/source.jpg")
    sample = dict(doc_id=0, doc=doc, target="Yes", resps=[["yes, it is"]], filtered_resps=["yes"])
    file, (row,) = rows_of(write_jsonl(tmp_path / "x_samples_slake.jsonl", [sample]))
    (answer,) = file.answers
    assert (answer.family, answer.text, answer.images) == (
        "vqa_closed",
        "yes, it is",
        ("a/source.jpg",),
    )
    assert row["strict"] == 1 and row["published"] is None and row["verdict"] == ""


# ---- VLMEvalKit


def vlm_rows(**changes):
    row = dict(index=1, question="Which?", A="CT", B="MRI", C=None, answer="B", category="x",
               prediction="B", hit=1)  # fmt: skip
    return row | changes


@pytest.mark.parametrize("ending", ["xlsx", "tsv", "json"])
def test_predictions_of_vlmevalkit(tmp_path, ending):
    folder, number = tmp_path / "Model-7B", "3" if ending == "tsv" else 3.0
    folder.mkdir()
    rows = [
        vlm_rows(),
        vlm_rows(index=2, prediction="MRI", hit=0),
        vlm_rows(index=3, C=number, answer="C", prediction=3, hit=1),
        vlm_rows(index=4, prediction="", hit=0),
    ]
    path = folder / f"Model-7B_Bench_TEST_openai_result.{ending}"
    if ending == "xlsx":
        write_xlsx(path, rows)
    elif ending == "tsv":
        write_csv(path, rows, "\t", csv.QUOTE_ALL, bom=True)
    else:
        path.write_text(json.dumps(rows).replace("null", "NaN"))
    write_csv(folder / "Model-7B_Bench_TEST_acc.csv", [dict(split="none", Overall=0.5)])
    file, (row,) = rows_of(path)
    assert (file.model, file.benchmark) == ("Model-7B", "Bench_TEST")
    assert row["n"] == 4 and row["n_unparsed"] == 1 and file.left_out == {}
    assert file.answers[3].text == ""  # an empty cell is an answer, and counts as wrong
    assert row["reasons"] == {"rejected the reference's option": 1}
    assert file.answers[2].options == {"A": "CT", "B": "MRI", "C": "3"}
    assert row["stated"] == 0.5


def test_pickles_and_damaged_or_large_xlsx_are_refused(tmp_path, monkeypatch):
    for name in ("Model_Bench.pkl", "m.pt"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'x'\ntR.")
        with pytest.raises(tables.PredictionFileError, match="a pickle can execute code"):
            formats.read_predictions(tmp_path / name)
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(tables.PredictionFileError, match="damaged or not an XLSX file"):
        formats.read_predictions(path)
    write_xlsx(path, [vlm_rows()])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("xl/extra.xml", '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><a/>')
    with pytest.raises(tables.PredictionFileError, match="extra.xml' declares XML entities"):
        formats.read_predictions(path)
    write_xlsx(path, [vlm_rows()])
    monkeypatch.setattr(tables, "MAX_BYTES", 5_000)
    with pytest.raises(tables.PredictionFileError, match=r"(unpacks to )?more than 5,000 bytes"):
        formats.read_predictions(path)


def test_cut_off_texts_and_rotations_are_noted(tmp_path):
    long = "B " * (tables.MAX_CELL // 2) + "B"
    rows = [vlm_rows(g_index=1), vlm_rows(index=1_000_001, g_index=1, prediction=long)]
    file, (row,) = rows_of(write_xlsx(tmp_path / "m_MMBench.xlsx", rows))
    assert len(file.answers[1].text) == tables.MAX_CELL and row["groups"] == 1
    assert file.notes[0].startswith("1 texts have the 32,767") and "rotations" in file.notes[1]


# ---- MedEvalKit


def medeval_results():
    closed = dict(question="is there air?", answer="yes", response="Yes.", correct=True)
    opened = dict(question="what is it?", answer="ct", response="a CT", correct=False, metrics={})
    choice = dict(
        prompt="\nQuestion: which?\nOptions: \n A:CT \n B:MRI \nAnswer with the letter.",
        answer="A", choices=[" A:CT ", " B:MRI "], response="(A)", correct=True,
    )  # fmt: skip
    return [closed, opened, choice, closed | dict(question="else?", response="unclear")]


def test_results_of_medevalkit(tmp_path):
    folder = tmp_path / "Lingshu-7B" / "VQA_RAD"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(medeval_results(), indent=4))
    metrics = {"total metrics": {"total": 4, "right": 2, "acc": 0.75}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    file, rows = rows_of(folder / "results.json")
    assert (file.model, file.benchmark) == ("Lingshu-7B", "VQA_RAD")
    found = {r["family"]: (r["n"], r["published"], r["strict"], r["reasons"]) for r in rows}
    assert found == {
        "vqa_closed": (2, 1.0, 0.5, {"accepted an answer that states no option": 1}),
        "vqa_open": (1, 0.0, 1.0, {"rejected the reference's words": 1}),
        "vqa_mcq": (1, 1.0, 1.0, {}),
    }
    assert rescoring.notes_of(file) == ["rows have no id: they are named by their position in the "
                                        "file"]  # fmt: skip
    lines = write_jsonl(folder / "lines.json", medeval_results())
    assert formats.read_predictions(lines).answers[2].options == {"A": "CT", "B": "MRI"}


# ---- Any format


def test_an_unknown_format_is_named_with_what_is_expected(tmp_path):
    path = write_csv(tmp_path / "a.csv", [dict(id=1, answer=2)])
    with pytest.raises(tables.PredictionFileError) as error:
        formats.read_predictions(path)
    text = str(error.value)
    assert "it has the columns id, answer" in text and "vlmevalkit: index, prediction" in text
    with pytest.raises(tables.PredictionFileError, match="does not end in .csv, .tsv"):
        formats.read_predictions(tmp_path / "a.txt")
    with pytest.raises(tables.PredictionFileError, match="No such file"):
        formats.read_predictions(tmp_path / "none.csv")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "\ufeffindex;prediction\r\n1;A\r\n", "separated by ';', those of a .csv file"),
        ("a.csv", "index\tprediction\n1\tA\n", r"separated by '\\t', those of a .csv file by ','"),
        ("a.tsv", "index,prediction\n1,A\n", "separated by ','"),
        ("a.csv", "index,prediction\n", "it has no rows"),
        ("a.jsonl", "", "it has no rows"),
        ("a.csv", "Results,\nindex,prediction,hit\n", "no row can be read; row 1: 3 fields, but"),
    ],
)
def test_a_file_without_usable_rows_is_refused_with_the_reason(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    with pytest.raises(tables.PredictionFileError, match=message):
        formats.read_predictions(tmp_path / name)


def test_rows_without_a_verdict_are_noted(tmp_path, capsys):
    rows = [vlm_rows(index=n, hit=None if n else 1) for n in range(3)]
    path = write_xlsx(tmp_path / "m_Bench.xlsx", rows)
    flags = [f"--workdir={tmp_path / 'w'}", "--resamples=2000"]
    assert rescore.main([str(path), *flags]) == 0
    printed = capsys.readouterr().out
    assert "hit: 2 of 3 rows (vqa_mcq) have no verdict; published and difference" in printed
    assert "| 1.000 (–) |" in printed and "None" not in printed  # one row has no interval


def test_one_id_with_different_rows_is_left_out(tmp_path):
    rows = [vlm_rows(), vlm_rows(prediction="A"), vlm_rows(index=2)]
    file = formats.read_predictions(write_xlsx(tmp_path / "m.xlsx", rows))
    assert [answer.key for answer in file.answers] == ["2"]
    assert file.left_out == {"one id has different rows": ["row 1", "row 2"]}
    path = write_csv(tmp_path / "r.tsv", [vlm_rows(index=7)], "\t")
    path.write_text(path.read_text() + '8\t"open')
    file = formats.read_predictions(path)
    assert len(file.answers) == 1 and "a quoted field is not closed" in str(file.left_out)


def mutate(data, rng):
    """Change, remove or cut some bytes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 2, 10))):
        at = rng.randrange(len(data) or 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randrange(1, 40)]
            case 2:
                data[at:at] = rng.choice((b'"', b"\t", b"\x00", b"NaN", b"\xff", b"&b;"))
            case 3:
                del data[at:]
    return bytes(data)


@pytest.mark.parametrize("name", ["m.xlsx", "m.tsv", "m_samples_t.jsonl", "r.json"])
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, name):
    path, rng, refused = tmp_path / name, random.Random(0), 0
    if name == "m.xlsx":
        write_xlsx(path, [vlm_rows(index=n) for n in range(4)])
    elif name == "m.tsv":
        write_csv(path, [vlm_rows(index=n) for n in range(4)], "\t")
    else:
        write_jsonl(path, lmms_samples() if "samples" in name else medeval_results())
    whole = path.read_bytes()
    for _ in range(100):
        path.write_bytes(mutate(whole, rng))
        try:
            rescoring.item_scores(formats.read_predictions(path))
        except tables.PredictionFileError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 5 < refused <= 100


def test_a_score_on_another_scale_is_no_verdict(tmp_path):
    rows = [vlm_rows(index=n, hit=None, score=n) for n in range(4)]
    file, (row,) = rows_of(write_xlsx(tmp_path / "m_Bench.xlsx", rows))
    # the rows with 0 and 1 alone would have another mean
    assert row["verdict"] == "" and row["published"] is None and row["strict"] == 1
    assert file.notes == ("score has values like 3: no score from 0 to 1",)


# ---- The program


def test_the_program_compares_files_and_writes_both_outputs(tmp_path, capsys):
    paths = [str(path) for path in write_smmile(tmp_path / "published")[:2]]
    flags = [f"--workdir={tmp_path / 'new'}", "--resamples=2000"]
    assert rescore.main([*paths, *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = result["comparisons"]
    # the file of the smaller model has other references for 18 of its 111 problems
    assert (row["n"], row["not_same"]) == (93, 18) and row["p_holm"] == row["p"]
    assert (row["first"], row["second"]) == ("qwen72B 0-shot", "qwen7B 0-shot")
    page = (tmp_path / "new" / "rescore.html").read_text()
    assert "<script" not in page and "default-src 'none'" in page
    assert "Of 2 published scores without a judge, 2 are the same item by item" in page
    stored = json.loads((tmp_path / "new" / "rescore.json").read_text())
    assert stored["rows"] == result["rows"] and stored["environment"]["seed"] == 0
    assert rescore.main([*paths, *flags]) == 0
    printed = capsys.readouterr().out
    assert "| result_qwen72B_0-shot_mcqa.csv | 111 | 0.523 (0.4" in printed
    assert f"page: {tmp_path / 'new' / 'rescore.html'}" in printed


def test_a_file_in_a_bucket_is_refused(tmp_path, capsys):
    assert rescore.main(["gs://bucket/a.csv", f"--workdir={tmp_path}"]) == 1
    assert "gs://bucket/a.csv: prediction files are read from a disk" in capsys.readouterr().err


def test_many_files_are_compared_with_one(tmp_path, capsys):
    paths = []
    for number in range(10):
        path = tmp_path / f"result_m{number}_ICL_mcqa.csv"
        rows = [r for n in range(8) for r in smmile_rows(
            problem_id=f"p{n}", full_response="B" if n % 5 < number else "C")]  # fmt: skip
        paths.append(str(write_csv(path, rows)))
    result = rescore.rescore_files(paths, resampling=RESAMPLING)[1]["comparisons"]
    assert len(result) == 9 and {row["first"] for row in result} == {"m0 ICL"}
    named = rescore.rescore_files(paths, against=paths[3], resampling=RESAMPLING)[1]
    assert {row["first"] for row in named["comparisons"]} == {"m3 ICL"}
    few = rescore.rescore_files(paths[:4], resampling=RESAMPLING)[1]["comparisons"]
    assert len(few) == 6 and few[0]["p_holm"] <= 1
    wrong = [*paths[:2], f"--workdir={tmp_path / 'out'}", f"--against={paths[5]}"]
    assert rescore.main(wrong) == 1 and "not one of the files" in capsys.readouterr().err
    assert rescore.main([paths[0], paths[0], f"--workdir={tmp_path}"]) == 1
    assert "is named twice" in capsys.readouterr().err


# ---- As a model of eval.run


def suite_items():
    prompt = "Which modality?\nA: CT\nB: MRI"
    return [
        item("a", "vqa_mcq", 0, id="one", prompt=prompt, answer="B", image="x/0.png"),
        item("a", "vqa_mcq", 1, id="two", prompt=prompt, answer="A", image="x/1.png"),
        item("a", "vqa_closed", 2, id="three", prompt="Is it?", answer="yes"),
        item("a", "vqa_closed", 3, id="four", prompt="Is it so?", answer="no"),
        item("a", "vqa_closed", 4, id="five", prompt="Is it so?", answer="no"),
    ]


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(key="three", question="Is it?"), "three"),
        (dict(key="three", question="Was it?"), matching.OTHER_QUESTION),
        (dict(key="three"), "three"),
        (dict(key="9", question="Which modality?", images=("0.png",)), "one"),
        (dict(key="9", question="Which modality?", reference="A"), "two"),
        (dict(key="9", question="Which modality?", reference="ct", options={}), "two"),
        (dict(key="9", question="Which modality?"), matching.SEVERAL_ITEMS),
        (dict(key="9", question="Look.\nIs it?\nAnswer yes or no."), "three"),
        (dict(key="9", question="Is it so?", reference="no"), matching.SEVERAL_ITEMS),
        (dict(key="9", question="Is it so?", reference="yes"), matching.NO_REFERENCE),
        (dict(key="9", question="Is it?", images=("z.png",)), matching.NO_IMAGE),
        (dict(key="9", question="Else?"), matching.NO_QUESTION),
    ],
)
def test_a_row_is_matched_by_id_or_by_content(fields, expected):
    answer = formats.Answer(place="row 1", family="vqa_closed", text="yes", **fields)
    file = formats.PredictionFile(
        path=pathlib.Path("f"), format="x", model="m", benchmark="b", answers=(answer,)
    )
    found, unmatched = matching.match(file, suite_items())
    assert (list(found) or list(unmatched)) == [expected]


def test_an_index_that_is_also_an_id_is_checked_with_its_question():
    items = [item("a", "vqa_closed", 0, id="0", prompt="Is it?", answer="yes")]
    parts = dict(path=pathlib.Path("f"), format="x", model="m", benchmark="b")
    for question, expected in (("", matching.UNCHECKED), ("Else?", matching.NO_QUESTION)):
        one = formats.Answer(
            key="0", place="row 1", family="vqa_closed", text="", question=question
        )
        file = formats.PredictionFile(answers=(one,), **parts)
        assert matching.match(file, items) == ({}, {expected: ["row 1"]})
    two = [formats.Answer(key=str(n), place=f"row {n}", family="vqa_closed", text="",
                          question="Is it?") for n in (4, 5)]  # fmt: skip
    found, left = matching.match(formats.PredictionFile(answers=tuple(two), **parts), items)
    assert found == {} and left == {matching.SEVERAL_ROWS: ["row 4", "row 5"]}
    same = [item("a", "vqa_closed", n, id=str(n), prompt="Is it?", answer="yes") for n in range(6)]
    found, _ = matching.match(formats.PredictionFile(answers=tuple(two), **parts), same)
    assert {name: answer.place for name, answer in found.items()} == {"4": "row 4", "5": "row 5"}


def write_suite(folder):
    folder.mkdir()
    lines = [
        dict(task_name="own", question_type="mcq", prompt=f"What is in image {n}?",
             options=["CT", "MRI"], answer="B", image_path=f"{n}.jpg", id=f"q{n}")
        for n in range(5)
    ]  # fmt: skip
    for n, image in zip(range(5), sorted((SAMPLE / "images").iterdir()), strict=False):
        shutil.copy(image, folder / f"{n}{image.suffix}")
    return write_jsonl(folder / "items.jsonl", lines)


def run(items, out, model):
    config = eval_tiny.get_config().unlock()
    config.update(questions=str(items), baselines="constant", probes="", options=False)
    config.update(resamples=2_000)
    return stages.run(build(Settings, config), out, model=f"predictions:{model}", progress=print)


def test_samples_of_lmms_eval_are_a_model_of_the_suite(tmp_path):
    items = write_suite(tmp_path / "data")
    text = ["B", "A", "B", "neither", "B", "B"].__getitem__
    path = write_jsonl(tmp_path / "d_samples_own.jsonl", lmms_samples(text, n=6))
    summary = run(items, tmp_path / "out", path)
    assert summary.recorded == dict(
        format="lmms_eval", matched=5, rows=[dict(why=matching.NO_QUESTION, rows=1, first="line 6")]
    )
    row = summary.scores[0]
    assert (row.n, row.value, row.n_unparsed, row.n_errors) == (5, 0.6, 1, 0)
    page = (tmp_path / "out" / "report.html").read_text()
    assert matching.NO_QUESTION in page and "line 6" in page


def test_predictions_without_any_item_are_refused_with_the_reasons(tmp_path):
    items = write_suite(tmp_path / "data")
    path = write_xlsx(tmp_path / "m.xlsx", [vlm_rows()])
    with pytest.raises(predictions.PredictionsError, match="no item has its question \\(1, first"):
        run(items, tmp_path / "out", path)
    path.with_suffix(".pkl").write_bytes(b"")
    with pytest.raises(predictions.PredictionsError, match="a pickle can execute code"):
        run(items, tmp_path / "other", path.with_suffix(".pkl"))
