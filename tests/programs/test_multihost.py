"""Two processes of four devices each as two hosts: the numbers of one, a stop that both obey."""

import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import micro_run
import numpy as np
import pytest
from gs_server import fixture_gs, fixture_server  # noqa: F401
from run_setup import ROOT, command, environment, finish, rows, start, wait_for_step
from safetensors.numpy import load_file

from medmax_jax import cli
from medmax_jax.storage.folder import Folder

pytestmark = pytest.mark.slow

ALL = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tp=2"]  # eight devices
GRACE = 30  # seconds that a spot TPU leaves after SIGTERM


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("config")
    return command(
        folder, data__validation=micro_run.write(folder / "held", count=9, seed=1),
        train__eval_every=30, train__checkpoint_every=10, train__keep=3,
    )  # fmt: skip


def one(words: list[str], workdir: pathlib.Path, devices: int = 8):
    return start(words, workdir, environment(devices=devices))


def two(
    words: list[str], workdir: pathlib.Path | str, cwds=(ROOT, ROOT), **variables
) -> list[subprocess.Popen]:
    """Two processes that share the eight devices of the mesh."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = environment(devices=4)
    shared |= {"MEDMAX_COORDINATOR": address, "MEDMAX_PROCESSES": "2"} | variables
    return [
        start(words, workdir, shared | {"MEDMAX_PROCESS": str(own)}, cwd)
        for own, cwd in enumerate(cwds)
    ]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("one")
    status, output = finish(one([*words, *ALL], folder))
    assert status == cli.DONE, output
    return folder


def close(a: pathlib.Path, b: pathlib.Path) -> None:
    """The same batches, the same losses within rounding, the same adapters nearly."""
    for kind in ("train", "validation"):
        expected, found = rows(a, kind), rows(b, kind)
        assert expected.keys() == found.keys()
        for step, row in expected.items():
            for name in ("loss", "text_nll", "image_nll"):
                np.testing.assert_allclose(found[step][name], row[name], rtol=1e-4)
            if kind == "train":
                assert found[step]["tokens"] == row["tokens"]
    adapters = [load_file(f / "adapter/adapter.safetensors") for f in (a, b)]
    for name, value in adapters[0].items():
        assert np.abs(adapters[1][name] - value).mean() < 1e-3 * np.abs(value).mean(), name


def test_two_hosts_train_one_run(words, alone, tmp_path):
    """SIGTERM to the host that does not write; both save, exit 75, and go on from there."""
    first, second = two([*words, *ALL], tmp_path)
    wait_for_step(first, tmp_path, 20)
    second.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    outputs = [finish(p) for p in (first, second)]
    assert [status for status, _ in outputs] == [cli.INTERRUPTED] * 2, outputs
    assert time.monotonic() - begin < GRACE
    assert "SIGTERM to a host: stopped after step" in outputs[0][1]

    outputs = [finish(p) for p in two([*words, *ALL], tmp_path)]
    assert [status for status, _ in outputs] == [cli.DONE] * 2, outputs
    assert re.search("resuming after step [2345]", outputs[0][1])
    assert "step 60/60" not in outputs[1][1]  # one host speaks
    close(alone, tmp_path)


def test_hosts_that_find_other_records_of_a_stage_end(tmp_path):
    """A folder that only one host has: both give the reason, and none waits for the other."""
    folder = micro_run.write(tmp_path / "train", count=40)
    config = tmp_path / "staged.py"
    config.write_text(
        "import micro_run\n\n\ndef get_config():\n"
        f"    config = micro_run.settings(data__train={folder!r}, train__steps=6)\n"
        '    config.stages = (dict(steps=3), dict(steps=3, records="later"))\n'
        "    return config\n"
    )
    cwds = [tmp_path / "with", tmp_path / "without"]
    for cwd in cwds:
        cwd.mkdir()
    micro_run.write(cwds[0] / "later", count=40)
    words = [sys.executable, "-m", "medmax_jax.train", f"--config={config}", *ALL]
    found = f"{ROOT}/tests/support:{ROOT}"
    for status, output in [*map(finish, two(words, tmp_path / "run", cwds, PYTHONPATH=found))]:
        assert status == cli.USAGE and "different numbers of steps, 3 to 6" in output, output


def test_run_resumes_elsewhere_after_a_host_is_killed(words, alone, tmp_path):
    """The other host ends too; then two hosts go on, then one on another mesh."""
    first, second = two([*words, *ALL], tmp_path)
    wait_for_step(first, tmp_path, 14)
    second.kill()
    assert finish(second)[0] == -signal.SIGKILL
    status, output = finish(first)  # its collectives fail, or the heartbeat does
    assert status not in (cli.DONE, cli.INTERRUPTED), output

    first, second = two([*words, *ALL], tmp_path)
    wait_for_step(first, tmp_path, 34)
    for process in (first, second):
        process.kill()
        finish(process)

    mesh = ["--config.mesh.fsdp=4", "--config.mesh.tp=1"]
    status, output = finish(one([*words, *mesh], tmp_path, devices=4))
    assert status == cli.DONE, output
    assert "config.mesh.data was 2, is now 1" in output
    assert re.search("resuming after step [123]0", output)
    close(alone, tmp_path)


def test_two_hosts_share_a_workdir_on_gs(words, alone, gs, tmp_path):
    """They have no disk in common; both are killed, and others resume."""
    steps = Folder(f"{gs}/checkpoints")
    first, second = two([*words, *ALL], gs, MEDMAX_STAGE=str(tmp_path / "a"))
    while not steps.children() or not Folder(f"{gs}/checkpoints/20").has("sha256.json"):
        assert first.poll() is None, finish(first)
        time.sleep(0.05)
    for process in (first, second):
        process.kill()
        finish(process)
    outputs = [finish(p) for p in two([*words, *ALL], gs, MEDMAX_STAGE=str(tmp_path / "b"))]
    assert [status for status, _ in outputs] == [cli.DONE] * 2, outputs
    assert re.search("resuming after step [2345]0", outputs[0][1])
    for name in Folder(gs).names():
        Folder(gs).download(name, tmp_path / "fetched" / name)
    close(alone, tmp_path / "fetched")
