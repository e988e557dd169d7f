"""Define machines by name, and their devices for the compiler; compiling for a TPU needs no TPU.

    v5e:4x4    sixteen chips of a v5e slice          v5p:2x2x1    four chips
    v5e:1x1    one                                   H100:8       eight GPUs, by arithmetic alone

With several slices the chips of each have a fast network of their own, and data parallelism runs
between them.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from medmax_jax.config import Mesh
from medmax_jax.flops import CHIPS, GIB, Chip

# GiB that libtpu leaves to a program: "available HBM" in its message when a program does not fit.
USABLE = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
GPU_SHARE = 0.92  # of a GPU's memory; the rest is for CUDA, cuDNN and fragmentation: an assumption
# Hz: with these clocks the widths of the matrix units give the published peak.
CLOCK = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}


class PlanError(ValueError):
    """A plan that cannot be made; the message names the flag, the value and the fix."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine, or several slices of one."""

    name: str
    chip: Chip
    shape: tuple[int, ...]  # of one slice
    slices: int

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def usable(self) -> float:
        """Return the bytes of one device that a program may use."""
        return USABLE[self.chip.name] * GIB if self.is_tpu else GPU_SHARE * self.chip.hbm

    @property
    def is_tpu(self) -> bool:
        return self.chip.name in USABLE


def parse(name: str, *, slices: int) -> Topology:
    """Parse a machine: v5e:4x4 -> sixteen v5e chips; raise PlanError on anything else."""
    match = re.fullmatch(r"([\w\-]+):(\d+(?:x\d+)*)", name)
    chip = CHIPS.get(match[1]) if match else None
    if chip is None:
        raise PlanError(
            f"--topology={name}; use the form CHIP:SHAPE with CHIP one of {', '.join(CHIPS)}, "
            "for example v5e:4x4, v5p:2x2x1 or H100:8"
        )
    shape = tuple(int(n) for n in match[2].split("x"))
    dimensions = DIMENSIONS.get(chip.name, 1)
    if len(shape) != dimensions or min(shape) < 1:
        raise PlanError(
            f"--topology={name}; {chip.name} has {dimensions} dimensions, each 1 or more"
        )
    if slices < 1:
        raise PlanError(f"--slices={slices}; it must be at least 1")
    return Topology(name, chip, shape, slices)


def devices(topology: Topology) -> Sequence[Any]:
    """Return the devices from libtpu; raise PlanError if it lacks the machine or is missing."""
    if not topology.is_tpu:
        raise PlanError(
            f"--topology={topology.name} is supported by arithmetic only; add --analytic"
        )
    # libtpu then queries no metadata server, and accepts that another process has loaded it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")  # nor does it log that it found no TPU
    x, y, z = (*topology.shape, 1)[:3]
    # A host has 2x2 chips; a machine with an odd side is made of smaller hosts.
    topology_options: dict[str, Any] = {"chips_per_host_bounds": (2 - x % 2, 2 - y % 2, 1)}
    if topology.chip.name == "v4":
        topology_options["chip_config_name"] = "megacore"  # else every core is a device of its own
    if topology.slices > 1:
        topology_options["num_slices"] = topology.slices
    try:
        tpu_devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **topology_options
        ).devices
    except Exception as error:  # noqa: BLE001  libtpu raises RuntimeErrors of several kinds
        raise PlanError(
            f"--topology={topology.name}: libtpu rejects it ({str(error).splitlines()[0]}); "
            "install libtpu with `pip install -r requirements-dev.txt`, or use --analytic"
        ) from error
    if len(tpu_devices) != topology.chips:
        raise PlanError(
            f"--topology={topology.name}: libtpu returns {len(tpu_devices)} devices, "
            f"not {topology.chips}"
        )
    return tpu_devices


def use_no_device() -> None:
    """Prepare a program that only compiles: the devices of this machine are not used."""
    jax.config.update("jax_platforms", "cpu")


def mesh_of(text: str, topology: Topology) -> Mesh:
    """Parse "1,4,1" -> Mesh(data=1, fsdp=4, tp=1); raise PlanError unless it covers all chips."""
    sizes = [int(n) for n in text.split(",")] if re.fullmatch(r"\d+,\d+,\d+", text) else []
    if math.prod(sizes) != topology.chips or not sizes:
        raise PlanError(
            f"--mesh={text}; use data,fsdp,tp with a product of {topology.chips}, the chips of "
            f"{topology.slices} x {topology.name}, or search"
        )
    return Mesh(data=sizes[0], fsdp=sizes[1], tp=sizes[2])
