"""Tests of the report of a plan: fill against offline packing, padding, rows, images."""

import json

import micro_run
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_jax.cli import load_config
from medmax_jax.config import from_config_dict
from medmax_jax.data import loader, prepare
from medmax_jax.data.analysis import check
from medmax_jax.data.packing import pack, report
from medmax_jax.data.packing.pack import PackError
from medmax_jax.data.records import synthetic, writer

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200).map(np.array)


@settings(max_examples=150, deadline=None)
@given(LENGTHS)
def test_offline_is_best_fit_decreasing(lengths):
    """Counting free space gives the rows of packing all documents in one window."""
    one_window = pack.plan(
        lengths, seq_len=64, pack=True, seed=0, epoch=0, windows=[np.arange(len(lengths))]
    )
    assert report.best_fit_row_count(lengths, 64) == len(one_window)


def test_length_model():
    lengths = synthetic.lengths(200_000, seed=0)
    assert lengths.min() == 1_034 and lengths.mean() == pytest.approx(1_156, abs=1)
    assert np.array_equal(lengths, synthetic.lengths(200_000, seed=0))
    assert not np.array_equal(lengths, synthetic.lengths(200_000, seed=1))


def test_fill_is_within_a_point_of_offline_packing():
    lengths = synthetic.lengths(40_000, seed=0)
    table = report.packing_efficiencies(
        lengths, (2_048, 4_096, 8_192, 16_384), int(lengths.max()), seed=0
    )
    assert list(table) == [4_096, 8_192, 16_384]  # some document is longer than 2,048
    for row in table.values():
        assert row["offline"] - row["fill"] < 0.01
    assert table[4_096]["fill"] < table[8_192]["fill"] < table[16_384]["fill"]
    short = lengths[lengths <= 2_048]
    row = report.packing_efficiencies(short, (2_048,), 2_048, seed=0)[2_048]
    assert 0.55 < row["fill"] < 0.57  # two images never fit


def test_padding_to_the_longest():
    lengths = np.array([100, 200, 128, 128])
    padding = report.padding_efficiency(lengths, batch_size=4, seed=0)
    assert padding == dict(fill=0.695, shapes=1, fill_of_steps=0.543, shapes_of_steps=1)
    assert report.padding_efficiency(lengths, batch_size=8, seed=0) == padding  # fewer than a batch
    assert report.padding_efficiency(lengths, batch_size=1, seed=0)["fill"] == 1


def test_image_stats(tmp_path):
    docs = micro_run.documents(5, seed=0)
    tasks = ["VQA", "VQA", "Visual Chat", "VQA", "VQA"]
    paths = ["a", "a", "a", "b", ""]
    for d, task, path, source in zip(docs, tasks, paths, "AABBB", strict=True):
        vars(d).update(task=task, image_path=path, source=source)
    layout = writer.open_records(micro_run.write(tmp_path / "other")).layout
    writer.write(tmp_path / "r", docs, shard_size=9, layout=layout, notes={})
    stats = report.image_stats(writer.open_records(tmp_path / "r"))
    # Verbatim: part of the data.
    assert stats == dict(
        pictures=2, without_picture=1, entries=2.0, tasks=1.5, of_entries={1: 1, 3: 1},
        by_source={
            "A": dict(images=1, entries=2.0, tasks=1.0),
            "B": dict(images=2, entries=1.0, tasks=1.0),
        },
    )  # fmt: skip
    without = report.image_stats(writer.open_records(tmp_path / "other"))
    # Verbatim: part of the data.
    assert without == dict(pictures=0, without_picture=40)


def test_synthetic_records_are_valid_and_can_be_trained_on(tmp_path):
    meta = writer.write(
        tmp_path / "r",
        synthetic.documents(60, seed=3),
        shard_size=32,
        layout=synthetic.LAYOUT,
        notes={},
    )
    records = writer.open_records(tmp_path / "r")
    assert records.index["length"].tolist() == synthetic.lengths(60, seed=3).tolist()
    assert (records.index["image"] == 1_024).all() and len(meta["sources"]) > 3
    stats = report.image_stats(records)
    # Verbatim: part of the data.
    assert stats["pictures"] == 30 and stats["entries"] == 2
    codes = [records[n].tokens[2:1_026] for n in (0, 1, 2)]
    assert np.array_equal(codes[0], codes[1]) and not np.array_equal(codes[1], codes[2])
    assert check.check(tmp_path / "r", tokenizer=None)["documents"] == 60


def test_program_reports_the_plan_of_a_run(tmp_path, capsys):
    folder = micro_run.write(tmp_path / "r")
    run = micro_run.run(data__train=folder, data__document_limit=20, data__seed=4)
    batches = loader.train_batches(run, folder)
    command = ["plan", folder, "--seq_len", "32", "--document_limit", "20", "--seed", "4", "--json"]
    assert prepare.main([*command, "--row", "3"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["plan"] == batches.plan and summary["documents"] + summary["left_out"] == 40
    long = np.flatnonzero(batches.records.index["length"] > 20)
    assert summary["left_out_ids"] == [f"0-{n}" for n in long] and len(long)
    batch = batches.batch(0)
    for n, document in enumerate(summary["row 3"]):
        span = batch.segments[3] == n + 1
        assert np.flatnonzero(span)[0] == document["start"] and span.sum() == document["tokens"]
        assert batch.ids[3][span].tolist() == batches.records[document["document"]].tokens.tolist()
        assert document["source"] == "generated" and document["id"] == f"0-{document['document']}"
    assert summary["shares"] == {"generated": dict(documents=1.0, tokens=1.0, times=1.0)}
    assert prepare.main([*command, "--epoch", "1"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["plan"] == summary["plan"] and second["epoch"] == 1
    assert prepare.main([*command, "--weights", "generated=2"]) == 0
    assert json.loads(capsys.readouterr().out)["shares"] == summary["shares"]
    assert prepare.main([*command, "--seed", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] != summary["plan"]
    assert prepare.main([*command[:4], "--image_centric"]) == 0
    assert "left_out_ids" in capsys.readouterr().out
    assert prepare.main(["stats", folder]) == 0
    # Verbatim: part of the data.
    assert "without_picture" in capsys.readouterr().out


def write_config(path, folder, stages):
    path.write_text(
        "import micro_run\n\n\ndef get_config():\n"
        f"    c = micro_run.settings(data__train={folder!r}, data__document_limit=20).unlock()\n"
        f"    c.stages = {stages!r}\n    return c.lock()\n"
    )
    return str(path)


@pytest.mark.filterwarnings("ignore:the load_module")
def test_stages_of_a_config_are_those_of_the_run(tmp_path, capsys):
    """Plan, rows and epochs of every stage, against the loaders of the run."""
    folder = micro_run.write(tmp_path / "r")
    dropped = dict(text=0.5, image=0.0, all=0.2)
    stages = (
        dict(steps=2, mixing=dict(by="task", weights="VQA=1")),
        dict(steps=3, condition_dropout=dropped),
    )
    config = write_config(tmp_path / "staged.py", folder, stages)
    assert prepare.main(["plan", folder, "--config", config, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    batches = loader.train_batches(from_config_dict(load_config(config)), folder)
    assert found["plan"] == batches.plan and found["steps"] == 5
    assert [row["steps"] for row in found["stages"]] == [2, 3]
    for row, own in zip(found["stages"], batches._loaders, strict=True):
        rows = len(own._epochs.first)
        assert row["rows"] == rows and row["epochs"] == round(row["steps"] * 8 / rows, 3)
    assert "mixing by task: VQA=1" in found["stages"][0]["settings"]
    assert found["stages"][0]["streams"]["unconditional"] == 0
    assert found["stages"][1]["streams"]["unconditional"] > 0
    assert "condition_dropout text 0.5" in found["stages"][1]["settings"]
    single = write_config(tmp_path / "plain.py", folder, ())
    assert prepare.main(["plan", folder, "--config", single]) == 0
    run = from_config_dict(load_config(single))
    assert loader.train_batches(run, folder).plan in capsys.readouterr().out
    assert prepare.main(["plan", folder, "--config", config, "--row", "0"]) == 1
    assert "--row and --config=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq_len", "32", "--row", "99"], "--row is 99; this epoch has rows 0.."),
        (["--seq_len", "32", "--epoch", "-1"], "--epoch is -1; the first is 0"),
        (["--seq_len", "8", "--document_limit", "30"], "longer than data.seq_len = 8"),
        (["--seq_len", "4"], "exceed data.document_limit = 4"),
        (["--seq_len", "0"], "--seq_len is 0; it must be at least 1"),
        (["--seq_len", "32", "--weights", "VQA=1"], "one for each of generated"),
    ],
)
def test_invalid_flags_are_reported(tmp_path, capsys, flags, message):
    folder = micro_run.write(tmp_path / "r")
    assert prepare.main(["plan", folder, *flags]) == 1
    assert message in capsys.readouterr().err


def test_rows_out_of_range(tmp_path):
    records = writer.open_records(micro_run.write(tmp_path / "r"))
    plan = pack.plan(records.index["length"], seq_len=32, pack=True, seed=0, epoch=0)
    with pytest.raises(PackError, match="--row is -1"):
        report.row_documents(records, plan, -1)


def test_credentialed_documents_are_identified_by_number(tmp_path, capsys):
    docs = micro_run.documents(20, seed=0)
    for d in docs:
        vars(d).update(credential="yes", id=f"SECRET-{d.id}", image_path=f"SECRET-{d.id}.png")
    layout = writer.open_records(micro_run.write(tmp_path / "other")).layout
    writer.write(tmp_path / "r", docs, shard_size=9, layout=layout, notes={})
    command = ["plan", str(tmp_path / "r"), "--seq_len", "32", "--document_limit", "20"]
    assert prepare.main([*command, "--row", "0"]) == 0
    captured = capsys.readouterr()
    assert "row 0  document  start" in captured.out and "left_out_ids  9\n" in captured.out
    assert "SECRET" not in captured.out + captured.err
