"""The page of the Fisher statistics: values of real runs, arranged by name, layer and tasks."""

import dataclasses
import json
import pathlib
import shutil
import stat

import micro_run
import numpy as np
import pytest

from medmax_jax import config, train
from medmax_jax.data.records import writer
from medmax_jax.sweep import __main__ as program
from medmax_jax.sweep import fisher_page


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[pathlib.Path]:
    """Two seeds of a run of six steps, measured at every second one; images with two tasks."""
    top = tmp_path_factory.mktemp("runs")
    layout = writer.open_records(micro_run.write(top / "plain")).layout
    documents = [
        dataclasses.replace(d, image_path=f"{n // 4}.png", task=("VQA", "Visual Chat")[n % 2])
        for n, d in enumerate(micro_run.documents(40, 0))
    ]
    writer.write(top / "train", documents, shard_size=64, layout=layout, notes={})
    for seed in (0, 1):
        changes = dict(data__train=str(top / "train"), train__steps=6, train__fisher_every=2)
        settings = micro_run.settings(**changes, train__seed=seed, data__seed=seed)
        train.run(config.from_config_dict(settings), top / str(seed))
    return [top / "0", top / "1"]


def measured(run: pathlib.Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "fisher"]


def test_page_has_the_values_of_the_runs(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    words = ["fisher", f"a={runs[0]}", f"a={runs[1]}", f"b={runs[1]}", "--out", str(out), "--json"]
    assert program.main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == dict(runs=3, names=2)
    text = out.read_text()
    assert text.count("<svg ") == 3 and "<h2>Layers</h2>" in text and "<h2>Tasks</h2>" in text
    rows = [measured(run) for run in runs]
    assert [[row["step"] for row in run] for run in rows] == [[2, 4, 6]] * 2
    for name in ("spectral_entropy", "leading_share", "layer_01/leading_share"):
        both = np.mean([row[name] for run in rows for row in run])
        second = np.mean([row[name] for row in rows[1]])
        assert f">{both:.3f}<" in text and f">{second:.3f}<" in text
    assert f">{np.mean([run[-1]['spectral_entropy'] for run in rows]):.3f}<" in text
    pair = "cosine/VQA, Visual Chat/same_image"
    values = [row[pair] for run in rows for row in run if row.get(pair) is not None]
    assert values and f">{np.mean(values):.3f}<" in text


def test_means_are_at_the_steps_of_the_first_run_within_all(runs):
    first, second = (fisher_page.read(run / "metrics.jsonl", log=print) for run in runs)
    name, expected = "spectral_entropy", [run.values["spectral_entropy"] for run in (first, second)]
    shorter = dataclasses.replace(
        second, steps=second.steps[:2], values={n: v[:2] for n, v in second.values.items()}
    )
    steps, values = fisher_page.mean_curve([first, shorter], name)
    assert steps.tolist() == [2, 4]
    np.testing.assert_allclose(values, np.mean(expected, axis=0)[:2])
    later = dataclasses.replace(second, steps=second.steps + 1)  # 3, 5, 7
    steps, values = fisher_page.mean_curve([first, later], name)
    assert steps.tolist() == [4, 6]
    between = (expected[1][:-1] + expected[1][1:]) / 2
    np.testing.assert_allclose(values, (expected[0][1:] + between) / 2)


def test_mean_is_over_the_runs_that_have_a_value():
    steps, absent = np.array([1, 2]), float("nan")
    runs = [
        fisher_page.Curves(steps, {"x": np.array(values)})
        for values in ([1.0, absent], [3.0, absent])
    ]
    runs.append(fisher_page.Curves(steps, {"x": np.array([absent, absent])}))
    np.testing.assert_array_equal(fisher_page.mean_curve(runs, "x")[1], [2.0, absent])


def test_layers_are_spaced_evenly(runs):
    first = fisher_page.read(runs[0] / "metrics.jsonl", log=print)
    assert fisher_page.layer_numbers({"a": [first]}) == ["00", "01"]
    assert fisher_page.spaced([f"{n:02d}" for n in range(32)], 4) == ["00", "10", "21", "31"]


def test_page_of_a_private_run_is_private(runs, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    shutil.copy(runs[0] / "metrics.jsonl", closed)
    (closed / "metrics.jsonl").chmod(0o600)
    fisher_page.write([f"a={closed}"], tmp_path / "page.html", log=print)
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o600
    (closed / "metrics.jsonl").chmod(0o644)
    fisher_page.write([f"a={closed}"], tmp_path / "open.html", log=print)
    assert (tmp_path / "open.html").stat().st_mode & 0o044


def test_damaged_and_repeated_rows(runs, tmp_path):
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()
    row = next(json.loads(line) for line in lines if '"fisher"' in line)
    lines += [json.dumps(row | {"spectral_entropy": 9.0}), "{broken", '{"kind": "fisher"}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    log = []
    curves = fisher_page.read(tmp_path / "metrics.jsonl", log=log.append)
    assert log == [f"WARNING: {tmp_path / 'metrics.jsonl'}: skipped 2 unreadable lines"]
    assert curves.steps.tolist() == [2, 4, 6] and curves.values["spectral_entropy"][0] == 9.0


def test_what_is_no_measured_run_is_refused(runs, tmp_path, capsys):
    out = str(tmp_path / "page.html")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    for spec, message in (
        (str(runs[0]), "is no run; write NAME=FOLDER"),
        (f"a={tmp_path / 'bare'}", "no Fisher information was measured; train with"),
        (f"a={tmp_path / 'absent'}", "no Fisher information was measured"),
    ):
        assert program.main(["fisher", spec, "--out", out]) == 1
        assert message in capsys.readouterr().err
    many = [f"{n}={runs[0]}" for n in range(9)]
    assert program.main(["fisher", *many, "--out", out]) == 1
    assert "9 names; a chart has at most 8" in capsys.readouterr().err
    assert not pathlib.Path(out).exists()
