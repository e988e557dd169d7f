"""The program medmax_jax.scaling: what it leaves, and what its errors say."""

import csv
import hashlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import scaling as bench
from medmax_jax.scaling import __main__ as program

ROOT = pathlib.Path(__file__).parents[2]
TEXT = "params,tokens,loss\n1e6,1e7,4\n2e6,2e8,3.5\n4e6,1e7,3.0\n"


def write(path: pathlib.Path, law: str, **grid: int) -> pathlib.Path:
    x = bench.design(law, **grid)
    rows = bench.draw_table(law, x, np.random.default_rng(0))
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["run", *x, "loss", "loss_text", "loss_image"])
        for k in range(len(rows)):
            out.writerow(
                [f"r{k}", *(v[k] for v in x.values()), rows.y[k], rows.y[k], 2 * rows.y[k]]
            )
    return path


def test_program_writes_a_page_and_json(tmp_path):
    path, out = (
        write(tmp_path / "runs.csv", "chinchilla", sizes=4, amounts=4, seeds=1),
        tmp_path / "out",
    )
    given = f"--table {path} --law chinchilla --bootstraps 40 --workdir {out} --json"
    command = [sys.executable, "-m", "medmax_jax.scaling", *given.split(), "--exclude", "run=r3"]
    command += ["--say", "split=validation <b>"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    facts = json.loads(done.stdout.splitlines()[-1])
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = facts["intervals"][name]
        assert low <= facts[name] <= high
    assert facts["rows"] == 15 and "row 4, run r3" in facts["checklist"]["excluded points"]
    assert set(facts["held_out"]) >= {"the largest params", "the largest tokens"}
    assert len(facts["allocation"]) == 3 and facts["condition"] > 1
    assert facts == json.loads((out / "fit.json").read_text())
    html = (out / "page.html").read_text()
    assert "validation &lt;b&gt;" in html and "not stated" in html and "<script" not in html
    head = html.split('<p class="head">')[1].split("</p>")[0]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert f"table {path} · digest {digest} · law chinchilla · seed 0 · bootstraps 40" in head
    assert facts["environment"]["machine"] in head
    for name in ("law", "residuals", "bootstrap", "allocation"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "warnings\n  loss sums text and image" in done.stdout


def test_each_modality_has_its_own_fit(tmp_path, capsys):
    path = write(tmp_path / "runs.csv", "power", sizes=3, amounts=3, seeds=1)
    given = ["--table", str(path), "--law", "power", "--target", "loss_text,loss_image",
             "--bootstraps", "20", "--json", "--workdir", str(tmp_path / "out")]  # fmt: skip
    assert program.main(given) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])["targets"]
    assert facts["loss_image"]["E"] == pytest.approx(2 * facts["loss_text"]["E"], rel=1e-3)
    assert (tmp_path / "out" / "loss_text_law.png").exists()


@pytest.mark.parametrize(
    "old,new,extra,words",
    [
        ("loss\n", "lost\n", [], "no column 'loss'; it has params, tokens, lost"),
        (",3.0\n", ",\n", [], "row 3: loss is empty; finish the run"),
        (",3.0\n", ",nan\n", [], "row 3: loss is nan: a diverged run; exclude it with"),
        (",3.0\n", ",-3\n", [], "row 3: loss is -3; it must be above 0"),
        (",3.0\n", ",three\n", [], "row 3: loss is 'three', not a number"),
        ("", "", ["--exclude", "lots"], "use COLUMN=VALUE"),
        ("", "", ["--exclude", "params>1"], "all 3 rows are excluded"),
        ("", "", ["--fix", "gamma=1"], "law chinchilla can fix only E, alpha, beta"),
        ("", "", ["--say", "mood=good"], "use one of params"),
        (
            "",
            "",
            [],
            "too few points for law chinchilla: 3 runs, 5 parameters (E, A, B, alpha, beta)",
        ),
    ],
)
def test_errors_name_the_row_and_the_fix(tmp_path, capsys, old, new, extra, words):
    path = tmp_path / "runs.csv"
    path.write_text(TEXT.replace(old, new) if old else TEXT)
    wide = (
        ["--fix", "E=1.5", "--fix", "alpha=0.3", "--fix", "beta=0.3"] if "gamma=1" in extra else []
    )
    assert program.main(["--table", str(path), "--law", "chinchilla", *wide, *extra]) == 1
    assert words in capsys.readouterr().err
