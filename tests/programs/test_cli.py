"""Messages of every program about a wrong flag, an unwritable workdir, and Ctrl-C."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from forked_programs import forked

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

PLATFORM = """
import sys

hidden, *sys.argv[1:] = sys.argv[1:]
if hidden == "hidden":
    sys.modules["libtpu"] = None  # as if it were not installed

import jax
from medmax_jax import cli

def main(settings, workdir):
    print(jax.config.jax_platforms, jax.devices())

cli.run(main, errors=())
"""
# A call that Python cannot interrupt, as XLA's compiler: its signal handlers run after it.
COMPILING = """
import hashlib
from medmax_jax import cli

with cli.Stop() as stop:
    stop.activity = "the compilation"
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000_000)
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


@pytest.mark.parametrize("own", cli.CONTENTS)
def test_the_folder_of_another_program_is_refused(own, tmp_path):
    for name in cli.CONTENTS:
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("")
        if name == own:
            with cli.open_workdir(folder, own=own) as work:
                assert work.folder == folder
            continue
        with pytest.raises(cli.WorkdirError, match=f"{cli.CONTENTS[name]} .{name}.; use another"):
            with cli.open_workdir(folder, own=own):
                pytest.fail("must not begin")


def test_workdir_is_created_and_left_empty(tmp_path):
    with cli.open_workdir(tmp_path / "a" / "b") as work:
        assert work.folder == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_ctrl_c_outside_the_loop():
    done = program("-c", INTERRUPTED, "--config=configs/tiny.py", "--workdir=w")
    assert done.returncode == cli.INTERRUPTED
    assert done.stderr == f"{cli.STOPPED}\n" and cli.RESUME in cli.STOPPED


def test_an_absent_tpu_is_not_mentioned():
    unset = ("JAX_PLATFORMS", "TPU_LIBRARY_PATH")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    for libtpu in ("installed", "hidden"):
        done = subprocess.run(
            [sys.executable, "-c", PLATFORM, libtpu, "--config=configs/tiny.py", "--workdir=w"],
            cwd=ROOT, env=environment, text=True, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0 and "Unable to initialize" not in done.stderr, done.stderr
        if "CpuDevice" in done.stdout:
            assert done.stderr == ""


def test_devices_of_this_machine_are_not_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "ACCELERATORS", (str(tmp_path),))
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: True)
    updates = {}
    monkeypatch.setattr(cli.jax.config, "update", updates.__setitem__)
    monkeypatch.setattr(type(cli.jax.config), "jax_platforms", None, raising=False)
    cli.skip_absent_tpu()
    assert updates == {}
    monkeypatch.setattr(cli, "ACCELERATORS", ())
    cli.skip_absent_tpu()
    assert updates == {"jax_platforms": "cpu"}


def test_wrong_and_missing_arguments_are_explained():
    config_flag, train = "--config=configs/tiny.py", "medmax_jax.train"
    cases = [
        ([train], "--config and --workdir are required; --help lists all flags"),
        ([train, config_flag], "--workdir is required; --help lists all flags"),
        (["medmax_jax.generate"], "--model and --out are required; --help lists all flags"),
        (["medmax_jax.convert"], "--from, --to and --format are required; --help lists all flags"),
        (["eval.report"], "--workdir is required; --help lists all flags"),
        (["data.prepare", "sample"], "--out is required; --help lists all flags"),
        ([train, config_flag, "--workdirr=w"], "--workdirr is not a flag; did you mean --workdir?"),
        ([train, config_flag, "--workdir=w", "--config.lr=1"],
         "--config.lr is not a field of the config; did you mean --config.optim.peak_lr?"),
        ([train, config_flag, "--workdir=w", "--config.data.batchsize=1"],
         "--config.data.batchsize is not a field of the config; did you mean "
         "--config.data.batch_size?"),
        ([train, "--config=configs/tinny.py", "--workdir=w"],
         "--config=configs/tinny.py: no such file; did you mean configs/tiny.py?"),
        (["eval.run", "--config=configs/eval_tiny.py", "--workdir=w", "--config.judge.endpont=x"],
         "--config.judge.endpont is not a field of the config; did you mean "
         "--config.judge.endpoint?"),
        (["data.prepare", "sampel"], "command: 'sampel' is unknown; did you mean sample?"),
        (["data.prepare", "sample", "--out=w", "--views=2", "--rond=2"],
         "--rond is not a flag; did you mean --rounds?"),
        # a misspelled flag comes before the one that is missing because of it
        (["medmax_jax.sweep", "status", "--wrkdir=w"],
         "--wrkdir is not a flag; did you mean --workdir?"),
        (["medmax_jax.convert", "--too=b"],
         "--too is not a flag; did you mean --to?"),
        (["data.prepare", "stats", "--outt=w"], "--outt is not a flag; did you mean --out?"),
        ([train, "--wrkdir=w"], "--wrkdir is not a flag; did you mean --workdir?"),
        (["medmax_jax.generate", "--promt=w"], "--promt is not a flag; did you mean --prompt?"),
        (["medmax_jax.sweep", "colect"], "command: 'colect' is unknown; did you mean collect?"),
        (["eval.suite", "publishd"], "table: 'publishd' is unknown; did you mean published?"),
        (["medmax_jax", "trian"], "unknown command 'trian'; did you mean train?"),
    ]  # fmt: skip
    for (words, message), result in zip(cases, forked(*(c[0] for c in cases)), strict=True):
        assert result == (cli.USAGE, f"error: {message}\n"), words


def test_help_shows_required_flags_first_and_the_fields_of_a_config():
    (status, text), (full_status, full), *configs = forked(
        ["medmax_jax.generate", "--help"],
        ["medmax_jax.generate", "--helpfull"],
        ["medmax_jax.train", "--help_config", "--config=configs/tiny.py", "--config.data.seed=7"],
        ["eval.run", "--config", "configs/eval_tiny.py", "--help_config"],
        ["medmax_jax.train_vqgan", "--config=configs/tiny_vqgan.py", "--help_config"],
        ["medmax_jax.scaling", "--help"],
        ["medmax_jax.train", "--help_config"],
    )
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert status == 0 and flags[:3] == ["--model", "--out", "--adapter"]
    assert "--verbosity" not in text
    assert full_status == 0 and "--verbosity" in full
    missing = configs.pop()
    assert missing[0] == cli.USAGE and "requires --config=FILE" in missing[1]
    scaling_status, scaling = configs.pop()
    flags = [line.split()[0] for line in scaling.splitlines() if line.startswith("  --")]
    assert scaling_status == 0 and flags[:2] == ["--law", "--table"]
    assert [code for code, _ in configs] == [0, 0, 0]
    train, evaluate, vqgan = (" ".join(text.split()) for _, text in configs)
    assert "--config.data.seed=7" in train and "--config.optim.peak_lr=0.003" in train
    assert "--config.data.batch_size=8 rows per step, over all devices" in train
    assert "--config.judge.service.retries=6 of one call" in evaluate
    assert "--config.questions='sample' or JSONL files in the released schema" in evaluate
    assert "--config.train.plain_steps=150 autoencoding before" in vqgan


def test_ctrl_c_during_a_compilation_is_reported_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILING], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    killer = threading.Timer(60, process.kill)
    killer.start()
    try:
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.5)  # until it is inside of the call
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        line = process.stderr.readline()
        assert line == "SIGINT: stopping after the compilation; repeat it to stop at once\n"
        assert time.monotonic() - begin < 2
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == cli.INTERRUPTED
    finally:
        killer.cancel()
        process.kill()
        process.communicate()


@pytest.mark.parametrize("seconds", [0.2, 0.6, 1.0])
def test_ctrl_c_during_the_imports_ends_without_a_traceback(seconds, tmp_path):
    words = [sys.executable, "-m", "medmax_jax.train", "--config=configs/tiny.py"]
    process = subprocess.Popen(
        [*words, f"--workdir={tmp_path / 'w'}"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in output


def test_configs_of_the_package_are_found_from_another_folder(tmp_path):
    words = ["medmax_jax.generate", "--config=configs/sample_meta.py", "--help_config"]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=tmp_path, text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 and "config.sample" in done.stdout, done.stderr


def test_a_second_interrupt_leaves_an_interactive_session(monkeypatch):
    """As a notebook's kernel is one: it must not end with the cell."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(KeyboardInterrupt), cli.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == "SIGINT"
        time.sleep(0.6)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
