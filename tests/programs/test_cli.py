"""Messages of every program about a wrong flag, an unwritable workdir, and Ctrl-C."""

import os
import pathlib
import subprocess
import sys

import pytest

from medmax_jax import cli, config, train_vqgan
from medmax_jax.configs import eval_tiny, tiny_vqgan
from medmax_jax.eval.config import Settings
from medmax_jax.eval.pipeline import stages

ROOT = pathlib.Path(__file__).parents[2]
INTERRUPTED = """
from medmax_jax import cli

def main(settings, workdir):
    raise KeyboardInterrupt

cli.run(main, errors=())
"""


def program(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, text=True, capture_output=True
    )


@pytest.mark.parametrize("name", ["medmax_jax.quickstart", "medmax_jax.train_vqgan"])
@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--workdir=w", "--config.seeed=1"], cli.USAGE, "--config.seeed is not a field"),
        (["--workdir=README.md/w"], cli.ERROR, "--workdir README.md/w is not writable"),
    ],
)
def test_one_line_and_a_status(name, arguments, status, message):
    done = program("-m", name, f"--config=configs/{name.split('.')[1].replace('train', 'tiny')}.py",
                   *arguments)  # fmt: skip
    assert done.returncode == status and message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--out=w", "--config.sample.foo=1"], cli.USAGE, "--config.sample.foo is not a field"),
        (["--out=README.md/w"], cli.ERROR, "--out README.md/w is not writable"),
        (["--out=runs/w", "--model=nowhere"], cli.ERROR, "nowhere/config.json: no such file"),
    ],
)
def test_generate_reports_errors_in_one_line(arguments, status, message):
    done = program(
        "-m", "medmax_jax.generate", "--model=medmax_jax/tiny", "--prompt=A CT?", *arguments
    )
    assert done.returncode == status and message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_programs_check_the_workdir_before_they_work(tmp_path):
    (tmp_path / "file").write_text("")
    request = dict(model="native:nowhere", adapter="", progress=print)
    with pytest.raises(cli.WorkdirError, match="file/w is not writable .*; use another folder"):
        settings = config.build(Settings, eval_tiny.get_config())
        stages.run(settings, tmp_path / "file" / "w", **request)
    with pytest.raises(cli.WorkdirError, match="file/w is not writable"):
        train_vqgan.run(
            config.build(train_vqgan.Run, tiny_vqgan.get_config()), tmp_path / "file" / "w"
        )


def test_workdir_is_created_and_left_empty(tmp_path):
    assert cli.open_workdir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_ctrl_c_outside_the_loop():
    done = program("-c", INTERRUPTED, "--config=configs/tiny.py", "--workdir=w")
    assert done.returncode == cli.INTERRUPTED
    assert done.stderr == f"{cli.STOPPED}\n" and cli.RESUME in cli.STOPPED
