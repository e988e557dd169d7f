"""Write a sweep's runs as files for launchers; this module starts nothing and needs no password.

    plain    commands.sh     one command per line, for a shell or your own queue
    slurm    slurm.sh        an array job that requeues itself on a warning signal
    xpk      xpk.sh          xpk workload create, one workload per run
    jobset   <run id>.yaml   a JobSet with a Kueue label, one file per run
    tpu_vm   tpu_vm.sh       gcloud compute tpus tpu-vm ssh --worker=all

Each run keeps its id as job name and workdir, and resumes from its workdir, so rendering again and
submitting again is safe: finished runs are left out.
"""

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from medmax_jax.plan import topology
from medmax_jax.sweep.axes import SweepError
from medmax_jax.sweep.expand import SweepRun


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchTarget:
    """The names of a sweep's machine in the launchers."""

    xpk: str  # and gcloud: v5litepod-16
    accelerator: str  # label of GKE's nodes
    shape: str  # 4x4
    chips: int  # of one slice
    hosts: int
    per_host: int  # chips


# Labels of GKE: docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus. Types as gcloud
# and xpk write them: v4 and v5p count cores, two per chip.
NAMES = {
    "v4": ("v4-{cores}", "tpu-v4-podslice"),
    "v5e": ("v5litepod-{chips}", "tpu-v5-lite-podslice"),
    "v5p": ("v5p-{cores}", "tpu-v5p-slice"),
    "v6e": ("v6e-{chips}", "tpu-v6e-slice"),
}
SINGLE_HOST = (1, 4, 8)  # chips of v5e and v6e slices that are one machine
NEEDS = {
    "plain": (),
    "slurm": ("parallel", "gpus", "time"),
    "xpk": ("cluster", "image", "zone", "project"),
    "jobset": ("image", "queue"),
    "tpu_vm": ("tpu", "zone", "project"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `render`; required ones have no default, see `missing_flags`."""
    add = parser.add_argument
    add("--form", choices=tuple(NEEDS), help="launcher to write files for (required)")
    add("--out", type=Path, metavar="F", help="folder for the files (required)")
    add("--runs_at", metavar="PATH", help="workdir on the cluster, if different: /gcs/bucket/sweep")
    add(
        "--repo",
        metavar="PATH",
        help="path of this repository on the cluster; default: the job's start folder",
    )
    add("--python", default="python", help="Python on the cluster")
    add("--max_restarts", type=int, default=50, help="xpk, jobset: restarts of a workload")
    add("--parallel", type=int, help="slurm: concurrent runs")
    add("--gpus", type=int, help="slurm: GPUs per run, on one node")
    add(
        "--time",
        help="slurm: time limit per job, 12:00:00; a job requeues until its run is finished",
    )
    add("--cluster", help="xpk: cluster")
    add("--zone", help="xpk, tpu_vm: zone")
    add("--project", help="xpk, tpu_vm: Google Cloud project")
    add("--image", help="xpk, jobset: image with this repository and its requirements")
    add("--queue", help="jobset: Kueue's LocalQueue")
    add("--tpu", help="tpu_vm: name of the TPU VM")


def missing_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags that the form requires and that are not set."""
    names = ("workdir", "form", "out", *NEEDS.get(args.form, ()))
    return [f"--{name}" for name in names if getattr(args, name) is None]


def write(runs: Sequence[SweepRun], folder: Path, args: argparse.Namespace) -> list[Path]:
    """Write the files of a form to `given.out`."""
    args.out.mkdir(parents=True, exist_ok=True)
    files = FORMS[args.form](runs, args.runs_at or str(folder), args)
    for name, text in files.items():
        (args.out / name).write_text(text)
    return [args.out / name for name in files]


def machine(run: SweepRun) -> LaunchTarget:
    """Return the launch target; raise SweepError for a sweep without a TPU topology."""
    kind, _, shape = run.topology.partition(":")
    if kind not in NAMES:
        raise SweepError(
            f"topology is {run.topology!r}; xpk, jobset and tpu_vm require a TPU, for example "
            "v5e:4x4: set --config.topology when you expand"
        )
    chips = topology.parse(run.topology, slices=1).chips
    single_host = kind in ("v5e", "v6e") and chips in SINGLE_HOST
    per_host = chips if single_host else min(4, chips)
    name, accelerator = NAMES[kind]
    return LaunchTarget(
        xpk=name.format(chips=chips, cores=2 * chips), accelerator=accelerator, shape=shape,
        chips=chips, hosts=-(-chips // per_host), per_host=per_host,
    )  # fmt: skip


def command(run: SweepRun, workdir: str, args: argparse.Namespace) -> str:
    """Return one line for a shell."""
    words = [
        args.python,
        "-m",
        "medmax_jax.train",
        *run.arguments(),
        f"--workdir={workdir}/{run.run_id}",
    ]
    return shlex.join(words)


def _in_repo(text: str, args: argparse.Namespace) -> str:
    return f"cd {shlex.quote(args.repo)} && {text}" if args.repo else text


def _plain(runs: Sequence[SweepRun], workdir: str, args: argparse.Namespace) -> dict[str, str]:
    lines = [_in_repo(command(run, workdir, args), args) for run in runs]
    return {"commands.sh": "#!/bin/sh\n" + "".join(f"{line}\n" for line in lines)}


SLURM = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{parallel}
#SBATCH --nodes=1
#SBATCH --gpus={gpus}
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
# A run stops within two minutes of the signal with a checkpoint and exit code 75, and requeues.
# Of an array whose file was rendered again, submit the new file: ended runs are not in it.
set -u
commands=(
{commands}
)
trap 'kill -TERM "$!"' TERM # before the run starts: without it, the signal ends this script
{where}bash -c "exec ${{commands[$SLURM_ARRAY_TASK_ID]}}" &
child=$!
wait "$child"
code=$?
if [ "$code" -gt 128 ]; then # the wait was interrupted by the signal, the run still saves
  wait "$child"
  code=$?
fi
if [ "$code" -eq 75 ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
  exit 0
fi
exit "$code"
"""


def _slurm(runs: Sequence[SweepRun], workdir: str, args: argparse.Namespace) -> dict[str, str]:
    quoted = "\n".join("  " + shlex.quote(command(run, workdir, args)) for run in runs)
    text = SLURM.format(
        name=runs[0].sweep if runs else "none", last=max(len(runs) - 1, 0), parallel=args.parallel,
        gpus=args.gpus, time=args.time, commands=quoted,
        where=f"cd {shlex.quote(args.repo)} || exit 1\n" if args.repo else "",
    )  # fmt: skip
    return {"slurm.sh": text}


def _xpk(runs: Sequence[SweepRun], workdir: str, args: argparse.Namespace) -> dict[str, str]:
    lines = ["#!/bin/sh", "set -e"]
    for run in runs:
        target = machine(run)
        inside = f"export MEDMAX_MULTIHOST=1; {_in_repo(command(run, workdir, args), args)}"
        words = [
            "xpk", "workload", "create", f"--workload={_job_name(run)}",
            f"--cluster={args.cluster}", f"--tpu-type={target.xpk}", f"--num-slices={run.slices}",
            f"--max-restarts={args.max_restarts}", f"--docker-image={args.image}",
            f"--zone={args.zone}", f"--project={args.project}", f"--command={inside}",
        ]  # fmt: skip
        lines.append(" \\\n  ".join([" ".join(words[:3]), *map(shlex.quote, words[3:])]))
    return {"xpk.sh": "\n".join(lines) + "\n"}


def _jobset(runs: Sequence[SweepRun], workdir: str, args: argparse.Namespace) -> dict[str, str]:
    files = {}
    for run in runs:
        text = yaml.safe_dump(_manifest(run, workdir, args), sort_keys=False, width=10_000)
        files[f"{run.run_id}.yaml"] = text
    return files


def _manifest(run: SweepRun, workdir: str, args: argparse.Namespace) -> dict[str, Any]:
    target = machine(run)
    chips = {"google.com/tpu": target.per_host}
    container = {
        "name": "train",
        "image": args.image,
        "command": ["bash", "-c", _in_repo(command(run, workdir, args), args)],
        "env": [{"name": "MEDMAX_MULTIHOST", "value": "1"}],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # of the TPU runtime
        "resources": {
            "requests": dict(chips),
            "limits": dict(chips),
        },  # twice, or YAML aliases
    }
    pod = {
        "restartPolicy": "Never",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": target.accelerator,
            "cloud.google.com/gke-tpu-topology": target.shape,
        },
        "containers": [container],
    }
    job = {
        "parallelism": target.hosts,
        "completions": target.hosts,
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": _job_name(run),
            "labels": {"kueue.x-k8s.io/queue-name": args.queue, "sweep": _label(run.sweep)},
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {"maxRestarts": args.max_restarts},
            "replicatedJobs": [
                {"name": "slice", "replicas": run.slices, "template": {"spec": job}}
            ],
        },
    }


def _tpu_vm(runs: Sequence[SweepRun], workdir: str, args: argparse.Namespace) -> dict[str, str]:
    lines = ["#!/bin/sh", "set -e"]
    for run in runs:
        machine(run)
        inside = f"export MEDMAX_MULTIHOST=1; {_in_repo(command(run, workdir, args), args)}"
        words = [
            "gcloud", "compute", "tpus", "tpu-vm", "ssh", args.tpu, f"--zone={args.zone}",
            f"--project={args.project}", "--worker=all", f"--command={inside}",
        ]  # fmt: skip
        lines.append(shlex.join(words))
    return {"tpu_vm.sh": "\n".join(lines) + "\n"}


def _job_name(run: SweepRun) -> str:
    """Return a valid Kubernetes name.

    It has lower case, digits and dashes, a letter first, and 40 characters at most for xpk.
    """
    return f"{_label(run.sweep)[:28].rstrip('-')}-{run.run_id}"


def _label(name: str) -> str:
    clean = "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower()).strip("-")
    return clean if clean[:1].isalpha() else f"s{clean}"


FORMS: dict[str, Callable[[Sequence[SweepRun], str, argparse.Namespace], dict[str, str]]] = {
    "plain": _plain,
    "slurm": _slurm,
    "xpk": _xpk,
    "jobset": _jobset,
    "tpu_vm": _tpu_vm,
}
