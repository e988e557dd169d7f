"""Tests of densify and decentralize: equal counts of each task on few images or on many."""

import dataclasses
import json

import micro_run
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_jax.data import image_density, prepare
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import RecordsError
from medmax_jax.data.records.reader import open_records

PAIRS = st.lists(st.tuples(st.integers(-1, 12), st.integers(0, 3)), min_size=1, max_size=80)
SEEDS = st.integers(0, 2**32 - 1)
# the pool of the module's docstring: images a, b, c, d and tasks v, c, r
IMAGE = np.array([0, 0, 0, 0, 1, 1, 2, 2, 3, -1])
TASK = np.array([0, 0, 1, 2, 0, 1, 1, 2, 0, 0])
NEED = np.array([2, 1, 1])


@settings(max_examples=200, deadline=None)
@given(PAIRS, SEEDS, st.data())
def test_densify_selects_exactly_what_is_needed(pairs, seed, data):
    image, task = np.array(pairs).T
    counts = np.bincount(task[image >= 0], minlength=4)
    need = np.array([data.draw(st.integers(0, int(n))) for n in counts])
    chosen = image_density.densify(image, task, need, seed=seed)
    assert len(set(chosen.tolist())) == len(chosen) and (image[chosen] >= 0).all()
    assert np.bincount(task[chosen], minlength=4).tolist() == need.tolist()
    again = image_density.densify(image, task, need, seed=seed)
    assert again.tolist() == chosen.tolist()
    with pytest.raises(RecordsError, match="1 of"):
        image_density.densify(image, task, counts + np.array([1, 0, 0, 0]), seed=seed)


@settings(max_examples=200, deadline=None)
@given(PAIRS, SEEDS, st.data())
def test_decentralize_gives_each_image_one_task(pairs, seed, data):
    image, task = np.array(pairs).T
    # counts that some assignment reaches: of each image, some documents of one task
    need = np.zeros(4, int)
    for n in set(image[image >= 0].tolist()):
        t = data.draw(st.sampled_from(sorted(set(task[image == n].tolist()))))
        need[t] += data.draw(st.integers(0, int((task[image == n] == t).sum())))
    try:
        chosen = image_density.decentralize(image, task, need, seed=seed)
    except RecordsError as error:  # greedy: it may miss an assignment, and says what is missing
        assert "are missing" in str(error)
        return
    assert np.bincount(task[chosen], minlength=4).tolist() == need.tolist()
    for n in set(image[chosen].tolist()):
        assert n >= 0 and len(set(task[chosen][image[chosen] == n].tolist())) == 1


def test_the_example_of_the_docstring():
    assert image_density.densify(IMAGE, TASK, NEED, seed=0).tolist() == [0, 1, 2, 3]
    for seed in range(8):
        spread = image_density.decentralize(IMAGE, TASK, NEED, seed=seed)
        assert np.bincount(TASK[spread]).tolist() == [2, 1, 1]
        assert len(set(IMAGE[spread].tolist())) >= 3
    with pytest.raises(RecordsError, match="10 documents are needed, but only"):
        image_density.decentralize(IMAGE, TASK, np.array([4, 3, 3]), seed=0)


@settings(max_examples=100, deadline=None)
@given(PAIRS, SEEDS, st.integers(1, 4), st.data())
def test_densify_by_entries_finds_a_selection_if_there_is_one(pairs, seed, entries, data):
    """Counts that `entries` documents of each of some images have, which may be all images."""
    image, task = np.array(pairs).T
    documents = np.flatnonzero(image >= 0)
    enough = [n for n in set(image[documents].tolist()) if (image == n).sum() >= entries]
    need = np.zeros(4, int)
    for n in enough:
        own = data.draw(st.permutations(np.flatnonzero(image == n).tolist()))
        need += np.bincount(task[own[:entries]], minlength=4)
    chosen = image_density.densify_by_entries(image, task, need, entries=entries, seed=seed)
    assert np.bincount(task[chosen], minlength=4).tolist() == need.tolist()
    assert len(set(chosen.tolist())) == len(chosen) and (image[chosen] >= 0).all()
    assert set(np.bincount(image[chosen], minlength=1).tolist()) <= {0, entries}
    again = image_density.densify_by_entries(image, task, need, entries=entries, seed=seed)
    assert again.tolist() == chosen.tolist()


@settings(max_examples=100, deadline=None)
@given(PAIRS, SEEDS, st.integers(1, 3), st.data())
def test_decentralize_by_entries_finds_a_selection_if_there_is_one(pairs, seed, entries, data):
    image, task = np.array(pairs).T
    need = np.zeros(4, int)
    for n in set(image[image >= 0].tolist()):
        counts = np.bincount(task[image == n], minlength=4)
        if tasks := np.flatnonzero(counts >= entries).tolist():
            need[data.draw(st.sampled_from(tasks))] += entries
    chosen = image_density.decentralize_by_entries(image, task, need, entries=entries, seed=seed)
    assert np.bincount(task[chosen], minlength=4).tolist() == need.tolist()
    for n in set(image[chosen].tolist()):
        own = chosen[image[chosen] == n]
        assert n >= 0 and len(own) == entries and len(set(task[own].tolist())) == 1


def test_scaled_counts():
    assert image_density.scaled_counts(np.array([6, 3, 1]), 5).tolist() == [3, 2, 0]
    assert image_density.scaled_counts(np.array([5, 0, 5]), 10).tolist() == [5, 0, 5]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("density") / "pool"
    prepare.prepare_sample(folder, split="train")
    return folder


def run(capsys, *arguments):
    status = prepare.main([*map(str, arguments), "--json"])
    printed = capsys.readouterr()
    return json.loads(printed.out.splitlines()[-1]) if status == 0 else printed.err


def test_two_arms_of_the_sample_differ_in_arrangement_only(sample, tmp_path, capsys):
    imax, dmax = tmp_path / "imax", tmp_path / "dmax"
    dense = run(capsys, "densify", sample, "--out", imax, "--documents", 60)
    spread = run(capsys, "decentralize", sample, "--out", dmax, "--like", imax, "--seed", 3)
    assert dense["documents"] == spread["documents"] == 60 and dense["tasks"] == spread["tasks"]
    before, after = dense["per_image"]["pool"], dense["per_image"]["densify"]
    assert after["tasks"] > before["tasks"]
    assert dense["per_image"]["IMAX (published)"]["tasks"] == 4.1
    assert spread["per_image"]["decentralize"]["tasks"] == 1.0
    assert spread["per_image"]["decentralize"]["images"] > 2 * after["images"]

    pool = {document.id: writer.to_bytes(document) for document in open_records(sample)}
    for folder, kind in ((imax, "densify"), (dmax, "decentralize")):
        records = open_records(folder)
        assert all(pool[document.id] == writer.to_bytes(document) for document in records)
        notes = records.meta["notes"]
        assert notes["split"] == "train" and notes["selection"]["kind"] == kind
        assert notes["selection"]["pool"] == open_records(sample).fingerprint


def test_pseudo_documents_are_selected_counted_and_checked(sample, tmp_path, capsys):
    records = open_records(sample)
    made = dict(pseudo=True, generator="ab" * 32, scores={"margin": 0.5})
    documents = [
        dataclasses.replace(document, **(made if number % 2 else {}))
        for number, document in enumerate(records)
    ]
    pool, dense = tmp_path / "pool", tmp_path / "dense"
    writer.write(pool, documents, shard_size=64, layout=records.layout, notes={})
    run(capsys, "densify", pool, "--out", dense, "--documents", 60)
    selected = open_records(dense)
    count = sum(document.pseudo for document in selected)
    assert 0 < count < 60 and selected.index["pseudo"].sum() == count
    assert {(d.generator, d.scores["margin"]) for d in selected if d.pseudo} == {("ab" * 32, 0.5)}
    assert sum(run(capsys, "stats", dense)["pseudo"].values()) == count
    assert "pseudo" not in run(capsys, "stats", sample)
    checked = run(capsys, "check", dense)
    assert checked["errors"] == 0 and checked["pseudo"] == count
    run(capsys, "stats", dense, "--out", tmp_path / "page.html", "--examples", 40)
    page = (tmp_path / "page.html").read_text()
    assert f"A model generated the answers of {count} documents." in page
    assert "ab" * 8 in page and "margin 0.5" in page


def test_entries_change_the_number_of_images_and_nothing_else(sample, tmp_path, capsys):
    """Equal documents of each task; the images of more entries are among those of fewer."""
    arms, images = {}, {}
    for entries in (1, 2, 4, 8):
        out = tmp_path / str(entries)
        words = ("--documents", 144, "--entries", entries, "--seed", 5)
        arms[entries] = run(capsys, "densify", sample, "--out", out, *words)
        records = open_records(out)
        images[entries] = {document.image_path for document in records}
        assert records.meta["notes"]["selection"]["entries"] == entries
        per_image = arms[entries]["per_image"]["densify"]
        assert per_image["entries"] == entries and per_image["images"] == 144 // entries
    assert all(arm["tasks"] == arms[1]["tasks"] for arm in arms.values())
    assert images[8] < images[4] < images[2] < images[1]
    kinds = [arm["per_image"]["densify"]["tasks"] for arm in arms.values()]
    assert kinds[0] == 1 and kinds == sorted(kinds) and kinds[-1] > 4.1

    spread = run(capsys, "decentralize", sample, "--out", tmp_path / "d", "--like", tmp_path / "8",
                 "--entries", 2)  # fmt: skip
    assert spread["tasks"] == arms[8]["tasks"]
    assert spread["per_image"]["decentralize"]["tasks"] == 1.0
    assert spread["per_image"]["decentralize"]["entries"] > 1.9


def test_entries_that_a_pool_cannot_give_are_refused(sample, tmp_path, capsys):
    out = tmp_path / "out"
    for words, expected in (
        (("--documents", 300, "--entries", 1), "only 150 have as many, for at most 150 documents"),
        (("--documents", 150, "--entries", 4), "use a multiple, such as 148 or 152"),
        (("--documents", 96, "--entries", 48), "only 0 have as many"),
        (("--documents", 96, "--entries", 0), "--entries is 0; it must be at least 1"),
        (("--documents", 4240, "--entries", 40), "a smaller --entries"),
    ):
        message = run(capsys, "densify", sample, "--out", out, *words)
        assert expected in message
    message = run(capsys, "decentralize", sample, "--out", out, "--documents", 200, "--entries", 1)
    assert "200 documents are needed, but only 150 can be selected" in message
    with pytest.raises(RecordsError, match="of task 1 1 of 3 are missing"):
        image_density.densify_by_entries(IMAGE, TASK, np.array([1, 3, 0]), entries=2, seed=0)
    assert not out.exists()


def test_selections_that_cannot_be_made_are_refused(sample, tmp_path, capsys):
    out = tmp_path / "out"
    message = run(capsys, "decentralize", sample, "--out", out, "--documents", 10**6)
    assert "--documents is 1000000; it must be 1 to" in message
    message = run(capsys, "decentralize", sample, "--out", out, "--like", sample)
    assert "are missing" in message and "use another --documents" in message
    other = micro_run.write(tmp_path / "other")
    message = run(capsys, "densify", sample, "--out", out, "--like", other)
    assert "no document has an image" in message or "which the pool lacks" in message
    assert not out.exists()
