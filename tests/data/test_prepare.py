"""Tests of preparing the sample: records, views, unreadable images, the program, its errors."""

import functools
import json
import logging
import shutil

import jax
import numpy as np
import PIL.Image
import pytest

from medmax_jax.checkpoints import safetensors_file
from medmax_jax.config import VQ, Vocab, to_dict
from medmax_jax.data import mixture, prepare
from medmax_jax.data.analysis import check
from medmax_jax.data.image_tokens import encoder as image_encoder
from medmax_jax.data.image_tokens.encoder import ImageView, PrepareError, load_encoder, load_pixels
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import RecordsError
from medmax_jax.data.records.jsonl import to_text
from medmax_jax.io import progress
from medmax_jax.models import images, tokenizer, vqgan
from medmax_jax.models.vocab import BOI, IMAGE_START

VOCAB = Vocab(size=9_100, image_codes=64, text_start=8_712)
SMALL = VQ(
    image_size=16,
    channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    z_channels=8,
    embed_dim=8,
    num_codes=64,
    norm_groups=32,
    view="released",
    answer_view="released",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a model folder with a random VQGAN of 8 x 8 codes."""
    folder = tmp_path_factory.mktemp("model")
    settings = dict(vocab=to_dict(VOCAB), vq=to_dict(SMALL), model={})
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(tokenizer.train(["The chest. The brain."] * 3, VOCAB))
    rng = np.random.default_rng(0)  # not vqgan.create: its compilation takes long

    def draw(path, like):
        gain = "scale" in jax.tree_util.keystr(path)  # of a GroupNorm
        spread = 0.1 if len(like.shape) > 1 else 0.0
        return rng.normal(gain, spread, like.shape).astype(like.dtype)

    vq = jax.tree_util.tree_map_with_path(draw, vqgan.abstract(SMALL))
    safetensors_file.save(folder / "vqgan.safetensors", vq, {})
    return folder


@pytest.fixture(scope="module")
def encoder(model):
    return load_encoder(model)


@pytest.fixture
def make(model, sample, encoder):
    def make(out, **changes):
        defaults = dict(split="train", kind="instruction", views=1, seed=0, sample=sample)
        defaults |= dict(vq=encoder.vq, tokenizer=encoder.tokenizer, model_folder=model)
        return prepare.prepare_sample(out, **(defaults | changes))

    return make


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Return a part of the real sample: some images of every split, one with a count."""
    folder = tmp_path_factory.mktemp("sample")
    (folder / "images").mkdir()
    rows = prepare._manifest(prepare.SAMPLE)
    taken = [next(r for r in rows if r["split"] == "train" and r["count"] is not None)]
    for split in prepare.SPLITS:
        taken += [r for r in rows if r["split"] == split and r not in taken][:5]
    for row in taken:
        shutil.copy(prepare.SAMPLE / row["file"], folder / row["file"])
    (folder / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in taken))
    return folder


def broken(sample, tmp_path, count):
    """Return a copy of the sample in which `count` train images are truncated."""
    shutil.copytree(sample, tmp_path / "broken")
    rows = [json.loads(line) for line in (sample / "manifest.jsonl").read_text().splitlines()]
    names = [r["file"] for r in rows if r["split"] == "train"][:count]
    for name in names:
        path = tmp_path / "broken" / name
        path.write_bytes(path.read_bytes()[:40])
    return tmp_path / "broken", names


def test_records_contain_the_images_and_the_text(make, encoder, sample, tmp_path):
    meta = make(tmp_path / "r")
    records = writer.open_records(tmp_path / "r")
    assert len(records) == meta["documents"] > 50
    assert meta["notes"]["unreadable"] == {} and meta["notes"]["documents_left_out"] == 0
    assert records.layout == encoder.layout and encoder.layout.codes_per_image == 64
    document = next(d for d in records if d.task == "Image Captioning")
    pixels = images.preprocess(
        images.load(sample / document.image_path, max_pixels=10**6), SMALL.image_size
    )
    batch = np.repeat(
        pixels[None], image_encoder.BATCH, axis=0
    )  # the shape that is compiled already
    expected = np.asarray(vqgan.encode(encoder.vq, batch)[0]).reshape(-1) + IMAGE_START
    begin = int(np.flatnonzero(document.tokens == BOI)[0]) + 1
    assert np.array_equal(document.tokens[begin : begin + 64], expected)
    text = to_text(document, records.layout, encoder.tokenizer)
    assert text.startswith("<image>") and "<reserved08706>" in text


def test_documents_are_those_of_the_sample(make, encoder, sample, tmp_path):
    for kind in prepare.KINDS:
        make(tmp_path / kind, kind=kind)
        rows = [r for r in prepare._manifest(sample) if r["split"] == "train"]
        texts = {d["id"]: d for d in prepare.KINDS[kind](rows, 0)}
        records = writer.open_records(tmp_path / kind)
        assert {d.id for d in records} == set(texts)
        for document in records:
            text = texts[document.id]
            assert to_text(document, records.layout, encoder.tokenizer) == text["text"]
            assert (document.group, document.turns) == (text["group"], text["turns"])


def test_same_command_gives_same_records(make, tmp_path):
    metas = [make(tmp_path / n, views=3) for n in "ab"]
    assert metas[0] == metas[1]
    other = make(tmp_path / "c", views=3, seed=1)
    assert other["sha256"] != metas[0]["sha256"]


def test_views_are_assigned_in_turn(make, tmp_path):
    """Every document occurs once for any number of views; its view changes in turn."""
    one_view_meta, three = (make(tmp_path / str(n), views=n) for n in (1, 3))
    assert (
        one_view_meta["documents"] == three["documents"]
        and one_view_meta["tasks"] == three["tasks"]
    )

    def views_of(name):
        seen = {}
        for d in writer.open_records(tmp_path / name):
            for begin in np.flatnonzero(d.tokens == BOI):
                span = d.tokens[begin + 1 : begin + 65]
                seen.setdefault(d.image_path, set()).add(span.tobytes())
        return seen

    assert {len(s) for s in views_of("1").values()} == {1}
    many = views_of("3")
    assert all(one_view <= many[path] for path, one_view in views_of("1").items())
    assert max(len(s) for s in many.values()) == 3


def test_views_change_slightly_and_are_never_rotated():
    rng = np.random.default_rng(0)
    ramp = np.tile(np.linspace(20, 230, 60, dtype=np.uint8), (40, 1))  # dark left, bright right
    noisy = (ramp + rng.integers(0, 5, ramp.shape)).astype(np.uint8)
    image = PIL.Image.fromarray(noisy).convert("RGB")
    plain = load_pixels(image, ImageView("a", 0, "s", True), SMALL)
    assert np.array_equal(plain, images.preprocess(image, SMALL.image_size))
    for n in range(1, 20):
        view = ImageView("a", n, f"0/a/{n}", crop=True)
        changed = load_pixels(image, view, SMALL)
        assert np.array_equal(changed, load_pixels(image, view, SMALL))
        assert changed.dtype == np.float32 and changed.shape == plain.shape
        assert np.abs(changed).max() <= 1 and not np.array_equal(changed, plain)
        assert changed[:, -1].mean() > changed[:, 0].mean() + 0.5  # still dark left, bright right
        assert np.abs(changed - plain).mean() < 0.35


def test_images_with_a_count_are_not_cropped():
    """Without a crop the pixels of a view are a linear function of the plain pixels."""
    rng = np.random.default_rng(1)
    image = PIL.Image.fromarray(rng.integers(90, 160, (32, 32, 3), dtype=np.uint8))
    plain = load_pixels(image, ImageView("a", 0, "s", False), SMALL)
    changed = load_pixels(image, ImageView("a", 1, "0/a/1", crop=False), SMALL)
    slope, shift = np.polyfit(plain.ravel(), changed.ravel(), 1)
    np.testing.assert_allclose(plain * slope + shift, changed, atol=1e-5)
    rows = prepare._manifest(prepare.SAMPLE)
    texts = prepare.KINDS["instruction"]([r for r in rows if r["split"] == "train"], 0)
    uncropped = {r["file"] for r in rows if r["count"] is not None or r["lesion"]}
    views = [v for _, v in prepare._assign_views(texts, rows, 2, 0) if v]
    assert uncropped and all(v.crop == (v.path not in uncropped) for v in views)


def test_unreadable_images_are_excluded_and_listed(make, sample, tmp_path, caplog):
    folder, names = broken(sample, tmp_path, 1)
    complete = make(tmp_path / "complete", views=2)
    with caplog.at_level(logging.WARNING):
        meta = make(tmp_path / "r", sample=folder, views=2, max_unreadable=0.5)
    assert list(meta["notes"]["unreadable"]) == names
    left_out = meta["notes"]["documents_left_out"]
    assert left_out > 0 and meta["documents"] + left_out == complete["documents"]
    assert names[0] in caplog.text and "excluded 1 unreadable images" in caplog.text
    assert names[0] not in {d.image_path for d in writer.open_records(tmp_path / "r")}


def test_too_many_unreadable_images_are_an_error(make, sample, tmp_path):
    folder, names = broken(sample, tmp_path, 3)
    with pytest.raises(PrepareError, match=r"3 of 6 images cannot be read.*--max_unreadable"):
        make(tmp_path / "r", sample=folder)
    assert list((tmp_path / "r").iterdir()) == []


def test_refusals(make, tmp_path):
    with pytest.raises(PrepareError, match="kind is 'chat'"):
        make(tmp_path / "r", kind="chat")
    with pytest.raises(PrepareError, match="views is 2 for split test"):
        make(tmp_path / "r", split="test", views=2)
    with pytest.raises(PrepareError, match="no image of split 'dev'"):
        make(tmp_path / "r", split="dev")
    with pytest.raises(PrepareError, match="not a valid model folder"):
        make(tmp_path / "r", model_folder=tmp_path)
    with pytest.raises(PrepareError, match="manifest.jsonl: cannot be read"):
        make(tmp_path / "r", sample=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordsError, match="cannot be written"):
        make(tmp_path / "file" / "r")


def test_program(model, encoder, sample, tmp_path, capsys, monkeypatch):
    loaded = dict(sample=sample, vq=encoder.vq, tokenizer=encoder.tokenizer)
    monkeypatch.setattr(
        prepare, "prepare_sample", functools.partial(prepare.prepare_sample, **loaded)
    )
    out, model = str(tmp_path / "r"), ["--model", str(model)]
    assert prepare.main(["sample", "--out", out, *model, "--split", "test", "--json"]) == 0
    meta = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert meta["documents"] > 0 and meta["notes"]["split"] == "test"
    assert prepare.main(["check", out, *model]) == 0
    assert "<image>" in (text := capsys.readouterr().out) and str(meta["tokens"]) in text
    assert prepare.main(["stats", out, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["documents"] == meta["documents"] and 0.5 < summary["fill"] <= 1
    assert summary["seq_len"] == summary["lengths"]["100%"] == meta["longest"]
    assert prepare.main(["stats", out, "--seq_len", "100"]) == 1  # a document is longer
    assert "set data.seq_len" in capsys.readouterr().err
    assert prepare.main(["sample", "--out", out, *model]) == 1
    assert "already contains a finished data set" in capsys.readouterr().err
    for wrong in (["sample"], ["sample", "--out", out, "--views", "0"], [], ["build"]):
        with pytest.raises(SystemExit) as stopped:
            prepare.main(wrong)
        assert stopped.value.code == 2


def test_ctrl_c_leaves_no_records_and_is_reported(
    model, encoder, sample, tmp_path, capsys, monkeypatch
):
    loaded = dict(sample=sample, vq=encoder.vq, tokenizer=encoder.tokenizer)
    prepare_sample = functools.partial(prepare.prepare_sample, **loaded)
    out, command = tmp_path / "r", ["sample", "--out", str(tmp_path / "r"), "--model", str(model)]

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "prepare_sample", prepare_sample)
    with monkeypatch.context() as patch:
        patch.setattr(progress.ItemProgress, "tick", stop)
        assert prepare.main([*command, "--split", "test"]) == 75
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted: no records were")
    assert list(out.iterdir()) == []
    assert prepare.main([*command, "--split", "test"]) == 0
    assert len(writer.open_records(out)) > 0


def test_check_without_its_tokenizer(make, tmp_path, capsys):
    make(tmp_path / "r", split="validation")
    assert prepare.main(["check", str(tmp_path / "r"), "--model", str(tmp_path)]) == 0
    assert "None" in capsys.readouterr().out


def test_check_reports_changed_documents(make, tmp_path, capsys):
    meta = make(tmp_path / "r", split="validation")
    path = tmp_path / "r" / "dataset.json"
    path.write_text(json.dumps(meta | {"sha256": "0" * 64}))
    assert check.check(tmp_path / "r", tokenizer=None)["findings"]["written"] == 1
    assert "not that of the documents that were written" in capsys.readouterr().out
    assert prepare.main(["check", str(tmp_path / "r")]) == 1


def test_mixture_is_the_published_one():
    assert len(mixture.SOURCES) == 13
    assert sum(s.percent for s in mixture.SOURCES) == pytest.approx(100, abs=0.2)
    assert sum(mixture.TASKS.values()) == pytest.approx(100, abs=0.2)
    assert {t for s in mixture.SOURCES for t in s.tasks} == set(mixture.TASKS)
    sums = {t: sum(s.percent for s in mixture.SOURCES if s.tasks == (t,)) for t in mixture.TASKS}
    for task in ("Visual Chat", "VQA", "Report Understanding"):  # their sources feed nothing else
        assert sums[task] == pytest.approx(mixture.TASKS[task], abs=0.2)
    assert [len(t.splitlines()) for t in mixture.markdown().split("\n\n")] == 3 * [2 + 13 + 1]


def test_rounds_are_other_wordings_of_the_same_facts(make, tmp_path):
    first, second = (make(tmp_path / str(n), split="validation", rounds=n) for n in (1, 2))
    assert second["groups"] == first["groups"] and second["tasks"].keys() == first["tasks"].keys()
    first, both = ({d.id for d in writer.open_records(tmp_path / n)} for n in "12")
    second = {i for i in both if i.endswith("-r1")}
    assert both - second == first and 0.9 < len(second) / len(first) < 1.1


def test_rows_with_generated_answers_become_pseudo_documents(tmp_path):
    row = dict(id="a", text="Is it?<reserved08706>no", image_path="", task="VQA", source="s")
    row |= dict(credential="no", group="g", turns=1)
    made = row | dict(id="b", pseudo=True, generator="c3" * 32, scores={"margin": 1.5})
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(made) + "\n")
    prepare.prepare_documents(
        tmp_path / "r", source=tmp_path / "t.jsonl", images=tmp_path, model_folder=prepare.TINY
    )
    records = writer.open_records(tmp_path / "r")
    assert [d.pseudo for d in records] == [False, True]
    assert records[1].generator == "c3" * 32 and records[1].scores == {"margin": 1.5}
