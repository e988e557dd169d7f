"""Scripts in benchmarks/ say in one line what is wrong with their arguments."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
# Each pair of script and arguments in one process, so that JAX is imported once.
DRIVER = """
import contextlib, io, json, runpy, sys, traceback
sys.path.insert(0, {folder!r})
for name, *words in json.loads(sys.stdin.read()):
    sys.argv, status, out, err = [name, *words], 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path({folder!r} + "/" + name, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            status = traceback.format_exc()
    print("RESULT", json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""
SIDES = ("decode_hf_side", "decode_jax_side", "hf_serving", "hf_side", "jax_serving", "jax_side")
REQUIRED = {
    "convert_7b": "--scratch is required",
    **dict.fromkeys(("gpu", "tpu"), "--workdir is required"),
    "imax_results": "--results is required",
    "loader": "--scratch is required",
    "scaling": "--part is required",
    "true_size": "--scratch is required",
    **dict.fromkeys(("true_size_jax", "true_size_torch"), "STEP and SCRATCH are required"),
    **dict.fromkeys(SIDES, "SPEC.json is required"),
}
MODULES = (  # imported by the others
    "accelerator", "accelerator_page", "accelerator_parts", "guidance_results", "same_weights",
    "sides", "true_size_make",
)  # fmt: skip
SCRIPTS = sorted({path.stem for path in FOLDER.glob("*.py")} - {*MODULES})
CASES = [(f"{name}.py", word) for name in SCRIPTS for word in ("--help", "--nonsense=1")]
CASES += [(f"{name}.py",) for name in REQUIRED]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Arguments -> (status, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER.format(folder=str(FOLDER))],
        input=json.dumps(CASES), capture_output=True, text=True, cwd=tmp_path_factory.mktemp("w"),
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(CASES), done.stderr[-2000:]
    return {c: json.loads(line[7:]) for c, line in zip(CASES, lines, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_one_line_says_what_is_missing(ended, case):
    (status, out, err), name = ended[case], case[0].removesuffix(".py")
    if "--help" in case:
        assert status == 0 and out.strip() and not err, (status, err)
        return
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, (status, err)
    assert ("--nonsense" if len(case) > 1 else REQUIRED[name]) in err


def test_modules_are_no_programs():
    for name in MODULES:
        tree = ast.parse((FOLDER / f"{name}.py").read_text())
        assert not any(isinstance(node, ast.If) for node in tree.body), name
