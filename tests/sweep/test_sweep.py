"""Sweeps as data: axes, names and costs of runs, what is refused, what is rendered."""

import argparse
import dataclasses
import json
import pathlib
import shlex
import subprocess

import kubernetes_validate
import numpy as np
import pytest
import yaml

from medmax_jax import flops
from medmax_jax.data.packing import mixing
from medmax_jax.sweep import __main__ as program
from medmax_jax.sweep import axes, expand, render
from medmax_jax.sweep.axes import SweepError

# ml_collections 1.1 loads config files in a way that Python 3.12 no longer has.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
MEDMAX = "--config=configs/sweep_medmax_7b_data.py"


def sweep(*given: dict, **changes: object) -> expand.Sweep:
    """On the tiny family, without a machine."""
    settings = dict(
        name="s", config="configs/tiny_base.py", axes=given, topology="", slices=1, utilisation=0.4,
        price=0.0, fill=1.0, said={},
    )  # fmt: skip
    return expand.Sweep(**(settings | changes))


# ---- axes


@pytest.mark.parametrize(
    "axis,want",
    [
        ({"grid": {"a.b": (1, 2), "c.d": (3, 4)}},
         [{"a.b": 1, "c.d": 3}, {"a.b": 1, "c.d": 4}, {"a.b": 2, "c.d": 3}, {"a.b": 2, "c.d": 4}]),
        ({"zip": {"a.b": (1, 2), "c.d": (3, 4)}}, [{"a.b": 1, "c.d": 3}, {"a.b": 2, "c.d": 4}]),
        ({"fixed": {"a.b": 1}}, [{"a.b": 1}]),
        ({"log_range": {"field": "a.b", "low": 1e-4, "high": 1e-2, "count": 3}},
         [{"a.b": 1e-4}, {"a.b": 1e-3}, {"a.b": 1e-2}]),
        ({"data_fraction": {"fractions": (0.25, 1.0), "steps": 100}},
         [{"mixing.fraction": 0.25, "train.steps": 25},
          {"mixing.fraction": 1.0, "train.steps": 100}]),
        ({"n_by_d": {"sizes": ({"a.b": 1}, {"a.b": 2}), "tokens": (8.0,)}},
         [{"a.b": 1, "tokens": 8.0}, {"a.b": 2, "tokens": 8.0}]),
        ({"isoflop": {"sizes": ({"a.b": 1},), "flops": (1e9, 1e10)}},
         [{"a.b": 1, "flops": 1e9}, {"a.b": 1, "flops": 1e10}]),
        ({"lora_rank": {"ranks": (4, 8), "alpha_over_rank": 2.0}},
         [{"lora.rank": 4, "lora.alpha": 8.0}, {"lora.rank": 8, "lora.alpha": 16.0}]),
        ({"leave_out": {"by": "task", "names": ("", "VQA")}},
         [{"mixing.by": "task", "mixing.leave_out": ""},
          {"mixing.by": "task", "mixing.leave_out": "VQA"}]),
        ({"seeds": (0, 1)},
         [{"train.seed": 0, "data.seed": 0}, {"train.seed": 1, "data.seed": 1}]),
        ({"union": ({"fixed": {"a.b": 1}}, {"seeds": (2,)})},
         [{"a.b": 1}, {"train.seed": 2, "data.seed": 2}]),
        ({"product": ({"fixed": {"a.b": 1}}, {"grid": {"c.d": (2, 3)}})},
         [{"a.b": 1, "c.d": 2}, {"a.b": 1, "c.d": 3}]),
    ],
)  # fmt: skip
def test_expansion_of_each_axis(axis, want):
    assert axes.expand([axis]) == want


def test_random_axes_depend_on_the_seed():
    fields = {"a.b": ("log", 1e-4, 1e-2), "c.d": ("uniform", 0, 1), "e.f": ("choice", 4, 8)}
    made = [
        axes.expand([{"random": {"count": 50, "seed": s, "fields": fields}}]) for s in (0, 0, 1)
    ]
    assert made[0] == made[1] != made[2]
    assert all(1e-4 <= r["a.b"] <= 1e-2 and 0 <= r["c.d"] <= 1 for r in made[0])
    assert {r["e.f"] for r in made[0]} == {4, 8}
    assert np.median([r["a.b"] for r in made[0]]) < 3e-3, "log means as many below 1e-3 as above"


@pytest.mark.parametrize(
    "given,words",
    [
        ([{"gird": {}}], "'gird' is unknown; use one of grid"),
        ([{"grid": {}, "zip": {}}], "is not an axis; use a dict with one key"),
        (
            [{"zip": {"a.b": (1,), "c.d": (1, 2)}}],
            "same number of values for each field; it has a.b 1, c.d 2",
        ),
        ([{"fixed": {"a.b": 1}}, {"grid": {"a.b": (1, 2)}}], "a.b is set by two axes"),
        ([{"log_range": {"field": "a", "low": 2, "high": 1, "count": 3}}], "0 < low < high"),
        ([{"random": {"count": 1, "seed": 0, "fields": {"a.b": ("normal", 0, 1)}}}], "random a.b"),
        ([{"data_fraction": {"fractions": (1.0,)}}], "must have fractions, steps"),
        ([{"grid": {"a.b": 3}}], "grid a.b is 3; it must be a tuple"),
        ([{"seeds": ()}], "must be a tuple of values"),
    ],
)
def test_invalid_axes_are_rejected(given, words):
    with pytest.raises(SweepError, match=words):
        axes.expand(given)


# ---- runs


def test_run_id_is_the_same_in_every_expansion():
    one = expand.plan_runs(sweep({"seeds": (0, 1)}, {"grid": {"optim.peak_lr": (1e-3, 2e-3)}}))
    other = expand.plan_runs(sweep({"grid": {"optim.peak_lr": (2e-3,)}}, {"seeds": (1,)}, name="t"))
    assert len({r.run_id for r in one}) == 4 and other[0].run_id == one[3].run_id
    assert one[0].run_id == "696be880ae"  # for ever: workdirs are found by it


def test_costs_match_flops_py():
    (run,) = expand.plan_runs(sweep({"fixed": {"train.steps": 10}}))
    typed = expand.settings(run)
    counts = flops.parameters(typed.model, typed.vocab, typed.lora)
    assert (run.params, run.trainable) == (counts.matmul, counts.base)
    assert run.tokens == 10 * 8 * 256
    each = flops.train_flops(typed.model, typed.vocab, typed.lora, trains="full", length=256)
    assert run.flops == pytest.approx(run.tokens * each)
    assert (run.hours, run.usd) == (None, None)


def test_equal_compute_and_equal_tokens():
    sizes = ({"model.num_layers": 2}, {"model.num_layers": 8})
    iso = expand.plan_runs(sweep({"isoflop": {"sizes": sizes, "flops": (4e12,)}}))
    assert [r.flops for r in iso] == pytest.approx([4e12, 4e12], rel=0.02)
    assert iso[0].steps > iso[1].steps and iso[0].params < iso[1].params
    grid = expand.plan_runs(sweep({"n_by_d": {"sizes": sizes, "tokens": (1e5,)}}))
    assert [r.tokens for r in grid] == pytest.approx([1e5, 1e5], rel=0.02)
    assert "tokens" not in grid[0].overrides


def test_paper_data_sweep_on_v5e_16(tmp_path, capsys):
    assert program.main(["expand", MEDMAX, "--workdir", str(tmp_path), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = json.loads(lines[-1])
    runs = expand.read(tmp_path)
    assert [r.overrides["mixing.fraction"] for r in runs] == [0.25, 0.5, 0.75, 1.0]
    assert [r.steps / runs[-1].steps for r in runs] == pytest.approx([0.25, 0.5, 0.75, 1], rel=1e-3)
    assert {r.chips for r in runs} == {16} and all(r.fits for r in runs)
    assert facts["usd"] == pytest.approx(1.2 * facts["chip_hours"], rel=1e-3)
    hours = runs[-1].flops / (16 * 197e12 * 0.5) / 3600  # without recomputation and the network
    assert hours < runs[-1].hours < 3 * hours
    assert expand.plan_runs(expand.load([MEDMAX, "--config.price=0.0"]))[0].usd is None


@pytest.mark.parametrize(
    "given,words",
    [
        (
            sweep({"fixed": {"optim.peek_lr": 1e-3}}),
            "--config.optim.peek_lr is not a field .*did you mean --config.optim.peak_lr",
        ),
        (
            sweep({"fixed": {"lora.rank": 4}}),
            "lora.rank is 4; it must be 0 when train.trains is full",
        ),
        (sweep({"fixed": {"train.steps": "many"}}), "train.steps"),
        (sweep({"grid": {"train.steps": (5, 5)}}), "runs 1 and 2 are the same.*different seeds"),
        (sweep({"fixed": {"tokens": 1e6, "train.steps": 5}}), "each set the steps"),
        (sweep({"seeds": (0,)}, config="configs/none.py"), "configs/none.py"),
        (sweep({"seeds": (0,)}, topology="v9:2x2"), "v9:2x2"),
        (sweep({"seeds": (0,)}, topology="v5e:2x2"), "4 chips, but config.mesh is 1 x 1 x 1 = 1"),
    ],
)
def test_invalid_sweeps_are_rejected(given, words):
    with pytest.raises(SweepError, match=words):
        expand.plan_runs(given)


def test_a_sweep_file_with_an_unknown_field(tmp_path, capsys):
    path = tmp_path / "bad.py"
    path.write_text(
        "from medmax_jax.configs import sweep_tiny\n\ndef get_config():\n"
        "    c = sweep_tiny.get_config().unlock()\n    c.topologie = 'v5e:4x4'\n    return c\n"
    )
    assert program.main(["expand", f"--config={path}"]) == 1
    assert (
        "'topologie' is unknown or missing; the fields are name, config, axes"
        in capsys.readouterr().err
    )
    assert program.main(["expand", "--config=configs/sweep_tiny.py", "--config.pric=1"]) == 1
    assert program.main(["status", "--workdir", str(tmp_path)]) == 1
    assert "sweep.jsonl: file not found; create it" in capsys.readouterr().err


def test_sweep_with_started_runs_is_not_overwritten(tmp_path):
    one = expand.plan_runs(sweep({"seeds": (0, 1)}))
    expand.write(one, tmp_path)
    expand.write(expand.plan_runs(sweep({"seeds": (1, 2)})), tmp_path)  # nothing had begun
    (tmp_path / one[1].run_id).mkdir()
    with pytest.raises(SweepError, match=f"have started: {one[1].run_id}"):
        expand.write(expand.plan_runs(sweep({"seeds": (2, 3)})), tmp_path)


# ---- fractions of the data


def test_fractions_are_nested_by_image_and_stratified_by_source():
    rng = np.random.default_rng(0)
    sources = np.sort(rng.integers(0, 3, 4_000)) * (np.arange(4_000) > 100)
    images = np.where(rng.random(4_000) < 0.1, -1, sources * 1_000 + rng.integers(0, 300, 4_000))
    subsamples = [
        mixing.subsample(images, sources, fraction=f, seed=7) for f in (0.25, 0.5, 0.75, 1.0)
    ]
    assert subsamples[-1].all()
    for small, large in zip(subsamples, subsamples[1:], strict=False):
        assert not (small & ~large).any(), "a larger fraction holds all of a smaller one"
    for f, keep in zip((0.25, 0.5, 0.75), subsamples, strict=False):
        seen = images >= 0
        for p in np.unique(images[seen]):
            assert len(set(keep[images == p])) == 1, (
                "all documents of an image are selected together"
            )
        for s in range(3):
            units = {*images[seen & (sources == s)]}
            kept = {*images[keep & seen & (sources == s)]}
            alone = (~seen & (sources == s)).sum()
            share = (len(kept) + (keep & ~seen & (sources == s)).sum()) / (len(units) + alone)
            assert share == pytest.approx(f, abs=2 / (len(units) + alone))
    other = mixing.subsample(images, sources, fraction=0.5, seed=8)
    assert (other != subsamples[1]).any()


# ---- rendering


def rendered(tmp_path: pathlib.Path, runs: list, form: str, **flags: object) -> dict[str, str]:
    given = dict(
        form=form, out=tmp_path / form, runs_at="/mnt/runs it's", repo="/srv/medmax jax",
        python="python", max_restarts=50, parallel=2, gpus=8, time="12:00:00", cluster="c1",
        zone="us-west4-a", project="p", image="repo/medmax:1", queue="lab", tpu="vm-1",
    )  # fmt: skip
    paths = render.write(runs, tmp_path / "d", argparse.Namespace(**(given | flags)))
    return {path.name: path.read_text() for path in paths}


@pytest.fixture(scope="module")
def medmax() -> list[expand.SweepRun]:
    return expand.plan_runs(expand.load([MEDMAX]))


@pytest.mark.parametrize("form,name", [("plain", "commands.sh"), ("slurm", "slurm.sh"),
                                       ("xpk", "xpk.sh"), ("tpu_vm", "tpu_vm.sh")])  # fmt: skip
def test_scripts_pass_shellcheck(tmp_path, medmax, form, name):
    text = rendered(tmp_path, medmax, form)[name]
    subprocess.run(["shellcheck", str(tmp_path / form / name)], check=True, timeout=60)
    assert all(run.run_id in text for run in medmax)


def test_plain_commands_are_accepted_by_train(tmp_path, medmax):
    line = rendered(tmp_path, medmax, "plain")["commands.sh"].splitlines()[1]
    words = shlex.split(line)
    assert words[:6] == ["cd", "/srv/medmax jax", "&&", "python", "-m", "medmax_jax.train"]
    assert words[-1] == f"--workdir=/mnt/runs it's/{medmax[0].run_id}"
    assert expand._parsed(words[6:-1]).mixing.fraction == 0.25


def test_xpk_and_gcloud_receive_machine_names(tmp_path, medmax):
    text = rendered(tmp_path, medmax, "xpk")["xpk.sh"].replace("\\\n", " ")
    words = shlex.split(text.splitlines()[2])
    assert words[:3] == ["xpk", "workload", "create"]
    assert {"--tpu-type=v5litepod-16", "--num-slices=1", "--max-restarts=50"} <= set(words)
    inside = next(w for w in words if w.startswith("--command="))
    assert "MEDMAX_MULTIHOST=1" in inside and "--config.mixing.fraction=0.25" in inside
    line = rendered(tmp_path, medmax, "tpu_vm")["tpu_vm.sh"].splitlines()[2]
    assert shlex.split(line)[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "vm-1"]
    assert "--worker=all" in shlex.split(line)


def test_jobset_is_a_valid_kubernetes_manifest(tmp_path, medmax):
    """The Job in it by Kubernetes' own schema; no registry has a schema of the JobSet around it."""
    files = rendered(tmp_path, medmax, "jobset")
    assert set(files) == {f"{run.run_id}.yaml" for run in medmax}
    made = yaml.safe_load(files[f"{medmax[0].run_id}.yaml"])
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "lab"
    assert len(made["metadata"]["name"]) <= 40
    (slices,) = made["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}, **slices["template"]}
    kubernetes_validate.validate(job, "1.33", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        job["spec"]["paralellism"] = 4
        kubernetes_validate.validate(job, "1.33", strict=True)
    spec = slices["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 4  # hosts of four chips
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize(
    "where,xpk,hosts,per_host",
    [("v5e:2x4", "v5litepod-8", 1, 8), ("v5e:4x4", "v5litepod-16", 4, 4),
     ("v6e:2x2", "v6e-4", 1, 4),
     ("v5p:2x2x2", "v5p-16", 2, 4), ("v4:2x2x4", "v4-32", 4, 4), ("v5e:1x1", "v5litepod-1", 1, 1)],
)  # fmt: skip
def test_launch_target_names(medmax, where, xpk, hosts, per_host):
    there = render.machine(dataclasses.replace(medmax[0], topology=where))
    assert (there.xpk, there.hosts, there.per_host) == (xpk, hosts, per_host)


def test_a_slurm_task_requeues_itself(tmp_path, medmax):
    """The script under bash: the run stops with 75 on the warning signal, scontrol is asked."""
    tools = tmp_path / "bin"
    tools.mkdir()
    waits = [
        "trap 'exit 75' TERM",
        f'echo "$@" > {tmp_path}/started',
        "while :; do sleep 0.1; done",
    ]
    asks = f'echo "$@" > {tmp_path}/asked'
    for name, text in (("scontrol", asks), ("stub", "\n".join(waits))):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    rendered(tmp_path, medmax, "slurm", python=str(tools / "stub"), repo=str(tmp_path))
    process = subprocess.Popen(
        ["bash", str(tmp_path / "slurm" / "slurm.sh")],
        env={"PATH": f"{tools}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "2",
             "SLURM_ARRAY_JOB_ID": "77"},
    )  # fmt: skip
    while not (tmp_path / "started").exists():
        assert process.poll() is None
    process.terminate()  # what SLURM sends to the batch shell
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "asked").read_text() == "requeue 77_2\n"
    assert "--config.mixing.fraction=0.75" in (tmp_path / "started").read_text()


def test_missing_flags_are_reported_at_once(tmp_path, capsys):
    for argv, message in (
        (["render"], "--workdir, --form and --out are required"),
        (["render", "--form=xpk", "--out=o", "--zone=z"],
         "--workdir, --cluster, --image and --project are required"),
        (["render", "--form=slurm"], "--workdir, --out, --parallel, --gpus and --time are"),
        (["rendr"], "'rendr' is unknown; did you mean render?"),
        (["expand", "--limt=3"], "--limt is not a flag; did you mean --limit?"),
        (["status", f"--workdir={tmp_path}", "--jsn"], "--jsn is not a flag; did you mean --json?"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            program.main(argv)
        error = capsys.readouterr().err
        assert end.value.code == 2 and message in error and error.count("\n") == 1, error


def test_a_sweep_is_shrunk_from_the_command_line(capsys):
    argv = ["expand", "--config=configs/sweep_tiny.py", "--json"]
    for flag, runs in (
        ("--limit=3", 3),
        ("--config.axes=({'seeds': (0, 1)},)", 2),
        ("--config.axes[1].data_fraction.fractions=(0.125,)", 8),
    ):
        assert program.main([*argv, flag]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"] == runs
    assert program.main([*argv, "--limit=0"]) == 1
    assert "--limit is 0; it must be at least 1" in capsys.readouterr().err
    assert program.main([*argv, "--config.prise=2"]) == 1
    assert "did you mean --config.price?" in capsys.readouterr().err


def test_a_sweep_without_a_machine_is_not_rendered_for_one(tmp_path):
    with pytest.raises(
        SweepError, match="require a TPU, for example v5e:4x4: set --config.topology"
    ):
        rendered(tmp_path, expand.plan_runs(sweep({"seeds": (0,)})), "xpk")


SHIPPED = {"sweep_tiny": 32, "sweep_tiny_lora": 24, "sweep_medmax_7b_data": 4}
SHIPPED |= {"sweep_imax_tiny": 15}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sweeps_expand(name):
    runs = expand.plan_runs(expand.load([f"--config=configs/{name}.py"]))
    assert len(runs) == SHIPPED[name]
