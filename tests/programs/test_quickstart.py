"""The complete pipeline at a small size: stopped, resumed, without a network; and its page."""

import html.parser
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
from run_setup import environment

from medmax_jax import quickstart

ROOT = pathlib.Path(__file__).parents[2]
SMALL = [
    "--config.views=1",
    "--config.cases=3",
    "--config.run.train.steps=4",
    "--config.run.train.log_every=1",
    "--config.run.train.eval_every=4",
    "--config.run.train.checkpoint_every=2",
    "--config.run.data.batch_size=1",
    "--config.eval.rows=8",
    "--config.eval.counts.vqa_closed=8",
    "--config.eval.counts.vqa_mcq=2",
    "--config.eval.counts.vqa_open=2",
    "--config.eval.counts.captioning=2",
    "--config.eval.counts.image_generation=2",
    "--config.eval.counts.multimodal=0",
]
MARKUP = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


def command(workdir) -> list[str]:
    program = [sys.executable, "-m", "medmax_jax.quickstart", f"--workdir={workdir}", *SMALL]
    offline = (
        shutil.which("unshare")
        and not subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode
    )
    return ["unshare", "-rn", *program] if offline else program


def test_quickstart_resumes_after_a_stop_and_writes_a_report(tmp_path):
    work = tmp_path / "run"
    place = dict(cwd=ROOT, env=environment(), text=True)
    with open(tmp_path / "out.txt", "w") as out:
        first = subprocess.Popen(command(work), stdout=out, stderr=subprocess.STDOUT, **place)
        deadline = time.monotonic() + 400
        while "step 1/4" not in (tmp_path / "out.txt").read_text():
            assert first.poll() is None, (tmp_path / "out.txt").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
        status = first.wait(timeout=120)
    output = (tmp_path / "out.txt").read_text()
    assert status == 75 and "run the same command again to resume" in output, output[-3000:]
    second = subprocess.run(command(work), capture_output=True, timeout=600, **place)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    assert "resuming after step" in second.stdout
    report = json.loads((work / "report.json").read_text())
    first_row = report["scores"][0]
    assert first_row["task"] == "vqa_closed" and first_row["n"] == 8
    assert {"before", "after", "diff", "ci_low", "ci_high"} <= set(first_row)
    assert len(report["comparisons"]) == 3
    page = (work / "report.html").read_text()
    assert "not for clinical use" in page and page.count("data:image/png") > 8


def image() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8))


def page_with_markup() -> str:
    row = dict(n=1, groups=1, diff=0.0, ci_low=0.0, ci_high=0.0)
    report = {
        "scores": [dict(task=MARKUP, metric=MARKUP, before=0.0, after=0.0, **row)],
        "comparisons": [dict(against=MARKUP, theirs=0.0, ours=0.0, **row)],
        "stages": [dict(stage=MARKUP, what=MARKUP, seconds=1.0)],
        "ran": dict(
            seconds=1.0, peak_gib=1.0, jax="0", train_groups=1, test_groups=1,
            model="m", data="d", split="s", digest="0", config="0", seed=0,
            environment=dict(machine=MARKUP),
        ),
        "notes": MARKUP,
    }  # fmt: skip
    case = quickstart.Case(
        name=f"{MARKUP}.png",
        image=image(),
        reconstruction=image(),
        question=MARKUP,
        answer=MARKUP,
        before=MARKUP,
        after=MARKUP,
    )
    made = quickstart.Generated(prompt=MARKUP, real=image(), before=image(), after=image())
    train = [
        dict(step=n, text_nll=1.0 / n, image_nll=2.0 / n, tokens_per_second=9.0) for n in (1, 2)
    ]
    curves = quickstart.plot_curves(train, train[:1])
    return quickstart.build(report, [case], [made], curves)


@pytest.mark.parametrize(
    "low, high, status, label",
    [
        (0.1, 0.3, "good", "Above the baseline"),
        (-0.3, -0.1, "bad", "Below the baseline"),
        (-0.1, 0.3, "neutral", "Inconclusive"),
        (None, None, "neutral", "Inconclusive"),
    ],
)
def test_the_page_states_first_whether_the_adapter_is_above_the_baselines(low, high, status, label):
    row = dict(against="random", n=9, groups=3, ours=0.7, theirs=0.5, diff=0.2, ci_low=low,
               ci_high=high)  # fmt: skip
    unparsed = dict(task="vqa_closed", metric="unparsed", after=0.25)
    (verdict,) = quickstart._verdicts(dict(scores=[unparsed], comparisons=[row]))
    assert verdict[:2] == (status, label)
    assert (
        "accuracy 0.700, against 0.500 of the baseline “random”; difference 0.200" in verdict.text
    )
    assert "on 9 items of 3 groups. 25.0% of the answers are unparsed." in verdict.text


def test_page_escapes_markup_and_forbids_scripts():
    tags, attributes, policy, shown = set(), set(), [], []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.add(tag)
            attributes.update(name for name, _ in attrs)
            if dict(attrs).get("http-equiv") == "Content-Security-Policy":
                policy.append(dict(attrs)["content"])

        def handle_data(self, data):
            shown.append(data)

    text = page_with_markup()
    Reader().feed(text)
    assert "script" not in tags and not {a for a in attributes if a.startswith("on")}
    assert "default-src 'none'" in policy[0] and "script-src" not in policy[0]
    # task, metric, baseline twice, stage, what, notes; then name, question, answer, before, after;
    # prompt
    assert sum(MARKUP in piece for piece in shown) == 7 + 5 + 1 + 1  # and the machine
    assert "http://" not in text and "https://" not in text
