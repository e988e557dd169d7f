"""Compiles a training step for TPUs on a machine without one, and prints the compiler's report.

    python benchmarks/step_aot.py --topology=v5e:2x2 --mesh=1,4,1 --layers=3 --rows=4 \
        --set model.attention=splash --set model.remat=attn

Widths are those of 7B, the depth is small so that it compiles in seconds. Printed as JSON:
    temp_gib      temporaries per device
    est_ms        scheduled cycles x trip counts / 1.5 GHz: ranks variants of a program, not a speed
                  (kernels written in Pallas and exposed communication have no cycles in it)
    layer_cycles  of the loops over layers only, forward and backward
    other_ms      the rest: embedding, head, loss, optimizer
    gflops, gbytes  XLA's cost analysis, per device; it counts the body of a loop once

--reports=loss compiles the step without what a log line reports in addition to the loss (log Z,
largest logits, norms): the difference is their cost. --lowered prints the two numbers of the cost
analysis before compilation, where no operation is fused, so bytes are an upper bound.
"""

import argparse
import functools
import json
import os
import re
import sys
import time
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"  # another process may use it
sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType

from medmax_jax import arguments, config, sharding
from medmax_jax.configs import base
from medmax_jax.models import chameleon
from medmax_jax.training import step

CLOCK = 1.5e9  # Hz, of v5e: reproduces its published peak


def main() -> None:
    """Parse the flags, compile, and print one JSON object."""
    parser = arguments.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--mesh", default="1,4,1", help="data,fsdp,tp")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="rows per device")
    parser.add_argument("--set", action="append", default=[], metavar="section.field=value")
    parser.add_argument("--reports", choices=("all", "loss"), default="all")
    parser.add_argument("--lowered", action="store_true", help="before compilation, for CPUs")
    parser.add_argument("--hlo", default="", help="file for the compiled program")
    args = parser.parse_args()
    begin = time.monotonic()
    lowered = lower_step(args)
    if args.lowered:
        cost = lowered.cost_analysis()
        report = dict(layers=args.layers, rows=args.rows, set=args.set, reports=args.reports)
        report |= dict(gflops=cost["flops"] / 1e9, gbytes=cost["bytes accessed"] / 1e9)
        print(json.dumps(report))
        return
    compiled = lowered.compile()
    text = compiled.as_text()
    if args.hlo:
        with open(args.hlo, "w") as file:
            file.write(text)
    cycles = Cycles(text)
    loops = sorted(cycles.layer_loops(args.layers))
    total, layers = cycles.total(), sum(loops)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    report = dict(
        topology=args.topology, mesh=args.mesh, layers=args.layers, rows=args.rows,
        set=args.set, reports=args.reports, gflops=round(cost["flops"] / 1e9, 3),
        gbytes=round(cost["bytes accessed"] / 1e9, 3),
        temp_gib=round(memory.temp_size_in_bytes / 2**30, 3),
        est_ms=round(total / CLOCK * 1e3, 2), layer_cycles=loops,
        other_ms=round((total - layers * args.layers) / CLOCK * 1e3, 2),
        compile_s=round(time.monotonic() - begin, 1), jax=jax.__version__,
    )  # fmt: skip
    print(json.dumps(report))


def lower_step(args: argparse.Namespace) -> Any:
    """Lower the program of `step.make_train_step` for the topology without allocation."""
    sizes = tuple(int(n) for n in args.mesh.split(","))
    settings = base.get_config()
    settings.model.num_layers = args.layers
    settings.data.batch_size = args.rows * sizes[0] * sizes[1]
    settings.mesh.update(data=sizes[0], fsdp=sizes[1], tp=sizes[2])
    for assignment in args.set:
        name, value = assignment.split("=")
        *sections, field = name.split(".")
        part = functools.reduce(lambda part, section: part[section], sections, settings)
        kind = type(part[field])
        part[field] = value == "True" if kind is bool else kind(value)
    if settings.model.quant != "none":
        settings.train.init_from = "abstract"  # never read: nothing is loaded here
    run = config.from_config_dict(settings)
    topology_mesh = lambda: make_topology_mesh(args.topology, args.mesh)  # noqa: E731
    mesh = sharding.make_mesh(run.mesh) if args.lowered else topology_mesh()
    with jax.set_mesh(mesh):
        like = chameleon.abstract_model(run.model, run.vocab, run.lora)
        graph, trainable, frozen = step.split_trainable(like, run.train.trains)
        state = sharding.with_shardings(
            jax.eval_shape(lambda t: step.init_state(t, run), trainable)
        )
        key = sharding.with_shardings(
            jax.eval_shape(lambda: jax.random.key(0, impl=run.train.prng_impl))
        )
        train_step = step.make_train_step(graph, run)
        if args.reports == "loss":
            train_step = _without_reports(train_step)
        return train_step.lower(state, frozen, step.abstract_batch(run), key)


def _without_reports(train_step: Any) -> Any:
    """Return the step with the loss as its only report; the compiler removes what is not used."""

    def with_loss(state: Any, *args: Any) -> tuple[Any, Any]:
        state, metrics = train_step.default(state, *args)
        return state, (metrics.loss, metrics.text_nll, metrics.image_nll, metrics.grad_norm)

    return sharding.jit(with_loss, donate_argnums=0)


def make_topology_mesh(topology: str, sizes: str) -> jax.sharding.Mesh:
    """Return data x fsdp x tp chips of a topology that is not attached."""
    extra = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    topology_desc = topologies.get_topology_desc(platform="tpu", topology_name=topology, **extra)
    chips = np.array(topology_desc.devices).reshape([int(n) for n in sizes.split(",")])
    return jax.sharding.Mesh(chips, sharding.AXES, (AxisType.Explicit,) * 3)


class Cycles:
    """Estimates the cycles of a scheduled HLO module, loops multiplied by their trip counts."""

    def __init__(self, text: str):
        self.bodies: dict[str, list[str]] = {}
        name = ""
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
                name = "ENTRY" if head[1] else head[2]
                self.bodies[name] = []
            elif name:
                self.bodies[name].append(line)

    def total(self, name: str = "ENTRY") -> int:
        """Return the cycles of a computation including its loops."""
        calls = self._calls(name)
        return sum(self._own(x) + (n * self.total(body) if body else 0) for x, n, body in calls)

    def layer_loops(self, turns: int) -> list[int]:
        """Return the cycles of one iteration of each outermost loop of `turns` iterations."""
        return [self.total(b) for _, n, b in self._calls("ENTRY") if b and n == turns]

    def _calls(self, name: str) -> list[tuple[str, int, str]]:
        """Return (line, turns, body) of a computation's instructions; only loops have a body."""
        calls = []
        for line in self.bodies[name]:
            loop = re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line)
            calls.append((line, self._turns(loop[1]), loop[2]) if loop else (line, 0, ""))
        return calls

    def _turns(self, condition: str) -> int:
        """Return the trip count: JAX's loops count from 0 to the constant of their condition."""
        limits = [re.search(r" constant\((\d+)\)", line) for line in self.bodies[condition]]
        (limit,) = {int(match[1]) for match in limits if match}
        return limit

    def _own(self, line: str) -> int:
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        return int(cycles[1]) if cycles and " while(" not in line else 0


if __name__ == "__main__":
    main()
