"""The page and the table of all items: verdicts, filters, and text from models and data files."""

import csv
import dataclasses
import json
import stat

import eval_setup
import PIL.Image
import pytest
from test_eval_report import make_workdir, rows
from test_html_page import HOSTILE, parsed

from medmax_jax.eval.metrics import strict
from medmax_jax.eval.reporting import item_browser, page
from medmax_jax.io import csv_files, html_page

OPEN = [one | dict(data_class="open") for one in rows()]


def written(folder, item_rows, change=lambda record: record):
    """Write the files of a run whose records are changed first; return page and table."""
    summary, records = make_workdir(folder, item_rows)
    records = list(map(change, records))
    page.write(folder / "report.html", summary, records, images_folder=folder)
    with open(folder / "items.csv", newline="", encoding="utf-8") as file:
        return parsed((folder / "items.html").read_text()), list(csv.DictReader(file)), records


def entries(tags):
    return [
        json.loads(a["data-values"])
        for t, a in tags.tags
        if (t, a.get("class")) == ("details", "entry")
    ]


def test_every_item_has_an_entry_and_a_row(tmp_path):
    tags, table, records = written(tmp_path, OPEN)
    values = entries(tags)
    assert len(values) == len(table) == len(records) > 20
    assert [row["id"] for row in table] == [record.id for record in records]
    assert [row["verdict"] for row in table] == [entry["verdict"][0] for entry in values]
    slake = [(row["verdict"], row["answer"]) for row in table if row["task"] == "slake_closed"]
    assert ("correct", "yes") in slake and ("wrong", "no") in slake
    assert {verdict for verdict, _ in slake} == {"correct", "wrong", "unparsed"}
    assert values[0]["tag"] == ["modality: CT"] and table[0]["tags"] == "modality: CT"
    selects = [a["name"] for t, a in tags.tags if t == "select"]
    assert selects == ["task", "verdict", "tag"]
    targets = [a["href"] for t, a in tags.tags if t == "a"]
    assert targets[:2] == ["report.html", "items.csv"]
    assert all((tmp_path / target).is_file() for target in targets)


def test_texts_of_models_are_escaped_and_run_nowhere(tmp_path):
    def change(record):
        return dataclasses.replace(
            record, text=HOSTILE + "\udc80", prompt='=HYPERLINK("http://x")', group=HOSTILE,
            slices=(("modality", HOSTILE),),
        )  # fmt: skip

    tags, table, _ = written(tmp_path, OPEN[:1], change)
    assert [t for t, _ in tags.tags if t in ("script", "iframe", "link")] == ["script"]
    assert not any(name.startswith("on") for _, attrs in tags.tags for name in attrs)
    assert entries(tags)[0]["tag"] == [f"modality: {HOSTILE}"]
    assert table[0]["answer"] == HOSTILE + "\\udc80"  # not UTF-8, so it is written as an escape
    assert table[0]["prompt"] == '\'=HYPERLINK("http://x")'


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1"])
def test_no_cell_is_a_formula(text):
    assert csv_files.csv_text(["a"], [[text]]) in (f"a\n'{text}\n", f'a\n"\'{text}"\n')


def test_numbers_of_a_table_stay_numbers():
    assert csv_files.csv_text(["a", "b", "c"], [[-1.5, None, "x, y"]]) == 'a,b,c\n-1.5,,"x, y"\n'


def test_images_of_credentialed_items_are_not_copied(tmp_path):
    secret = [one | dict(credential="yes") for one in rows()]
    tags, _, records = written(tmp_path, secret)
    assert any(record.generated for record in records)
    assert not [t for t, _ in tags.tags if t == "img"] and not (tmp_path / "item_images").exists()
    assert "not on this page" in tags.text and page.CREDENTIALED in tags.text
    for name in (item_browser.PAGE, item_browser.TABLE):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_an_image_outside_the_workdir_is_copied_once(tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    run.mkdir(), data.mkdir()
    summary, records = make_workdir(run, OPEN)
    (run / "a.png").rename(data / "a.png")
    with PIL.Image.open(data / "a.png") as image:
        image.resize((600, 300)).save(data / "a.png")
    page.write(run / "report.html", summary, records, images_folder=data)
    (copy,) = (run / "item_images").iterdir()
    with PIL.Image.open(copy) as small:
        assert small.size == (256, 128)
    sources = [a["src"] for t, a in parsed((run / "items.html").read_text()).tags if t == "img"]
    assert sources.count(f"item_images/{copy.name}") > 20
    (data / "a.png").write_bytes(b"no image")
    page.write(run / "report.html", summary, records, images_folder=data)
    assert "shown to the model: " in (run / "items.html").read_text()


@pytest.mark.parametrize(
    "score, error, expected",
    [
        (strict.scored(1.0), "", "correct"),
        (strict.scored(0.0), "", "wrong"),
        (strict.scored(0.4), "", "partial"),
        (strict.unscored("the judge failed"), "", "unscored"),
        (strict.unscored("refused"), "refused", "error"),
        (None, "", "not scored"),
    ],
)
def test_verdicts(score, error, expected):
    record = eval_setup.record(eval_setup.item("x", "vqa_open", 0), "", error=error)
    assert item_browser.item_verdict(record, score) == expected


def test_the_policy_allows_the_script_of_the_page_alone(tmp_path):
    written(tmp_path, OPEN[:1])
    text = (tmp_path / "items.html").read_text()
    assert html_page.SCRIPT_POLICY in html_page.html.unescape(text)
    assert text.count("<script>") == 1 and f"<script>{html_page.SCRIPT}</script>" in text
    assert "unsafe-inline'; script" in html_page.SCRIPT_POLICY  # of the style, not of the script
    assert "<script" not in (tmp_path / "report.html").read_text()
