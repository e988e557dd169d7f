"""The page of statistics: its numbers are those of the documents, and what it must not show."""

import collections
import json
import stat

import micro_run
import numpy as np
import pytest
from test_html_page import parsed

from medmax_jax.data import prepare
from medmax_jax.data.analysis import check, stats
from medmax_jax.data.records import writer
from medmax_jax.data.records.jsonl import to_text
from medmax_jax.models.vocab import is_image


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "validation"
    assert prepare.main(["sample", "--out", str(folder), "--split", "validation"]) == 0
    return folder


def pictures_of(tags):
    return [a for tag, a in tags.tags if tag == "img"]


def test_the_page_shows_numbers_plots_pictures_and_texts(sample, tmp_path, capsys):
    out = tmp_path / "page.html"
    command = ["stats", str(sample), "--out", str(out), "--examples", "7", "--json"]
    assert prepare.main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["page"] == str(out)
    tags, found = parsed(out.read_text()), writer.open_records(sample)
    assert not [t for t, _ in tags.tags if t in ("script", "iframe", "link", "form")]
    plots = [a for a in pictures_of(tags) if not a["alt"].startswith("images/")]
    assert [a["alt"] for a in plots] == [
        "Tokens of text and of images",
        "Documents by their tokens, task on task",
        "Tokens over places of rows",
        "Pictures by modality",
    ]
    shown = [a for a in pictures_of(tags) if a["alt"].startswith("images/")]
    drawn = found.read(stats._drawn(found, 7, 0))
    assert [a["alt"] for a in shown] == [d.image_path for d in drawn] and len(drawn) == 7
    tokenizer = check.resolve_tokenizer(found, None, prepare.TINY)
    for document in drawn:
        assert document.id in tags.text
        for part in to_text(document, found.layout, tokenizer).split("<reserved08706>"):
            assert part in tags.text
    assert f"{len(found):,}" in tags.text and f"{found.meta['tokens']:,}" in tags.text
    assert len({d.task for d in drawn}) == min(7, len(found.names("task")))


def test_numbers_are_those_of_the_documents(sample):
    found = writer.open_records(sample)
    for label in ("source", "task"):
        expected = collections.defaultdict(lambda: [0, set(), 0, 0])
        for d in found:
            row = expected[getattr(d, label)]
            image = int(is_image(d.tokens, found.layout.vocab).sum())
            row[0] += 1
            row[1] |= {d.image_path} - {""}
            row[2] += len(d.tokens) - image
            row[3] += image
        told = {
            name: [row["documents"], row["pictures"], row["text"], row["image"]]
            for name, row in stats.tokens_by(found, label).items()
        }
        assert told == {n: [a, len(b), c, d] for n, (a, b, c, d) in expected.items()}


def test_documents_without_pictures_are_no_picture(tmp_path):
    found = writer.open_records(micro_run.write(tmp_path / "r"))
    assert stats.tokens_by(found, "source")["generated"]["pictures"] == 0


def test_row_lengths():
    assert stats.row_lengths(np.array([5, 9, 17])) == [32, 64, 128, 256]
    assert stats.row_lengths(np.full(10, 64)) == [64, 128, 256, 512]
    many = np.append(np.full(5_000, 1_100), 4_000)
    assert stats.row_lengths(many)[0] == 2_048  # one long document does not decide


@pytest.fixture
def closed(sample, tmp_path):
    """The sample, as if credentialed, with canaries in ids and paths."""
    docs = list(writer.open_records(sample))[:30]
    for n, d in enumerate(docs):
        vars(d).update(credential="yes", id=f"SECRET{n}", image_path=f"SECRET{n}.png")
    layout = writer.open_records(sample).layout
    writer.write(tmp_path / "closed", docs, shard_size=9, layout=layout, notes={"x": "SECRET"})
    return tmp_path / "closed"


def test_a_credentialed_folder_is_not_shown_unasked(closed, tmp_path, capsys):
    out = tmp_path / "page.html"
    out.write_text("an older page that anyone may read")
    out.chmod(0o644)
    assert prepare.main(["stats", str(closed), "--out", str(out)]) == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    page = out.read_text()
    assert "SECRET" not in page and "Credentialed: no picture and no text is shown" in page
    tags = parsed(page)
    assert len(pictures_of(tags)) == 4  # the plots
    found = writer.open_records(closed)
    tokenizer = check.resolve_tokenizer(found, None, prepare.TINY)
    parts = {p for d in found for p in to_text(d, found.layout, tokenizer).split("<reserved08706>")}
    assert not [p for p in parts if len(p) > 12 and p in tags.text]
    assert prepare.main(["stats", str(closed), "--out", str(out), "--show_credentialed"]) == 0
    assert "SECRET" in out.read_text() and stat.S_IMODE(out.stat().st_mode) == 0o600
    assert len(pictures_of(parsed(out.read_text()))) > 4


def test_records_of_an_unknown_model_say_what_is_missing(tmp_path, capsys):
    folder, out = micro_run.write(tmp_path / "r"), tmp_path / "page.html"
    assert prepare.main(["stats", folder, "--out", str(out)]) == 0
    text = parsed(out.read_text()).text
    assert "Texts are not shown: name the model" in text and "Pictures are not shown" in text
    assert prepare.main(["stats", folder, "--out", str(tmp_path / "no" / "p.html")]) == 1
    assert "no such folder; make it first" in capsys.readouterr().err
    assert prepare.main(["stats", folder, "--out", str(out), "--examples", "-1"]) == 1
