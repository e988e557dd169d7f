"""What `medmax generate` imports and compiles before its first answer; nothing here is timed."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
# Each of these took at least 0.1 s of a start, and answering a prompt needs none of them.
UNUSED = (
    *("orbax", "grain", "clu", "tensorflow_datasets", "tensorboardX", "pyarrow", "openpyxl"),
    *("transformers", "huggingface_hub", "google.cloud", "gcsfs", "requests", "gradio"),
    *("matplotlib", "scipy", "sacrebleu", "pandas", "pydicom", "jax.experimental.pallas"),
)
PROGRAM = f"""
import runpy, sys
sys.argv[0] = "medmax"
try:
    runpy.run_module("medmax_jax", run_name="__main__", alter_sys=True)
finally:
    print("imported:", *[name for name in {UNUSED} if name in sys.modules], file=sys.stderr)
"""
COMPILED = re.compile(r"Compiling jit\((\w+)\)")


def test_the_first_answer_imports_and_compiles_only_what_it_needs(tmp_path):
    words = ["generate", "--model=medmax_jax/tiny", "--prompt=Is it a CT?", f"--out={tmp_path}"]
    words += ["--config.sample.max_gen_len=16", "--compile_cache=off"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\n  -> " in done.stdout
    assert re.search(r"^imported: *$", done.stderr, re.MULTILINE), done.stderr.splitlines()[-1]
    programs = COMPILED.findall(done.stderr)
    large = ["_unstack", "prefill", "set_seen_tokens", "decode_chunk"]
    assert [name for name in programs if name in large] == large, programs
    assert len(programs) <= 11, programs  # the others are arrays of zeros and the key
