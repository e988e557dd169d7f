"""Text, JSON and CSV from elsewhere: one reader, the same bounds and errors for all of them."""

import gzip
import json
import pathlib

import pytest
from source_setup import plan

from medmax_jax.data import prepare
from medmax_jax.data.records.row_streams import SourceError
from medmax_jax.data.release import train_rows
from medmax_jax.data.sources import build
from medmax_jax.data.sources.row import RejectedRow, Row
from medmax_jax.eval.models import predictions
from medmax_jax.eval.tasks import selection
from medmax_jax.generation import output_files
from medmax_jax.io import text_files
from medmax_jax.io.text_files import TextFileError
from medmax_jax.scaling import table
from medmax_jax.scaling.laws import LAWS, ScalingError

DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
CSV_HEADER = "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split\n"
CSV_ROW = "0,P1_F1.jpg,c,Which?,A: 1,B: 2,C: 3,D: 4,A,train\n"
RAD = dict(image_name="p1.jpg", question="Is it normal?", answer="Yes", phrase_type="freeform")


def rows_of(source: str, folder: pathlib.Path) -> list[Row | RejectedRow]:
    return list(build.READERS[source](folder, plan(source)))


# ---- JSON


@pytest.mark.parametrize(
    "text, reason",
    [
        (b'{"a": NaN}', text_files.NOT_FINITE),
        (b'{"a": -1e999}', text_files.NOT_FINITE),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', text_files.KEY_TWICE),
        (b"[" * 65 + b"]" * 65, text_files.TOO_DEEP),
        (b'{"a": ' * 40 + b"[" * 40 + b"]" * 40 + b"}" * 40, text_files.TOO_DEEP),
        (DEEP, text_files.TOO_DEEP),
        (b'{"a": "\\uD83d"}', text_files.LONE_SURROGATE),
        (b'{"\\udc00": 1}', text_files.LONE_SURROGATE),
        (b"[18446744073709551616]", text_files.BIG_INTEGER),
        (b"9" * 5_000, text_files.BIG_INTEGER),
        (b"\xff\xfe{\x00}\x00", text_files.NOT_UTF8),
        (b'{"a": 1} x', text_files.NOT_JSON),
        (b"", text_files.NOT_JSON),
    ],
    ids=range(13),
)
def test_invalid_json_is_rejected(text, reason):
    with pytest.raises(TextFileError, match=r"^a\.json: ") as error:
        text_files.parse_json(text, "a.json")
    assert error.value.reason == reason and str(error.value).isprintable()


def test_valid_json_is_accepted():
    numbers = b"1.5, -9223372036854775808, 18446744073709551615"
    text = b'\xef\xbb\xbf{"a": [' + numbers + b'], "b": "\\ud83d\\ude00"}'
    value = text_files.parse_json(text, "a.json")
    assert value == {"a": [1.5, -(2**63), 2**64 - 1], "b": "\U0001f600"}
    assert text_files.parse_json(b"[" * 64 + b"]" * 64, "deep enough")
    assert text_files.parse_json(b'"\\ud83d"', "ours", allow_lone_surrogates=True) == "\ud83d"
    row = text_files.parse_row(b'{"a": NaN, "b": 1e999, "c": 1}', "row")
    assert row == dict(a=None, b=None, c=1)


def test_duplicate_key_among_many_is_found_quickly():
    text = b"{" + b",".join(b'"%d":0' % n for n in range(200_000)) + b',"199999":1}'
    with pytest.raises(TextFileError, match="a key occurs twice: '199999'"):
        text_files.parse_json(text, "a.json")


# ---- files


@pytest.mark.parametrize("form", ["plain", "bom", "crlf", "gzip", "array", "bom array", "u2028"])
def test_rows_are_read_in_every_form(tmp_path, form):
    rows = [{"prompt": "a\u2028b"}, {"prompt": "é"}]
    text = "".join(json.dumps(row, ensure_ascii=form != "u2028") + "\n" for row in rows)
    text = json.dumps(rows, indent=1) if form.endswith("array") else text
    data = (text.replace("\n", "\r\n") if form == "crlf" else text).encode()
    data = b"\xef\xbb\xbf" + data if form.startswith("bom") else data
    path = tmp_path / "p.jsonl"
    path.write_bytes(gzip.compress(data, mtime=0) if form == "gzip" else data)
    assert [row for _, row in text_files.read_objects(path)] == rows
    assert [q.parts for q in output_files.read_prompts(path)] == [("a\u2028b",), ("é",)]


def test_gzip_files_are_unpacked_within_bounds(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(gzip.compress(b"[" + b" " * 3_000_000 + b"]", mtime=0))
    assert text_files.read_json(path) == []
    with pytest.raises(TextFileError, match=r"more than 1,000 bytes"):
        text_files.read_json(path, max_bytes=1_000)
    monkeypatch.setattr(text_files, "GZIP_GRACE", 1_000)
    with pytest.raises(TextFileError, match="expands to more than 200 times its size"):
        text_files.read_json(path)
    path.write_bytes(gzip.compress(b"[1, 2, 3]" * 100)[:-12])
    with pytest.raises(TextFileError, match=r"a\.json: damaged or truncated gzip"):
        text_files.read_json(path)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(TextFileError, match=r"none: cannot be read \(No such file"):
        text_files.read_json(tmp_path / "none")
    with pytest.raises(TextFileError, match=r"cannot be read \(Is a directory\)"):
        text_files.read_objects(tmp_path)


def test_deep_json_raises_a_one_line_error_in_every_reader(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_bytes(DEEP)
    for read in (output_files.read_prompts, selection.read_rows, predictions._read):
        with pytest.raises(ValueError, match=r"deep\.jsonl line 1: .*nested over 64 levels"):
            read(path)


@pytest.mark.parametrize("name", ["table", "prompts", "questions", "published"])
def test_a_byte_order_mark_is_skipped(tmp_path, name):
    path = tmp_path / "a"
    if name == "table":
        path.write_text("params,tokens,loss\n1e6,1e8,3\n", encoding="utf-8-sig")
        runs = table.read(path, LAWS["chinchilla"], target="loss", columns={}, exclude=[])
        assert runs.y.tolist() == [3.0]
    elif name == "prompts":
        path.write_text('{"prompt": "ok?"}\n', encoding="utf-8-sig")
        assert output_files.read_prompts(path)[0].parts == ("ok?",)
    elif name == "questions":
        path.write_text('{"prompt": "ok?"}\n', encoding="utf-8-sig")
        assert selection.read_rows(path) == [("a line 1", {"prompt": "ok?"})]
    else:
        assert train_rows.read_row(b'\xef\xbb\xbf{"text": "a"}') == {"text": "a"}


@pytest.mark.parametrize(
    "name, data, said",
    [
        (
            "train.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n', mtime=0),
            "the file is compressed; unpack it first",
        ),
        (
            "train.json",
            b'\n [{"text": "a"}]',
            "the file is one JSON array; write one row per line first",
        ),
    ],
)
def test_import_reports_unsupported_formats(tmp_path, capsys, name, data, said):
    (tmp_path / name).write_bytes(data)
    command = ["import", "--from", str(tmp_path / name), "--out", str(tmp_path / "out")]
    assert prepare.main(command) == 1 and said in capsys.readouterr().err


# ---- CSV


@pytest.mark.parametrize(
    "bad, said",
    [
        (CSV_ROW.replace(",Which?,", ',"Which "one" is it",'),
         r'train_2\.csv, row 2 \(line 3\): a quote inside a quoted field is not escaped'),
        (CSV_ROW.replace(",Which?,", ',"Which,'), r"row 2 \(line 3\): a quoted field is not"),
        (CSV_ROW.replace(",c,", f",{'x' * 2**22},"), r"line 3 has more than 4194304 characters"),
        (CSV_ROW.replace(",c,", ',"' + f"{'x' * 2**21}\n" * 3 + '",'), r"row 2 .*a field has over"),
    ],
    ids=["stray", "open", "line", "field"],
)  # fmt: skip
def test_damaged_csv_error_names_the_row(tmp_path, bad, said):
    (tmp_path / "train_2.csv").write_text(CSV_HEADER + CSV_ROW + bad)
    with pytest.raises(SourceError, match=said):
        rows_of("PMC-VQA", tmp_path)


def test_a_long_field_is_read(tmp_path):
    """Python's own limit is 131,072 characters."""
    long = CSV_ROW.replace(",c,", f",{'x' * 140_000},")
    (tmp_path / "train_2.csv").write_text(CSV_HEADER + CSV_ROW + long + "\n" + CSV_ROW)
    rows = rows_of("PMC-VQA", tmp_path)
    assert [row.id[-1] for row in rows] == ["1", "2", "4"]  # a blank line is no row


def test_duplicate_columns_are_rejected(tmp_path):
    (tmp_path / "train_2.csv").write_text(CSV_HEADER.replace("Caption", "Question") + CSV_ROW)
    with pytest.raises(SourceError, match="column 'Question' occurs twice; rename or remove one"):
        rows_of("PMC-VQA", tmp_path)
    (tmp_path / "t.csv").write_text("params,tokens,loss,loss\n1,1,1,1\n")
    with pytest.raises(ScalingError, match="column 'loss' occurs twice"):
        table.read(tmp_path / "t.csv", LAWS["chinchilla"], target="loss", columns={}, exclude=[])


def test_row_of_another_width_is_reported(tmp_path):
    (tmp_path / "t.csv").write_text("params,tokens,loss\n1,1,1\n1,1\n")
    with pytest.raises(ScalingError, match=r"t\.csv, row 2: 2 fields under 3 columns"):
        table.read(tmp_path / "t.csv", LAWS["chinchilla"], target="loss", columns={}, exclude=[])


# ---- rows of sources


def write_rad(folder: pathlib.Path, *rows: str) -> None:
    (folder / "VQA_RAD Dataset Public.json").write_text("[" + ",\n".join(rows) + "]")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1e999", '"\\ud83d"', "null", "true"])
def test_non_text_values_are_counted_as_rejected_rows(tmp_path, value):
    odd = json.dumps(RAD).replace('"Yes"', value)
    write_rad(tmp_path, json.dumps(RAD), odd, json.dumps(RAD))
    whole, bad, last = rows_of("VQA-RAD", tmp_path)
    assert isinstance(bad, RejectedRow) and not bad.by_rule and bad.where.endswith("row 2")
    assert isinstance(whole, Row) and isinstance(last, Row) and last.id.endswith("3")


def test_optional_columns_may_be_nan(tmp_path):
    """pandas writes NaN where a table has no value: no option, no article."""
    (tmp_path / "pmc_oa.jsonl").write_text(
        '{"image": "P2_F1.jpg", "caption": "A scan.", "pmcid": NaN, "alignment": NaN}\n'
        '{"image": "P1_F1.jpg", "caption": NaN}\n'
        '{"image": "P3_F1.jpg", "caption": "A scan.", "caption": "Another."}\n'
    )
    first, *bad = rows_of("PMC-OA", tmp_path)
    assert first.group == "P2"
    assert [b.reason for b in bad] == ["caption: missing or not text", text_files.KEY_TWICE]
    folder = tmp_path / "QA_information" / "Open-access"
    folder.mkdir(parents=True)
    question = dict(question="What?", gt_answer="MR", image_path="Images/a.png", option_A="CT",
                 option_B="MR", option_C="", option_D=float("nan"))  # fmt: skip
    gap = question | dict(option_A=float("nan"))
    (folder / "X.json").write_text(json.dumps([question, gap]))
    row, bad = rows_of("OmniMedVQA", tmp_path)
    assert "nan" not in row.text and "with a gap" in bad.reason


def test_one_array_is_read_like_lines(tmp_path):
    rows = [{"image": f"P{n}_F1.jpg", "caption": "A scan."} for n in range(3)]
    (tmp_path / "pmc_oa.jsonl").write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert [row.group for row in rows_of("PMC-OA", tmp_path)] == ["P0", "P1", "P2"]


def test_text_after_an_array_is_rejected(tmp_path):
    write_rad(tmp_path, json.dumps(RAD))
    with open(tmp_path / "VQA_RAD Dataset Public.json", "a") as file:
        file.write("[]")
    with pytest.raises(SourceError, match="text after the end of the array"):
        rows_of("VQA-RAD", tmp_path)
