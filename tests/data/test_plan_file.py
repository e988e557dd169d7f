"""Tests of saved plans: rows, documents of a row, damage and other settings."""

import json

import micro_run
import numpy as np
import pytest

from medmax_jax.data import loader, prepare
from medmax_jax.data.packing import plan_file
from medmax_jax.data.packing.pack import PackError
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import RecordsError


@pytest.fixture
def saved(tmp_path, capsys):
    """Return (folder, file, the program's result)."""
    folder = micro_run.write(tmp_path / "r")
    command = ["plan", folder, "--seq_len", "32", "--document_limit", "20", "--seed", "4", "--json"]
    assert prepare.main([*command, "--save", str(tmp_path / "p.npz")]) == 0
    return folder, tmp_path / "p.npz", json.loads(capsys.readouterr().out)


def test_row_of_the_file_is_the_row_of_a_run(saved, capsys):
    folder, path, summary = saved
    assert summary["saved"] == str(path)
    assert prepare.main(["plan", str(path), "--row", "3", "--json"]) == 0
    from_file = json.loads(capsys.readouterr().out)
    assert (
        from_file["run"] == from_file["rows"] == summary["plan"]
        and from_file["row_count"] == summary["rows"]
    )
    assert (
        from_file["fill"] == summary["fill"]
        and from_file["records"] == writer.open_records(folder).meta["sha256"]
    )
    assert prepare.main(["plan", folder, "--seq_len", "32", "--document_limit", "20", "--seed", "4",
                         "--row", "3", "--json"]) == 0  # fmt: skip
    expected = json.loads(capsys.readouterr().out)["row 3"]
    assert from_file["row 3"] == [{k: d[k] for k in from_file["row 3"][0]} for d in expected]
    run = micro_run.run(data__train=folder, data__document_limit=20, data__seed=4)
    batch = loader.train_batches(run, folder).batch(0)
    assert (batch.segments[3] > 0).sum() == sum(d["tokens"] for d in from_file["row 3"])
    assert prepare.main(["plan", str(path), "--row", "3"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.partition("row 3 ")[2].splitlines()]
    numbers = [str(d[name]) for d in expected for name in ("document", "start", "tokens")]
    assert [n for line in lines[1 : 1 + len(expected)] for n in line[:3]] == numbers


def test_later_epochs_have_other_rows_and_the_hash_of_the_run(saved, tmp_path, capsys):
    folder, path, summary = saved
    command = ["plan", folder, "--seq_len", "32", "--document_limit", "20", "--seed", "4"]
    assert prepare.main([*command, "--epoch", "2", "--save", str(tmp_path / "p2.npz")]) == 0
    second = plan_file.load(tmp_path / "p2.npz")
    assert second.header["run"] == summary["plan"] != second.header["rows"]
    assert sorted(second.plan.documents) == sorted(plan_file.load(path).plan.documents)


def test_training_requires_the_saved_plan(saved):
    folder, path, summary = saved
    right = dict(data__train=folder, data__document_limit=20, data__seed=4)
    plan = plan_file.load(path).header["run"]
    batches = loader.train_batches(micro_run.run(**right, data__plan=plan), folder)
    assert batches.plan == summary["plan"] == plan
    for wrong in (dict(data__seed=5), dict(data__document_limit=19), dict(data__seq_len=40)):
        run = micro_run.run(**(right | wrong), data__plan=plan)
        with pytest.raises(RecordsError, match="config.data.plan is .* restore them"):
            loader.train_batches(run, folder)
        loader.eval_batches(run, folder)  # validation has a plan of its own


@pytest.mark.parametrize("name", [*plan_file.ARRAYS, "header", "sha256"])
def test_every_array_is_part_of_the_hash(saved, name):
    _, path, _ = saved
    with np.load(path) as file:
        arrays = dict(file)
    first = arrays[name].reshape(-1)
    first[0] ^= 1
    np.savez(path, **arrays)
    with pytest.raises(PackError, match=r"p\.npz: .*create it again with data.prepare plan --save"):
        plan_file.load(path)


def test_any_flipped_byte_is_detected_or_harmless(saved):
    """A zip has bytes, such as times, that are not part of the plan."""
    _, path, _ = saved
    raw, original = path.read_bytes(), plan_file.load(path)
    for place in range(0, len(raw), 37):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1 :])
        try:
            loaded = plan_file.load(path)
        except PackError:
            continue
        assert loaded.header == original.header and np.array_equal(loaded.lengths, original.lengths)
        assert loaded.plan.fingerprint == original.plan.fingerprint


def test_pickles_and_other_files_are_rejected(tmp_path, capsys):
    np.savez(tmp_path / "evil.npz", header=np.array([{"a": 1}], object))
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "other.npz", x=np.arange(3))
    for name in ("evil.npz", "text.npz", "other.npz"):
        assert prepare.main(["plan", str(tmp_path / name)]) == 1
        assert f"{name}: not a plan, or damaged" in capsys.readouterr().err


def test_refusals(saved, tmp_path, capsys):
    folder, path, _ = saved
    for command, message in (
        (["plan", str(path), "--row", "999"], "--row is 999; this epoch has rows 0.."),
        (["plan", str(path), "--seq_len", "3"], "is a saved plan, which contains its settings"),
        (["plan", folder], "--seq_len is None; it must be at least 1"),
        (["plan", folder, "--seq_len", "32", "--save", str(tmp_path / "p")], "must end in .npz"),
        (["plan", folder, "--seq_len", "32", "--save", "no/p.npz"], "cannot be written"),
    ):
        assert prepare.main(command) == 1
        assert message in capsys.readouterr().err
