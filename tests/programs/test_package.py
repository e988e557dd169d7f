"""The installed package: one top-level name, the `medmax` command, no module under two names."""

import json
import pathlib
import re
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest
from packaging.requirements import Requirement

from medmax_jax import __main__ as command
from medmax_jax import __version__

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    source = folder / "source"  # the build writes into its folder, so not into the checkout
    source.mkdir()
    subprocess.run(
        ["tar", "-c", "--null", "-T", "-", "-f", folder / "source.tar"],
        cwd=ROOT, check=True, input=listed,
    )  # fmt: skip
    subprocess.run(["tar", "-x", "-f", folder / "source.tar", "-C", source], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", folder, "."], cwd=source, check=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_one_top_level_name_and_its_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"medmax_jax", f"medmax_jax-{__version__}.dist-info"}
    for name in (
        *("py.typed", "tiny/model.safetensors", "configs/tiny.py", "eval/run.py"),
        *("tiny_adapter/adapter.safetensors", "tiny_adapter/adapter_config.json"),
        *("data/sample/manifest.jsonl", "data/sample/NOTICE", "data/sources/prompts.json"),
        *("data/instruct/prompts/instruction.txt", "eval/prompts/judge_correct.txt"),
    ):
        assert f"medmax_jax/{name}" in names, name
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    parts = ("medmax_jax/", "configs/", "data/", "eval/")
    modules = {f"medmax_jax/{n.removeprefix('medmax_jax/')}" for n in listed if n.startswith(parts)}
    assert {n for n in names if n.endswith(".py")} == modules
    entry = zipfile.ZipFile(wheel).read(f"medmax_jax-{__version__}.dist-info/entry_points.txt")
    assert b"medmax = medmax_jax.__main__:main" in entry


@pytest.mark.slow
def test_an_installed_wheel_runs_without_the_checkout(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True, timeout=1800)
    work = tmp_path / "work"
    work.mkdir()
    for name in ("data", "eval", "configs"):
        done = subprocess.run(
            [python, "-c", f"import {name}"], cwd=work, capture_output=True, text=True
        )
        assert "ModuleNotFoundError" in done.stderr
    medmax = tmp_path / "env" / "bin" / "medmax"
    shipped = ["--model=medmax_jax/tiny", "--adapter=medmax_jax/tiny_adapter"]
    ask = [medmax, "generate", *shipped, "--prompt=Is a CT an image?", "--out=answers"]
    subprocess.run(ask, cwd=work, check=True, timeout=600)
    subprocess.run([medmax, "quickstart"], cwd=work, check=True, timeout=3600)
    assert (work / "quickstart_run" / "report.html").exists()


def medmax(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "medmax_jax", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_help_lists_the_commands_without_jax():
    code = (
        "import sys; sys.argv[1:] = ['--help']\nfrom medmax_jax import __main__\n"
        "__main__.main()\nassert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [words[0] for words in lines] == list(command.COMMANDS)


@pytest.mark.parametrize(
    ("word", "hint"),
    [("trian", "did you mean train?"), ("evl", "did you mean eval?"), ("xyzzy", "medmax --help")],
)
def test_unknown_command_suggests_the_nearest(word, hint):
    done = medmax(word)
    assert done.returncode == 2 and done.stderr.startswith(f"error: unknown command {word!r}")
    assert hint in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_command_is_the_program_of_its_module():
    module = command.COMMANDS["report"][0]
    own = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    done = medmax("report", "--help")
    assert done.returncode == own.returncode and done.stdout == own.stdout != ""
    assert medmax("compare", "a", "b").returncode == 1  # the program's own exit status


USER = """
from medmax_jax import generate, generation, load_config, plan, prepare_sample, train
from medmax_jax.eval import compare, evaluate
from medmax_jax.eval.models.base import ModelRequest

class Mine:
    def generate(self, requests: list[ModelRequest]) -> list[str]:
        return ["yes" for request in requests if request.mode == "text"]

summary = evaluate(Mine(), "sample", "runs/mine", mode="strict")
print(summary["scores"][0], compare("runs/a", "runs/mine", seed=0, resamples=1000))
bundle = generation.load("models/anole", adapter="runs/lora/adapter")
sample = generation.defaults("medmax_eval")
[answer] = generation.generate(bundle, [["Is this a CT?"]], sample, mode="text", seed=0)
config = load_config("configs/tiny.py", {"optim.peak_lr": 1e-3})
prepare_sample("records")
print(plan(config, "v5e:1x1")["fits"], train(config, "runs/lora").loss)
print(generate("models/anole", ["?"], "answers")[0].text)
print([part.text for part in answer if isinstance(part, generation.Text)])
"""


def test_a_users_script_passes_strict_type_checks(tmp_path):
    """Wrong uses of the same names do not: the types say something."""
    settings = dict(include=["."], typeCheckingMode="strict", extraPaths=[str(ROOT)])
    settings["pythonPlatform"] = "Linux"
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    (tmp_path / "right.py").write_text(USER)
    wrong = USER.replace('mode="text", seed=0', 'mode=1, seed="0"').replace(
        '"runs/mine", mode', "mode"
    )
    (tmp_path / "wrong.py").write_text(
        wrong.replace("part.text", "part.words").replace(".loss", ".lost")
    )
    command = ["basedpyright", "--pythonpath", sys.executable, "--outputjson", "-p"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert [d["message"] for d in found if d["file"].endswith("right.py")] == []
    assert len([d for d in found if d["severity"] == "error"]) >= 5


def test_old_import_paths_are_gone():
    # Verbatim: part of the data.
    for name in ("medmax_jax.lanes", "medmax_jax.seeing", "medmax_jax.data.published"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True
        )
        assert "ModuleNotFoundError" in done.stderr


def test_extras_are_the_requirement_files():
    extras = SETTINGS["project"]["optional-dependencies"]
    for name in ("tpu", "cuda", "demo", "dev", "docs"):
        lines = (ROOT / f"requirements-{name}.txt").read_text().splitlines()
        stated = [re.sub(r"\s+#.*", "", s) for s in lines if s and not s.startswith(("#", "-r"))]
        assert {str(Requirement(s)) for s in stated} == {str(Requirement(s)) for s in extras[name]}


def test_version_is_stated_once_per_file():
    assert SETTINGS["project"]["version"] == __version__
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
