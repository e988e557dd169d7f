"""Describe what makes a result: version, commit, machine and date.

    environment(devices=jax.devices())  ->  {"date": "2026-11-29 09:43 UTC", "medmax_jax": "0.2.0",
                                             "commit": "3bb3fa6", "machine": "4 x TPU v5e, ..."}

The program that computes numbers records this next to them, so that a page that is rendered later,
or elsewhere, shows where its numbers are from: html_page.provenance. The name of the machine is
left out, because pages are passed on.
"""

import collections
import datetime
import functools
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmax_jax import __version__


def environment(*, devices: Sequence[Any] = ()) -> dict[str, str]:
    """Return the facts by the names under which pages show them.

    devices: `jax.devices()`, in a program that computes with JAX.
    """
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "medmax_jax": __version__,
        "commit": git_commit(),
        "machine": machine(devices),
    }


def machine(devices: Sequence[Any] = ()) -> str:
    """Return accelerators, processors and system: "4 x TPU v5e, 24 CPU cores, Linux x86_64"."""
    kinds = collections.Counter(device.device_kind for device in devices)
    parts = [f"{count} x {kind}" for kind, count in kinds.items() if kind != "cpu"]
    parts += [f"{os.cpu_count()} CPU cores", f"{platform.system()} {platform.machine()}"]
    return ", ".join(parts)


@functools.cache
def git_commit() -> str:
    """Return the commit of the source at the first call, with + when it was changed.

    Empty outside a checkout.
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
