"""Reads public benchmarks in their own formats into rows of the MedMax release's schema.

Those of MedMax's suite are read here; the other readers are in the modules of eval/benchmarks/.

    {"task_name": "slake", "question_type": "closed", "prompt": "Is it a CT?", "answer": "yes",
     "image_path": "imgs/xmlab1/source.jpg", "id": "slake-test-0000002", "group": "xmlab1",
     "slices": {"modality": "CT", "organ": "Lung"}, "data_class": "open"}

    benchmark    file in the folder                                         images
    vqa_rad      VQA_RAD Dataset Public.json, or test-*.parquet             VQA_RAD Image Folder/
    slake        test.json, English rows                                    imgs/
    pathvqa      test-*.parquet                                             in the file
    quilt_vqa    quiltvqa_test_w_ans.json: an array of {"id": 0,            images/
                 "image": "..jpg", "question": "..", "answer": "..",
                 "answer_type": "CLOSED" or "OPEN", "yes_no_answer": "Yes"}
    pmc_vqa      test_2.csv, or test.csv                                    as vqa.py
    pmc_vqa_clean  test_clean.csv, 2,000 rows of version 1 that were        images/
                 checked by its authors
    omnimed_vqa  QA_information/Open-access/*.json                          paths in the files
    path_mmu     data.json: {"PubMed": {"test": [{"No": 1, "img": "..jpg",  images/
                 "question": "..", "options": ["A) ..", ..],
                 "answer": "A) .."}], "test_tiny": [..]}, ..}
    probmed      test.json: an array of {"id": 1, "image": "..png",         as in the paths
                 "question": "..", "answer": "yes", "qa_type":
                 "entity_hallu_0", "image_type": "chest_x-ray"}
    llava_med    llava_med_eval_qa50_qa.jsonl                               images/
    pmc_oa       test.jsonl: captions and, of the same rows, generation     as captions.py

Some fields are additions to the schema. VQA-RAD and SLAKE call some questions closed that are not
answered by yes or no ("Left or right?"); those are left out, and counted. Sources, in addition to
docs/reference/data_sources.md: github.com/aldraus/quilt-llava llava/eval/quilt_eval.py and cards
of its users (question, image); github.com/PathMMU-Benchmark/PathMMU data/instructions.md and
eval/utils/data_utils.py; github.com/eric-ai-lab/ProbMed eval/calculate_score.py and
eval/inference/GPT-4V/gpt4v.py; github.com/microsoft/LLaVA-Med data/eval/.
"""

import functools
import json
import pathlib
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from medmax_jax.data.records.row_streams import (
    RowLocation,
    SourceError,
    csv_rows,
    json_array,
    json_lines,
)
from medmax_jax.data.release import chat_answers
from medmax_jax.data.sources import captions, vqa
from medmax_jax.data.sources.row import (
    ExcludedRow,
    Plan,
    RejectedRow,
    Row,
    RowError,
    clean,
    collect_rows,
    field_image_path,
    field_text,
    find_root,
    first_file,
)
from medmax_jax.endpoints.egress import LICENCE_BOUND, OPEN
from medmax_jax.eval.benchmarks import (
    deeptumorvqa,
    gmai_mmbench,
    kormedmcqa,
    kvasir_vqa,
    medbookvqa,
    medframeqa,
    medgen,
    mediconfusion,
    medthink,
    medxpertqa,
    smmile,
)
from medmax_jax.eval.benchmarks.card import YES_NO, Item, item_row
from medmax_jax.io import text_files
from medmax_jax.io.text_files import TextFileError
from medmax_jax.models.tokenizer import IMAGE_NAME, SEP_NAME

MAX_JSON = 1 << 27  # bytes of a file that must be read completely; PathMMU's has some 30 MB
QUESTION_WORDS = ("what", "where", "when", "how", "why", "who", "which")
_QUILT, _LLAVA = "quiltvqa_test_w_ans.json", "llava_med_eval_qa50_qa.jsonl"
_PATH_MMU_SPLITS = ("test", "test_tiny")


def _of_row(row: Row, name: str, place: RowLocation, kind: str | None, **fields: Any) -> Item:
    """Return an item of a training reader's row of one turn; kind None: by the answer."""
    prompt, answer = row.text.removeprefix(IMAGE_NAME).split(SEP_NAME)
    is_closed = answer.strip().rstrip(".").lower() in ("yes", "no")
    kind = kind or ("closed" if is_closed else "open")
    if kind == "closed":
        if not is_closed:
            raise ExcludedRow(YES_NO)
        answer = answer.strip().rstrip(".").lower()
    return item_row(
        name,
        place,
        kind,
        prompt=prompt,
        answer=answer,
        image_path=row.image_path,
        group=row.group,
        **fields,
    )


def _plan(source: str) -> Plan:
    return Plan(source=source, split="test", seed=0, caption_share=1.0)


def _kind(item: Mapping[str, Any]) -> str:
    answer_type = str(item.get("answer_type", "")).strip().upper()
    if answer_type not in ("OPEN", "CLOSED", "OTHER"):
        raise RowError("answer_type: neither OPEN, CLOSED nor OTHER")
    return "closed" if answer_type == "CLOSED" else "open"


def _vqa_rad(place: RowLocation, item: dict[str, Any]) -> Item:
    row = vqa.vqa_rad(_plan("VQA-RAD"), place, item)
    if row.split != "test":
        raise ExcludedRow("not in the test split")
    kinds = str(item.get("question_type", "")).upper().split(",")
    slices = {"organ": item.get("image_organ"), "question_type": kinds[0].strip()}
    return _of_row(row, "vqa_rad", place, _kind(item), slices=slices, data_class=OPEN)


def _slake(place: RowLocation, item: dict[str, Any]) -> Item:
    row = vqa.slake(_plan("SLAKE"), place, item)
    names = {"modality": "modality", "organ": "location", "question_type": "content_type"}
    slices = {ours: item.get(theirs) for ours, theirs in names.items()}
    return _of_row(row, "slake", place, _kind(item), slices=slices, data_class=OPEN)


def _of_parquet(name: str, data_class: str, folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    """Yield the items of PathVQA, or of VQA-RAD as parquet; closed is set by the answer."""
    for number, row in enumerate(vqa.read(folder, _plan(name)), 1):
        if isinstance(row, RejectedRow):
            yield row
            continue
        first = row.text.removeprefix(IMAGE_NAME).split(None, 1)[0].lower()
        slices = {"question_type": first if first in QUESTION_WORDS else "yes/no or other"}
        item = _of_row(
            row, name, RowLocation("test", number), None, slices=slices, data_class=data_class
        )
        suffix = ".png" if row.image.startswith(b"\x89PNG") else ".jpg"
        yield item | {"image_path": f"images/{row.image_path}{suffix}", "image_bytes": row.image}


def _quilt_vqa(place: RowLocation, item: dict[str, Any]) -> Item:
    kind, answer = _kind(item), field_text(item, "answer")
    if kind == "closed":
        answer = field_text(item, "yes_no_answer").rstrip(".").lower()
        if answer not in ("yes", "no"):
            raise ExcludedRow(YES_NO)
    question = item.get("question")
    prompt = clean(
        question.replace(IMAGE_NAME, " ") if isinstance(question, str) else "", "question"
    )
    image = field_image_path(item, "image", "images")
    group = pathlib.PurePosixPath(image).name
    fields = dict(prompt=prompt, answer=answer, image_path=image, group=group)
    return item_row("quilt_vqa", place, kind, **fields, context=str(item.get("context") or ""))


def _pmc_vqa(name: str, files: Sequence[str], folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    path = first_file(folder, files, "PMC-VQA")
    second = path.stem.endswith("_2")
    answer = "Answer" if second else "Answer_label"
    roots = ("images_2/figures", "figures", "images_2")
    root = find_root(folder, roots) if second else "images"

    def make(place: RowLocation, item: dict[str, Any]) -> Item:
        row = vqa.pmc_vqa(_plan("PMC-VQA"), root, answer, place, item)
        return _of_row(row, name, place, "mcq")

    letters = [f"Choice {letter}" for letter in vqa.LETTERS]
    yield from collect_rows(csv_rows(path, ("Figure_path", "Question", *letters, answer)), make)


def _omnimed_vqa(place: RowLocation, item: dict[str, Any]) -> Item:
    row = vqa.omnimedvqa(_plan("OmniMedVQA"), place, item)
    if row.split != "test":
        raise ExcludedRow("not in the test split")
    names = {"modality": "modality_type", "question_type": "question_type", "data_set": "dataset"}
    slices = {ours: item.get(theirs) for ours, theirs in names.items()}
    return _of_row(row, "omnimed_vqa", place, "mcq", slices=slices)


def _path_mmu(folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    path = first_file(folder, ("data.json",), "PathMMU")
    try:
        data = text_files.read_bytes(path, max_bytes=MAX_JSON)
        # The rows are checked one by one, so that one invalid row does not reject the file.
        lenient = dict(allow_nonfinite=True, allow_lone_surrogates=True)
        subsets = text_files.parse_json(data, path.name, **lenient)
        rows = [
            (subset, RowLocation(f"{subset}-{split}.json", number), row)
            for subset, splits in subsets.items()
            for split, split_rows in splits.items()
            if split in _PATH_MMU_SPLITS
            for number, row in enumerate(split_rows, 1)
        ]
    except TextFileError as error:
        raise SourceError(f"{error}; use the file as it is published") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise SourceError(
            f"{path.name}: not {{subset: {{split: [rows]}}}}; use the file as it is published"
        ) from error
    for subset, place, row in rows:
        yield from collect_rows([(place, row)], functools.partial(_path_mmu_row, subset))


def _path_mmu_row(subset: str, place: RowLocation, item: dict[str, Any]) -> Item:
    options = item.get("options")
    if not isinstance(options, list) or not 2 <= len(options) <= 10:
        raise RowError("options: not a list of two to ten texts")
    by_letter = {}
    for letter, option in zip(string.ascii_uppercase, options, strict=False):
        text = field_text({"option": option}, "option")
        by_letter[letter] = clean(re.sub(rf"^\(?{letter}[).:]\s*", "", text), "option")
    answer = field_text(item, "answer")
    letters = [
        c for c, text in by_letter.items() if re.fullmatch(rf"\(?{c}([).:].*)?", answer, re.S)
    ]
    if len(letters) != 1:
        raise RowError("answer: not one of the options")
    prompt = vqa.choice_text(field_text(item, "question"), by_letter)
    image = field_image_path(item, "img", "images")
    fields = dict(prompt=prompt, answer=letters[0], image_path=image, group=image)
    return item_row("path_mmu", place, "mcq", **fields, slices={"subset": subset})


def _probmed(place: RowLocation, item: dict[str, Any]) -> Item:
    kind = field_text(item, "qa_type")
    names = ("modality", "body_part", "abnormality", "entity")
    question_type = next((name for name in names if name in kind), "grounding")
    answer = field_text(item, "answer").lower()
    if answer not in ("yes", "no"):
        raise RowError("answer: neither yes nor no")
    image = field_image_path(item, "image", "")
    slices = {"question_type": question_type, "modality_organ": item.get("image_type")}
    fields = dict(prompt=field_text(item, "question"), answer=answer, image_path=image)
    group = field_text(item, "id")
    return item_row("probmed", place, "closed", **fields, group=group, slices=slices)


def _llava_med(place: RowLocation, item: dict[str, Any]) -> Item:
    """Return an item in the form of the release's rows: the answer dictionary is stored as JSON."""
    kind = item.get("type")
    if kind not in ("conversation", "detailed_description"):
        raise RowError("type: neither conversation nor detailed_description")
    names = ("fig_label", "fig_caption", "in_text_mention", "gpt4_answer", "domain")
    answer = json.dumps({name: item.get(name) for name in names})
    try:
        chat_answers.read(answer)
    except chat_answers.ChatAnswerError as error:
        raise RowError(str(error)) from error
    prompt = item.get("text")
    if not isinstance(prompt, str) or not prompt.replace(IMAGE_NAME, "").strip():
        raise RowError("text: no question")
    image = field_image_path(item, "image", "images")
    fields = dict(prompt=prompt, answer=answer, image_path=image)
    return item_row("visual_chat", place, kind, **fields, group=field_text(item, "pair_id"))


def _pmc_oa(folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    path = first_file(folder, ("test.jsonl",), "PMC-OA")
    root = find_root(folder, captions.PMC_ROOTS)
    for place, line in json_lines(path):
        for name in ("image_captioning", "image_generation"):
            yield from collect_rows([(place, line)], functools.partial(_pmc_oa_row, name, root))


def _pmc_oa_row(name: str, root: str, place: RowLocation, item: dict[str, Any]) -> Item:
    image, caption = field_image_path(item, "image", root), field_text(item, "caption")
    name_of_article = pathlib.PurePosixPath(image).name.split("_")[0]
    article = field_text(item, "pmcid") if item.get("pmcid") else name_of_article
    generates = name == "image_generation"
    texts = dict(
        # Verbatim: part of the data.
        prompt=caption if generates else "Please describe this picture.",
        answer="" if generates else caption,
    )
    return item_row(name, place, "pmc_oa", **texts, image_path=image, group=article)


def _array_reader(name: str, make: Callable[[RowLocation, dict[str, Any]], Item]):
    return lambda folder: collect_rows(json_array(first_file(folder, (name,), name)), make)


def _vqa_rad_of_either_form(folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    if (folder / vqa.VQA_RAD).is_file():
        return _array_reader(vqa.VQA_RAD, _vqa_rad)(folder)
    return _of_parquet("vqa_rad", OPEN, folder)


def _omnimed(folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    paths = sorted((folder / "QA_information" / "Open-access").glob("*.json"))
    if not paths:
        raise SourceError("omnimed_vqa: no QA_information/Open-access/*.json in the folder")
    for path in paths:
        yield from collect_rows(json_array(path), _omnimed_vqa)


READERS: Mapping[str, Callable[[pathlib.Path], Iterator[Item | RejectedRow]]] = {
    "vqa_rad": _vqa_rad_of_either_form,
    "slake": _array_reader("test.json", _slake),
    "pathvqa": functools.partial(_of_parquet, "pathvqa", LICENCE_BOUND),
    "quilt_vqa": _array_reader(_QUILT, _quilt_vqa),
    "pmc_vqa": functools.partial(_pmc_vqa, "pmc_vqa", ("test_2.csv", "test.csv")),
    "pmc_vqa_clean": functools.partial(_pmc_vqa, "pmc_vqa_clean", ("test_clean.csv",)),
    "omnimed_vqa": _omnimed,
    "path_mmu": _path_mmu,
    "probmed": _array_reader("test.json", _probmed),
    "llava_med": lambda folder: collect_rows(
        json_lines(first_file(folder, (_LLAVA,), "LLaVA-Med")), _llava_med
    ),
    "pmc_oa": _pmc_oa,
    mediconfusion.NAME: mediconfusion.read,
    medgen.NAME: medgen.read,
    deeptumorvqa.NAME: deeptumorvqa.read,
    kvasir_vqa.NAME: kvasir_vqa.read,
    **{name: functools.partial(smmile.read, name) for name in smmile.NAMES},
    medframeqa.NAME: medframeqa.read,
    kormedmcqa.NAME: kormedmcqa.read,
    medbookvqa.NAME: medbookvqa.read,
    medxpertqa.NAME: medxpertqa.read,
    gmai_mmbench.NAME: gmai_mmbench.read,
    "r_rad": functools.partial(medthink.read, "r_rad"),
    "r_slake": functools.partial(medthink.read, "r_slake"),
}
