"""Tests of who_saw: shards, plans, runs and checkpoints of an image, against the batches read."""

import hashlib
import json
import shutil

import micro_run
import numpy as np
import pytest

from medmax_jax import config, train
from medmax_jax.data import loader, prepare
from medmax_jax.data.analysis import near_duplicates
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Document, Layout
from medmax_jax.models.vocab import BOI, EOI, IMAGE_START, SEP
from medmax_jax.storage.folder import file_sha256
from medmax_jax.training import setup

LAYOUT = Layout(vocab=micro_run.run().vocab, codes_per_image=4, tokenizer="", vqgan="")
STEPS, EVERY = 9, 3


def codes_of(n):
    return np.array([n % 16, n // 16, 3, 5])


def digest(n):
    return hashlib.sha256(str(n).encode()).hexdigest()


def image_document(n, credential="no", sha=True):
    """Return a document of image n // 2: each image has two."""
    image = n // 2
    text = [micro_run.TEXT_START + n % 60, SEP, micro_run.TEXT_START + n % 50]
    tokens = [0, BOI, *(codes_of(image) + IMAGE_START), EOI, *text, 2]
    return Document(
        tokens=np.array(tokens, np.int32), image_path=f"SECRET{image}.png", task="VQA",
        source="s", credential=credential, turns=1, group="g", id=f"SECRET-{n}",
        image_sha256=digest(image) if sha else "",
    )  # fmt: skip


def write(folder, numbers, **fields):
    docs = [image_document(n, **fields) for n in numbers]
    writer.write(folder, docs, shard_size=16, layout=LAYOUT, notes={})
    return str(folder)


def who_saw(capsys, what, *folders):
    capsys.readouterr()
    command = ["who_saw", what, "--in", *map(str, folders), "--json"]
    assert prepare.main(command) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Write records, a run of nine steps on them that was stopped and resumed, a saved plan."""
    top = tmp_path_factory.mktemp("world")
    folder = write(top / "records" / "train", range(120))
    validation = write(top / "records" / "held", range(300, 306))
    settings = dict(
        data__train=folder, data__validation=validation, data__batch_size=8, train__keep=9
    )
    settings |= dict(train__checkpoint_every=EVERY, data__seed=3)
    train.run(micro_run.run(**settings, train__steps=EVERY), top / "runs" / "a")
    run = micro_run.run(**settings, train__steps=STEPS)
    train.run(run, top / "runs" / "a", setup.Options(extend=True))
    command = ["plan", folder, "--seq_len", "32", "--seed", "3", "--save", str(top / "p.npz")]
    assert prepare.main(command) == 0
    return top, run


def read_at(run, documents):
    """Return the steps, counted from 1, whose batch contains one of the documents."""
    batches = loader.train_batches(run, run.data.train)
    found = []
    for step in range(len(batches)):
        part, own_step = batches._at(step) if run.stages else (batches, step)
        if np.isin(part._documents(own_step), documents).any():
            found.append(step + 1)
    return found


@pytest.mark.parametrize("image", [0, 17, 42])
def test_steps_and_checkpoints_agree_with_the_batches(world, capsys, image):
    top, run = world
    documents = [2 * image, 2 * image + 1]
    expected = read_at(run, documents)
    for what in (
        digest(image), digest(image)[:16], near_duplicates.code_hash(codes_of(image)),
        f"SECRET{image}.png", f"SECRET-{documents[1]}",
    ):  # fmt: skip
        result = who_saw(capsys, what, top)
        assert result["documents"] == 2 and [s["document"] for s in result["shards"]] == documents
        for s in result["shards"]:
            shard, record = divmod(s["document"], 16)
            assert s["shard"].endswith(f"records/train/0000{shard}-of-00008.array_record")
            assert s["record"] == record
        seen = [(r.get("seen"), r.get("first_step"), r.get("last_step")) for r in result["runs"]]
        parts = [[s for s in expected if s <= EVERY], [s for s in expected if s > EVERY]]
        assert seen == [(len(p), p[0], p[-1]) if p else (None, None, None) for p in parts]
        for line in result["checkpoints"]:
            name = line["checkpoint"].rpartition("/")[2]
            before = [s for s in expected if s <= (STEPS if name == "adapter" else int(name))]
            if before:
                assert (line["seen"], line["first_step"]) == (len(before), before[0])
            else:
                assert line["not_yet_seen_by_step"] == int(name)
        names = [line["checkpoint"].rpartition("/")[2] for line in result["checkpoints"]]
        assert names == (["3", "6", "9", "adapter"] if expected else [])
        plan = writer.open_records(run.data.train), loader.train_batches(run, run.data.train)
        rows = [r for r in range(len(plan[1]._epochs.first))
                if np.isin(plan[1]._epochs.row(r).documents, documents).any()]  # fmt: skip
        assert result["plans"] == [dict(plan=str(top / "p.npz"), epoch=0, rows=rows)]


@pytest.mark.parametrize("image", [0, 3, 17, 42])
def test_steps_of_every_stage_agree_with_the_batches(tmp_path, capsys, image):
    """The files of a run of three stages, whose last stage was extended after step 7."""
    folder = write(tmp_path / "records", range(120))
    place = tmp_path / "run"
    for step in (3, 7, 13):
        (place / "checkpoints" / str(step)).mkdir(parents=True)
    lines = []
    for start, last_stage in ((0, 3), (7, 6)):
        settings = micro_run.settings(data__train=folder, train__steps=7 + last_stage)
        settings.stages = (
            dict(steps=3),
            dict(steps=4, mixing=dict(weights="s=1", fraction=0.5)),
            dict(steps=last_stage, mixing=dict(image_centric=True)),
        )
        run = config.from_config_dict(settings)
        facts = setup.run_metadata(run, loader.train_batches(run, folder))
        lines.append({name: facts[name] for name in ("data", "plan", "config")} | {"start": start})
    (place / "config.json").write_text(json.dumps(lines[-1]))
    (place / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = read_at(run, [2 * image, 2 * image + 1])
    assert expected[0] <= 7 < expected[-1]
    result = who_saw(capsys, digest(image), tmp_path)
    seen = [(line["seen"], line["first_step"], line["last_step"]) for line in result["runs"]]
    parts = [s for s in expected if s <= 7], [s for s in expected if s > 7]
    assert seen == [(len(p), p[0], p[-1]) for p in parts]
    for line in result["checkpoints"]:
        before = [s for s in expected if s <= int(line["checkpoint"].rpartition("/")[2])]
        assert line.get("seen", 0) == len(before)


def test_checkpoint_before_the_first_use_is_reported(world, capsys):
    top, run = world
    first = {p: read_at(run, [2 * p, 2 * p + 1]) for p in range(60)}
    late = next(p for p, steps in first.items() if steps and EVERY < steps[0] <= STEPS)
    result = who_saw(capsys, digest(late), top)
    assert result["checkpoints"][0]["not_yet_seen_by_step"] == EVERY
    assert result["checkpoints"][-1]["first_step"] == first[late][0]
    assert result["runs"][0]["not_seen_by_step"] == EVERY
    assert result["runs"][1]["first_step"] == first[late][0]


def test_validation_is_distinguished_from_training(world, capsys):
    top, _ = world
    result = who_saw(capsys, digest(151), top)
    assert [r["in_validation"] for r in result["runs"]] == [2, 2] and result["checkpoints"] == []
    assert result["plans"] == []


def test_unknown_image_is_found_nowhere(world, capsys):
    top, _ = world
    result = who_saw(capsys, digest(10_000), top)
    assert result["documents"] == 0 and result["looked_into"] == dict(
        records=2, codes=0, plans=1, runs=1
    )
    assert not any(result[n] for n in ("shards", "codes", "plans", "runs", "checkpoints"))


def test_unknown_provenance_is_reported(world, tmp_path, capsys):
    """For records that are elsewhere or were rebuilt, nothing is guessed about a run."""
    top, run = world
    shutil.copytree(top / "runs", tmp_path / "runs")
    shutil.copy(top / "p.npz", tmp_path / "p.npz")
    result = who_saw(capsys, digest(1), tmp_path)
    fingerprint = writer.open_records(run.data.train).fingerprint[:16]
    unknown = f"its records {fingerprint} are not in these folders"
    assert [r["unknown"] for r in result["runs"]] == [unknown] * 2
    assert "are not in these folders" in result["plans"][0]["unknown"]
    config = tmp_path / "runs" / "a" / "history.jsonl"
    config.write_text(config.read_text().replace('"seed": 3', '"seed": 4'))
    result = who_saw(capsys, digest(1), tmp_path, top / "records")
    assert {r["unknown"] for r in result["runs"]} == {
        "its records and settings now give another plan"
    }
    config.unlink()  # as of runs from before there was one
    result = who_saw(capsys, digest(1), tmp_path, top / "records")
    assert len(result["runs"]) == 1 and result["checkpoints"] == moved_checkpoints(
        capsys, tmp_path, top
    )


def moved_checkpoints(capsys, tmp_path, top):
    checkpoints = who_saw(capsys, digest(1), top)["checkpoints"]
    return [
        c | {"checkpoint": c["checkpoint"].replace(str(top), str(tmp_path))} for c in checkpoints
    ]


def test_copy_under_another_name_is_found_by_its_codes(tmp_path, capsys):
    write(tmp_path / "a", range(4))
    write(tmp_path / "b", range(4), sha=False)
    docs = [image_document(n, sha=False) for n in range(4)]
    for n, d in enumerate(docs):
        vars(d).update(id=f"other-{n}", image_path=f"other{n // 2}.png")
    writer.write(tmp_path / "c", docs, shard_size=9, layout=LAYOUT, notes={})
    result = who_saw(capsys, digest(0), tmp_path)
    assert result["documents"] == 6
    assert who_saw(capsys, "other0.png", tmp_path)["documents"] == 6


def test_credentialed_images_are_named_by_hashes(tmp_path, capsys):
    write(tmp_path / "r", range(4), credential="yes")
    for what in (digest(0), "SECRET0.png", "SECRET-1"):
        assert prepare.main(["who_saw", what, "--in", str(tmp_path)]) == 0
        captured = capsys.readouterr()
        assert "SECRET" not in captured.out + captured.err
        assert near_duplicates.code_hash(codes_of(0))[:16] in captured.out


def test_files_and_folders_of_codes(tmp_path, capsys):
    """Run the real programs: tokenize images, write records of some, query by the file itself."""
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
    result = who_saw(capsys, str(tmp_path / "p" / names[1]), tmp_path)
    assert [s["document"] for s in result["shards"]] == [1]
    # Verbatim: part of the data.
    assert result["codes"] == [dict(codes=str(tmp_path / "codes"), picture=1, shard=0, record=1)]
    digest = file_sha256(tmp_path / "p" / names[1])
    assert writer.open_records(tmp_path / "r")[1].image_sha256 == digest


def test_checkpoints_of_other_programs_are_ignored(world, tmp_path, capsys):
    top, _ = world
    (tmp_path / "vqgan" / "checkpoints").mkdir(parents=True)
    (tmp_path / "vqgan" / "config.json").write_text('{"vq": 1}')
    assert who_saw(capsys, digest(0), tmp_path)["looked_into"]["runs"] == 0
    shutil.copytree(top / "runs", tmp_path / "runs")
    with open(tmp_path / "runs" / "a" / "history.jsonl", "a") as file:
        file.write('{"start": ')  # the disk was full
    assert prepare.main(["who_saw", digest(0), "--in", str(tmp_path)]) == 1
    assert "history.jsonl: damaged" in capsys.readouterr().err


def test_a_missing_folder_is_an_error(tmp_path, capsys):
    assert prepare.main(["who_saw", "x", "--in", str(tmp_path / "no")]) == 1
    assert "no such folder" in capsys.readouterr().err
