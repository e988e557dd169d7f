"""Tests of each source's reader on small files in the published format: texts, splits, errors."""

import gzip
import json

import pytest
from source_setup import FOLDERS, QUILT_HEADER, parquet_questions, plan, talk, write_csv, write_json

from medmax_jax.data import mixture
from medmax_jax.data.records import row_streams
from medmax_jax.data.records.row_streams import SourceError
from medmax_jax.data.sources import row
from medmax_jax.data.sources.build import READERS
from medmax_jax.data.sources.row import RejectedRow, Row

SEP = "<reserved08706>"


def read(source, folder, **settings):
    """Return the rows and the bad rows of a source."""
    results = list(READERS[source](folder, plan(source, **settings)))
    return [r for r in results if isinstance(r, Row)], [
        r for r in results if isinstance(r, RejectedRow)
    ]


@pytest.fixture
def source_folder(tmp_path):
    def source_folder(source):
        FOLDERS[source][0](tmp_path)
        return tmp_path

    return source_folder


def test_readers_cover_the_mixture():
    assert list(READERS) == [s.name for s in mixture.SOURCES] and set(FOLDERS) == set(READERS)


@pytest.mark.parametrize("source", list(READERS))
def test_every_row_is_in_the_released_schema(source, source_folder):
    folder = source_folder(source)
    rows, bad = read(source, folder)
    assert rows and not [b for b in bad if not b.by_rule]
    described = mixture.BY_NAME[source]
    for r in rows:
        assert r.source == source and r.task in described.tasks and r.split in row.SPLITS
        assert r.text.count(SEP) == 2 * r.turns - 1 and r.text.count("<image>") == 1
        assert r.group and r.id.startswith(f"{source}/")
    assert len({r.id for r in rows}) == len(rows)
    assert read(source, folder)[0] == rows
    groups = {}
    for r in rows:
        groups.setdefault(r.image_path, set()).add(r.group)
    assert all(len(g) == 1 for g in groups.values())  # an image is in one group


def test_captions_become_captioning_or_generation(source_folder):
    folder = source_folder("LLaVA-Med-PMC")
    for share, task in ((1.0, mixture.CAPTION), (0.0, mixture.GENERATION)):
        rows, _ = read("LLaVA-Med-PMC", folder, caption_share=share)
        assert {r.task for r in rows} == {task}
    assert rows[1].text.endswith(f"{SEP}<image>") and "CT of the chest, number 1." in rows[1].text
    rows, _ = read("LLaVA-Med-PMC", folder, caption_share=1.0)
    assert rows[0].text == f"<image>Describe the image concisely.{SEP}CT of the chest, number 0."
    assert rows[0].group == "27770000" and rows[0].image == "images/27770000_Fig1_1.jpg"


def test_templates_are_drawn_by_seed_and_id(source_folder):
    folder = source_folder("PMC-OA")
    texts = [[r.text for r in read("PMC-OA", folder, seed=s)[0]] for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    rows, _ = read("PMC-OA", folder, caption_share=1.0)
    questions = {r.text.removeprefix("<image>").split(SEP)[0] for r in rows}
    assert questions <= set(row.templates("caption")) and rows[0].group == "PMC212310"
    # Verbatim: part of the data.
    assert row.templates("caption")[1] == "Please describe this picture."


def test_older_pmc_oa_has_splits(tmp_path):
    item = {"image": "PMC1_F1.jpg", "caption": "A.", "pmcid": "PMC1", "url_name": "x.jpg"}
    (tmp_path / "valid.jsonl").write_text(json.dumps(item) + "\n")
    rows, _ = read("PMC-OA", tmp_path, split="validation")
    assert [(r.split, r.group) for r in rows] == [("validation", "PMC1")]
    with pytest.raises(SourceError, match=r"none of pmc_oa.jsonl, train.jsonl"):
        read("PMC-OA", tmp_path)


def test_image_paths_follow_the_layout_of_the_archive(source_folder):
    folder = source_folder("PMC-OA")
    inner = folder / "images" / "caption_T060_filtered_top4_sep_v0_subfigures"
    inner.mkdir()
    for image in (folder / "images").glob("*.jpg"):
        image.rename(inner / image.name)
    rows, _ = read("PMC-OA", folder)
    assert all((folder / r.image).is_file() for r in rows)
    inner.rename(folder / inner.name)
    assert all((folder / r.image).is_file() for r in read("PMC-OA", folder)[0])


def test_conversations_keep_the_position_of_the_image(source_folder):
    rows, _ = read("LLaVA-Med-IT", source_folder("LLaVA-Med-IT"))
    rest = f"{SEP}A chest x-ray.{SEP}Is it normal?{SEP}Yes, number"
    assert rows[0].text == f"<image>What is shown?{rest} 0 is."
    assert rows[1].text == f"What is shown?<image>{rest} 1 is."
    assert rows[0].turns == 2 and rows[0].group == "28880000"


def test_rows_of_several_images_are_excluded_by_rule(source_folder):
    rows, bad = read("PubMedVision-IT", source_folder("PubMedVision-IT"))
    assert [r.group for r in rows] == ["pmc_0", "pmc_1", "pmc_2"]
    assert [(b.by_rule, b.where) for b in bad] == [
        (True, "PubMedVision_InstructionTuning_VQA.json, row 4")
    ]


def test_quilt_has_a_split_and_videos(source_folder):
    rows, _ = read("Quilt-1M", source_folder("Quilt-1M"), caption_share=1.0)
    assert [r.split for r in rows] == ["train"] * 3 + ["validation"]
    assert {r.group for r in rows} == {"KdKl0MGHEMA"} and rows[0].image == rows[1].image
    assert rows[2].text.endswith("Two lines,\nquoted.")


def test_vqa_rad_splits_by_phrase_type(source_folder):
    rows, _ = read("VQA-RAD", source_folder("VQA-RAD"))
    assert [r.split for r in rows] == ["train"] * 3 + ["test"] * 2
    assert rows[0].text == f"<image>Are regions of the brain infarcted?{SEP}Yes"
    assert rows[2].text.endswith(f"{SEP}5") and rows[0].group == "synpic54610"


def test_slake_is_read_in_english(source_folder):
    rows, bad = read("SLAKE", source_folder("SLAKE"))
    assert [r.group for r in rows] == ["xmlab0", "xmlab1", "xmlab2"]
    assert [b.reason for b in bad] == ["a question in Chinese"]


def test_parquet_of_pathvqa_and_vqa_rad(tmp_path):
    parquet_questions(tmp_path)
    rows, _ = read("PathVQA", tmp_path)
    assert [r.id for r in rows] == [f"PathVQA/train-{n:07d}" for n in range(1, 7)]
    assert rows[0].group == rows[1].group != rows[2].group and isinstance(rows[0].image, bytes)
    assert [r.source for r in read("VQA-RAD", tmp_path)[0]] == ["VQA-RAD"] * 6
    with pytest.raises(SourceError, match="no test-.*pickles are not read"):
        read("PathVQA", tmp_path, split="test")
    (tmp_path / "data" / "test-0.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(SourceError, match=r"test-0.parquet: damaged"):
        read("PathVQA", tmp_path, split="test")


def test_pmc_vqa_answers_with_the_letter(source_folder):
    folder = source_folder("PMC-VQA")
    rows, _ = read("PMC-VQA", folder)
    question = "<image>Which organ is shown?\nA: Liver\nB: Brain\nC: Heart\nD: Lung"
    assert rows[0].text == f"{question}{SEP}B" and rows[0].group == "PMC869350"
    assert rows[0].image.startswith("images_2/figures/")
    with pytest.raises(SourceError, match="has no split validation"):
        read("PMC-VQA", folder, split="validation")


def test_pmc_vqa_version_1(tmp_path):
    header = ["Figure_path", "Question", "Answer", *(f"Choice {c}" for c in "ABCD")]
    choices = ["A:Diffuse", "B:Focal", "C:None", "D:Unknown"]
    figure = ["PMC1064097_F1.jpg", "What is the uptake pattern?", "Focal", *choices]
    write_csv(tmp_path / "train.csv", [*header, "Answer_label"], [[*figure, "B"], [*figure, "E"]])
    rows, bad = read("PMC-VQA", tmp_path)
    assert rows[0].text.endswith(f"B: Focal\nC: None\nD: Unknown{SEP}B")
    assert rows[0].image == "images/PMC1064097_F1.jpg"
    assert [b.reason for b in bad] == ["Answer_label: expected A, B, C or D"]


def test_omnimedvqa_has_two_to_four_options(source_folder):
    folder = source_folder("OmniMedVQA")
    rows, _ = read("OmniMedVQA", folder)
    assert rows[0].text == f"<image>What is this?\nA: No\nB: Yes{SEP}A"
    assert rows[5].text == f"<image>What is this?\nA: CT\nB: MR\nC: X-ray\nD: OCT{SEP}B"
    path = folder / "QA_information" / "Open-access" / "ACRIMA.json"
    items = json.loads(path.read_text())
    items[0]["gt_answer"] = "Maybe"
    items[1] |= {"option_A": "", "option_C": "Never"}
    write_json(path, items)
    _, bad = read("OmniMedVQA", folder)
    assert [b.reason.split(":")[0] for b in bad] == ["gt_answer", "option_A..D"]


def test_malformed_conversations_are_rejected(tmp_path):
    good = {"id": "1_F1", "image": "1_F1.jpg", "conversations": talk("<image>\nQ?", "A.")}
    wrong = [
        good | {"conversations": talk("Q?")},
        good | {"conversations": talk("Q?", "A.")[::-1]},
        good | {"conversations": talk("<image>", "A.")},
        good | {"conversations": talk("Q <image> Q?", "A.")},
        good | {"conversations": talk("Q?", f"A.{SEP}B")},
        good | {"conversations": "no list"},
        good | {"image": "../1_F1.jpg"},
        good | {"image": "/etc/passwd"},
        good | {"image": []},
        good | {"image": None},
        ["no", "object"],
    ]
    write_json(tmp_path / "llava_med_instruct_10k.json", [good, *wrong])
    rows, bad = read("LLaVA-Med-IT", tmp_path)
    assert len(rows) == 1 and len(bad) == len(wrong) and not any(b.by_rule for b in bad)
    assert bad[6].reason == "image: leads out of the folder"
    assert bad[0].where == "llava_med_instruct_10k.json, row 2"


def test_reasons_repeat_nothing_of_the_row(tmp_path):
    lines = ['{"image": "a.jpg", "caption": "SECRET', "[1]"]
    lines += ['{"image": "SECRET/../x", "caption": 1}']
    lines += ['{"image": "a.jpg", "caption": {"SECRET": 1}}', '{"image": "a.jpg", "caption": " "}']
    (tmp_path / "pmc_oa.jsonl").write_text("\n".join(lines))
    rows, bad = read("PMC-OA", tmp_path)
    assert not rows and len(bad) == 5 and "SECRET" not in repr(bad)


def test_json_array_is_read_as_a_stream(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    items = [{"n": n, "text": "é]},[{" * n, "more": [n, {"x": None}]} for n in range(40)]
    for indent in (None, 2):
        path.write_text(json.dumps(items, indent=indent, ensure_ascii=False), encoding="utf-8")
        for size in (1, 7, 64, 10**6):
            monkeypatch.setattr(row_streams, "CHUNK", size)
            assert [item for _, item in row_streams.json_array(path)] == items
    path.write_text(" [ ] ")
    monkeypatch.setattr(row_streams, "CHUNK", 100)
    assert list(row_streams.json_array(path)) == []
    path.write_text("\ufeff[1, 22, 333]", encoding="utf-8")
    monkeypatch.setattr(row_streams, "CHUNK", 1)
    assert [item for _, item in row_streams.json_array(path)] == [1, 22, 333]


@pytest.mark.parametrize(
    "text",
    ['{"a": 1}', "", '[{"a": 1}', '[{"a": 1} {"a": 2}]', '[{"a": 1},', "[" * 5000, '[{"a": "']
    + ["[1, nonsense]"],
)
def test_damaged_arrays_end_with_an_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SourceError, match=r"a\.json: (damaged|not a JSON array)"):
        list(row_streams.json_array(tmp_path / "a.json"))


def test_items_and_lines_have_a_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(row_streams, "MAX_ITEM", 1_000)
    monkeypatch.setattr(row_streams, "CHUNK", 100)
    long = json.dumps({"caption": "x" * 2_000})
    (tmp_path / "a.json").write_text(f"[{long}]")
    with pytest.raises(SourceError, match="more than 1000 characters"):
        list(row_streams.json_array(tmp_path / "a.json"))
    (tmp_path / "a.jsonl").write_text(long)
    with pytest.raises(SourceError, match="line 1 has more than 1000 bytes"):
        list(row_streams.json_lines(tmp_path / "a.jsonl"))
    (tmp_path / "a.csv").write_text("caption\n" + "x" * 2_000)
    with pytest.raises(SourceError, match="more than 1000 characters"):
        list(row_streams.csv_rows(tmp_path / "a.csv", ("caption",)))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"a\n" + b"0" * 10**7))  # a small bomb
    with pytest.raises(SourceError, match="more than 1000 characters"):
        list(row_streams.csv_rows(tmp_path / "b.csv.gz", ("a",)))


def test_csv_rows_of_another_width_are_malformed(tmp_path):
    path = tmp_path / "quilt_1M_lookup.csv"
    header = QUILT_HEADER.split(",")
    write_csv(path, header, [["0", "short row"]])
    assert [b.reason for b in read("Quilt-1M", tmp_path)[1]] == ["not a complete row of its file"]
    write_csv(path, ["caption", "image"], [["a", "b"]])
    with pytest.raises(SourceError, match="columns image_path, split are missing"):
        read("Quilt-1M", tmp_path)
    path.write_bytes(b"\xff\xfe not text")
    with pytest.raises(SourceError, match=r"quilt_1M_lookup.csv: damaged"):
        read("Quilt-1M", tmp_path)
    path.write_text(",".join(header) + '\n0,"' + "x" * (row_streams.MAX_ITEM + 1))
    with pytest.raises(SourceError, match="quilt_1M_lookup.csv: line 2 has more than 4194304 char"):
        read("Quilt-1M", tmp_path)


@pytest.mark.parametrize("source", list(READERS))
def test_empty_folder_is_reported(source, tmp_path):
    with pytest.raises(SourceError, match=source):
        read(source, tmp_path)
