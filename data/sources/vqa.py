"""Read sources of open and closed questions in their own JSON: VQA-RAD and SLAKE.

    source   file in the folder                       images
    VQA-RAD  VQA_RAD Dataset Public.json              VQA_RAD Image Folder/
             {"qid": 1, "image_name": "synpic54610.jpg", "image_organ": "HEAD", "answer": "Yes",
              "answer_type": "CLOSED", "question_type": "PRES", "question": "Are regions of ..?",
              "phrase_type": "freeform"}              test_freeform and test_para are the test set
    SLAKE    train.json, validation.json, test.json   imgs/
             {"img_id": 1, "img_name": "xmlab1/source.jpg", "question": "..", "answer": "..",
              "q_lang": "en", "location": "..", "modality": "CT", "answer_type": "OPEN",
              "base_type": "vqa", "content_type": "Modality", "triple": [..], "qid": 0}

Both are JSON arrays. VQA-RAD as parquet is read by `read` below. Its test questions share images
with its train questions, as published. SLAKE is in English and Chinese; which MedMax took is not
published. MedMax's other sources are English, so the English questions are read.
Read at: osf.io/89kps through huggingface.co/datasets/flaviagiammarino/vqa-rad README.md (the
counts), public loaders of the JSON (its fields); huggingface.co/datasets/BoKelvin/SLAKE files.
"""

import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from medmax_jax.data.mixture import VQA
from medmax_jax.data.records.document import pseudonym
from medmax_jax.data.records.row_streams import (
    RowLocation,
    SourceError,
    csv_rows,
    json_array,
    parquet_rows,
)
from medmax_jax.data.sources.row import (
    ExcludedRow,
    Plan,
    RejectedRow,
    Row,
    RowError,
    collect_rows,
    field_image_path,
    field_text,
    find_root,
    first_file,
    join_turns,
    seeded_rng,
)

VQA_RAD = "VQA_RAD Dataset Public.json"
_SLAKE = {
    "train": ("train.json",),
    "validation": ("validation.json", "validate.json"),
    "test": ("test.json",),
}


def read_vqa_rad(folder: pathlib.Path, plan: Plan) -> Iterator[Row | RejectedRow]:
    """Read VQA-RAD of the Open Science Framework."""
    path = first_file(folder, (VQA_RAD,), plan.source)
    return collect_rows(json_array(path), functools.partial(vqa_rad, plan))


def read_slake(folder: pathlib.Path, plan: Plan) -> Iterator[Row | RejectedRow]:
    """Read SLAKE's questions in English."""
    path = first_file(folder, _SLAKE[plan.split], plan.source)
    return collect_rows(json_array(path), functools.partial(slake, plan))


def _question_row(
    plan: Plan,
    place: RowLocation,
    question: str,
    answer: str,
    *,
    image: str | bytes,
    image_path: str,
    split: str,
    group: str,
) -> Row:
    """Return one question about one image."""
    return Row(
        id=place.id(plan.source),
        text=join_turns([(question, answer)], image="start"),
        image=image,
        image_path=image_path,
        task=VQA,
        source=plan.source,
        split=split,
        group=group,
        turns=1,
    )


def vqa_rad(plan: Plan, place: RowLocation, item: dict[str, Any]) -> Row:
    """Return one question of VQA-RAD."""
    kind = item.get("phrase_type")
    if not isinstance(kind, str) or kind not in ("freeform", "para", "test_freeform", "test_para"):
        raise RowError("phrase_type: unknown value, so the split is unknown")
    image = field_image_path(item, "image_name", "VQA_RAD Image Folder")
    split = "test" if kind.startswith("test_") else "train"
    question, answer = field_text(item, "question"), field_text(item, "answer")
    return _question_row(
        plan, place, question, answer,
        image=image, image_path=image, split=split, group=pathlib.Path(image).stem,
    )  # fmt: skip


def slake(plan: Plan, place: RowLocation, item: dict[str, Any]) -> Row:
    """Return one question of SLAKE."""
    if item.get("q_lang") not in ("en", "zh"):
        raise RowError("q_lang: expected en or zh")
    if item["q_lang"] == "zh":
        raise ExcludedRow("a question in Chinese")
    image = field_image_path(item, "img_name", "imgs")
    group = pathlib.PurePosixPath(image).parent.name
    question, answer = field_text(item, "question"), field_text(item, "answer")
    return _question_row(
        plan, place, question, answer,
        image=image, image_path=image, split=plan.split, group=group,
    )  # fmt: skip


# ---- Sources of multiple-choice questions: PMC-VQA and OmniMedVQA ----
#
#     source      file in the folder                            images
#     PMC-VQA     train_2.csv, test_2.csv (version 2)           images_2/figures/, figures/
#                 index,Figure_path,Caption,Question,Choice A,..,Choice D,Answer,split
#                 Answer is a letter, a choice reads " A: Brain "
#                 or train.csv, test.csv (version 1)            images/
#                 Figure_path,Question,Answer,Choice A,..,Choice D,Answer_label
#                 Answer is text, Answer_label the letter
#     OmniMedVQA  QA_information/Open-access/*.json             paths in the files
#                 {"dataset": "ACRIMA", "question_id": "ACRIMA_0000", "question_type": "..",
#                  "question": "..", "gt_answer": "..", "image_path": "Images/ACRIMA/..png",
#                  "option_A": "..", .., "modality_type": ".."}  two to four options, A to D
#
# A document has the question format of the MedMax release, and answers with the letter:
#     <image>Which organ is this?\nA: Liver B: Brain\nC: Heart D: Lung<reserved08706>B
# (its figure breaks lines after the question, B and C; ours has one choice per line). Version 2 of
# PMC-VQA has 176,948 train rows, which is MedMax's 178K up to rounding. OmniMedVQA publishes no
# split; MedMax trained on 81K of its 88,996 open questions, so 9 % of its images, by hash, are test
# here: not the released split. Restricted-access questions come without images and are not read.
# Read at: huggingface.co/datasets/xmcmic/PMC-VQA README.md (version 1) and files; public loaders of
# train_2.csv (version 2); huggingface.co/datasets/foreverbeliever/OmniMedVQA README.md, github.com/
# GiovanniCornejo/MediVision-OmniMedVQA reports/draft_reports/part1_dataexploration.md (counts).

LETTERS = ("A", "B", "C", "D")
OMNI_TEST = 0.09  # 1 - 81K / 88,996: the share that MedMax did not train on
_PMC = {"train": ("train_2.csv", "train.csv"), "test": ("test_2.csv", "test.csv")}


def read_pmc_vqa(folder: pathlib.Path, plan: Plan) -> Iterator[Row | RejectedRow]:
    """Read PMC-VQA, version 2 if the folder has it."""
    if plan.split not in _PMC:
        raise SourceError(f"{plan.source} has no split {plan.split}; use train or test")
    path = first_file(folder, _PMC[plan.split], plan.source)
    second = path.stem.endswith("_2")
    columns = ["Figure_path", "Question", *(f"Choice {c}" for c in LETTERS)]
    columns.append("Answer" if second else "Answer_label")
    rows = csv_rows(path, tuple(columns))
    root = find_root(folder, ("images_2/figures", "figures", "images_2")) if second else "images"
    return collect_rows(rows, functools.partial(pmc_vqa, plan, root, columns[-1]))


def read_omnimedvqa(folder: pathlib.Path, plan: Plan) -> Iterator[Row | RejectedRow]:
    """Read OmniMedVQA's open-access questions, file by file."""
    paths = sorted((folder / "QA_information" / "Open-access").glob("*.json"))
    if not paths:
        raise SourceError(
            f"{plan.source}: the folder has no QA_information/Open-access/*.json; check --from"
        )
    for path in paths:
        yield from collect_rows(json_array(path), functools.partial(omnimedvqa, plan))


def choice_text(question: str, choices: dict[str, str]) -> str:
    """Return the question with its choices, one per line."""
    return "\n".join([question, *(f"{letter}: {text}" for letter, text in choices.items())])


def pmc_vqa(plan: Plan, root: str, answer: str, place: RowLocation, item: dict[str, Any]) -> Row:
    """Return one question of PMC-VQA; `answer`: the column with the letter."""
    choices = {}
    for letter in LETTERS:
        text = re.sub(rf"^{letter}\s*:\s*", "", field_text(item, f"Choice {letter}"))
        choices[letter] = field_text({"choice": text}, "choice")
    letter = field_text(item, answer).upper()
    if letter not in choices:
        raise RowError(f"{answer}: expected A, B, C or D")
    image = field_image_path(item, "Figure_path", root)
    group = pathlib.PurePosixPath(image).name.split("_")[0]
    question = choice_text(field_text(item, "Question"), choices)
    return _question_row(
        plan, place, question, letter,
        image=image, image_path=image, split=plan.split, group=group,
    )  # fmt: skip


def omnimedvqa(plan: Plan, place: RowLocation, item: dict[str, Any]) -> Row:
    """Return one question of OmniMedVQA."""
    letters = [letter for letter in LETTERS if item.get(f"option_{letter}") not in (None, "")]
    choices = {letter: field_text(item, f"option_{letter}") for letter in letters}
    if letters != list(LETTERS[: len(letters)]) or len(letters) < 2:
        raise RowError("option_A..D: fewer than two options, or with a gap")
    correct = [c for c, text in choices.items() if text == field_text(item, "gt_answer")]
    if len(correct) != 1:
        raise RowError("gt_answer: expected exactly one of the options")
    image = field_image_path(item, "image_path", "")
    split = "test" if seeded_rng("OmniMedVQA", image).random() < OMNI_TEST else "train"
    question = choice_text(field_text(item, "question"), choices)
    return _question_row(
        plan, place, question, correct[0],
        image=image, image_path=image, split=split, group=image,
    )  # fmt: skip


# ---- Sources of questions as parquet with images: PathVQA, and VQA-RAD's other form ----
#
#     file in the folder, or in data/ of it                columns
#     train-00000-of-00007-<hash>.parquet and so on        image {bytes, path}, question, answer
#     validation-.., test-..
#
# PathVQA's first release holds its questions as pickles, which can execute code when opened;
# they are not read. The image's name is the hash of its bytes, which is also its group: the parquet
# does not state which figure of a book it is. Ids count rows through a split's files in name order.
# Read at: huggingface.co/datasets/flaviagiammarino/path-vqa and vqa-rad, README.md and files.

COLUMNS = ["image", "question", "answer"]
MAX_IMAGE_BYTES = 2**26  # 64 MiB


def read(folder: pathlib.Path, plan: Plan) -> Iterator[Row | RejectedRow]:
    """Read the rows of a split's parquet files."""
    paths = sorted(folder.glob(f"{plan.split}-*.parquet"))
    paths = paths or sorted((folder / "data").glob(f"{plan.split}-*.parquet"))
    if not paths:
        raise SourceError(
            f"{plan.source}: no {plan.split}-*.parquet in the folder or its data/; download the "
            "parquet form (pickles are not read)"
        )
    rows = parquet_rows(paths, COLUMNS, f"{plan.split}.parquet")
    return collect_rows(rows, lambda place, item: _row(plan, place, item))


def read_vqa_rad_of_either_form(folder: pathlib.Path, plan: Plan) -> Iterator[Row | RejectedRow]:
    """Read VQA-RAD: the JSON of its authors, or else parquet."""
    return (read_vqa_rad if (folder / VQA_RAD).is_file() else read)(folder, plan)


def _row(plan: Plan, place: RowLocation, item: dict[str, Any]) -> Row:
    image = item["image"].get("bytes") if isinstance(item["image"], dict) else None
    if not isinstance(image, bytes) or not 0 < len(image) <= MAX_IMAGE_BYTES:
        raise RowError("image: no bytes, or too many")
    name = pseudonym(image)
    question, answer = field_text(item, "question"), field_text(item, "answer")
    return _question_row(
        plan, place, question, answer,
        image=image, image_path=name, split=plan.split, group=name,
    )  # fmt: skip
