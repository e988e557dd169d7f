"""The tutorials of docs/tutorials, block by block, in a folder that has only links to the checkout.

`-m slow` runs every page as written, and once more with the smaller sizes that are written here;
the page of the endpoint is in the default tests. What needs a TPU, a download or another machine's
server is listed here too: those commands are left out, and the 7B tutorial runs on the shipped tiny
model. A `text` block is the output of the block before it: each of its lines must be printed, up to
its numbers.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from llm_server import completion, serving
from run_setup import environment

from medmax_jax import config
from medmax_jax.configs import medmax_7b_lora

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"^```(bash|python|text)\n(.*?)^```$", re.M | re.S)
COMMAND = r"^{}(?:.*\\\n)*.*\n"  # with the lines that continue it
TINY = (
    "--config=configs/tiny.py "
    "--config.train.steps=3 --config.train.eval_every=0 --config.optim.warmup_ratio=0.0 "
)
LEFT_OUT = {  # what needs the network, a TPU or the reader's own server: commands by their start
    "tpu_7b": ("gcloud", "python -m medmax_jax.convert check", "export BUCKET"),
    "endpoint": ("export",),
}
ON_TINY = (  # the shipped model stands for the published one, embedded images for published rows
    (r"\$BUCKET/", ""),
    ("--from hf://GAIR/Anole-7b-v0.1 ", "--from medmax_jax/tiny "),
    (r"data\.prepare import --from \S+ \\\n *--out records/(\w+)",
     r"data.prepare sample --out records/\1 --split \1 --model models/anole"),
    ("MEDMAX_MULTIHOST=1 ", ""),
    (r"(medmax_jax\.train )--config=configs/medmax_7b_lora\.py ", rf"\1{TINY}"),
    ("--seq_len 8192 --document_limit 2048", "--seq_len 256 --document_limit 256"),
)  # fmt: skip
SMALLER = {
    "dense_mixture": (),  # fewer steps would train no model whose answers pass the filters
    "laptop": (("vqa_closed = 40", "vqa_closed = 8"), ("steps=300", "steps=10")),
    "endpoint": (),
    "own_benchmark": ((r"(--workdir=runs/own)", r"\1 --model=baseline:majority"),),
    "tpu_7b": tuple(
        (COMMAND.format(rf".*medmax_jax\.{start}"), "")  # what needs the adapter, or trains it
        for start in (r"train (?!(?:.*\\\n)*.*--dry_run)", "generate ", r"convert --from \S*runs")
    ),
    "scaling_study": (
        ("--views 8", "--views 1"),
        (r"SIZES\[:3\]", "SIZES[:1]"),
        (r"\(0\.25, 0\.5, 1\.0\), \"steps\": 64", '(1.0,), "steps": 8'),
        # one run is too few for a law: the fit reads the table of a larger sweep
        ("--table runs/study/table.csv", f"--table {ROOT}/docs/explanation/scaling_tiny/table.csv"),
    ),
}


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((PAGES / f"{page}.md").read_text())


def prepared(page: str, body: str, changes: tuple[tuple[str, str], ...]) -> str:
    """The block without what cannot run here, and with the changes."""
    for start in LEFT_OUT.get(page, ()):
        body = re.sub(COMMAND.format(re.escape(start)), "", body, flags=re.M)
    for pattern, new in (*(ON_TINY if page == "tpu_7b" else ()), *changes):
        body = re.sub(pattern, new, body, flags=re.M)
    return body


def masked(line: str) -> str:
    """The line with every number replaced, and single spaces."""
    return " ".join(re.sub(r"[-+]?\d[\d.,:]*", "#", line).split())


def run_page(page: str, folder: pathlib.Path, *changes: tuple[str, str], **variables: str) -> None:
    for name in ("configs", "data", "eval", "medmax_jax"):
        (folder / name).symlink_to(ROOT / name)
    env = environment() | {"PYTHON": sys.executable, "PYTHONPATH": ""} | variables
    output = ""
    for kind, body in blocks(page):
        if kind == "text":
            printed = {masked(line) for line in output.splitlines()}
            assert body and not {masked(line) for line in body.splitlines()} - printed, output
            continue
        code = prepared(page, body, changes)
        if kind == "bash":
            words = ["bash", "-euo", "pipefail", "-c", f'python() {{ "$PYTHON" "$@"; }}\n{code}']
        else:
            words = [sys.executable, "-c", code]
        done = subprocess.run(
            words, cwd=folder, env=env, text=True, timeout=1800,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output = done.stdout
        print(f"---- {page}\n{code}----\n{output}")
        assert done.returncode == 0, (page, code, output[-3000:])


# The programs of these run in the default suite too.
@pytest.mark.slow
@pytest.mark.parametrize("page", ["laptop", "tpu_7b", "scaling_study"])
def test_a_tutorial_runs_with_smaller_sizes(page, tmp_path):
    for pattern, _ in SMALLER[page]:
        assert any(re.search(pattern, body, re.M) for _, body in blocks(page)), pattern
    run_page(page, tmp_path, *SMALLER[page])


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", ["laptop", "tpu_7b", "scaling_study", "own_benchmark", "dense_mixture"]
)
def test_a_tutorial_runs_as_written(page, tmp_path):
    run_page(page, tmp_path)


def test_the_tutorial_of_an_own_benchmark_runs_with_a_baseline(tmp_path):
    run_page("own_benchmark", tmp_path, *SMALLER["own_benchmark"])


def test_the_tutorial_of_an_endpoint_runs_as_written(tmp_path):
    with serving(lambda request, n: completion("yes")) as llm:
        run_page("endpoint", tmp_path, URL=llm.url, NAME="my-model")
    assert llm.requests and all(request["model"] == "my-model" for request in llm.requests)


def test_the_commands_for_7b_have_valid_configs():
    """The flags that the test above replaces with those of the tiny model."""
    text = "".join(body for kind, body in blocks("tpu_7b") if kind == "bash")
    commands = re.findall(r"medmax_jax\.train --config=configs/medmax_7b_lora\.py(.*)", text)
    assert len(commands) == 2
    for flags in commands:
        settings = medmax_7b_lora.get_config()
        for path, value in re.findall(r"--config\.([\w.]+)=(\S+)", flags):
            section, name = path.split(".")
            settings[section][name] = type(settings[section][name])(value)
        run = config.from_config_dict(settings)
        assert run.mesh.data * run.mesh.fsdp * run.mesh.tp == 16  # v5e:4x4


@pytest.mark.parametrize(("page", "printed"), [("models", "3,507,840 parameters\n"), ("data", "")])
def test_the_example_of_a_reference_page_runs(page, printed, tmp_path):
    text = (ROOT / "docs" / "reference" / "python" / f"{page}.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    (tmp_path / "runs").mkdir()
    records = ["-m", "data.prepare", "sample", "--kind", "instruction", "--split", "validation"]
    if "runs/records/train" in code:
        subprocess.run(
            [sys.executable, *records, "--out", tmp_path / "runs" / "records" / "train"],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, text=True, stdout=subprocess.PIPE, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == printed


def test_every_tutorial_is_run():
    assert {path.stem for path in PAGES.glob("*.md")} == set(SMALLER)
