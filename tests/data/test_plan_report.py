"""What the plan says of itself: fill against offline packing, padding, rows by number, pictures."""

import json

import micro_run
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_jax.data import loader, prepare
from medmax_jax.data.analysis import check
from medmax_jax.data.packing import pack, report
from medmax_jax.data.packing.pack import PackError
from medmax_jax.data.records import synthetic, writer

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200).map(np.array)


@settings(max_examples=150, deadline=None)
@given(LENGTHS)
def test_offline_is_best_fit_decreasing(lengths):
    """Counting rooms gives the rows of packing all documents in one window."""
    whole = pack.plan(
        lengths, seq_len=64, pack=True, seed=0, epoch=0, windows=[np.arange(len(lengths))]
    )
    assert report.best_fit_row_count(lengths, 64) == len(whole)


def test_the_length_model():
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
    told = report.padding_efficiency(lengths, batch_size=4, seed=0)
    assert told == dict(fill=0.695, shapes=1, fill_of_steps=0.543, shapes_of_steps=1)
    assert report.padding_efficiency(lengths, batch_size=8, seed=0) == told  # fewer than a batch
    assert report.padding_efficiency(lengths, batch_size=1, seed=0)["fill"] == 1


def test_pictures(tmp_path):
    docs = micro_run.documents(5, seed=0)
    tasks = ["VQA", "VQA", "Visual Chat", "VQA", "VQA"]
    paths = ["a", "a", "a", "b", ""]
    for d, task, path in zip(docs, tasks, paths, strict=True):
        vars(d).update(task=task, image_path=path)
    layout = writer.open_records(micro_run.write(tmp_path / "other")).layout
    writer.write(tmp_path / "r", docs, shard_size=9, layout=layout, notes={})
    told = report.image_stats(writer.open_records(tmp_path / "r"))
    assert told == dict(
        pictures=2, without_picture=1, entries=2.0, tasks=1.5, of_entries={1: 1, 3: 1}
    )
    without = report.image_stats(writer.open_records(tmp_path / "other"))
    assert without == dict(pictures=0, without_picture=40)


def test_synthetic_records_are_whole_and_can_be_trained_on(tmp_path):
    meta = writer.write(
        tmp_path / "r",
        synthetic.documents(60, seed=3),
        shard_size=32,
        layout=synthetic.LAYOUT,
        notes={},
    )
    found = writer.open_records(tmp_path / "r")
    assert found.index["length"].tolist() == synthetic.lengths(60, seed=3).tolist()
    assert (found.index["image"] == 1_024).all() and len(meta["sources"]) > 3
    told = report.image_stats(found)
    assert told["pictures"] == 30 and told["entries"] == 2
    codes = [found[n].tokens[2:1_026] for n in (0, 1, 2)]
    assert np.array_equal(codes[0], codes[1]) and not np.array_equal(codes[1], codes[2])
    assert check.check(tmp_path / "r", tokenizer=None)["documents"] == 60


def test_the_program_shows_the_plan_of_a_run(tmp_path, capsys):
    folder = micro_run.write(tmp_path / "r")
    run = micro_run.run(data__train=folder, data__document_limit=20, data__seed=4)
    at = loader.train_batches(run, folder)
    command = ["plan", folder, "--seq_len", "32", "--document_limit", "20", "--seed", "4", "--json"]
    assert prepare.main([*command, "--row", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"] == at.plan and told["documents"] + told["left_out"] == 40
    long = np.flatnonzero(at.records.index["length"] > 20)
    assert told["left_out_ids"] == [f"0-{n}" for n in long] and len(long)
    batch = at.batch(0)
    for n, document in enumerate(told["row 3"]):
        span = batch.segments[3] == n + 1
        assert np.flatnonzero(span)[0] == document["start"] and span.sum() == document["tokens"]
        assert batch.ids[3][span].tolist() == at.records[document["document"]].tokens.tolist()
        assert document["source"] == "generated" and document["id"] == f"0-{document['document']}"
    assert told["shares"] == {"generated": dict(documents=1.0, tokens=1.0, times=1.0)}
    assert prepare.main([*command, "--epoch", "1"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["plan"] == told["plan"] and second["epoch"] == 1
    assert prepare.main([*command, "--weights", "generated=2"]) == 0
    assert json.loads(capsys.readouterr().out)["shares"] == told["shares"]
    assert prepare.main([*command, "--seed", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] != told["plan"]
    assert prepare.main([*command[:4], "--image_centric"]) == 0
    assert "left_out_ids" in capsys.readouterr().out
    assert prepare.main(["stats", folder]) == 0
    assert "without_picture" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq_len", "32", "--row", "99"], "--row is 99; this epoch has rows 0.."),
        (["--seq_len", "32", "--epoch", "-1"], "--epoch is -1; the first is 0"),
        (["--seq_len", "8", "--document_limit", "30"], "longer than data.seq_len = 8"),
        (["--seq_len", "4"], "longer than data.document_limit = 4"),
        (["--seq_len", "0"], "--seq_len is 0; it must be above 0"),
        (["--seq_len", "32", "--weights", "VQA=1"], "for each of generated"),
    ],
)
def test_wrong_flags_say_so(tmp_path, capsys, flags, message):
    folder = micro_run.write(tmp_path / "r")
    assert prepare.main(["plan", folder, *flags]) == 1
    assert message in capsys.readouterr().err


def test_rows_out_of_range(tmp_path):
    found = writer.open_records(micro_run.write(tmp_path / "r"))
    plan = pack.plan(found.index["length"], seq_len=32, pack=True, seed=0, epoch=0)
    with pytest.raises(PackError, match="--row is -1"):
        report.row_documents(found, plan, -1)


def test_credentialed_documents_are_numbers(tmp_path, capsys):
    docs = micro_run.documents(20, seed=0)
    for d in docs:
        vars(d).update(credential="yes", id=f"SECRET-{d.id}", image_path=f"SECRET-{d.id}.png")
    layout = writer.open_records(micro_run.write(tmp_path / "other")).layout
    writer.write(tmp_path / "r", docs, shard_size=9, layout=layout, notes={})
    command = ["plan", str(tmp_path / "r"), "--seq_len", "32", "--document_limit", "20"]
    assert prepare.main([*command, "--row", "0"]) == 0
    told = capsys.readouterr()
    assert "'document': " in told.out and "left_out_ids  [" not in told.out
    assert "SECRET" not in told.out + told.err
