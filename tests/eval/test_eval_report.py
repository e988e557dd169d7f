"""The page: published numbers beside, slices, failures; and the release's prompts by name."""

import json
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
from test_eval_rows import CHAT

from medmax_jax.config import build
from medmax_jax.configs import eval_paper, eval_suite
from medmax_jax.endpoints import egress
from medmax_jax.eval.config import Settings
from medmax_jax.eval.metrics import aggregate, per_record
from medmax_jax.eval.pipeline import inference
from medmax_jax.eval.reporting import page
from medmax_jax.eval.reporting import tables as reporting_tables
from medmax_jax.eval.tasks import catalog
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.io import html_page

NUMBERS = dict(seed=0, resamples=2_000)
MANY = 24  # questions, so that a slice of half of them is too small and the whole is not


def row(task, kind, **changes):
    columns = dict(prompt="Is it a CT?", answer="yes", image_path="a.png")
    return dict(task_name=task, question_type=kind) | columns | changes


def rows():
    """All families; SLAKE with slices, and with answers of every kind of failure."""
    many = [
        row("slake", "closed", slices={"modality": "CT" if n < 20 else "MRI"}, group=f"g{n}")
        for n in range(MANY)
    ]
    choices = dict(prompt="Which?\nA: CT\nB: MRI", answer="B")
    chat = dict(prompt="What?\n<image>", answer=repr(CHAT))
    others = [
        row("vqa_rad", "open", prompt="Where?", answer="left lung"),
        row("pmc_vqa", "mcq", **choices),
        row("image_captioning", "pmc_oa", answer="A CT of the chest."),
        row("image_generation", "report", prompt="A <b>chest</b> X-ray.", answer=""),
        row("mm_out", "", prompt="Explain a CT.", answer="It is a CT."),
        row("visual_chat", "conversation", **chat),
        row("visual_chat", "detailed_description", **chat),
    ]
    return [one | {"id": f"i{n}"} for n, one in enumerate(many + others)]


class Scripted:
    """Says yes, then no, then nothing that can be read; draws where it may."""

    def generate(self, asks):
        said = ["yes", "no", "<script>alert(1)</script>"]
        return [
            [PIL.Image.new("RGB", (32, 32), "teal")] * (ask.mode != "text")
            + [said[n % 3]] * (ask.mode != "image")
            for n, ask in enumerate(asks)
        ]


def made(tmp_path, asked=None):
    """A workdir as eval.run leaves it, with a judge's verdicts and a scorer's cosines."""
    PIL.Image.new("RGB", (64, 48), "maroon").save(tmp_path / "a.png")
    items = task_items.from_rows(asked or rows())
    records = inference.run_items(
        Scripted(),
        items,
        mode="strict",
        images_folder=tmp_path,
        out=tmp_path / "records.jsonl",
        progress=lambda _: None,
    )
    lines = [
        dict(id=r["id"], kind=kind, votes=votes, why="", judge="j", case="")
        for r in records
        for family, kind, votes in (
            ("vqa_open", "correct", [0.0, 1.0, 0.0]),
            ("visual_chat", "relative", [[8.0, 6.0], [9.0, 5.0]]),
        )
        if r["family"] == family
    ]
    put = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / per_record.JUDGED).write_text(put)
    known = per_record.read(tmp_path)
    floor = [dict(task="slake_closed", metric="accuracy", value=0.5)]
    summary = dict(
        model="scripted & co",
        adapter="",
        settings=dict(
            mode="strict", prompt="sft", images=str(tmp_path), questions=["x"], **NUMBERS
        ),
        scores=aggregate.summary(records, known, mode="strict", **NUMBERS),
        floors=[dict(name="majority", says="the commonest answer", scores=floor)],
        baselines=[],
        modality_ceiling=None,
        judge=dict(model="gpt-4o-mini-2024-07-18", repeats=3),
        scorers={"efficientnet_lite0": "0123"},
        probes=dict(
            reason="",
            rows=[
                dict(
                    probe="blank",
                    task="slake_closed",
                    metric="accuracy",
                    diff=-0.25,
                    ci_low=-0.5,
                    ci_high=0.0,
                )
            ],
        ),
        calibration=dict(reason="the model gives no likelihoods", rows=[]),
        contamination=[dict(task="slake_closed", part="clean", value=0.25)],
    )
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return summary, records


def whole(tmp_path, **changes):
    summary, records = made(tmp_path)
    page.write(tmp_path / "report.html", summary | changes, records, images_folder=tmp_path)
    return (tmp_path / "report.html").read_text()


def test_the_page_has_every_part(tmp_path):
    text = whole(tmp_path)
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert heads[:4] == [*("Scores", "Floors", "Other metrics", "Beside the published numbers")]
    for said in (
        "Probes: the same questions asked in another way",
        "Options by likelihood, and calibration",
        "Contamination: the clean and the contaminated part",
        "By slice",
        "Failures",
        "Not run, or without a score",
        "Examples: multimodal",
        "Examples: visual_chat_conversation",
    ):
        assert said in heads, said
    for said in (
        "scripted &amp; co",
        "gpt-4o-mini-2024-07-18",
        "-0.500 to 0.000",
        "efficientnet_lite0",
        "Not available: the model gives no likelihoods",
        "majority: the commonest answer.",
        "image against text only, over 256 tokens cut",  # how published captions were scored
        "answered, but no scorer said how well",  # generation, without a scorer
        "HuatuoGPT-Vision 7B",
    ):
        assert said in text, said


def test_the_page_stands_alone_and_runs_nothing(tmp_path):
    text = whole(tmp_path)
    assert html_page.POLICY in text and "<script" not in text and "<b>chest" not in text
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert text.count("data:image/png") >= 8


def test_published_numbers_stand_beside(tmp_path):
    summary, _ = made(tmp_path)
    tables = {kind: rows for kind, rows, _ in reporting_tables.published(summary)}
    closed = {r["task"]: r for r in tables["accuracy, %"]}
    assert closed["slake_closed"]["MedMax 7B"] == 88.4
    assert closed["slake_closed"]["here"] == "33.3"
    assert closed["slake_closed"]["as released"] == "33.3"
    chat = {r["task"]: r for r in tables["gpt-4o-mini relative score"]}
    assert chat["visual_chat_conversation"]["here"] == f"{100 * 5.5 / 8.5:.1f}"
    (caption,) = tables["BiomedCLIP image-text cosine"]
    assert caption["here"] is None  # the headline is of the words: BiomedCLIP saw nothing here
    assert caption["MedMax 7B"] == 0.37


def calibrated():
    """As eval/pipeline/option_likelihoods.py tells it, of a task whose name is markup."""
    bins = [
        dict(n=n, groups=2, confidence=c, low=c - 0.05, high=c + 0.05, accuracy=a, ci_low=a - 0.1,
             ci_high=a + 0.1)
        for n, c, a in ((4, 0.55, 0.25), (5, 0.75, 0.5), (4, 0.85, 0.75))
    ]  # fmt: skip
    at = [k / 10 for k in range(1, 11)]
    curve = [dict(coverage=c, risk=c / 2, ci_low=c / 4, ci_high=min(c, 0.8)) for c in at]
    rows = [dict(task="<b>t</b>", metric="ece", n=13, value=0.2, ci_low=0.1, ci_high=0.3)]
    return dict(reason="", rows=rows, bins={"<b>t</b>": bins}, curves={"<b>t</b>": curve})


def test_calibration_is_drawn_with_the_n_of_each_bin(tmp_path):
    text = whole(tmp_path, calibration=calibrated())
    charts = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(charts) == 2 and text.count("<svg") == 2 and "<b>t</b>" not in text
    reliability, risk = charts
    assert reliability.count('class="dot"') == reliability.count('class="whisker"') == 3
    assert "4 answers, sure 0.500 to 0.600 (mean 0.550): 0.250 right" in reliability
    assert "13 answers in 3 bins of 4 to 5" in text
    assert risk.count('class="dot"') == 10 and risk.count('class="band"') == 1
    assert "the surest 50 %: 0.250 wrong, 0.125–0.500" in risk
    assert "0.500 of all are wrong, 0.250 of the surest half" in text
    table = text.split("The bins in numbers")[1].split("</details>")[0]
    assert table.count("<tr>") == 4 and "0.500–0.600" in table and "0.150–0.350" in table


def test_few_groups_are_marked_and_one_group_has_no_interval(tmp_path):
    found = calibrated()
    for one in (*found["bins"]["<b>t</b>"][:1], *found["curves"]["<b>t</b>"][:1]):
        one |= dict(groups=1, ci_low=None, ci_high=None)
    row = dict(task="t", metric="accuracy", few_groups=True, value=0.5, ci_low=0.25, ci_high=0.75)
    found["rows"] = [row | dict(n=40, groups=19), row | dict(n=40, groups=20, few_groups=False)]
    found["rows"].append(row | dict(n=9, groups=1, ci_low=None, ci_high=None))
    text = whole(tmp_path, calibration=found)
    part = text.split("Options by likelihood, and calibration")[1].split("</table>")[0]
    assert part.count("0.250–0.750") == 2 and part.count("0.250–0.750 †") == 1
    assert "few_groups" not in text and "†: fewer than 20 groups" in text
    bins = text.split("The bins in numbers")[1].split("</details>")[0]
    assert "0.400–0.600 †" in bins and "None" not in text and "nan" not in text
    assert reporting_tables.interval(found["rows"][2]) == "–"


def test_a_page_without_likelihoods_has_no_charts(tmp_path):
    assert "<svg" not in whole(tmp_path)


def test_whole_sets_are_a_table_a_metric(tmp_path):
    head = dict(task="image_generation_report", scorer="biomedclip", fingerprint="0123abcd")
    told = dict(n=9, groups=7, value=0.5, ci_low=0.4, ci_high=0.6)
    sets = [
        head | dict(metric="diversity") | told | dict(references=0.7, references_low=0.6,
                                                      references_high=0.75),
        head | dict(metric="kid") | told | dict(subsets_mean=0.4, subsets_std=0.02, size=4),
    ]  # fmt: skip
    text = whole(tmp_path, picture_sets=sets)
    part = text.split("Whole sets of pictures")[1].split("</section>")[0]
    assert part.count("<table") == 2 and "0123abcd" not in part
    assert "references, 95 %" in part.split("</table>")[0] and "0.600–0.750" in part
    first, second = part.split("</table>")[:2]
    assert "subsets_std" in second and "subsets_std" not in first


def test_slices_have_enough_items_or_are_counted(tmp_path):
    summary, records = made(tmp_path)
    values = aggregate.scores_by_item(records, per_record.read(tmp_path))
    rows, few = reporting_tables.slices(records, values, summary, **NUMBERS)
    assert [(r["slice"], r["n"]) for r in rows] == [("modality: CT", 20)] and few == 1
    assert rows[0]["value"] == pytest.approx(7 / 20)


def test_failures_are_counted_and_shown(tmp_path):
    summary, records = made(tmp_path)
    values = aggregate.scores_by_item(records, per_record.read(tmp_path))
    counts = {r["task"]: r for r in reporting_tables.failures(records, values, summary)}
    slake = counts["slake_closed"]
    assert (slake["items"], slake["wrong"], slake["unparsed"], slake["errors"]) == (24, 8, 8, 0)
    records[0] = records[0] | {"text": "", "error": "HTTP 400: too large"}
    counts = {r["task"]: r for r in reporting_tables.failures(records, values, summary)}
    assert counts["slake_closed"]["errors"] == 1 and counts["slake_closed"]["answered"] == 23
    shown = reporting_tables.failed_examples(records, values, summary)
    of_slake = [r["what"] for r in shown if r["task"] == "slake_closed"]
    assert of_slake == ["error", *["unparsed"] * 3, *["wrong"] * 3]
    assert any(r["answer"] == "HTTP 400: too large" for r in shown)


def test_a_table_of_the_sample_alone(tmp_path):
    asked = [row("sample_vqa", "closed", id=str(n)) for n in range(3)]
    summary, records = made(tmp_path, asked)
    summary["settings"]["questions"] = ["sample"]
    del summary["judge"], summary["scorers"], summary["probes"], summary["contamination"]
    page.write(tmp_path / "report.html", summary, records, images_folder=tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "Not run" not in text and "Beside the published" not in text
    assert "nobody: open answers have text metrics only" in text and "Probes" not in text


def test_the_page_again_by_the_program(tmp_path):
    made(tmp_path)
    command = [sys.executable, "-m", "eval.report", f"--workdir={tmp_path}"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Examples: slake_closed" in (tmp_path / "report.html").read_text()
    (tmp_path / "summary.json").unlink()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and "run eval.run to its end" in done.stderr
    assert "Traceback" not in done.stderr


# The release's prompts, by name: what each asks, word for word.


def test_sft_and_chameleon(tmp_path):
    (closed, opened, mcq, caption, drawn, mixed, chat, detailed) = task_items.from_rows(
        [row("vqa_rad", "closed"), *rows()[MANY:]]
    )
    picture = tmp_path / "a.png"
    asked = {
        item.task: task_items.prompt_parts(item, tmp_path, "chameleon")
        for item in (closed, opened, mcq)
    }
    assert asked["vqa_rad_closed"] == (
        picture,
        "Answer the question based on this image and respond 'yes' or 'no'.\n"
        "Question: Is it a CT?\nAnswer:",
    )
    assert asked["vqa_rad_open"][1] == (
        "Answer the question based on this image.\nQuestion: Where?\nAnswer:"
    )
    assert asked["pmc_vqa_mcq"][1] == (
        "Answer the question based on this image and respond 'A', 'B', 'C', or 'D'.\n"
        "Question: Which?\nA: CT\nB: MRI\nAnswer:"
    )
    more = "Explain a CT. Answer the question with one picture."
    assert task_items.prompt_parts(mixed, tmp_path, "chameleon") == (more,)
    for name in task_items.PROMPTS:
        assert task_items.prompt_parts(caption, tmp_path, name) == (
            picture,
            task_items.CAPTION_PROMPT,
        )
        assert task_items.prompt_parts(drawn, tmp_path, name) == ("A <b>chest</b> X-ray.",)
        assert task_items.prompt_parts(chat, tmp_path, name) == ("What?", picture)
        assert task_items.prompt_parts(detailed, tmp_path, name) == (
            picture,
            task_items.DETAILED_PROMPT,
        )
    for name in ("sft", "default"):
        assert task_items.prompt_parts(closed, tmp_path, name) == (picture, "Is it a CT?")
        assert task_items.prompt_parts(mixed, tmp_path, name) == ("Explain a CT.",)
    with pytest.raises(task_items.TaskError, match="prompt is 'llava'; use one of sft, chameleon"):
        task_items.prompt_parts(closed, tmp_path, "llava")


def test_who_ends_the_turn():
    for family in task_items.FAMILIES:
        assert task_items.uses_end_of_turn(family, "sft") and not task_items.uses_end_of_turn(
            family, "chameleon"
        )
        assert task_items.uses_end_of_turn(family, "default") == (family == "visual_chat")


def test_a_row_says_its_own_class():
    (item,) = task_items.from_rows([row("image_captioning", "report")])
    assert item.data_class == egress.CREDENTIALED
    (item,) = task_items.from_rows([row("image_captioning", "report", data_class="open")])
    assert item.data_class == egress.OPEN
    (item,) = task_items.from_rows([row("my_own", "closed")])
    assert item.data_class == egress.LICENCE_BOUND


@pytest.mark.parametrize("config", [eval_suite, eval_paper])
def test_the_configs_say_every_field(config):
    found = build(Settings, config.get_config())
    assert found.mode == ("strict" if config is eval_suite else "paper")
    strict, sample = config is eval_suite, found.sample
    assert sample.text_greedy and sample.repetition_penalty == (1.0 if strict else 1.2)
    assert (sample.budget, sample.max_gen_len) == (
        ("answer", 1_024) if strict else ("segment", 4_096)
    )
    assert found.judge.endpoint == "" and found.judge.service.credentialed_hosts == ()
    text = Path(config.__file__).read_text().split("def get_config")[1]
    for line in text.splitlines():
        if re.match(r"    config\.[\w.]+ = ", line) and "ConfigDict()" not in line:
            assert "  # " in line or ".counts." in line, f"say what it is: {line}"


def test_the_suite_as_a_table():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "eval.suite"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * (2 + len(catalog.TASKS)) + 2 and "| slake_closed |" in done.stdout
    assert done.stdout in (root / "docs" / "reference" / "tasks.md").read_text()
    theirs = [*command, "published"]
    done = subprocess.run(theirs, cwd=root, capture_output=True, text=True)
    assert "| captioning_quilt | BiomedCLIP image-text cosine | MedMax 7B | 0.32 |" in done.stdout
