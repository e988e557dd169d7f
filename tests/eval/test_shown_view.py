"""The view in which an evaluation shows images: what is recorded, warned of and refused."""

import json
import pathlib

import pytest
from eval_setup import write_items

from medmax_jax.config import build, to_dict
from medmax_jax.configs import eval_tiny
from medmax_jax.eval.config import EvalError, Settings
from medmax_jax.eval.models import loading
from medmax_jax.eval.pipeline import run_facts, stages
from medmax_jax.eval.results import read_summary
from medmax_jax.eval.tasks import selection

NATIVE, ADAPTER = "native:medmax_jax/tiny", "medmax_jax/tiny_adapter"


def settings(items: pathlib.Path, **changes) -> Settings:
    config = eval_tiny.get_config().unlock()
    config.update(questions=str(items), baselines="", probes="", options=False)
    config.update(changes)
    return build(Settings, config)


def spec_of(given: Settings, model: str = NATIVE, adapter: str = ADAPTER) -> loading.ModelSpec:
    return loading.parse_model_spec(model, adapter, False, given, progress=print)


def test_an_evaluation_states_both_views_and_warns(tmp_path, caplog, capsys):
    items = write_items(tmp_path / "data", 4)
    stages.run(settings(items, view="pad"), tmp_path / "w", model=NATIVE, adapter=ADAPTER,
               progress=print)  # fmt: skip
    (warning,) = [r.getMessage() for r in caplog.records if "trained on images" in r.getMessage()]
    assert "was trained on images with view released" in warning
    assert "is used with view pad" in warning
    summary = read_summary(tmp_path / "w")
    assert (summary.view, summary.trained_view) == ("pad", "released")
    assert "view pad, but trained on released" in (tmp_path / "w" / "report.html").read_text()
    assert json.loads((tmp_path / "w" / "run.json").read_text())["view"] == "pad"


def test_a_workdir_has_one_view_and_older_ones_have_the_release(tmp_path):
    items = write_items(tmp_path / "data", 4)
    given = settings(items)
    older = {n: v for n, v in to_dict(given).items() if n != "view"}
    assert build(Settings, older) == given and given.view == ""
    eval_set = selection.load_eval_set(given)

    def facts(view):
        spec = spec_of(settings(items, view=view))
        return run_facts.check_workdir(tmp_path, given, spec, eval_set, write=True)

    released = facts("")
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored.pop("view") == "released"
    (tmp_path / "run.json").write_text(json.dumps(stored))  # as older versions wrote it
    assert facts("released") == released
    with pytest.raises(EvalError, match="another view; use a new --workdir"):
        facts("pad")
    (tmp_path / "run.json").unlink()
    assert facts("pad")["config"] != released["config"]


def test_wrong_views_are_refused_by_name(tmp_path):
    items = write_items(tmp_path / "data", 1)
    with pytest.raises(EvalError, match="config.view is 'squash'; use released or pad, or an emp"):
        settings(items, view="squash")
    with pytest.raises(
        EvalError, match="config.view is 'pad', but 'baseline:constant' does not re"
    ):
        spec_of(settings(items, view="pad"), "baseline:constant", "")
    assert spec_of(settings(items), "baseline:constant", "").view == "released"
