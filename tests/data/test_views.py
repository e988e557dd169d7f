"""Views of images in records: which is used where, what records state, and what is refused."""

import dataclasses
import json

import micro_run
import numpy as np
import pytest

from medmax_jax.checkpoints import export
from medmax_jax.config import ConfigError, Vocab, from_config_dict, to_dict
from medmax_jax.configs import tiny
from medmax_jax.data import loader, prepare
from medmax_jax.data.image_tokens import document_codes
from medmax_jax.data.image_tokens.document_codes import StoredCodes, views_of_text
from medmax_jax.data.image_tokens.encoder import (
    ImageView,
    PrepareError,
    load_encoder,
    load_pixels,
    open_image,
)
from medmax_jax.data.image_tokens.store import tokenize
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Document, Layout, RecordsError
from medmax_jax.models import images, vqgan
from medmax_jax.models.vocab import BOI, BOS, EOI, EOS, IMAGE_START, SEP
from medmax_jax.sharding import make_mesh
from medmax_jax.training import reporting

TALL = "images/film-child-1427_00.jpg"  # an X-ray of which the release loses a part
WIDE = "images/echo-doppler_00.jpg"
ROWS = [
    dict(id="asked", text="<image>CT?<reserved08706>no", image_path=TALL),
    dict(id="drawn", text="Draw it.<reserved08706><image>", image_path=TALL),
    dict(id="edited", text="<image>Invert it.<reserved08706><image>", image_path=WIDE),
    dict(id="text", text="Is it?<reserved08706>no", image_path=""),
]
LAYOUT = Layout(
    vocab=Vocab(size=9_000, image_codes=16, text_start=8_712), codes_per_image=4,
    tokenizer="t", vqgan="v",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Use a batch of one image on each of the eight devices of the tests."""
    monkeypatch.setattr(document_codes, "BATCH", 2)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(prepare.TINY, view="pad")


@pytest.fixture
def texts(tmp_path):
    common = dict(task="VQA", source="s", credential="no", group="g", turns=1)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r | common) + "\n" for r in ROWS))
    return tmp_path / "texts.jsonl"


def write(out, texts, **options):
    prepare.prepare_documents(
        out, source=texts, images=prepare.SAMPLE, model_folder=prepare.TINY, **options
    )
    return writer.open_records(out)


def codes_of(document):
    return [
        tuple(document.tokens[b + 1 : b + 65] - IMAGE_START)
        for b in np.flatnonzero(document.tokens == BOI)
    ]


def encoded(encoder, path, view):
    image = open_image(prepare.SAMPLE / path, name=path)
    pixels = images.preprocess(image, 64, view)[None]
    return tuple(np.asarray(vqgan.encode(encoder.vq, np.repeat(pixels, 2, axis=0)))[0].reshape(-1))


@pytest.mark.parametrize(
    "text, turns, expected",
    [
        ("<image>CT?<reserved08706>no", 1, "p"),
        ("Draw.<reserved08706><image>", 1, "a"),
        ("<image><image>?<reserved08706>so: <image>", 1, "ppa"),
        ("<image>?<reserved08706><image><reserved08706><image>?<reserved08706>no", 2, "pap"),
        ("<image>?<reserved08706><image><reserved08706><image>", 0, "paa"),  # as it is trained
        ("A CT: <image>", 0, "a"),  # pretraining: every token is trained
        ("none", 0, ""),
    ],
)
def test_images_that_are_trained_have_the_view_of_answers(text, turns, expected):
    layout = dataclasses.replace(LAYOUT, view="p", answer_view="a")
    assert "".join(views_of_text(text, turns, layout)) == expected


def test_records_have_the_view_of_each_place_and_state_it(encoder, texts, tmp_path):
    asked, drawn, edited, text = write(tmp_path / "r", texts, view="pad")
    padded, cropped = (encoded(encoder, TALL, view) for view in ("pad", "released"))
    assert padded != cropped
    assert codes_of(asked) == [padded] and codes_of(drawn) == [cropped]
    assert codes_of(edited) == [encoded(encoder, WIDE, view) for view in ("pad", "released")]
    assert {(d.view, d.answer_view) for d in (asked, drawn, edited)} == {("pad", "released")}
    records = writer.open_records(tmp_path / "r")
    assert records.meta["layout"]["view"] == records.layout.view == "pad"
    stated = writer.to_bytes(asked)
    assert b'"view": "pad"' in stated and b"answer_view" not in stated


def test_the_release_is_the_default_with_the_same_bytes_as_before(encoder, texts, tmp_path):
    default, stated = write(tmp_path / "a", texts), write(tmp_path / "b", texts, view="released")
    assert default.fingerprint == stated.fingerprint
    assert codes_of(default[0]) == [encoded(encoder, TALL, "released")] == codes_of(default[1])
    assert b"view" not in writer.to_bytes(default[0])
    path = tmp_path / "a" / "dataset.json"
    meta = json.loads(path.read_text())
    del meta["layout"]["view"], meta["layout"]["answer_view"]  # as older versions wrote it
    path.write_text(json.dumps(meta))
    assert writer.open_records(tmp_path / "a").layout == default.layout


def store(encoder, out, view):
    tokenize(
        out, [TALL, WIDE], folder=prepare.SAMPLE,
        encoder=load_encoder(prepare.TINY, vq=encoder.vq, view=view),
        precision="highest", shard_size=4, batch=2, max_bad=0,
    )  # fmt: skip
    return out


def test_stored_codes_are_chosen_by_view(encoder, texts, tmp_path):
    pad, released = (store(encoder, tmp_path / view, view) for view in ("pad", "released"))
    expected = write(tmp_path / "r", texts, view="pad")
    stored = write(tmp_path / "s", texts, view="pad", codes=[released, pad])
    assert stored.fingerprint == expected.fingerprint
    with pytest.raises(PrepareError, match=r"view released, but view is pad; add a folder of `tok"):
        write(tmp_path / "t", texts, view="pad", codes=[released])
    with pytest.raises(PrepareError, match="a second folder of view pad"):
        StoredCodes([pad, pad], encoder, "highest")
    with pytest.raises(PrepareError, match="was started with view 'pad', not with 'released'"):
        store(encoder, pad, "released")
    for name in ("plan.json", "dataset.json"):  # as older versions wrote them
        content = json.loads((released / name).read_text())
        del (content["plan"] if name == "dataset.json" else content)["view"]
        (released / name).write_text(json.dumps(content))
    store(encoder, released, "released")
    write(tmp_path / "u", texts, codes=[released])


def test_one_image_may_be_asked_about_and_drawn_in_one_chunk(encoder, tmp_path):
    """Rows of a published source that share an image have it in the view of their own place."""
    from source_setup import FOLDERS

    from medmax_jax.data.sources import build

    (tmp_path / "from").mkdir()
    FOLDERS["PMC-OA"][0](tmp_path / "from")
    build.build_source(
        tmp_path / "r", source="PMC-OA", folder=tmp_path / "from", model_folder=prepare.TINY,
        split="train", seed=0, caption_share=0.5, vq=encoder.vq, view="pad",
    )  # fmt: skip
    places = set()
    for document in writer.open_records(tmp_path / "r"):
        begin = int(np.flatnonzero(document.tokens == BOI)[0])
        answer = bool((document.tokens[:begin] == SEP).any())
        path = next((tmp_path / "from").rglob(document.image_path.rpartition("/")[2]))
        pixels = images.preprocess(open_image(path, name="a"), 64, "released" if answer else "pad")[
            None
        ]
        expected = np.asarray(vqgan.encode(encoder.vq, np.repeat(pixels, 2, axis=0)))[0]
        assert codes_of(document) == [tuple(expected.reshape(-1))]
        places.add(answer)
    assert places == {True, False}


def test_variants_of_a_padded_image_are_cut_from_all_of_it(monkeypatch):
    """Of a wide image, crops of the release stay in the center square; others reach the ends."""
    ramp = np.tile(np.arange(120, dtype=np.uint8), (30, 1))
    image = images.Image.fromarray(ramp).convert("RGB")
    vq = dataclasses.replace(vqgan.RELEASED, image_size=8)
    cuts = {view: [] for view in images.VIEWS}

    def preprocess(cut, size, view):
        cuts[view].append(np.asarray(cut))
        return np.zeros((size, size, 3), np.float32)

    monkeypatch.setattr(images, "preprocess", preprocess)
    for n in range(1, 40):
        for view in images.VIEWS:
            load_pixels(image, ImageView("a", n, f"0/{n}", True, view), vq)
    columns = {view: np.concatenate([c[0, :, 0] for c in found]) for view, found in cuts.items()}
    assert (columns["released"].min(), columns["released"].max()) == (45, 74)
    assert columns["pad"].min() < 5 and columns["pad"].max() > 114
    for view, shape in (("released", 1), ("pad", 4)):
        assert all(abs(c.shape[1] / c.shape[0] - shape) < 0.3 for c in cuts[view])


def document(view="released", answer_view="released", image=True, n=0):
    span = [BOI, 4, 19, 5, 4, EOI] if image else []
    return Document(
        tokens=np.array([BOS, *span, 8_720, SEP, 8_730, EOS], np.int32),
        image_path="a.png" if image else "", task="VQA", source="s", credential="no", turns=1,
        group="g", id=f"d{n}", view=view, answer_view=answer_view,
    )  # fmt: skip


def test_mixed_and_unknown_views_are_refused_by_name(tmp_path):
    def written(layout, *documents):
        writer.write(tmp_path / "r", documents, shard_size=9, layout=layout, notes={})

    message = "have view pad, answer_view released, but those of the folder have view released, ans"
    with pytest.raises(RecordsError, match=message):
        written(LAYOUT, document(), document(view="pad", n=1))
    pad = dataclasses.replace(LAYOUT, view="pad")
    with pytest.raises(RecordsError, match="'d0'.* have view released, answer_view released, but"):
        written(pad, document())
    written(pad, document(view="pad"), document(image=False, n=1))  # text has no view
    path = tmp_path / "r" / "dataset.json"
    path.write_text(path.read_text().replace('"view": "pad"', '"view": "squash"'))
    with pytest.raises(RecordsError, match="view is 'squash', not one of released, pad"):
        writer.open_records(tmp_path / "r")


def test_training_refuses_records_of_another_view(tmp_path):
    run = micro_run.run(data__train=micro_run.write(tmp_path / "r"))
    loader.train_batches(run, run.data.train)
    padded = dataclasses.replace(run, vq=dataclasses.replace(run.vq, view="pad"))
    message = (
        "images have view released, answer_view released, but config.vq has view pad, answer_view"
    )
    for load in (loader.train_batches, loader.eval_batches):
        with pytest.raises(RecordsError, match=message):
            load(padded, run.data.train)
    layout = dataclasses.replace(writer.open_records(run.data.train).layout, view="pad")
    text_only = dataclasses.replace(document(image=False), task="VQA")
    writer.write(tmp_path / "t", [text_only], shard_size=9, layout=layout, notes={})
    loader.eval_batches(run, str(tmp_path / "t"))  # without images any view will do


def test_training_from_a_base_of_another_view_is_a_warning_that_names_both(tmp_path):
    run = micro_run.run(data__train=micro_run.write(tmp_path / "r"))
    train = dataclasses.replace(run.train, init_from="medmax_jax/tiny")
    raw = tiny.get_config()
    raw.vq.view = "pad"
    padded = from_config_dict(raw)
    export.check_base("medmax_jax/tiny", padded, tokenizer="", vqgan="")  # is no other model
    batches, lines = loader.train_batches(run, run.data.train), []
    for vq in (padded.vq, dataclasses.replace(padded.vq, view="released")):
        reporting.environment_summary(
            dataclasses.replace(run, train=train, vq=vq), make_mesh(run.mesh), batches, None,
            log=lines.append, tables=False,
        )  # fmt: skip
    (warning,) = [line for line in lines if "WARNING" in line]
    assert warning.startswith(
        "WARNING: medmax_jax/tiny was trained on images with view released, answer_view released, "
        "but is used with view pad, answer_view released: "
    )


def test_a_model_folder_decides_unless_a_view_is_stated(tmp_path):
    for name in ("tokenizer.json", "vqgan.safetensors"):
        (tmp_path / name).symlink_to(prepare.TINY / name)
    config = json.loads((prepare.TINY / "config.json").read_text())
    assert "view" not in config["vq"]  # an older folder
    config["vq"] |= {"view": "pad"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_encoder(tmp_path, vq=()).layout.view == "pad"
    assert load_encoder(tmp_path, vq=(), view="released").layout.view == "released"
    assert to_dict(load_encoder(tmp_path, vq=()).vq_config)["answer_view"] == "released"
    config["vq"]["view"] = "squash"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PrepareError, match="vq.view is 'squash'; it must be one of released, pad"):
        load_encoder(tmp_path, vq=())
    with pytest.raises(ConfigError):
        micro_run.run(vq__answer_view="squash")
