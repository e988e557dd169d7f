"""Files and columns of earlier versions in a workdir: one clear error, and its command fixes it."""

import json
import shutil
import subprocess

import pytest
from test_eval_models import run, write_items

from medmax_jax.eval import compare, report
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.metrics import per_record
from medmax_jax.eval.pipeline import inference, run_facts
from medmax_jax.eval.tasks import items as task_items

COLUMNS = {"predicted_modality": "looks_like", "modality": "kind"}
SUMMARY_COLUMNS = {"mde": "can_find", "scored_only": "of_scored", "baseline": "floor",
                   "baseline_name": "floor_of"}  # fmt: skip


def rename_columns(path, names):
    text = path.read_text()
    for new, old in names.items():
        text = text.replace(f'"{new}": ', f'"{old}": ')
    path.write_text(text)


@pytest.fixture
def workdir(tmp_path):
    """A finished evaluation with probes, judgments and image scores, under the old names."""
    items = write_items(tmp_path / "data", 6)
    folder = tmp_path / "out"
    run(items, folder, "baseline:constant", probes="blank")
    line = dict(id="q0", kind="correct", votes=[1.0], why=[], judge="j", case="")
    (folder / "judged.jsonl").write_text(json.dumps(line) + "\n")
    # Verbatim: part of the data.
    for name in ("pictures.jsonl", "probe_blank_pictures.jsonl"):
        line = dict(id="q0", scorer="biomedclip", fingerprint="f", image_text=[0.5])
        (folder / name).write_text(json.dumps(line) + "\n")
    rename_columns(folder / "records.jsonl", COLUMNS)
    rename_columns(folder / "probe_blank.jsonl", COLUMNS)
    rename_columns(folder / "summary.json", SUMMARY_COLUMNS)
    return folder


def test_resume_compare_and_report_name_the_file_its_new_name_and_the_fix(workdir, tmp_path):
    items = tmp_path / "data" / "items.jsonl"
    for use in (
        lambda: run(items, workdir, "baseline:constant", probes="blank"),
        lambda: compare(workdir, workdir, seed=0, resamples=2_000),
        lambda: report.rewrite_report(workdir, ""),
    ):
        with pytest.raises(EvalError, match="use a new workdir, or rename: ") as caught:
            use()
        assert f"{workdir}/judged.jsonl is named judgments.jsonl now" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_command_of_the_error_makes_the_workdir_usable(workdir, tmp_path):
    items = tmp_path / "data" / "items.jsonl"
    with pytest.raises(EvalError) as caught:
        run(items, workdir, "baseline:constant", probes="blank")
    command = str(caught.value).partition("or rename: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    inputs = per_record.read(workdir)
    assert inputs.judgments["correct"]["q0"]["votes"] == [1.0]
    assert inputs.image_scores["biomedclip"]["q0"]["image_text"] == [0.5]
    assert (workdir / per_record.probe_scores_file("blank")).exists()
    report.rewrite_report(workdir, "")
    row = json.loads((workdir / "summary.json").read_text())["scores"][0]
    assert set(SUMMARY_COLUMNS) <= set(row) and not set(SUMMARY_COLUMNS.values()) & set(row)
    assert compare(workdir, workdir, seed=0, resamples=2_000).rows
    before = (workdir / "records.jsonl").read_bytes()
    run(items, workdir, "baseline:constant", probes="blank")  # resumes with the recorded answers
    assert (workdir / "records.jsonl").read_bytes() == before


def test_a_single_column_is_named(workdir, tmp_path):
    for name in ("judged.jsonl", *(path.name for path in workdir.glob("*_*.jsonl"))):
        (workdir / name).unlink(missing_ok=True)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(workdir / "records.jsonl", other)
    with pytest.raises(EvalError, match="column looks_like of .* is named predicted_modality now"):
        compare(other, other, seed=0, resamples=2_000)
    with pytest.raises(EvalError, match="column can_find of .*summary.json is named mde now"):
        per_record.check_names([workdir / "summary.json"])


def test_run_items_checks_the_columns_of_its_file(workdir):
    with pytest.raises(EvalError, match="column looks_like of .*records.jsonl"):
        inference.run_items(
            None, [], mode="strict", images_folder=workdir, out=workdir / "records.jsonl",
            progress=print,
        )  # fmt: skip


def test_digests_of_items_are_those_of_earlier_runs(tmp_path):
    """The digest in run.json is computed over the first names of the fields."""
    items = write_items(tmp_path / "data", 2)
    run(items, tmp_path / "out", "baseline:constant")
    record = json.loads((tmp_path / "out" / "records.jsonl").read_text().splitlines()[0])
    assert record["modality"] == "" and "kind" not in record
    (item,) = task_items.from_rows([json.loads(items.read_text().splitlines()[0])])
    fields = run_facts._digest_fields(item)
    assert fields["kind"] == "" and "modality" not in fields
