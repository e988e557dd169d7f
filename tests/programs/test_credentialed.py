"""Credentialed rows: no host that is not listed gets them, files are private, messages are mute."""

import dataclasses
import json
import os
import stat
from pathlib import Path

import PIL.Image
import pytest
import test_generate as micro
from llm_server import completion, serving, short_waits  # noqa: F401
from test_eval import settings

from medmax_jax.data import prepare
from medmax_jax.data.analysis import eval_set
from medmax_jax.data.image_tokens import store
from medmax_jax.data.image_tokens.encoder import PrepareError
from medmax_jax.data.instruct import captions
from medmax_jax.data.records import jsonl
from medmax_jax.data.records.document import RecordsError
from medmax_jax.endpoints import egress
from medmax_jax.endpoints.egress import CREDENTIALED, LICENCE_BOUND, OPEN
from medmax_jax.eval import report
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.models import predictions
from medmax_jax.eval.pipeline import inference, judging, stages
from medmax_jax.eval.records import EvalRecord
from medmax_jax.eval.reporting import comparison
from medmax_jax.eval.tasks import probes, selection
from medmax_jax.eval.tasks.items import TaskError, from_rows, is_credentialed
from medmax_jax.models.tokenizer import TokenizerError

folder = micro.folder
ROW = dict(task_name="vqa_rad", question_type="closed", prompt="SECRET words?", answer="yes",
           image_path="SECRET.png", id="SECRET", credential="yes")  # fmt: skip


def modes(top):
    """Path -> mode of everything below a folder, and of the folder itself."""
    return {str(p.relative_to(top)): stat.S_IMODE(p.stat().st_mode) for p in [top, *top.rglob("*")]}


def assert_private(top):
    assert all(m == (0o700 if (top / p).is_dir() else 0o600) for p, m in modes(top).items()), modes(
        top
    )


@pytest.fixture(autouse=True)
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def items_of(folder, *rows):
    """A questions file with these rows and its images; its path."""
    for name in {row["image_path"] for row in rows}:
        PIL.Image.new("RGB", (64, 64), "red").save(folder / name)
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "q.jsonl"


# The class of a row.


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(credential="yes"), CREDENTIALED),
        (dict(credential=" YES "), CREDENTIALED),
        (dict(credential="yes", data_class="credentialed"), CREDENTIALED),
        (dict(data_class="credentialed"), CREDENTIALED),
        (dict(credential="no"), LICENCE_BOUND),
        (dict(credential="no", data_class="open"), OPEN),
        (dict(credential="", data_class=""), OPEN),  # of its card
        (dict(task_name="image_captioning", question_type="report"), CREDENTIALED),  # of its card
        (dict(task_name="image_captioning", question_type="report", credential="no"), CREDENTIALED),
    ],
)
def test_the_class_of_an_item(change, expected):
    row = {k: v for k, v in ROW.items() if k != "credential"} | change
    assert from_rows([row])[0].data_class == expected


@pytest.mark.parametrize(
    "change",
    [dict(data_class="open"), dict(credential="no", data_class="credentialed"),
     dict(credential="maybe"), dict(credential=True), dict(data_class="SECRET class")],
)  # fmt: skip
def test_columns_that_disagree_are_refused(change):
    with pytest.raises(egress.OutgoingError, match="^row 0: ") as caught:
        from_rows([ROW | change])
    assert "SECRET" not in str(caught.value)


def test_an_image_is_credentialed_in_every_row():
    open_row = ROW | dict(credential="no", id="b")
    items = from_rows([open_row, ROW, open_row | dict(id="c", image_path="other.png")])
    assert [is_credentialed(item) for item in items] == [True, True, False]


def test_records_without_an_explicit_no_are_credentialed():
    for value in ("yes", "YES", "maybe", "", "unknown"):
        assert egress.is_credentialed(value)
    assert not egress.is_credentialed("no") and not egress.is_credentialed(" No")


# An evaluation.


def test_no_data_reaches_an_unlisted_host(tmp_path):
    path = items_of(tmp_path, ROW, ROW | dict(id="2", credential="no", image_path="b.png"))
    now = dataclasses.replace(settings(tmp_path), questions=(str(path),), images="")
    with serving(lambda *_: completion("yes")) as llm:
        request = dict(model=f"endpoint:m@{llm.url}", progress=lambda _: None)
        with pytest.raises(egress.OutgoingError, match="not listed"):
            stages.run(now, tmp_path / "out", **request)
        assert not llm.requests
        judge = dataclasses.replace(now.judge, endpoint=f"m@{llm.url}")
        judged = dataclasses.replace(now, judge=judge)
        opened = items_of(tmp_path, ROW | dict(question_type="open"))
        judged = dataclasses.replace(judged, questions=(str(opened),))
        with pytest.raises(egress.OutgoingError, match="not listed"):  # before any answer
            stages.run(judged, tmp_path / "judged", model="baseline:constant",
                       progress=lambda _: None)  # fmt: skip
        assert not llm.requests and not (tmp_path / "judged" / "records.jsonl").exists()


def test_judge_is_checked_for_the_data_it_receives(tmp_path):
    now = settings(tmp_path)
    one = judging.make_judge(dataclasses.replace(now.judge, endpoint="m@http://127.0.0.1:9/v1"))
    judging.check_hosts(one, from_rows([ROW]))  # closed questions are not judged
    with pytest.raises(egress.OutgoingError):
        judging.check_hosts(one, from_rows([ROW | dict(question_type="open")]))


def test_the_workdir_is_private_from_the_first_byte(tmp_path):
    rows = [ROW | dict(id=f"SECRET{n}", group=str(n), image_path=f"{n}.png") for n in range(4)]
    drawn = dict(task_name="image_generation", question_type="report", prompt="Draw it.", answer="")
    rows += [row | drawn | dict(id=f"drawn{n}") for n, row in enumerate(rows)]
    path = items_of(tmp_path, *rows)
    now = dataclasses.replace(settings(tmp_path), questions=(str(path),), images="", options=True)
    now = dataclasses.replace(now, counts=dataclasses.replace(now.counts, image_generation=-1))
    out, output = tmp_path / "out", []
    out.mkdir(mode=0o755)  # it may have been there
    stages.run(now, out, model="baseline:random", progress=output.append)
    expected = {"records.jsonl", "summary.json", "report.html", "items.html", "items.csv"}
    assert expected | {"run.json", "records_images"} < set(modes(out))
    assert_private(out)
    assert not any("SECRET" in line for line in output)
    assert "store this page only where the items may be stored" in (out / "report.html").read_text()
    os.chmod(out / "report.html", 0o644)
    report.rewrite_report(out, "")
    assert_private(out)
    assert os.umask(0o022) == 0o022  # as it was before


def test_workdir_of_open_data_is_unchanged(tmp_path):
    path = items_of(tmp_path, ROW | dict(credential="no"))
    now = dataclasses.replace(settings(tmp_path), questions=(str(path),), images="")
    stages.run(now, tmp_path / "out", model="baseline:constant", progress=lambda _: None)
    found = modes(tmp_path / "out")
    assert {"records.jsonl", "history.jsonl", "summary.json"} <= set(found)
    assert found["."] == 0o755 and set(found.values()) == {0o755, 0o644}, found  # by the umask


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(answer="SECRET"), "q.jsonl line 1: the answer cannot be read as yes or no"),
        (dict(answer=["SECRET"]), "q.jsonl line 1: answer is of type list"),
        (dict(prompt=["SECRET"]), "q.jsonl line 1: prompt is of type list"),
        (dict(image_path="../SECRET.png"), "q.jsonl line 1: image_path: the image leads out"),
        (dict(task_name="SECRET", question_type="SECRET"), "is not a task of this suite"),
        (dict(question_type="mcq", options=["SECRET"]), "expected a list of 2 to 26 texts"),
        (dict(task_name="visual_chat", question_type="conversation"), "is not the dictionary"),
    ],
)
def test_messages_contain_nothing_of_a_row(tmp_path, change, message):
    (tmp_path / "q.jsonl").write_text(json.dumps(ROW | change))
    now = dataclasses.replace(settings(tmp_path), questions=(str(tmp_path / "q.jsonl"),), images="")
    with pytest.raises(TaskError) as caught:
        selection.load_eval_set(now)
    assert message in str(caught.value) and "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_later_messages_contain_nothing_of_a_row(tmp_path):
    with pytest.raises(TaskError, match="the id of row 1 occurs more than once"):
        from_rows([ROW, ROW])
    items = from_rows([ROW])
    found = selection.EvalSet(items=items, train=[], training_images=[], folder=tmp_path)
    with pytest.raises(EvalError, match="first: the image of item number 1") as caught:
        selection.check_images(found)
    (tmp_path / "SECRET.png").write_bytes(b"SECRET")
    with pytest.raises(EvalError, match="image of item number 1 cannot be read") as unread:
        selection.check_images(found)
    assert not {"SECRET"} & {w for e in (caught, unread) for w in str(e.value).split()}
    path = tmp_path / "p.jsonl"
    for row, output in (
        (dict(id="SECRET2", text="yes"), "first: that of line 1"),
        (dict(id="SECRET", images=["SECRET2.png"]), "line 1: image 1 is not a file"),
        (dict(id="SECRET", images=["../SECRET.png"]), "image 1 is outside"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(predictions.PredictionsError) as wrong:
            predictions.Predictions(path, items)
        assert output in str(wrong.value) and "SECRET" not in str(wrong.value)
    path.write_text(json.dumps(dict(id="SECRET", images=["SECRET.png"])))  # no image, as above
    model, ask = (
        predictions.Predictions(path, items),
        inference.make_request(items[0], tmp_path, "strict"),
    )
    with pytest.raises(predictions.PredictionsError, match="line 1: image 1 cannot be") as wrong:
        model.generate([ask])
    assert "SECRET" not in str(wrong.value)
    record = EvalRecord.of(items[0], text="")
    with pytest.raises(comparison.ComparisonError, match="prompt of a credentialed item differs"):
        comparison.check_same(record, dataclasses.replace(record, prompt="SECRET2"))


def test_a_probe_with_a_credentialed_image_is_credentialed():
    rows = [ROW | dict(id=str(n), group=str(n), image_path=f"{n}.png") for n in range(6)]
    rows = [row | dict(credential="yes" if n % 2 else "no") for n, row in enumerate(rows)]
    items = from_rows(rows)
    secret = {item.image for item in items if is_credentialed(item)}
    for made in (probes.swapped(items, seed=0), probes.shuffled(items, seed=0)):
        assert any(new.image in secret for new in made)
        assert all(is_credentialed(new) for new in made if new.image in secret)


# Files of the workdir that may not be written.


@pytest.mark.parametrize(
    "name", ["records.jsonl", "history.jsonl", "run.json", "summary.json",
             "report.html", "items.html", "items.csv", "probe_blank_image"],
)  # fmt: skip
def test_unwritable_file_is_reported_in_one_line(tmp_path, name):
    path = items_of(tmp_path, ROW | dict(credential="no"))
    now = dataclasses.replace(
        settings(tmp_path), questions=(str(path),), images="", options=True, probes=("blank",)
    )
    (tmp_path / "out").mkdir()
    if name == "probe_blank_image":
        (tmp_path / "out" / name).write_text("")
    else:
        (tmp_path / "out" / name).mkdir()
    with pytest.raises((ValueError, OSError)) as caught:
        stages.run(now, tmp_path / "out", model="baseline:constant", progress=lambda _: None)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[1]", "7", "{", '"a"'])
def test_damaged_run_json_is_reported_in_one_line(tmp_path, content):
    path = items_of(tmp_path, ROW | dict(credential="no"))
    now = dataclasses.replace(settings(tmp_path), questions=(str(path),), images="")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(content)
    (tmp_path / "out" / "history.jsonl").write_text('[1]\n{"a": 1}\n7\n')
    with pytest.raises(ValueError, match="run.json"):
        stages.run(now, tmp_path / "out", model="baseline:constant", progress=lambda _: None)


# Data.


TEXT = dict(text="<image>Is it?<reserved08706>yes", image_path="a.png", task="VQA", source="S",
            credential="yes", group="g", turns=1)  # fmt: skip


def documents(folder, rows):
    PIL.Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(r | {"id": f"{n}"}) + "\n" for n, r in enumerate(rows)))
    return dict(source=path, images=folder, model_folder=prepare.TINY)


@pytest.mark.parametrize("place", [0, 3])
def test_documents_of_credentialed_rows_are_private(tmp_path, place):
    """Also where the rows before are open: their shard is closed before the first other row."""
    rows = [TEXT | dict(credential="yes" if n >= place else "no") for n in range(6)]
    (tmp_path / "out").mkdir(mode=0o755)
    prepare.prepare_documents(tmp_path / "out", **documents(tmp_path, rows))
    assert_private(tmp_path / "out")
    prepare.prepare_documents(
        tmp_path / "open", **documents(tmp_path, [TEXT | dict(credential="no")])
    )
    assert modes(tmp_path / "open")["."] == 0o755


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(text=["SECRET"]), "row 3: field 'text' is of type list"),
        (dict(source=None, task="SECRET"), "row 3: field 'source' is of type NoneType"),
        (dict(turns="SECRET"), "row 3: field 'turns' is of type str"),
        (dict(image_path="../SECRET.png"), "row 3: image_path is of type str"),
        (dict(text="SECRET"), "row 3: image_path is of type str"),
        (dict(credential="SECRET credential"), "row 3: credential is of type str"),
        (dict(credential="SECRET credential", group=7), "row 3: field 'group' is of type int"),
    ],
)
def test_messages_about_documents_contain_no_content(tmp_path, change, message):
    given = documents(tmp_path, [TEXT, TEXT, TEXT | change])
    with pytest.raises((RecordsError, egress.OutgoingError)) as caught:
        jsonl.read_texts(given["source"])
    assert message in str(caught.value) and "SECRET" not in str(caught.value)


def test_images_of_documents_are_named_by_number(tmp_path, caplog):
    rows = [TEXT] * 9 + [TEXT | dict(image_path="SECRET.png")]
    meta = prepare.prepare_documents(
        tmp_path / "out", **documents(tmp_path, rows), max_unreadable=1.0
    )
    assert list(meta["notes"]["unreadable"]) == ["image of row 10"]
    assert "SECRET" not in json.dumps(meta) + caplog.text
    with pytest.raises(PrepareError, match="image of row 10") as caught:
        prepare.prepare_documents(
            tmp_path / "none", **documents(tmp_path, rows), max_unreadable=0.0
        )
    assert "SECRET" not in str(caught.value)


def test_a_control_token_of_documents_is_named_by_its_row(tmp_path, monkeypatch):
    def refuse(*_):
        raise TokenizerError("the text contains control token 1: SECRET")

    monkeypatch.setattr(prepare, "document_ids", refuse)
    for credential, output in (("yes", "row 1: text contains the name"), ("no", "SECRET")):
        given = documents(tmp_path, [TEXT | dict(credential=credential)])
        with pytest.raises((PrepareError, TokenizerError)) as caught:
            prepare.prepare_documents(tmp_path / credential, **given)
        assert output in str(caught.value)
        assert ("SECRET" in str(caught.value)) == (credential == "no")


def test_messages_about_captions_contain_no_content(tmp_path):
    row = dict(id="SECRET", caption="SECRET", images=["a.png"], source="s", credential="yes")
    path = tmp_path / "c.jsonl"
    for change in (dict(caption=["SECRET"]), dict(images="SECRET"), dict(images=["../SECRET"]),
                   dict(group=["SECRET"])):  # fmt: skip
        path.write_text(json.dumps(row | change))
        with pytest.raises(captions.CaptionsError, match="row 1: ") as caught:
            captions.read_rows(path)
        assert "SECRET" not in str(caught.value)
    path.write_text(json.dumps(row) + "\n" + json.dumps(row))
    with pytest.raises(captions.CaptionsError, match="id of row 2 occurs twice"):
        captions.read_rows(path)


def test_a_listing_with_credentialed_rows_needs_the_flag(tmp_path):
    (tmp_path / "l.jsonl").write_text(json.dumps(dict(image_path="SECRET.png", credential="yes")))
    with pytest.raises(PrepareError, match="row 1: the row is credentialed; add --credentialed"):
        store._list_images(tmp_path, tmp_path / "l.jsonl", credentialed=False)
    found = store._list_images(tmp_path, tmp_path / "l.jsonl", credentialed=True)
    assert found == ["SECRET.png"]


def test_an_item_of_a_check_is_named_by_its_line():
    line = json.dumps(dict(prompt="a", answer="b", image_path="", id="SECRET", credential="yes"))
    assert eval_set._of_row(json.loads(line), Path("items.jsonl"), "line 4").name == "line 4"
