"""Two processes as two hosts: the numbers of one process, one writer, and a stop that both obey."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import micro_run
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_train import ROOT, finish, rows, wait_for_step

from medmax_jax import cli

pytestmark = pytest.mark.slow

STEPS = 60


@pytest.fixture
def command(tmp_path) -> list[str]:
    """The program on a mesh of two devices."""
    settings = dict(
        data__train=micro_run.write(tmp_path / "train"),
        data__validation=micro_run.write(tmp_path / "held", count=9, seed=1),
        mesh__fsdp=2, train__steps=STEPS, train__log_every=2, train__checkpoint_every=10,
        train__eval_every=30,
    )  # fmt: skip
    path = tmp_path / "micro.py"
    path.write_text(
        f"import micro_run\n\n\ndef get_config():\n    return micro_run.settings(**{settings})\n"
    )
    return [sys.executable, "-m", "medmax_jax.train", f"--config={path}"]


def hosts(command: list[str], workdir: pathlib.Path, count: int) -> list[subprocess.Popen]:
    """`count` processes that share the two devices of the mesh."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "tests"),
        "XLA_FLAGS": flags + str(2 // count),
    }
    started = []
    for own in range(count):
        if count > 1:
            environment["MEDMAX_COORDINATOR"] = address
            environment["MEDMAX_PROCESSES"], environment["MEDMAX_PROCESS"] = str(count), str(own)
        started.append(
            subprocess.Popen(
                [*command, f"--workdir={workdir}"],
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        )
    return started


def test_two_hosts_are_one_run(command, tmp_path):
    (alone,) = hosts(command, tmp_path / "one", 1)
    status, output = finish(alone)
    assert status == cli.DONE, output

    first, second = hosts(command, tmp_path / "two", 2)
    wait_for_step(first, tmp_path / "two", 20)
    second.send_signal(signal.SIGTERM)  # to the host that does not write
    outputs = [finish(p) for p in (first, second)]
    assert [status for status, _ in outputs] == [cli.INTERRUPTED] * 2, outputs
    assert "signal to another host: stopped after step" in outputs[0][1]

    outputs = [finish(p) for p in hosts(command, tmp_path / "two", 2)]
    assert [status for status, _ in outputs] == [cli.DONE] * 2, outputs
    assert re.search("resuming after step [234]", outputs[0][1])
    assert "step 60/60" not in outputs[1][1]  # one host speaks

    for kind in ("train", "validation"):
        expected, found = rows(tmp_path / "one", kind), rows(tmp_path / "two", kind)
        assert expected.keys() == found.keys()
        for step, row in expected.items():
            for name in ("loss", "text_nll", "image_nll"):
                np.testing.assert_allclose(found[step][name], row[name], rtol=1e-4)
    adapters = [load_file(tmp_path / n / "adapter/adapter.safetensors") for n in ("one", "two")]
    for name, value in adapters[0].items():
        assert np.abs(adapters[1][name] - value).mean() < 1e-3 * np.abs(value).mean(), name
