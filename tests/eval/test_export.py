"""Scores in the forms of others, read back: lmms-eval's files, and the Hub's by its own library."""

import dataclasses
import json
import math

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from test_eval_report import make_workdir, rows

from medmax_jax.environment import environment
from medmax_jax.eval import export
from medmax_jax.eval.benchmarks.card import TaskSpec
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.reporting import hub_results
from medmax_jax.eval.results import write_summary
from medmax_jax.eval.tasks.families import FAMILIES

OPEN = [one | dict(data_class="open") for one in rows()]


def evaluated(folder, item_rows=OPEN, **changes):
    """Write a finished evaluation and return its summary and records."""
    summary, records = make_workdir(folder, item_rows)
    facts = {"kind": "python", "environment": environment()} | changes
    summary = dataclasses.replace(summary, **facts)
    write_summary(folder, summary)
    return summary, records


def samples_of(files):
    """Return task -> samples as lmms-eval's loader finds them: STAMP_samples_TASK.jsonl."""
    found = {}
    for file in files:
        stamp, _, task = file.name.removesuffix(".jsonl").partition("_samples_")
        if task:
            assert file.with_name(f"{stamp}_results.json").is_file()
            found[task] = [json.loads(line) for line in file.read_text().splitlines()]
    return found


def test_lmms_eval_files(tmp_path):
    summary, records = evaluated(tmp_path, model="org/tuned model:7b")
    files, notes = export.export(tmp_path, tmp_path / "out", "lmms_eval")
    (results_file,) = (tmp_path / "out").glob("*/*_results.json")
    assert results_file.parent.name == "org__tuned model__7b" and notes == []
    assert len(results_file.name) == len("20261129_094300_results.json")
    content = json.loads(results_file.read_text())
    for row in summary.scores:
        scores, metric = content["results"][row.task], row.metric.replace(" ", "_")
        assert scores[f"{metric},none"] == row.value
        assert scores[f"{metric}_stderr,none"] == "N/A"
        assert content["higher_is_better"][row.task][metric] is True
    closed = content["results"]["slake_closed"]
    error = closed["accuracy_stderr_clustered,none"]
    assert error == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 23), rel=0.02)
    tasks = set(content["results"])
    for name in ("configs", "versions", "n-shot", "n-samples", "group_subtasks", "task_hashes"):
        assert set(content[name]) == tasks, name
    samples = samples_of(files)
    assert set(samples) == tasks
    lines = samples["slake_closed"]
    own = [record for record in records if record.task == "slake_closed"]
    assert [line["doc_id"] for line in lines] == list(range(len(own)))
    assert [line["filtered_resps"] for line in lines] == [record.text for record in own]
    assert sum(line["score"] for line in lines) / len(lines) == pytest.approx(
        closed["accuracy,none"]
    )
    assert {line["target"] for line in lines} == {"yes"} and len(lines[0]["doc_hash"]) == 64
    before = {file: file.read_bytes() for file in files}
    export.export(tmp_path, tmp_path / "out", "lmms_eval")
    assert {file: file.read_bytes() for file in files} == before


def test_texts_of_credentialed_items_are_not_exported(tmp_path):
    secret = [
        one | dict(credential="yes", prompt="SECRET", answer="yes", image_path="b.png")
        if n % 2 and one["task_name"] == "slake" else one | dict(data_class="licence-bound")
        for n, one in enumerate(rows())
    ]  # fmt: skip
    (tmp_path / "b.png").write_bytes(b"")
    evaluated(tmp_path, secret)
    for form in export.FORMATS:
        files, notes = export.export(tmp_path, tmp_path / form, form)
        assert not any("SECRET" in file.read_text() for file in files)
        if form == "lmms_eval":
            assert "slake_closed: 12 samples of credentialed items, which stay here" in notes
            assert any("19 samples are licence-bound" in note for note in notes)
            lines = samples_of(files)["slake_closed"]
            assert [line["doc_id"] for line in lines] == list(range(0, 24, 2))


def test_the_hub_reads_its_files(tmp_path):
    summary, _ = evaluated(tmp_path)
    link = "https://example.org/results"
    files, notes = hub_results.write(tmp_path / "out", summary, source_url=link)
    heads = {row.task: row for row in summary.scores if row.headline}
    entries = []
    for file in (tmp_path / "out" / ".eval_results").iterdir():
        entries += parse_eval_result_entries(yaml.safe_load(file.read_text()))
    by_task = {entry.task_id: entry for entry in entries}
    slake = by_task["slake_closed"]
    assert slake.dataset_id == "BoKelvin/SLAKE" and slake.source_url == link
    assert slake.value == round(100 * heads["slake_closed"].value, 2)
    assert "accuracy, %, 95 % interval " in slake.notes and "24 items in 24 groups" in slake.notes
    assert slake.date.endswith("Z") and slake.date[:4] == environment()["date"][:4]
    named = {note.split(":")[0] for note in notes}
    assert named | set(by_task) == set(heads) and not named & set(by_task)
    assert "vqa_rad_open: in README.md alone; osf.io" in "\n".join(notes)
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    results = {result.dataset_config: result for result in card.data.eval_results}
    assert set(results) == set(heads) and card.data.model_name == "scripted & co"
    for task, result in results.items():
        assert result.metric_value == round(100 * heads[task].value, 2)
        assert result.metric_type == heads[task].metric
        assert result.metric_args["items"] == heads[task].n
    assert len(files) == len(entries) + 1


def test_every_family_own_cards_and_decibels_are_in_the_card(tmp_path):
    summary, _ = evaluated(tmp_path)
    head = next(row for row in summary.scores if row.headline)
    heads = [
        dataclasses.replace(head, family=name, task=f"own_{name}", metric=metric, value=0.25)
        for name in FAMILIES
        for metric in ["psnr" if name == "image_editing" else head.metric]
    ]
    own = TaskSpec(
        task="own_vqa_mcq", title="Mine", family="vqa_mcq", source="ward 3", licence="-",
        metric="accuracy",
    )  # fmt: skip
    summary = dataclasses.replace(summary, scores=tuple(heads), cards=(own.fields(),))
    _, notes = hub_results.write(tmp_path / "out", summary, source_url="")
    assert "own_vqa_mcq: in README.md alone; ward 3 is no data set of the Hub" in notes
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    results = {result.dataset_config: result for result in card.data.eval_results}
    assert set(results) == {row.task for row in heads}
    assert results["own_vqa_mcq"].dataset_name == "Mine"
    edited = results["own_image_editing"]
    assert (edited.metric_name, edited.metric_value) == ("psnr, dB", 0.25)
    assert results["own_vqa_rationale"].metric_value == 25


def test_another_model_card_is_kept(tmp_path):
    summary, _ = evaluated(tmp_path)
    files, _ = hub_results.write(tmp_path / "out", summary, source_url="")
    assert hub_results.write(tmp_path / "out", summary, source_url="")[0] == files
    files[-1].write_text("# My model\n")
    with pytest.raises(FileExistsError, match="README.md is another model card; move it away"):
        hub_results.write(tmp_path / "out", summary, source_url="")
    assert files[-1].read_text() == "# My model\n"


def test_the_program(tmp_path, capsys):
    evaluated(tmp_path)
    words = [str(tmp_path), "--format=hf_eval_results", f"--out={tmp_path / 'out'}"]
    assert export.main(words) == 0
    assert f"{tmp_path / 'out'}/README.md" in capsys.readouterr().out
    assert export.main([str(tmp_path / "none"), *words[1:]]) == 1
    assert "no finished evaluation" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export.main([str(tmp_path), "--format=csv", "--out=x"])
    with pytest.raises(EvalError, match="run eval.run to the end"):
        export.export(tmp_path / "none", tmp_path, "lmms_eval")
