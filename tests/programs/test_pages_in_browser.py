"""Every page in a browser, wide and narrow, light and dark: axe-core, width, and the item browser.

axe-core checks the success criteria of WCAG 2.1, A and AA, and its own best practices: contrast,
names, structure, keyboard. Chromium is the one of the machine.
"""

import dataclasses
import json

import jax
import numpy as np
import PIL.Image
import pytest
from chromium import CHROMIUM
from smmile_files import write_smmile
from test_compare import write as write_evaluation
from test_eval_report import make_workdir, rows
from test_leaderboard import finished, texts
from test_quickstart import page_with_markup
from test_reproduce import reproduce, settings_of, write_released
from test_samples import ROOT, TINY

from medmax_jax import config
from medmax_jax.configs import tiny
from medmax_jax.data import prepare
from medmax_jax.data.records.reader import open_records
from medmax_jax.environment import environment
from medmax_jax.eval import rescore
from medmax_jax.eval.reporting import comparison, leaderboard, page
from medmax_jax.eval.reproduction import page as reproduction_page
from medmax_jax.generation import model_bundle
from medmax_jax.generation.model_bundle import Image, Text
from medmax_jax.generation.output_files import OutputFolder, Prompt
from medmax_jax.scaling import __main__ as scaling
from medmax_jax.sweep import fisher_page
from medmax_jax.training import fisher, samples

WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
AXE = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


def evaluation(folder):
    summary, records = make_workdir(folder, [one | dict(data_class="open") for one in rows()])
    summary = dataclasses.replace(summary, environment=environment())
    page.write(folder / "report.html", summary, records, images_folder=folder)
    return folder / "report.html"


def items(folder):
    return evaluation(folder).with_name("items.html")


def compared(folder):
    first = write_evaluation(folder / "one", ["no"] * 40)
    second = write_evaluation(folder / "two", ["yes"] * 40)
    result = comparison.compare(first, second, seed=0, resamples=2_000)
    side = dict(model="m", digest="0123", seed=0)
    markup = comparison.render(result, "one", "two", facts=[side, side, environment()])
    (folder / "comparison.html").write_text(markup)
    return folder / "comparison.html"


def rescored(folder):
    files = map(str, write_smmile(folder / "published"))
    assert rescore.main([*files, f"--workdir={folder}", "--resamples=2000"]) == 0
    return folder / "rescore.html"


def ranked(folder):
    answers = (("one", 58, 30), ("two", 40, 30), ("three", 12, 31))
    runs = {
        name: finished(folder / name, {"vqa_closed": texts(a), "vqa_open": texts(b)}, name)
        for name, a, b in answers
    }
    board = leaderboard.build(runs, seed=0, resamples=2_000)
    markup = leaderboard.render(board, facts=dict(seed=0) | environment())
    (folder / "leaderboard.html").write_text(markup)
    return folder / "leaderboard.html"


def reproduced(folder):
    (folder / "released").mkdir()
    released = write_released(folder / "released")
    content, _ = reproduce(settings_of(released), released, folder)
    (folder / "reproduction.html").write_text(reproduction_page.render(content))
    return folder / "reproduction.html"


def gallery(folder):
    PIL.Image.new("RGB", (9, 7), "gray").save(folder / "a.png")
    drawn = Image(PIL.Image.new("RGB", (64, 64), "red"), np.arange(4))
    prompts = [
        Prompt(id="0", named=True, parts=("Generate a CT.",)),
        Prompt(id="1", named=True, parts=(folder / "a.png", "What is it?")),
    ]
    output = OutputFolder(folder, prompts, dict(model="m", adapter="a", seed=3))
    output.add(prompts[1], [Text("A gray image."), drawn], "mixed")
    output.add(prompts[0], [drawn], "image")
    return output.gallery()


def record_stats(folder):
    made = prepare.main(["sample", "--out", str(folder / "r"), "--split", "validation"])
    out = folder / "page.html"
    assert made == 0 == prepare.main(["stats", str(folder / "r"), "--out", str(out)])
    return out


def law(folder):
    table = ROOT / "docs" / "explanation" / "scaling_tiny" / "table.csv"
    command = f"--table {table} --law chinchilla --bootstraps 40 --workdir {folder}"
    assert scaling.main(command.split()) == 0
    return folder / "page.html"


def training_samples(folder):
    prepare.prepare_sample(
        folder / "r", model_folder=TINY, split="validation", kind="instruction", views=1, seed=0
    )
    settings, records = tiny.get_config(), open_records(folder / "r")
    settings.sample.update(max_gen_len=16)
    run = config.from_config_dict(settings)
    facts = dict(model="tiny", seed=0) | environment(devices=jax.devices())
    prompts = samples.select_prompts(records, 4, run)
    return samples.write(
        model_bundle.load(TINY), prompts, run, step=1, folder=folder / "samples", facts=facts
    )


def gradients(folder):
    rng, tasks = np.random.default_rng(0), ["VQA", "Image Captioning"] * 4
    rows = []
    for step in (10, 20, 30):
        part = rng.normal(size=(3, 8, 40))
        row = fisher.statistics(part @ part.swapaxes(1, 2), tasks, np.arange(8) // 2)
        rows.append(json.dumps({"kind": "fisher", "step": step} | row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(rows))
    fisher_page.write([f"a={folder}", f"b={folder}"], folder / "page.html", log=print)
    return folder / "page.html"


def quickstart(folder):
    (folder / "report.html").write_text(page_with_markup())
    return folder / "report.html"


@pytest.mark.parametrize(
    "make",
    [
        evaluation,
        items,
        compared,
        rescored,
        ranked,
        reproduced,
        gallery,
        record_stats,
        law,
        training_samples,
        gradients,
        quickstart,
    ],
)
def test_pages_are_accessible_and_never_scroll_sideways(make, browser, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    address = make(tmp_path).as_uri()
    for width in WIDTHS:
        for scheme in SCHEMES:
            viewport = dict(width=width, height=900)
            # axe is a script, which the policy of the page forbids
            context = browser.new_context(viewport=viewport, color_scheme=scheme, bypass_csp=True)
            opened = context.new_page()
            opened.goto(address)
            found = axe.run(opened, options=AXE).response
            assert len(found["passes"]) > 10
            problems = [
                (rule["id"], node["html"], node["failureSummary"])
                for rule in found["violations"]
                for node in rule["nodes"]
            ]
            assert not problems, (width, scheme, problems)
            assert opened.evaluate("document.documentElement.scrollWidth") == width
            assert opened.locator("p.head").first.inner_text().count(" · ") >= 2
            context.close()


def test_the_item_browser_filters_under_its_policy(browser, tmp_path):
    address = items(tmp_path).as_uri()
    opened, messages = browser.new_page(), []
    opened.on("console", lambda message: messages.append(message.text))
    opened.goto(f"{address}#task=slake_closed&verdict=wrong")
    shown, count = opened.locator("details.entry:visible"), opened.locator("output")
    total = opened.locator("details.entry").count()
    assert count.inner_text() == f"{shown.count()} of {total} items"
    assert 0 < shown.count() < total
    assert all("slake_closed" in text and "wrong" in text for text in shown.all_inner_texts())
    opened.select_option("select[name=verdict]", "")
    opened.select_option("select[name=task]", "")
    assert shown.count() == total
    opened.select_option("select[name=tag]", "modality: MRI")
    assert count.inner_text() == f"4 of {total} items"
    opened.select_option("select[name=tag]", "")
    opened.select_option("select[name=task]", "image_generation_report")
    shown.first.locator("summary").click()
    opened.wait_for_function(
        "[...document.querySelectorAll('details[open] img')].every(i => i.naturalWidth)"
    )
    assert shown.first.locator("img").count() == 2 and not messages
    opened.close()
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(address)
    assert plain.locator("details.entry:visible").count() == total
    assert not plain.locator("form").is_visible()


def test_the_leaderboard_sorts_under_its_policy(browser, tmp_path):
    address = ranked(tmp_path).as_uri()
    opened, messages = browser.new_page(), []
    opened.on("console", lambda message: messages.append(message.text))
    opened.on("request", lambda request: messages.append(request.url))
    opened.goto(address)

    def order():
        return opened.locator("table.sortable tbody td:first-child").all_inner_texts()

    assert order() == ["one", "two", "three"]
    head = opened.locator("th", has_text="vqa_open")
    head.locator("button").press("Enter")
    assert order() == ["three", "one", "two"] and head.get_attribute("aria-sort") == "descending"
    head.locator("button").click()
    assert order() == ["one", "two", "three"] and head.get_attribute("aria-sort") == "ascending"
    opened.locator("th", has_text="model").locator("button").click()
    assert order() == ["one", "three", "two"] and head.get_attribute("aria-sort") is None
    assert messages == [address]
    opened.close()
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(address)
    assert plain.locator("table.sortable tbody tr:visible").count() == 3
    assert plain.locator("th button").count() == 0
