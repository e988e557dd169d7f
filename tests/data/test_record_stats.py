"""Tests of the page of statistics: its counts, and what it must not show."""

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


def image_tags(tags):
    return [a for tag, a in tags.tags if tag == "img"]


def charts(tags):
    return [a["aria-label"] for tag, a in tags.tags if tag == "svg"]


def test_page_shows_counts_plots_images_and_texts(sample, tmp_path, capsys):
    out = tmp_path / "page.html"
    command = ["stats", str(sample), "--out", str(out), "--examples", "7", "--json"]
    assert prepare.main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["page"] == str(out)
    tags, records = parsed(out.read_text()), writer.open_records(sample)
    assert not [t for t, _ in tags.tags if t in ("script", "iframe", "link", "form")]
    assert charts(tags) == [
        "Text tokens and image tokens",
        "Documents by length, stacked by task",
        "Tokens divided by positions, by row length",
        "Images by modality",
    ]
    examples = [a for a in image_tags(tags) if a["alt"].startswith("images/")]
    drawn = records.read(stats._example_numbers(records, 7, 0))
    assert [a["alt"] for a in examples] == [d.image_path for d in drawn] and len(drawn) == 7
    tokenizer = check.resolve_tokenizer(records, None, prepare.TINY)
    for document in drawn:
        assert document.id in tags.text
        for part in to_text(document, records.layout, tokenizer).split("<reserved08706>"):
            assert part in tags.text
    assert f"{len(records):,}" in tags.text and f"{records.meta['tokens']:,}" in tags.text
    assert len({d.task for d in drawn}) == min(7, len(records.names("task")))


def test_counts_agree_with_the_documents(sample):
    records = writer.open_records(sample)
    for label in ("source", "task"):
        expected = collections.defaultdict(lambda: [0, set(), 0, 0])
        for d in records:
            row = expected[getattr(d, label)]
            image = int(is_image(d.tokens, records.layout.vocab).sum())
            row[0] += 1
            row[1] |= {d.image_path} - {""}
            row[2] += len(d.tokens) - image
            row[3] += image
        counts = {
            name: [row["documents"], row["images"], row["text"], row["image"]]
            for name, row in stats.tokens_by(records, label).items()
        }
        assert counts == {n: [a, len(b), c, d] for n, (a, b, c, d) in expected.items()}


def test_documents_without_images_are_not_counted_as_images(tmp_path):
    records = writer.open_records(micro_run.write(tmp_path / "r"))
    assert stats.tokens_by(records, "source")["generated"]["images"] == 0


def test_row_lengths():
    assert stats.row_lengths(np.array([5, 9, 17])) == [32, 64, 128, 256]
    assert stats.row_lengths(np.full(10, 64)) == [64, 128, 256, 512]
    many = np.append(np.full(5_000, 1_100), 4_000)
    assert stats.row_lengths(many)[0] == 2_048  # one long document does not decide


@pytest.fixture
def closed(sample, tmp_path):
    """Write the sample as credentialed records, with canaries in ids and paths."""
    docs = list(writer.open_records(sample))[:30]
    for n, d in enumerate(docs):
        vars(d).update(credential="yes", id=f"SECRET{n}", image_path=f"SECRET{n}.png")
    layout = writer.open_records(sample).layout
    writer.write(tmp_path / "closed", docs, shard_size=9, layout=layout, notes={"x": "SECRET"})
    return tmp_path / "closed"


def test_credentialed_folder_is_shown_only_on_request(closed, tmp_path, capsys):
    out = tmp_path / "page.html"
    out.write_text("an older page that anyone may read")
    out.chmod(0o644)
    assert prepare.main(["stats", str(closed), "--out", str(out)]) == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    page = out.read_text()
    assert "SECRET" not in page and "credentialed, so images and text are not shown" in page
    tags = parsed(page)
    assert len(charts(tags)) == 4 and not image_tags(tags)
    records = writer.open_records(closed)
    tokenizer = check.resolve_tokenizer(records, None, prepare.TINY)
    parts = {
        p for d in records for p in to_text(d, records.layout, tokenizer).split("<reserved08706>")
    }
    assert not [p for p in parts if len(p) > 12 and p in tags.text]
    assert prepare.main(["stats", str(closed), "--out", str(out), "--show_credentialed"]) == 0
    assert "SECRET" in out.read_text() and stat.S_IMODE(out.stat().st_mode) == 0o600
    assert len(image_tags(parsed(out.read_text()))) > 4


def test_missing_model_of_records_is_reported(tmp_path, capsys):
    folder, out = micro_run.write(tmp_path / "r"), tmp_path / "page.html"
    assert prepare.main(["stats", folder, "--out", str(out)]) == 0
    text = parsed(out.read_text()).text
    assert "Text is not shown; set --model" in text and "Images are not shown" in text
    assert prepare.main(["stats", folder, "--out", str(tmp_path / "no" / "p.html")]) == 1
    assert "no such folder; create it first" in capsys.readouterr().err
    assert prepare.main(["stats", folder, "--out", str(out), "--examples", "-1"]) == 1
