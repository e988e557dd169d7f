"""An image path of a data file never leaves its folder, in every reader."""

import json

import numpy as np
import PIL.Image
import pytest

from medmax_jax.data import prepare
from medmax_jax.data.analysis import near_duplicates
from medmax_jax.data.image_tokens import encoder as image_encoder
from medmax_jax.data.image_tokens import store
from medmax_jax.data.image_tokens.encoder import PrepareError
from medmax_jax.data.instruct import captions, curation
from medmax_jax.data.records import jsonl
from medmax_jax.data.records.document import RecordsError
from medmax_jax.data.sources.row import RowError, field_image_path
from medmax_jax.eval.models import predictions
from medmax_jax.eval.models.base import ModelRequest
from medmax_jax.eval.pipeline import inference
from medmax_jax.eval.records import EvalRecord
from medmax_jax.eval.reporting import page
from medmax_jax.eval.tasks import items, selection
from medmax_jax.generation import output_files
from medmax_jax.generation.requests import GenerateError
from medmax_jax.models import image_headers
from medmax_jax.storage import image_paths
from medmax_jax.storage.image_paths import ImagePathError, is_inside, resolve

OUTSIDE = ["../s.png", "a/../../s.png", "/etc/s.png", "a\\..\\s.png", "a\0.png", "", "."]
ROW = dict(task_name="vqa_rad", question_type="closed", prompt="Is it?", answer="yes")


@pytest.fixture
def folder(tmp_path):
    """F with a.png, a link to it, and links to a file and a folder outside."""
    (tmp_path / "elsewhere").mkdir()
    inside = tmp_path / "F"
    inside.mkdir()
    for path in (inside / "a.png", tmp_path / "elsewhere" / "s.png"):
        PIL.Image.new("RGB", (8, 8)).save(path)
    (inside / "same.png").symlink_to("a.png")
    (inside / "link.png").symlink_to(tmp_path / "elsewhere" / "s.png")
    (inside / "linked").symlink_to(tmp_path / "elsewhere")
    (inside / "loop.png").symlink_to("loop.png")
    return inside


def test_paths_below_the_folder(folder, tmp_path):
    for name in ("a.png", "./a.png", "b/c.png", "..a.png", "a..b/c.png", "same.png"):
        assert is_inside(name) and resolve(folder, name) == folder / name
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be a link
    assert resolve(tmp_path / "link", "same.png").is_file()


@pytest.mark.parametrize("name", [*OUTSIDE, None, 7, ["a.png"]])
def test_paths_that_leave_the_folder_are_rejected(folder, name):
    assert not is_inside(name)
    with pytest.raises(ImagePathError, match="is outside the image folder; use a path relative"):
        resolve(folder, name)


@pytest.mark.parametrize("name", ["link.png", "linked/s.png", "loop.png", "linked/../a.png"])
def test_links_that_leave_the_folder_are_rejected(folder, name):
    with pytest.raises(ImagePathError, match="outside the image folder"):
        resolve(folder, name)


def test_a_label_replaces_the_path(folder):
    for name in ("../SECRET.png", "link.png"):
        with pytest.raises(ImagePathError) as caught:
            resolve(folder, name, label="the image of row 3")
        assert str(caught.value).startswith("the image of row 3 ") and name not in str(caught.value)
        assert str(folder) not in str(caught.value)


@pytest.mark.parametrize("name", ["../s.png", "/etc/s.png", "link.png", "linked/s.png"])
def test_every_reader_rejects_paths_outside_the_folder(folder, name, tmp_path):
    """Evaluation items, predictions, prompts, captions, documents, sources, records' images."""
    write = lambda path, row: path.write_text(json.dumps(row) + "\n")  # noqa: E731
    lexical = not is_inside(name)
    if lexical:
        with pytest.raises(items.TaskError, match="row 0: image_path: .*leads out"):
            items.from_rows([ROW | {"image_path": name}])
        with pytest.raises(RowError, match="leads out"):
            field_image_path({"image": name}, "image", "")
        row = dict(id="a", text="<image>q", image_path=name, task="t", source="s", group="g")
        write(folder / "d.jsonl", row | dict(turns=0, credential="no"))
        with pytest.raises(RecordsError, match="image_path is"):
            jsonl.read_texts(folder / "d.jsonl")
    item = items.from_rows([ROW | {"image_path": "a.png"}])[0]
    changed_items = [items.dataclasses.replace(item, image=name)]
    eval_set = selection.EvalSet(items=changed_items, train=[], training_images=[], folder=folder)
    with pytest.raises(ImagePathError):
        selection.check_images(eval_set)
    with pytest.raises(ImagePathError):
        inference.make_request(changed_items[0], folder, "strict")
    write(folder / "p.jsonl", dict(id="0", text="yes", images=[name]))
    with pytest.raises(predictions.PredictionsError, match="line 1: .*outside the image folder"):
        predictions.Predictions(folder / "p.jsonl", [item])
    for prompt in (f"Is it {{{name}}}?", [{"image": name}, {"text": "q"}]):
        write(folder / "q.jsonl", dict(prompt=prompt))
        with pytest.raises(GenerateError, match="line 1: .*outside the image folder"):
            output_files.read_prompts(folder / "q.jsonl")
    with pytest.raises(image_headers.ImageError, match="outside the image folder"):
        near_duplicates.hash_file(folder, name)
    record = EvalRecord.of(changed_items[0], text="yes")
    with pytest.raises(ImagePathError):
        page.examples([record], tmp_path, folder)


def test_preparation_programs_reject_links_outside_the_folder(folder, tmp_path):
    text = dict(id="a", text="<image>Is it?<reserved08706>yes", image_path="link.png", task="VQA")
    text |= dict(source="s", credential="no", group="g", turns=1)
    (folder / "d.jsonl").write_text(json.dumps(text))
    with pytest.raises(PrepareError, match="'link.png' is a symbolic link to a file outside"):
        prepare.prepare_documents(
            tmp_path / "out", source=folder / "d.jsonl", images=folder, model_folder=prepare.TINY
        )
    assert not (tmp_path / "out").exists()
    row = captions.Row(id="a", caption="c", images=("link.png",), source="s", group="g",
                       data_class="open")  # fmt: skip
    prompts = dict(filter=None, writer=None, prompts={}, images=folder, concurrency=1)
    with pytest.raises(ImagePathError):
        curation.check([row], curation.Settings(threshold=0, score_of=lambda _: 1.0, **prompts))
    encoder = image_encoder.load_encoder(prepare.TINY)
    with pytest.raises(PrepareError, match="link.png"):
        store.tokenize(
            tmp_path / "codes", ["a.png", "link.png"], folder=folder, encoder=encoder,
            precision="highest", shard_size=8, batch=2, max_bad=1.0,
        )  # fmt: skip


def test_command_line_prompts_accept_any_file(tmp_path):
    (prompt,) = output_files.prompts_from_flags(
        [f"Is it {{{tmp_path}/a.png}}?"], [str(tmp_path / "b.png")]
    )
    assert [p for p in prompt.parts if not isinstance(p, str)] == [
        tmp_path / "b.png", tmp_path / "a.png",
    ]  # fmt: skip


def test_predictions_are_validated_before_an_image_is_opened(folder, monkeypatch):
    """All lines are checked when the file is opened; a good one is read as before."""
    item = items.from_rows([ROW | {"image_path": "a.png"}])[0]
    rows = [dict(id="0", text="yes", images=["a.png"])]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = predictions.Predictions(folder / "p.jsonl", [item])
    request = ModelRequest(id="0", parts=(), mode="mixed", max_tokens=1, data_class="open")
    ((text, image),) = model.generate([request])
    assert text == "yes" and np.asarray(image).shape == (8, 8, 3)


def test_is_inside_has_a_single_definition():
    assert image_paths.is_inside is image_paths.is_inside
