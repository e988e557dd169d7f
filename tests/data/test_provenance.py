"""Who saw an image: its shards, plans, runs and checkpoints, against the batches that were read."""

import hashlib
import json
import shutil

import micro_run
import numpy as np
import pytest

from medmax_jax import train
from medmax_jax.data import loader, prepare
from medmax_jax.data.analysis import near_duplicates
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Document, Layout
from medmax_jax.io import storage
from medmax_jax.models.vocab import BOI, EOI, IMAGE_START, SEP
from medmax_jax.training import setup

LAYOUT = Layout(vocab=micro_run.run().vocab, codes_per_image=4, tokenizer="", vqgan="")
STEPS, EVERY = 9, 3


def codes_of(n):
    return np.array([n % 16, n // 16, 3, 5])


def digest(n):
    return hashlib.sha256(str(n).encode()).hexdigest()


def shown(n, credential="no", sha=True):
    """A document of picture n // 2: each picture has two."""
    picture = n // 2
    words = [micro_run.TEXT_START + n % 60, SEP, micro_run.TEXT_START + n % 50]
    tokens = [0, BOI, *(codes_of(picture) + IMAGE_START), EOI, *words, 2]
    return Document(
        tokens=np.array(tokens, np.int32), image_path=f"SECRET{picture}.png", task="VQA",
        source="s", credential=credential, turns=1, group="g", id=f"SECRET-{n}",
        image_sha256=digest(picture) if sha else "",
    )  # fmt: skip


def write(folder, numbers, **about):
    docs = [shown(n, **about) for n in numbers]
    writer.write(folder, docs, shard_size=16, layout=LAYOUT, notes={})
    return str(folder)


def ask(capsys, what, *folders):
    capsys.readouterr()
    command = ["who_saw", what, "--in", *map(str, folders), "--json"]
    assert prepare.main(command) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Records, a run of nine steps on them that was stopped and went on, a saved plan."""
    top = tmp_path_factory.mktemp("world")
    folder = write(top / "records" / "train", range(120))
    held = write(top / "records" / "held", range(300, 306))
    settings = dict(data__train=folder, data__validation=held, data__batch_size=8, train__keep=9)
    settings |= dict(train__checkpoint_every=EVERY, data__seed=3)
    train.run(micro_run.run(**settings, train__steps=EVERY), top / "runs" / "a")
    run = micro_run.run(**settings, train__steps=STEPS)
    train.run(run, top / "runs" / "a", setup.Options(extend=True))
    command = ["plan", folder, "--seq_len", "32", "--seed", "3", "--save", str(top / "p.npz")]
    assert prepare.main(command) == 0
    return top, run


def read_at(run, documents):
    """Steps, counted from 1, whose batch holds one of the documents."""
    at = loader.train_batches(run, run.data.train)
    rows = [np.concatenate(at._rows(s)) for s in range(len(at))]
    return [s + 1 for s, row in enumerate(rows) if np.isin(row, documents).any()]


@pytest.mark.parametrize("picture", [0, 17, 42])
def test_steps_and_checkpoints_are_those_of_the_batches(world, capsys, picture):
    top, run = world
    documents = [2 * picture, 2 * picture + 1]
    expected = read_at(run, documents)
    for what in (
        digest(picture), digest(picture)[:16], near_duplicates.code_hash(codes_of(picture)),
        f"SECRET{picture}.png", f"SECRET-{documents[1]}",
    ):  # fmt: skip
        told = ask(capsys, what, top)
        assert told["documents"] == 2 and [s["document"] for s in told["shards"]] == documents
        for s in told["shards"]:
            shard, record = divmod(s["document"], 16)
            assert s["shard"].endswith(f"records/train/0000{shard}-of-00008.array_record")
            assert s["record"] == record
        seen = [(r.get("seen"), r.get("first_step"), r.get("last_step")) for r in told["runs"]]
        parts = [[s for s in expected if s <= EVERY], [s for s in expected if s > EVERY]]
        assert seen == [(len(p), p[0], p[-1]) if p else (None, None, None) for p in parts]
        for line in told["checkpoints"]:
            name = line["checkpoint"].rpartition("/")[2]
            before = [s for s in expected if s <= (STEPS if name == "adapter" else int(name))]
            if before:
                assert (line["seen"], line["first_step"]) == (len(before), before[0])
            else:
                assert line["not_yet_seen_by_step"] == int(name)
        names = [line["checkpoint"].rpartition("/")[2] for line in told["checkpoints"]]
        assert names == (["3", "6", "9", "adapter"] if expected else [])
        plan = writer.open_records(run.data.train), loader.train_batches(run, run.data.train)
        rows = [r for r in range(len(plan[1]._epochs.first))
                if np.isin(plan[1]._epochs.row(r), documents).any()]  # fmt: skip
        assert told["plans"] == [dict(plan=str(top / "p.npz"), epoch=0, rows=rows)]


def test_some_picture_comes_late_and_the_earlier_checkpoint_says_so(world, capsys):
    top, run = world
    first = {p: read_at(run, [2 * p, 2 * p + 1]) for p in range(60)}
    late = next(p for p, steps in first.items() if steps and EVERY < steps[0] <= STEPS)
    told = ask(capsys, digest(late), top)
    assert told["checkpoints"][0]["not_yet_seen_by_step"] == EVERY
    assert told["checkpoints"][-1]["first_step"] == first[late][0]
    assert told["runs"][0]["not_seen_by_step"] == EVERY
    assert told["runs"][1]["first_step"] == first[late][0]


def test_validation_is_told_apart_from_training(world, capsys):
    top, _ = world
    told = ask(capsys, digest(151), top)
    assert [r["in_validation"] for r in told["runs"]] == [2, 2] and told["checkpoints"] == []
    assert told["plans"] == []


def test_nobody_saw_what_is_not_there(world, capsys):
    top, _ = world
    told = ask(capsys, digest(10_000), top)
    assert told["documents"] == 0 and told["looked_into"] == dict(
        records=2, codes=0, plans=1, runs=1
    )
    assert not any(told[n] for n in ("shards", "codes", "plans", "runs", "checkpoints"))


def test_what_cannot_be_known_is_said(world, tmp_path, capsys):
    """Records that are elsewhere or were made anew: no guess about what a run has seen."""
    top, run = world
    shutil.copytree(top / "runs", tmp_path / "runs")
    shutil.copy(top / "p.npz", tmp_path / "p.npz")
    told = ask(capsys, digest(1), tmp_path)
    assert [r["unknown"] for r in told["runs"]] == [
        f"its records {writer.open_records(run.data.train).fingerprint[:16]} are not here"
    ] * 2
    assert "are not here" in told["plans"][0]["unknown"]
    config = tmp_path / "runs" / "a" / "history.jsonl"
    config.write_text(config.read_text().replace('"seed": 3', '"seed": 4'))
    told = ask(capsys, digest(1), tmp_path, top / "records")
    assert {r["unknown"] for r in told["runs"]} == {
        "its records and settings make another plan by now"
    }
    config.unlink()  # as of runs from before there was one
    told = ask(capsys, digest(1), tmp_path, top / "records")
    assert len(told["runs"]) == 1 and told["checkpoints"] == ask_again(capsys, tmp_path, top)


def ask_again(capsys, tmp_path, top):
    found = ask(capsys, digest(1), top)["checkpoints"]
    return [c | {"checkpoint": c["checkpoint"].replace(str(top), str(tmp_path))} for c in found]


def test_a_copy_under_another_name_is_found_by_its_codes(tmp_path, capsys):
    write(tmp_path / "a", range(4))
    write(tmp_path / "b", range(4), sha=False)
    docs = [shown(n, sha=False) for n in range(4)]
    for n, d in enumerate(docs):
        vars(d).update(id=f"other-{n}", image_path=f"other{n // 2}.png")
    writer.write(tmp_path / "c", docs, shard_size=9, layout=LAYOUT, notes={})
    told = ask(capsys, digest(0), tmp_path)
    assert told["documents"] == 6
    assert ask(capsys, "other0.png", tmp_path)["documents"] == 6


def test_credentialed_images_are_named_by_hashes(tmp_path, capsys):
    write(tmp_path / "r", range(4), credential="yes")
    for what in (digest(0), "SECRET0.png", "SECRET-1"):
        assert prepare.main(["who_saw", what, "--in", str(tmp_path)]) == 0
        told = capsys.readouterr()
        assert "SECRET" not in told.out + told.err and "'codes': ['" in told.out


def test_files_and_folders_of_codes(tmp_path, capsys):
    """The real programs: tokenize pictures, make records of some, ask by the file itself."""
    names = ["images/ct-lung-1_06.jpg", "images/film-child-1437_00.jpg"]
    (tmp_path / "p" / "images").mkdir(parents=True)
    for name in names:
        shutil.copy(prepare.SAMPLE / name, tmp_path / "p" / name)
    command = ["tokenize", "--images", str(tmp_path / "p"), "--out", str(tmp_path / "codes")]
    assert prepare.main([*command, "--model", str(prepare.TINY)]) == 0
    rows = [
        dict(id=f"d{n}", text="What is it?<reserved08706><image>", image_path=name, task="VQA",
             source="s", credential="no", group="g", turns=1)
        for n, name in enumerate(names)
    ]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ["documents", "--from", str(tmp_path / "d.jsonl"), "--images", str(tmp_path / "p")]
    assert prepare.main([*command, "--out", str(tmp_path / "r")]) == 0
    told = ask(capsys, str(tmp_path / "p" / names[1]), tmp_path)
    assert [s["document"] for s in told["shards"]] == [1]
    assert told["codes"] == [dict(codes=str(tmp_path / "codes"), picture=1, shard=0, record=1)]
    digest = storage.file_sha256(tmp_path / "p" / names[1])
    assert writer.open_records(tmp_path / "r")[1].image_sha256 == digest


def test_other_programs_have_checkpoints_too(world, tmp_path, capsys):
    top, _ = world
    (tmp_path / "vqgan" / "checkpoints").mkdir(parents=True)
    (tmp_path / "vqgan" / "config.json").write_text('{"vq": 1}')
    assert ask(capsys, digest(0), tmp_path)["looked_into"]["runs"] == 0
    shutil.copytree(top / "runs", tmp_path / "runs")
    with open(tmp_path / "runs" / "a" / "history.jsonl", "a") as file:
        file.write('{"start": ')  # the disk was full
    assert prepare.main(["who_saw", digest(0), "--in", str(tmp_path)]) == 1
    assert "history.jsonl: damaged" in capsys.readouterr().err


def test_a_missing_folder_is_an_error(tmp_path, capsys):
    assert prepare.main(["who_saw", "x", "--in", str(tmp_path / "no")]) == 1
    assert "no such folder" in capsys.readouterr().err
