"""The area that views do not show, by source and modality, against the embedded manifest."""

import collections
import json

import pytest
from PIL import Image

from medmax_jax.data import prepare
from medmax_jax.data.image_tokens import document_codes
from medmax_jax.data.sample.manifest import read_manifest


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(document_codes, "BATCH", 2)


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "r"
    prepare.prepare_sample(folder, split="validation", view="pad")
    return folder


def stats(capsys, *arguments):
    assert prepare.main(["stats", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_tables_of_the_sample_are_those_of_its_manifest(padded, capsys, tmp_path):
    found = stats(capsys, padded, "--out", tmp_path / "page.html", "--examples", 0)
    rows = [
        r for r in read_manifest(prepare.SAMPLE / "manifest.jsonl") if r["split"] == "validation"
    ]
    lost = {r["id"]: 1 - min(r["width"], r["height"]) / max(r["width"], r["height"]) for r in rows}
    of_modality = collections.defaultdict(list)
    for row in rows:
        of_modality[row["modality"]].append(lost[row["id"]])
    assert found["views"] == "view pad, answer_view released" and not found["unreadable_images"]
    for name, shares in {"all": list(lost.values()), **of_modality}.items():
        mean, largest = sum(shares) / len(shares), max(shares)
        assert found["area_lost_by_modality"][name] == dict(
            images=len(shares), prompts=0.0, answers=pytest.approx(mean, abs=6e-4),
            largest=pytest.approx(largest, abs=6e-4),
        )  # fmt: skip
    assert of_modality["X-ray"] and max(lost.values()) > 0.1
    by_source = found["area_lost_by_source"]
    assert sum(row["images"] for name, row in by_source.items() if name != "all") == len(rows)
    assert "Area lost" in (tmp_path / "page.html").read_text()


def test_other_folders_are_measured_where_images_are_named(tmp_path, capsys):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "b.png")
    (tmp_path / "gone.png").write_bytes((tmp_path / "a.png").read_bytes())
    common = dict(task="VQA", credential="no", group="g", turns=1)
    question, drawing = "<image>?<reserved08706>no", "?<reserved08706><image>"
    texts = {"a.png": (question, "s"), "b.png": (question, "s"), "gone.png": (drawing, "t")}
    (tmp_path / "t.jsonl").write_text(
        "".join(
            json.dumps(common | dict(id=path, text=text, source=source, image_path=path)) + "\n"
            for path, (text, source) in texts.items()
        )
    )
    prepare.prepare_documents(
        tmp_path / "r", source=tmp_path / "t.jsonl", images=tmp_path, model_folder=prepare.TINY
    )
    assert not [name for name in stats(capsys, tmp_path / "r") if name.startswith("area_lost")]
    (tmp_path / "gone.png").write_text("damaged")
    found = stats(capsys, tmp_path / "r", "--images", tmp_path)
    row = dict(images=2, prompts=0.125, answers=None, largest=0.25)
    assert found["area_lost_by_source"] == {"s": row, "all": row}
    assert found["unreadable_images"] == 1 and "area_lost_by_modality" not in found
    assert prepare.main(["stats", str(tmp_path / "r"), "--images", str(tmp_path / "no")]) == 1
    assert "--images" in capsys.readouterr().err
