"""The page: published numbers, slices, failures; and the prompts of the MedMax release by name."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
from test_eval_rows import CHAT

import medmax_jax
from medmax_jax import environment
from medmax_jax.config import build
from medmax_jax.configs import eval_paper, eval_suite
from medmax_jax.endpoints import egress
from medmax_jax.eval.config import Settings
from medmax_jax.eval.metrics import aggregate, per_record
from medmax_jax.eval.pipeline import inference
from medmax_jax.eval.reporting import curves, definitions, page, verdict
from medmax_jax.eval.reporting import tables as reporting_tables
from medmax_jax.eval.results import BaselineScores, MetricRow, Summary
from medmax_jax.eval.stats.intervals import Resampling
from medmax_jax.eval.tasks import catalog
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.io import html_page

RESAMPLING = Resampling(0, 2_000)
MANY = 24  # questions, so that a slice of half of them is too small and the whole is not


def row(task, kind, **changes):
    columns = dict(prompt="Is it a CT?", answer="yes", image_path="a.png")
    return dict(task_name=task, question_type=kind) | columns | changes


def rows():
    """Return rows of all families; SLAKE with slices and with every kind of failure."""
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
    """Answers yes, no, and a text that cannot be parsed, in turn; generates images where asked."""

    def generate(self, requests):
        texts = ["yes", "no", "<script>alert(1)</script>"]
        return [
            [PIL.Image.new("RGB", (32, 32), "teal")] * (ask.mode != "text")
            + [texts[n % 3]] * (ask.mode != "image")
            for n, ask in enumerate(requests)
        ]


def make_workdir(tmp_path, item_rows=None):
    """Return the summary and the records of a workdir that eval.run might have written."""
    PIL.Image.new("RGB", (64, 48), "maroon").save(tmp_path / "a.png")
    items = task_items.from_rows(item_rows or rows())
    records = inference.run_items(
        Scripted(),
        items,
        mode="strict",
        images_folder=tmp_path,
        out=tmp_path / "records.jsonl",
        progress=lambda _: None,
    )
    lines = [
        dict(id=r.id, kind=kind, votes=votes, why="", judge="j", case="")
        for r in records
        for family, kind, votes in (
            ("vqa_open", "correct", [0.0, 1.0, 0.0]),
            ("visual_chat", "relative", [[8.0, 6.0], [9.0, 5.0]]),
        )
        if r.family == family
    ]
    put = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / per_record.JUDGMENTS).write_text(put)
    inputs = per_record.read(tmp_path)
    baseline = [dict(task="slake_closed", metric="accuracy", value=0.5)]
    summary = dict(
        model="scripted & co",
        adapter="",
        settings=dict(
            mode="strict",
            prompt="sft",
            images=str(tmp_path),
            questions=["x"],
            seed=RESAMPLING.seed,
            resamples=RESAMPLING.resamples,
        ),
        scores=[
            row.to_json()
            for row in aggregate.summary(records, inputs, mode="strict", resampling=RESAMPLING)
        ],
        floors=[dict(name="majority", says="the most common answer", scores=baseline)],
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
    return Summary.from_json(summary), records


def render_page(tmp_path, **changes):
    summary, records = make_workdir(tmp_path)
    summary = dataclasses.replace(summary, **changes)
    page.write(tmp_path / "report.html", summary, records, images_folder=tmp_path)
    return (tmp_path / "report.html").read_text()


def test_the_page_has_every_part(tmp_path):
    text = render_page(tmp_path)
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert heads[:5] == [
        "Result", "Scores", "Baselines", "Other metrics", "Comparison with published numbers"
    ]  # fmt: skip
    for title in (
        "Probes: the same questions in modified form",
        "Options by likelihood, and calibration",
        "Contamination: the clean and the contaminated part",
        "By slice",
        "Failures",
        "Tasks not run, or without a score",
        "Examples: multimodal",
        "Examples: visual_chat_conversation",
    ):
        assert title in heads, title
    for content in (
        "scripted &amp; co",
        "gpt-4o-mini-2024-07-18",
        "-0.500 to 0.000",
        "efficientnet_lite0",
        "Not available: the model gives no likelihoods",
        "majority: the most common answer.",
        "image against text only, over 256 tokens cut",  # how published captions were scored
        "answered, but not scored",  # generation, without a scorer
        "HuatuoGPT-Vision 7B",
    ):
        assert content in text, content


def test_the_page_is_self_contained_and_has_no_scripts(tmp_path):
    text = render_page(tmp_path)
    assert html_page.POLICY in text and "<script" not in text and "<b>chest" not in text
    assert not re.search(r"src=\"(?!data:)", text)
    # the items are credentialed, so no link names their files
    assert re.findall(r"<a href=\"([^\"]*)", text) == ["items.html", "items.csv"]
    assert text.count("data:image/png") >= 8


def test_published_numbers_are_shown_next_to_the_scores(tmp_path):
    summary, _ = make_workdir(tmp_path)
    tables = {kind: rows for kind, rows, _ in reporting_tables.published(summary)}
    closed = {r["task"]: r for r in tables["accuracy, %"]}
    assert closed["slake_closed"]["MedMax 7B"] == 88.4
    assert closed["slake_closed"]["here"] == "33.3"
    assert closed["slake_closed"]["as released"] == "33.3"
    chat = {r["task"]: r for r in tables["gpt-4o-mini relative score"]}
    assert chat["visual_chat_conversation"]["here"] == f"{100 * 5.5 / 8.5:.1f}"
    (caption,) = tables["BiomedCLIP image-text cosine"]
    assert caption["here"] is None  # the headline is a text metric: BiomedCLIP did not score here
    assert caption["MedMax 7B"] == 0.37


def calibrated():
    """Return a calibration summary of a task whose name is markup."""
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
    text = render_page(tmp_path, calibration=calibrated())
    charts = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(charts) == 3 and text.count("<svg") == 3 and "<b>t</b>" not in text
    _, reliability, risk = charts
    assert reliability.count("<title>") == 3  # one per dot
    assert "4 answers, confidence 0.500 to 0.600 (mean 0.550): accuracy 0.250" in reliability
    assert "13 answers in 3 bins of 4 to 5" in text
    assert risk.count("<title>") == 10
    assert "the most confident 50 %: risk 0.250, 0.125–0.500" in risk
    assert "risk 0.500 of all answers, 0.250 of the most confident half" in text
    table = text.split("Table of the bins")[1].split("</details>")[0]
    assert table.count("<tr>") == 4 and "0.500–0.600" in table and "0.150–0.350" in table


def test_intervals_of_calibration_are_drawn_for_enough_groups(tmp_path):
    result = calibrated()
    few = curves.render_curves(result)
    for row in (*result["bins"]["<b>t</b>"], *result["curves"]["<b>t</b>"]):
        row |= dict(groups=20)
    assert curves.render_curves(result).count("opacity: 0.6") > few.count("opacity: 0.6")
    assert "A bin of fewer than 20 groups has no whisker" in few


def test_few_groups_are_marked_and_one_group_has_no_interval(tmp_path):
    result = calibrated()
    for one in (*result["bins"]["<b>t</b>"][:1], *result["curves"]["<b>t</b>"][:1]):
        one |= dict(groups=1, ci_low=None, ci_high=None)
    row = dict(task="t", metric="accuracy", few_groups=True, value=0.5, ci_low=0.25, ci_high=0.75)
    result["rows"] = [row | dict(n=40, groups=19), row | dict(n=40, groups=20, few_groups=False)]
    result["rows"].append(row | dict(n=9, groups=1, ci_low=None, ci_high=None))
    text = render_page(tmp_path, calibration=result)
    part = text.split("Options by likelihood, and calibration")[1].split("</table>")[0]
    assert part.count("0.250–0.750") == 2 and part.count("0.250–0.750 †") == 1
    assert "few_groups" not in text and "†: fewer than 20 groups" in text
    bins = text.split("Table of the bins")[1].split("</details>")[0]
    assert "0.400–0.600 †" in bins and "None" not in text and "nan" not in text
    assert reporting_tables.interval(result["rows"][2]) == "–"


def test_a_page_without_likelihoods_has_the_chart_of_scores_only(tmp_path):
    text = render_page(tmp_path)
    assert text.count("<svg") == 1 and "slake_closed" in text.split("</svg>")[0].split("<svg")[1]


def score(value, **changes):
    """Return a score row of 40 items of 30 groups, with an interval of ± 0.1."""
    columns = dict(task="t", family="vqa_closed", metric="accuracy", n=40, groups=30, n_unparsed=4,
                   value=value, ci_low=value - 0.1, ci_high=value + 0.1, headline=True)  # fmt: skip
    return MetricRow(**columns | changes)


def with_baselines(row, *, floors=(), blind=None):
    """Return a summary of one score, of baselines by name, and of a paired comparison."""
    named = tuple(
        BaselineScores(name=name, says="", scores=(dataclasses.replace(row, value=v),))
        for name, v in floors
    )
    compared = (dict(name="blind", scores=[blind]),) if blind else ()
    return Summary(model="m", scores=(row,), floors=named, baselines=compared)


@pytest.mark.parametrize(
    "value, groups, status, label, phrase",
    [
        (0.7, 30, "good", "Above the baseline", "is 0.200 above the baseline “two” (0.500)."),
        (0.3, 30, "bad", "Below the baseline", "is 0.200 below the baseline “two” (0.500)."),
        (0.45, 30, "neutral", "Inconclusive", "0.050 below the baseline “two” (0.500), and the"),
        (0.5, 30, "neutral", "Inconclusive", "scores the same as the baseline “two” (0.500)."),
        (0.7, 19, "good", "Above the baseline", "0.600–0.800 (approximate: few groups), on"),
    ],
)  # fmt: skip
def test_the_verdict_is_a_sentence_with_a_status(value, groups, status, label, phrase):
    summary = with_baselines(score(value, groups=groups), floors=[("one", 0.4), ("two", 0.5)])
    text = verdict.render(summary)
    assert f'<li class="{status}"><b>{label}.</b> t: accuracy {value:.3f}, 95\xa0% interval' in text
    assert phrase in text and "10.0% of the answers are unparsed" in text
    assert f"on 40 items of {groups} groups" in text
    assert ("†" in text) == (groups == 19)


def test_the_verdict_uses_the_paired_interval_of_the_blind_baseline():
    blind = dict(task="t", metric="accuracy", before=0.65, after=0.7, ci_low=0.01, ci_high=0.09)
    summary = with_baselines(score(0.7), floors=[("one", 0.4)], blind=blind)
    (head,) = verdict.headlines(summary)
    assert (head.best, head.outcome) == ("blind", verdict.ABOVE)
    assert "95 % interval of the difference 0.010–0.090" in verdict.sentence(head)
    assert reporting_tables.main_table(summary)[0]["best baseline"] == 0.65
    (row,) = reporting_tables.baseline_table(summary)
    assert (row["the model"], row["one"], row["blind"]) == (0.7, 0.4, 0.65)
    summary.baselines[0]["scores"] = [blind | dict(ci_low=None, ci_high=None)]
    assert verdict.headlines(summary)[0].outcome == verdict.INCONCLUSIVE


def test_one_group_and_no_baseline_have_no_verdict():
    row = score(0.7, groups=1, ci_low=None, ci_high=None)
    (head,) = verdict.headlines(with_baselines(row))
    assert head.outcome == verdict.NO_BASELINE
    assert verdict.sentence(head).endswith("A single group has no interval.")
    (head,) = verdict.headlines(with_baselines(row, floors=[("one", 0.1)]))
    assert head.outcome == verdict.INCONCLUSIVE
    assert verdict.render(Summary(model="m", scores=())) == ""


def test_intervals_of_few_groups_are_not_drawn():
    drawn, left_out = (
        verdict.render(with_baselines(score(0.7, groups=groups), floors=[("one", 0.4)]))
        for groups in (20, 19)
    )
    assert "Lines: 95 % intervals over groups." in drawn and "not drawn" not in drawn
    assert "fewer than 20 groups; the interval is in the table and not drawn" in left_out
    assert drawn.count("<path") == left_out.count("<path") + 1


def test_the_head_states_data_seed_date_and_version(tmp_path):
    """What computed the numbers is in the summary; the program that renders it adds nothing."""
    made_by = environment.environment()
    changes = dict(fingerprints=dict(data="4a04f14a8a44110b"), environment=made_by)
    text = render_page(tmp_path, **changes)
    head = re.search(r'<p class="head">(.*?)</p>', text)[1].split(" · ")
    assert head[:6] == ["model scripted &amp; co", "data x", "digest 4a04f14a8a44110b",
                        "generation strict", "prompts sft", "seed 0"]  # fmt: skip
    assert re.fullmatch(r"date \d{4}-\d\d-\d\d \d\d:\d\d UTC", head[6])
    assert head[7] == f"medmax_jax {medmax_jax.__version__}"
    assert head[-1] == f"machine {made_by['machine']}"
    without = re.search(r'<p class="head">(.*?)</p>', render_page(tmp_path))[1]
    assert "machine" not in without and "commit" not in without


def test_images_in_the_workdir_link_to_their_files(tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    run.mkdir(), data.mkdir()
    item_rows = [one | dict(data_class="open") for one in rows()]
    summary, records = make_workdir(run, item_rows)
    for folder, expected in ((run, {"a.png", "records_images"}), (data, {"records_images"})):
        shutil.copy(run / "a.png", data)
        page.write(run / "report.html", summary, records, images_folder=folder)
        text = (run / "report.html").read_text()
        assert "shown to the model" in text and "generated by the model" in text
        links = re.findall(r"<a href=\"([^\"]*)", text)
        assert {link.split("/")[0] for link in links} == expected | {"items.html", "items.csv"}
        assert all((run / link).is_file() for link in links)


def test_every_metric_has_a_definition_with_its_direction():
    names = [spec.metric for spec in catalog.TASKS.values()] + ["kid", "ece", "clip_recall_5"]
    for name in names:
        assert re.search("(higher|lower) is better$", definitions.metric_definition(name)), name
    assert definitions.metric_definition("mystery") == ""


def test_complete_image_sets_have_one_table_per_metric(tmp_path):
    head = dict(task="image_generation_report", scorer="biomedclip", fingerprint="0123abcd")
    interval = dict(n=9, groups=7, value=0.5, ci_low=0.4, ci_high=0.6)
    sets = [
        head | dict(metric="diversity") | interval | dict(references=0.7, references_low=0.6,
                                                      references_high=0.75),
        head | dict(metric="kid") | interval | dict(subsets_mean=0.4, subsets_std=0.02, size=4),
    ]  # fmt: skip
    text = render_page(tmp_path, **{page.IMAGE_SETS: sets})
    part = text.split("Complete sets of images")[1].split("</section>")[0]
    assert part.count("<table") == 2 and "0123abcd" not in part
    assert "references, 95 %" in part.split("</table>")[0] and "0.600–0.750" in part
    first, second = part.split("</table>")[:2]
    assert "subsets_std" in second and "subsets_std" not in first


def test_slices_have_enough_items_or_are_counted(tmp_path):
    summary, records = make_workdir(tmp_path)
    values = aggregate.scores_by_item(records, per_record.read(tmp_path))
    rows, few = reporting_tables.slices(records, values, summary, resampling=RESAMPLING)
    assert [(r["slice"], r["n"]) for r in rows] == [("modality: CT", 20)] and few == 1
    assert rows[0]["value"] == pytest.approx(7 / 20)


def test_failures_are_counted_and_shown(tmp_path):
    summary, records = make_workdir(tmp_path)
    values = aggregate.scores_by_item(records, per_record.read(tmp_path))
    counts = {r["task"]: r for r in reporting_tables.failures(records, values, summary)}
    slake = counts["slake_closed"]
    assert (slake["items"], slake["wrong"], slake["unparsed"], slake["errors"]) == (24, 8, 8, 0)
    records[0] = dataclasses.replace(records[0], text="", error="HTTP 400: too large")
    counts = {r["task"]: r for r in reporting_tables.failures(records, values, summary)}
    assert counts["slake_closed"]["errors"] == 1 and counts["slake_closed"]["answered"] == 23
    shown = reporting_tables.failed_examples(records, values, summary)
    of_slake = [r["kind"] for r in shown if r["task"] == "slake_closed"]
    assert of_slake == ["error", *["unparsed"] * 3, *["wrong"] * 3]
    assert any(r["answer"] == "HTTP 400: too large" for r in shown)


def test_a_page_of_the_embedded_sample(tmp_path):
    item_rows = [row("sample_vqa", "closed", id=str(n)) for n in range(3)]
    summary, records = make_workdir(tmp_path, item_rows)
    summary = dataclasses.replace(
        summary, settings=summary.settings | dict(questions=["sample"]), judge=None, scorers={},
        probes=None, contamination=None,
    )  # fmt: skip
    page.write(tmp_path / "report.html", summary, records, images_folder=tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "Tasks not run" not in text and "Comparison with published" not in text
    assert "Judge: none; open answers have text metrics only" in text
    assert "Probes: the same" not in text


def test_the_program_rewrites_the_page(tmp_path):
    make_workdir(tmp_path)
    command = [sys.executable, "-m", "eval.report", f"--workdir={tmp_path}"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Examples: slake_closed" in (tmp_path / "report.html").read_text()
    (tmp_path / "summary.json").unlink()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and "run eval.run to the end" in done.stderr
    assert "Traceback" not in done.stderr


# The prompts of the MedMax release by name, verbatim.


def test_prompts_of_sft_and_chameleon(tmp_path):
    (closed, opened, mcq, caption, drawn, mixed, chat, detailed) = task_items.from_rows(
        [row("vqa_rad", "closed"), *rows()[MANY:]]
    )
    image = tmp_path / "a.png"
    prompts = {
        item.task: task_items.prompt_parts(item, tmp_path, "chameleon")
        for item in (closed, opened, mcq)
    }
    assert prompts["vqa_rad_closed"] == (
        image,
        "Answer the question based on this image and respond 'yes' or 'no'.\n"
        "Question: Is it a CT?\nAnswer:",
    )
    assert prompts["vqa_rad_open"][1] == (
        "Answer the question based on this image.\nQuestion: Where?\nAnswer:"
    )
    assert prompts["pmc_vqa_mcq"][1] == (
        "Answer the question based on this image and respond 'A', 'B', 'C', or 'D'.\n"
        "Question: Which?\nA: CT\nB: MRI\nAnswer:"
    )
    # Verbatim: part of the data.
    expected = "Explain a CT. Answer the question with one picture."
    assert task_items.prompt_parts(mixed, tmp_path, "chameleon") == (expected,)
    for name in ("sft", "chameleon", "default"):
        assert task_items.prompt_parts(caption, tmp_path, name) == (
            image,
            task_items.CAPTION_PROMPT,
        )
        assert task_items.prompt_parts(drawn, tmp_path, name) == ("A <b>chest</b> X-ray.",)
        assert task_items.prompt_parts(chat, tmp_path, name) == ("What?", image)
        assert task_items.prompt_parts(detailed, tmp_path, name) == (
            image,
            task_items.DETAILED_PROMPT,
        )
    for name in ("sft", "default"):
        assert task_items.prompt_parts(closed, tmp_path, name) == (image, "Is it a CT?")
        assert task_items.prompt_parts(mixed, tmp_path, name) == ("Explain a CT.",)
    with pytest.raises(task_items.TaskError, match="prompt is 'llava'; use one of sft, chameleon"):
        task_items.prompt_parts(closed, tmp_path, "llava")


def test_the_chat_prompt_states_the_format_of_text_answers(tmp_path):
    items = task_items.from_rows([row("vqa_rad", "closed"), *rows()[MANY:]])
    image = tmp_path / "a.png"
    found = {item.task: task_items.prompt_parts(item, tmp_path, "chat") for item in items}
    whole = "Answer with complete sentences only."
    assert found == {
        "vqa_rad_closed": (image, "Is it a CT?\nAnswer with yes or no only."),
        "vqa_rad_open": (image, "Where?\nAnswer with a word or a short phrase only."),
        "pmc_vqa_mcq": (
            image,
            "Which?\nA: CT\nB: MRI\nAnswer with the letter of one option only.",
        ),
        "captioning_pmc_oa": (image, f"{task_items.CAPTION_PROMPT}\n{whole}"),
        "image_generation_report": ("A <b>chest</b> X-ray.",),
        "multimodal": ("Explain a CT.",),
        "visual_chat_conversation": (f"What?\n{whole}", image),
        "visual_chat_detailed_description": (image, f"{task_items.DETAILED_PROMPT}\n{whole}"),
    }


def test_which_prompts_end_the_turn():
    for family in task_items.FAMILIES:
        assert task_items.uses_end_of_turn(family, "chat")
        assert task_items.uses_end_of_turn(family, "sft") and not task_items.uses_end_of_turn(
            family, "chameleon"
        )
        assert task_items.uses_end_of_turn(family, "default") == (family == "visual_chat")


def test_a_row_may_set_its_data_class():
    (item,) = task_items.from_rows([row("image_captioning", "report")])
    assert item.data_class == egress.CREDENTIALED
    (item,) = task_items.from_rows([row("image_captioning", "report", data_class="open")])
    assert item.data_class == egress.OPEN
    (item,) = task_items.from_rows([row("my_own", "closed")])
    assert item.data_class == egress.LICENCE_BOUND


@pytest.mark.parametrize("config", [eval_suite, eval_paper])
def test_the_configs_document_every_field(config):
    result = build(Settings, config.get_config())
    assert result.mode == ("strict" if config is eval_suite else "paper")
    strict, sample = config is eval_suite, result.sample
    assert sample.text_greedy and sample.repetition_penalty == (1.0 if strict else 1.2)
    assert (sample.budget, sample.max_gen_len) == (
        ("answer", 1_024) if strict else ("segment", 4_096)
    )
    assert result.judge.endpoint == "" and result.judge.service.credentialed_hosts == ()
    text = Path(config.__file__).read_text().split("def get_config")[1]
    for line in text.splitlines():
        if re.match(r"    config\.[\w.]+ = ", line) and "ConfigDict()" not in line:
            assert "  # " in line or ".counts." in line, f"undocumented: {line}"


def test_the_suite_table_is_in_the_documentation():
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
