"""Plans: the reader of compiled programs, arithmetic, the search, and what the program refuses."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import micro_run
import numpy as np
import pytest

from medmax_jax import config, sharding
from medmax_jax.configs import (
    base,
    chameleon_30b_lora,
    medmax_7b_full,
    medmax_7b_lora,
    medmax_7b_qlora,
)
from medmax_jax.flops import GIB
from medmax_jax.models import chameleon
from medmax_jax.plan import analytic, api, hlo_analysis, search, table
from medmax_jax.plan.__main__ import format_plan
from medmax_jax.plan.topology import PlanError, mesh_of, parse
from medmax_jax.training import step

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = (ROOT / "tests" / "plan" / "plan_program.txt").read_text()
V5E = parse("v5e:2x2", slices=1)
# Name, machine, mesh, rows of a device, remat: known to need more memory than there is.
TOO_LARGE = [
    ("medmax_7b_lora", "v5e:2x2", "1,4,1", 8, "qkv_attn"),
    ("medmax_7b_lora", "v5e:2x2", "1,4,1", 4, "dots"),
    ("medmax_7b_lora", "v5e:1x1", "1,1,1", 1, "qkv_attn"),
    ("medmax_7b_lora", "v5e:2x2", "4,1,1", 4, "all"),
    ("medmax_7b_full", "v5e:2x2", "1,4,1", 1, "all"),
    ("chameleon_30b_lora", "v5e:2x2", "1,4,1", 1, "all"),
    ("chameleon_30b_lora", "v6e:1x1", "1,1,1", 1, "all"),
]
FILES = {
    "medmax_7b_lora": medmax_7b_lora,
    "medmax_7b_qlora": medmax_7b_qlora,
    "medmax_7b_full": medmax_7b_full,
    "chameleon_30b_lora": chameleon_30b_lora,
}


def setting(name: str, machine: str, axes: str, rows: int, remat: str, seq: int = 2_048):
    """(run, topology) of a line above."""
    topology = parse(machine, slices=1)
    settings = FILES[name].get_config()
    settings.mesh.update(data=1, fsdp=1, tp=1)
    settings.data.update(seq_len=seq)
    settings.model.update(attention="splash")
    run = config.from_config_dict(settings)
    mesh = mesh_of(axes, topology)
    return search.with_settings(run, mesh=mesh, rows=rows, remat=remat), topology


def plan(*words: str, seconds: int = 240) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "medmax_jax.plan", *words]
    return subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, timeout=seconds,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


# ---- the reader of programs


def test_pieces_of_a_gather_count_once_and_loops_multiply():
    rows = {(row["kind"], row["overlapped"]): row for row in summary()}
    assert rows[("all-gather", True)]["count"] == 32
    assert rows[("all-gather", True)]["bytes"] == 32 * 8 * 16 * 2
    assert rows[("all-gather", True)]["sent"] == 32 * 8 * 16 * 2 * 3 // 4  # a group of four
    assert rows[("collective-permute", True)]["bytes"] == 32 * 4 * 16 * 2
    assert rows[("reduce-scatter", False)]["bytes"] == 32 * 8 * 16 * 4  # what is reduced
    assert rows[("all-reduce", False)]["sent"] == 2 * 20 * 7 / 8  # of eight, a scalar and four
    assert len(rows) == 4


def summary() -> list[dict]:
    return hlo_analysis.summary(hlo_analysis.Program(PROGRAM).collectives())


def test_cycles_are_summed_over_scheduled_lines():
    assert hlo_analysis.Program(PROGRAM).cycles() == 32 * (10 + 300) + 5


def test_data_dependent_loop_counts_once():
    text = PROGRAM.replace("compare(%i.5, %limit.5), direction=LT", "and(%i.5, %limit.5)")
    program = hlo_analysis.Program(text)
    assert program.cycles() == 10 + 300 + 5 and program.data_dependent_loops() == [10 + 300]
    assert hlo_analysis.Program(PROGRAM).data_dependent_loops() == []


def test_standalone_gather_is_synchronous():
    text = PROGRAM.replace("%async_collective_fusion.1", "%fused.1").replace("AsyncCollective", "")
    (gather,) = [c for c in hlo_analysis.Program(text).collectives() if c.kind == "all-gather"]
    assert not gather.overlapped and gather.times == 32


def test_other_program_texts_are_rejected():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo_analysis.Program("module @jit_step {}")


# ---- machines


@pytest.mark.parametrize("name, chips", [("v5e:4x4", 16), ("v5p:2x2x1", 4), ("H100:8", 8)])
def test_machines_by_name(name, chips):
    assert parse(name, slices=1).chips == chips
    assert parse(name, slices=2).chips == 2 * chips


@pytest.mark.parametrize(
    "name, slices, words",
    [
        ("v9:2x2", 1, "CHIP one of v4, v5e"),
        ("v5e", 1, "use the form CHIP:SHAPE"),
        ("v5p:2x2", 1, "v5p has 3 dimensions"),
        ("v5e:2x2", 0, "--slices=0"),
    ],
)
def test_invalid_machines_are_rejected(name, slices, words):
    with pytest.raises(PlanError, match=words):
        parse(name, slices=slices)


@pytest.mark.parametrize("text", ["1,4", "1,8,1", "a,b,c", ""])
def test_mesh_must_cover_all_chips(text):
    with pytest.raises(PlanError, match="product of 4"):
        mesh_of(text, V5E)


# ---- arithmetic


@pytest.mark.parametrize("axes", [(1, 4, 1), (1, 2, 2), (2, 1, 4)])
@pytest.mark.parametrize("name", list(FILES))
def test_arguments_are_counted_exactly(name, axes):
    settings = FILES[name].get_config()
    settings.mesh.update(data=axes[0], fsdp=axes[1], tp=axes[2])
    settings.optim.accumulate = 1
    run = config.from_config_dict(settings)
    with jax.set_mesh(sharding.make_mesh(run.mesh)):
        like = chameleon.abstract_model(run.model, run.vocab, run.lora)
        _, adapters, frozen = chameleon.split_adapters(like)
        trainable = step.split_trainable(like, run.train.trains)[1]
        moments = sharding.with_shardings(
            jax.eval_shape(lambda t: step.init_state(t, run), trainable)
        ).opt_state
    parts = analytic.estimate(run, V5E)["parts"]
    for part, tree in (("base", frozen), ("adapters", adapters), ("optimiser", moments)):
        exact = sum(
            np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
        assert parts[part] == pytest.approx(exact / GIB, rel=0.01, abs=0.002), part


@pytest.mark.parametrize("line", TOO_LARGE)
def test_arithmetic_predicts_what_does_not_fit(line):
    run, topology = setting(*line)
    assert not analytic.estimate(run, topology)["fits"]


@pytest.mark.parametrize(
    "line",
    [
        ("medmax_7b_lora", "v5e:2x2", "1,4,1", 4, "all"),
        ("medmax_7b_qlora", "v5e:1x1", "1,1,1", 1, "all"),
    ],
)
def test_arithmetic_predicts_what_fits(line):
    run, topology = setting(*line)
    assert analytic.estimate(run, topology)["fits"]


def test_plan_shows_the_stages_and_keeps_their_proportions(tmp_path):
    settings = micro_run.settings(train__steps=20)
    settings.stages = (dict(steps=5, trains="mlp"), dict(steps=15, condition_dropout=dict(all=0.5)))
    answer = api.plan(settings, "v5e:1x1", tmp_path, seq=64, analytic=True)
    assert answer["steps"] == 10  # rows are twice as long
    found = [(s["first_step"], s["last_step"], s["tokens"]) for s in answer["stages"]]
    assert found == [(1, 2, 2 * 8 * 64), (3, 10, 8 * 8 * 64)]
    first, second = answer["stages"]
    assert 0 < first["trained"] < first["trainable"] == second["trained"]
    lines = [line for line in format_plan(answer) if line.startswith("stage ")]
    assert len(lines) == 2 and "trains mlp: " in lines[0] and "condition_dropout" in lines[1]
    assert api.plan(micro_run.settings(), "v5e:1x1", tmp_path, analytic=True)["stages"] == []
    settings.stages = (dict(steps=20, trains="bias"),)
    with pytest.raises(config.ConfigError, match=r"stages\[0\]\.trains is 'bias'"):
        api.plan(settings, "v5e:1x1", tmp_path, analytic=True)


@pytest.mark.parametrize(
    ("topology", "analytic", "reason"),
    [("v5e:1x1", True, "--analytic compiles nothing"), ("H100:8", False, "H100:8 is not a TPU")],
)
def test_decoding_that_is_not_compiled_is_refused(tmp_path, topology, analytic, reason):
    settings = micro_run.settings()
    with pytest.raises(PlanError, match=f"--decode=image is compiled for TPUs, but {reason}"):
        api.plan(settings, topology, tmp_path, analytic=analytic, decode="image")


def test_saving_more_costs_memory_and_saves_time():
    found = {}
    for remat in search.REMAT:
        run, topology = setting("medmax_7b_lora", "v5p:2x2x1", "1,4,1", 4, remat)
        rough = analytic.estimate(run, topology)
        rate = analytic.rates(run, topology, rough, utilisation=0.6, price=None)
        found[remat] = (rough["peak_hbm_gib"], rate["tokens_per_s_per_chip"])
    assert found["dots"] > found["qkv_attn"] > found["attn"] > found["all"]
    assert found["dots"][1] > found["qkv_attn"][1] > found["attn"][1] > found["all"][1]


def test_full_recomputation_cannot_pass_68_percent():
    run, topology = setting("medmax_7b_lora", "v5e:2x2", "1,4,1", 4, "all")
    free = {"collectives": [], "parts": {}}
    rate = analytic.rates(run, topology, free, utilisation=1.0, price=2.0)
    assert rate["mfu"] == pytest.approx(0.68, abs=0.005)
    assert rate["tokens_per_s_per_chip"] == pytest.approx(4_647, rel=0.01)  # v5e's ceiling
    assert rate["cost_usd"] == pytest.approx(2 * rate["chip_hours"], rel=0.01)
    half = analytic.rates(run, topology, free, utilisation=0.5, price=None)
    assert half["step_s"] == pytest.approx(2 * rate["step_s"], rel=0.01)
    assert half["cost_usd"] is None


def test_exposed_communication_is_added():
    run, topology = setting("medmax_7b_lora", "v5e:2x2", "1,4,1", 4, "all")
    second = round(2 * 45e9)  # over both links of a ring
    row = {"kind": "all-gather", "count": 1, "bytes": second, "sent": second}
    step_s = [
        analytic.rates(
            run, topology, {"collectives": [row | {"overlapped": kind}], "parts": {}},
            utilisation=0.6, price=None,
        )["step_s"]
        for kind in (True, False)
    ]  # fmt: skip
    assert step_s[1] == pytest.approx(step_s[0] + 1, abs=1e-3)


# ---- search


def test_candidates_are_settings_that_the_model_allows():
    run, topology = setting("chameleon_30b_lora", "v5e:4x4", "1,16,1", 1, "all")
    found = list(search.candidates(run, topology))
    assert len({(each.mesh, each.data.batch_size, each.model.remat) for each in found}) == len(
        found
    )
    tokens = run.train.steps * run.data.batch_size
    for each in found:
        assert each.mesh.data * each.mesh.fsdp * each.mesh.tp == 16
        assert each.data.batch_size % (each.mesh.data * each.mesh.fsdp) == 0
        assert each.train.steps * each.data.batch_size == pytest.approx(tokens, rel=0.01)


def test_slices_are_along_the_data_axis():
    topology = parse("v5e:4x4", slices=2)
    run, _ = setting("medmax_7b_lora", "v5e:4x4", "1,16,1", 1, "all")
    assert {each.mesh.data % 2 for each in search.candidates(run, topology)} == {0}


def test_search_selects_the_fastest_that_fits():
    run, topology = setting("medmax_7b_lora", "v5e:2x2", "1,4,1", 4, "all")
    order = search.rank_candidates(search.candidates(run, topology), topology, utilisation=0.6)
    answer = lambda each: analytic.estimate(each, topology)  # noqa: E731
    best, found = search.best_fitting(order, topology, answer, utilisation=0.6, most=3)
    assert found["fits"] and best in order[:3]
    with pytest.raises(PlanError, match="no setting fits 1 x v5e:2x2"):
        search.best_fitting([], topology, answer, utilisation=0.6, most=3)


def test_search_continues_when_the_first_candidates_do_not_fit():
    run, topology = setting("medmax_7b_lora", "v5e:2x2", "1,4,1", 4, "all")
    order = search.rank_candidates(search.candidates(run, topology), topology, utilisation=0.6)
    refused = order[:4]

    def answer(each):
        return analytic.estimate(each, topology) | ({"fits": False} if each in refused else {})

    best, _ = search.best_fitting(order, topology, answer, utilisation=0.6, most=2)
    assert best == order[4]


def test_every_remat_policy_has_a_memory_estimate():
    run = config.from_config_dict(base.get_config())
    for remat in config.CHOICES["model.remat"]:
        each = dataclasses.replace(run, model=dataclasses.replace(run.model, remat=remat))
        assert analytic.estimate(each, V5E)["peak_hbm_gib"] > 0


def test_tpu_compiler_options_are_rejected_on_other_devices():
    settings = base.get_config()
    settings.train.compile = "gather"
    run = config.from_config_dict(settings)
    with pytest.raises(ValueError, match="config.train.compile is 'gather'.*devices are cpu"):
        step.check(run, sharding.make_mesh(run.mesh))


# ---- the program


LORA = ("--config=configs/medmax_7b_lora.py", "--topology=v5e:2x2", "--analytic")


def test_analytic_plan_is_marked_as_an_estimate(tmp_path):
    done = plan(
        *LORA, "--mesh=1,4,1", "--per_chip_batch=4", "--seq=2048", "--price=1.2", "--json",
        f"--cache={tmp_path}", "--config.model.attention=splash", "--config.model.remat=all",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, last, line = done.stdout.splitlines()
    assert "estimated by arithmetic" in last
    found = json.loads(line)
    assert found["how"] == "analytic" and found["fits"] and found["batch_size"] == 16
    assert found["hbm_gib"] == 15.75 and found["mesh"] == {"data": 1, "fsdp": 4, "tp": 1}
    assert sum(found["parts"].values()) == pytest.approx(found["peak_hbm_gib"], abs=0.01)
    # 221,742 rows of 8,192 tokens three times, whatever the rows of the plan are
    rate = found["tokens_per_s_per_chip"] * 4 * 3600
    assert found["hours"] == pytest.approx(3 * 221_742 * 8_192 / rate, rel=0.01)
    assert found["cost_usd"] == pytest.approx(1.2 * found["chip_hours"], rel=0.01)


@pytest.mark.parametrize(
    "words, status, message",
    [
        (("--mesh=1,4,1", "--config.data.batch_size=6"), 2, "config.data.batch_size is 6"),
        (("--mesh=1,3,1",), 1, "product of 4"),
        (
            (),
            1,
            "config.mesh is 4 x 4 x 1, but 1 x v5e:2x2 has 4 chips; use --mesh=1,4,1, the "
            "nearest, or --mesh=search",
        ),
        (("--mesh=1,4,1", "--utilisation=1.5"), 1, "--utilisation=1.5"),
        (("--mesh=1,4,1", "--config.model.remat=some"), 2, "config.model.remat is 'some'"),
    ],
)
def test_impossible_plans_name_the_flag(tmp_path, words, status, message):
    done = plan(*LORA, f"--cache={tmp_path}", *words)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr


# ---- the table


def make_table(folder: pathlib.Path, page: pathlib.Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "medmax_jax.plan.table", f"--cache={folder}", "--minutes=0"]
    return subprocess.run(
        [*command, f"--out={page}"], cwd=ROOT, text=True, capture_output=True, timeout=240,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def test_plan_table_has_every_cell_with_its_source(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n" + "old\n".join(table.MARKS) + "after\n")
    assert make_table(tmp_path, page).returncode == 0
    text = page.read_text()
    assert text.startswith("before\n" + table.MARKS[0]) and text.endswith("after\n")
    assert "old" not in text
    assert text.count("### ") == len(table.MODELS) * len(table.LENGTHS) + 1
    full = text.split("### 7B full, 2,048 tokens per row\n")[1].split("###")[0]
    rows = [line for line in full.splitlines() if re.match(r"\| (v\d|[A-Z])", line)]
    assert len(rows) == 2 * len(table.MACHINES)
    assert {row.split("|")[-2].strip() for row in rows[len(table.MACHINES) :]} == {"arithmetic"}
    assert "| v5e:1x1 | does not fit | | | |\n" in full


def test_plan_table_requires_the_marker_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    done = make_table(tmp_path, page)
    assert done.returncode == 1 and "lacks the lines" in done.stderr
    assert page.read_text() == "nothing here\n"
