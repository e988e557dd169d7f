"""Several evaluations in one table: ranks, letters, what is left out; the page and its files."""

import csv
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from test_compare import write
from test_html_page import HOSTILE, parsed

from medmax_jax.eval import leaderboard as program
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.reporting import leaderboard
from medmax_jax.eval.reporting.comparison import ComparisonError
from medmax_jax.eval.stats import paired_tests
from medmax_jax.io import html_page

ROOT = Path(__file__).parents[2]
SETTINGS = dict(seed=0, resamples=2_000)


def test_letters_by_hand():
    assert paired_tests.letters(["x", "y"], []) == {"x": "a", "y": "a"}
    assert paired_tests.letters(["x", "y"], [("x", "y")]) == {"x": "a", "y": "b"}
    chain = paired_tests.letters(["x", "y", "z"], [("x", "z")])
    assert chain == {"x": "a", "y": "ab", "z": "b"}
    split = [("x", "y"), ("x", "z"), ("y", "z")]
    assert paired_tests.letters(["x", "y", "z"], split) == {"x": "a", "y": "b", "z": "c"}
    many = [f"m{n}" for n in range(30)]
    letters = paired_tests.letters(many, itertools.combinations(many, 2))
    assert letters["m0"] == "a" and letters["m25"] == "z" and letters["m26"] == "a1"


def test_two_names_share_a_letter_if_and_only_if_they_are_not_different():
    pick = random.Random(0)
    for _ in range(200):
        names = [f"m{n}" for n in range(pick.randrange(1, 9))]
        pairs = list(itertools.combinations(names, 2))
        different = {pair for pair in pairs if pick.random() < 0.4}
        letters = paired_tests.letters(names, different)
        assert all(letters.values()) and letters[names[0]].startswith("a")
        for pair in pairs:
            shared = set(letters[pair[0]]) & set(letters[pair[1]])
            assert bool(shared) == (pair not in different), (different, letters)


def finished(folder, answers, model="m", **changes):
    """Write a finished evaluation; answers: task -> texts, `yes` is right."""
    for task, texts in answers.items():
        write(folder, texts, task, **changes)
    summary = dict(model=model, scores=[])
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def texts(right, count=60):
    return ["yes"] * right + ["no"] * (count - right)


@pytest.fixture
def runs(tmp_path):
    """Two models that are close to each other, and one that is worse."""
    folders = [
        finished(tmp_path / "good", {"vqa_closed": texts(58), "vqa_open": texts(50)}, "/w/good"),
        finished(tmp_path / "near", {"vqa_closed": texts(56), "vqa_open": texts(50)}, "near"),
        finished(tmp_path / "poor", {"vqa_closed": texts(12), "vqa_open": texts(50)}, HOSTILE),
    ]
    return {str(folder): folder for folder in folders}


def test_letters_follow_from_paired_tests(runs, tmp_path):
    board = leaderboard.build(runs, **SETTINGS)
    assert [row["model"] for row in board.rows] == ["good", "near", HOSTILE]
    assert [row["rank"] for row in board.rows] == [1, 2, 3]
    closed = [row["tasks"]["vqa_closed"] for row in board.rows]
    assert [cell["letters"] for cell in closed] == ["a", "a", "b"]
    assert closed[0]["value"] == pytest.approx(58 / 60) and closed[0]["groups"] == 30
    assert all(cell["low"] < cell["value"] < cell["high"] for cell in closed)
    assert {row["tasks"]["vqa_open"]["letters"] for row in board.rows} == {"a"}  # equal
    assert [row["mean"]["letters"] for row in board.rows] == ["a", "a", "b"]
    assert board.rows[2]["mean"]["value"] == pytest.approx((12 / 60 + 50 / 60) / 2)
    assert len(board.pairs) == 3 * 3 and board.left_out == []
    reversed_runs = leaderboard.build(dict(reversed(runs.items())), **SETTINGS)
    assert reversed_runs.rows == board.rows
    pair = {str(folder): folder for folder in list(runs.values())[:2]}
    assert leaderboard.build(pair, **SETTINGS).rows[0]["model"] == "good"


def test_other_items_and_scorers_are_named_and_not_compared(runs, tmp_path):
    other = finished(tmp_path / "other", {"vqa_closed": texts(60)}, prompt="Is it not?")
    elsewhere = finished(tmp_path / "elsewhere", {"vqa_closed": texts(9)}, id="x")
    part = finished(tmp_path / "part", {"vqa_closed": texts(40, count=50)})
    every = runs | {str(folder): folder for folder in (other, elsewhere, part)}
    board = leaderboard.build(every, **SETTINGS)
    assert len(board.rows) == 4
    lines = "\n".join(board.left_out)
    assert f"{other}: not compared with" in lines and "prompt is" in lines
    assert f"{elsewhere}: not compared: it has no item of" in lines
    assert "10 items of vqa_closed that another run did not answer" in lines
    assert f"{part}: no exact of vqa_open" in lines
    rows = {row["workdir"]: row for row in board.rows}
    assert rows[str(part)]["tasks"]["vqa_open"] is None
    assert all(row["tasks"]["vqa_closed"]["n"] == 50 for row in board.rows)
    assert rows[str(part)]["mean"]["n"] == 50  # the tasks that all have
    judged = list(runs.values())
    for folder, judge in zip(judged, ("j1", "j1", "j2"), strict=True):
        votes = [
            dict(id=f"vqa_open/{n}", kind="correct", votes=[1.0], why=[""], judge=judge, case="")
            for n in range(60)
        ]
        (folder / "judgments.jsonl").write_text("".join(json.dumps(v) + "\n" for v in votes))
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"judge": {"judge": judge}}))
    board = leaderboard.build(runs, **SETTINGS)
    assert board.tasks["vqa_open"] == "judge_correct"
    assert board.rows[-1]["tasks"]["vqa_open"] is None
    assert f"{judged[2]}: judge_*: by j2, and by j1 elsewhere" in board.left_out


def test_errors_name_the_fix(runs, tmp_path):
    one = dict(list(runs.items())[:1])
    with pytest.raises(ComparisonError, match="1 evaluation can be in the table; required: 2"):
        leaderboard.build(one, **SETTINGS)
    with pytest.raises(ComparisonError, match="too few for 105 pairs: .* use at least 2101"):
        leaderboard.build({f"d{n}": tmp_path for n in range(15)}, seed=0, resamples=2_000)
    with pytest.raises(EvalError, match="no finished evaluation"):
        leaderboard.build(one | {"none": tmp_path / "none"}, **SETTINGS)


def test_the_page_runs_its_own_script_alone(runs):
    board = leaderboard.build(runs, **SETTINGS)
    markup = leaderboard.render(board, facts=dict(seed=0))
    tags = parsed(markup)
    assert markup.count("<script>") == 1 and html_page.SORT_SCRIPT in markup
    assert html_page.script_policy(html_page.SORT_SCRIPT) in html_page.html.unescape(markup)
    assert not any(name.startswith("on") for _, attributes in tags.tags for name in attributes)
    assert "good has the highest mean, 0.900, and does not differ significantly from near." in (
        tags.text
    )
    values = [a["data-value"] for t, a in tags.tags if t == "td" and "data-value" in a]
    assert values[:2] == ["good", "1"] and float(values[2]) == pytest.approx(0.9)
    assert HOSTILE in values


def test_the_program(runs, tmp_path):
    workdir = tmp_path / "board"
    command = [sys.executable, "-m", "eval.leaderboard", *runs, f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.967 a" in done.stdout and f"page: {workdir}/leaderboard.html" in done.stdout
    content = json.loads((workdir / program.CONTENT).read_text())
    assert content["rows"][0]["model"] == "good" and content["made_by"]["resamples"] == 10_000
    with open(workdir / program.TABLE, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["vqa_closed letters"] for row in table] == ["a", "a", "b"]
    assert program.main([str(tmp_path / "none"), f"--workdir={workdir}"]) == 1


def test_a_workdir_that_is_named_twice_is_an_error(runs, tmp_path, capsys):
    first = next(iter(runs))
    for again in (first, f"{first}/", f"{first}/../{Path(first).name}"):
        assert program.main([*runs, again, f"--workdir={tmp_path / 'board'}"]) == 1
        assert "is named twice; name each workdir once" in capsys.readouterr().err
