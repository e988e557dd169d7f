"""Memory that really runs out: who asked for how much is said, and the engine can be used again."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from generate_setup import CODES, MODEL, PICTURE, VOCAB
from test_generate import folder, g, program  # noqa: F401

from medmax_jax import cli
from medmax_jax.checkpoints import safetensors_file
from medmax_jax.config import Mesh, to_dict
from medmax_jax.generation import buckets, engine
from medmax_jax.generation.requests import GenerateError
from medmax_jax.models import chameleon
from medmax_jax.sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[2]

# Text of 512 rows sorts the vocabulary of each: one block of 123 MiB. Images need no such.
CHUNK = """
rows = 512
sample = dataclasses.replace(setup.DRAWN, max_gen_len=1)
e = engine.make_engine(
    g.model, g.vocab, g.mesh, codes=setup.CODES, rows=rows, lanes=3 * rows, slots=64, kind="model"
)

def answers(mode):
    asked = requests.make_requests(
        setup.prompts(), sample, g.vocab, mode=mode, names=None, codes=setup.CODES, context=64
    )
    served = scheduler.run_requests(e, asked, sample, mode=mode, seed=7)
    return {n.index: n.tokens.tolist() for news in served for n in news if n.done}

text, image = answers("text"), answers("image")
with no_more_than(64):
    try:
        answers("text")
    except requests.GenerateError as error:
        said, cause = str(error), str(error.__cause__)
    empty = e.cache is None and bool(e.slot_table.free.all())
    smaller = answers("image") == image
print(json.dumps([said, cause, empty, smaller, answers("text") == text]))
"""
LOAD = """
try:
    with no_more_than(176):
        model_bundle.load(sys.argv[2])
except requests.GenerateError as error:
    print(json.dumps([str(error)]))
"""
# Attention inside the VQGAN, over 64 x 64 places, has 64 MiB a picture, 512 MiB eight.
PICTURES = """
import numpy as np, PIL.Image
large = dataclasses.replace(setup.PICTURE, image_size=128)
g = dataclasses.replace(g, vq_config=large)
pictures = [PIL.Image.new("RGB", (9, 7), (10 * i, 0, 0)) for i in range(8)]
both = (lambda: model_bundle.encode(g, pictures), lambda: model_bundle.decode(g, codes))
codes = both[0]()
both[1]()
said = []
for each in both:
    with no_more_than(64):
        try:
            each()
        except requests.GenerateError as error:
            said.append(str(error))
print(json.dumps(said))
"""
CHILD = """
import contextlib, dataclasses, json, os, resource, sys, time
sys.path[:0] = ["tests/support"]
import generate_setup as setup
from medmax_jax.generation import engine
from medmax_jax.generation import model_bundle
from medmax_jax.generation import requests
from medmax_jax.generation import scheduler

def now(_):
    time.sleep(0.01)
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

@contextlib.contextmanager
def no_more_than(mib):
    taken = min(map(now, range(50)))  # what the last program had is given back a little later
    resource.setrlimit(resource.RLIMIT_AS, (taken + mib * 2**20, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

g = model_bundle.load(sys.argv[1])
"""


def child(script, *folders):
    """What a process of its own prints last: a limit on memory is of a whole process."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD + script, *map(str, folders)],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},  # one device
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_runs_out_in_a_chunk_and_the_engine_goes_on(folder):  # noqa: F811
    said, cause, empty, smaller, again = child(CHUNK, folder)
    assert "Out of memory allocating" in cause
    assert said.startswith(
        "out of memory: 512 rows of 64 slots have a cache of 1536 lanes, 24 MiB, beside the "
        "model's 2 MiB; take fewer rows (--rows; --config.rows of an evaluation) or "
    )
    assert 'a smaller sample.max_gen_len) or a cache in bytes (--cache=int8, kind="int8") (' in said
    assert empty and smaller and again


def test_memory_runs_out_while_weights_are_read(folder, tmp_path):  # noqa: F811
    """The file is mapped, 144 MiB; then there is no room for its first large matrix."""
    wide = dataclasses.replace(MODEL, hidden_size=2_048)
    sections = dict(model=to_dict(wide), vocab=to_dict(VOCAB), vq=to_dict(PICTURE))
    (tmp_path / "config.json").write_text(json.dumps(sections))
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        like = safetensors_file.flatten_named(
            chameleon.abstract_model(wide, VOCAB, chameleon.NO_LORA)
        )
    safetensors_file.save(
        tmp_path / "model.safetensors", jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like), {}
    )
    (said,) = child(LOAD, folder, tmp_path)
    assert "out of memory: " + str(tmp_path) + " has weights of " in said
    assert "--config.mesh.fsdp" in said and "--quant (MemoryError)" in said


def test_memory_runs_out_in_the_vqgan(folder):  # noqa: F811
    encoding, decoding = child(PICTURES, folder)
    for said in (encoding, decoding):
        assert "out of memory: the VQGAN has 8 pictures of 128 px at once, beside weights" in said
        assert "take fewer rows, whose cache lies there too (--rows; " in said


def test_an_engine_larger_than_the_machine(g):  # noqa: F811
    fixed = dict(codes=CODES, rows=2**20, lanes=2**28, slots=64)
    for kind, mend in (
        ("model", 'or a cache in bytes (--cache=int8, kind="int8") ('),
        ("int8", "len) ("),
    ):
        with pytest.raises(GenerateError) as error:
            engine.make_engine(g.model, VOCAB, g.mesh, kind=kind, **fixed)
        assert "out of memory: 1048576 rows of 64 slots have a cache" in str(error.value)
        assert mend in str(error.value)


def test_the_program_out_of_memory_leaves_no_answer_and_binds_nothing(folder, tmp_path):  # noqa: F811
    """A context of 2^34 tokens; then the same folder takes another request."""
    big, out = tmp_path / "big", tmp_path / "out"
    big.mkdir()
    for file in folder.iterdir():
        (big / file.name).symlink_to(file)
    settings = json.loads((folder / "config.json").read_text())
    settings["model"]["context_length"] = 2**34
    (big / "config.json").unlink()
    (big / "config.json").write_text(json.dumps(settings))
    asked = (f"--model={big}", f"--out={out}", "--prompt=Is it?")
    done = program(*asked, "--mode=mixed")
    assert done.returncode == cli.ERROR and "Traceback" not in done.stderr
    assert (
        "error: out of memory: 1 rows of 17179869184 slots have a cache of 3 lanes" in done.stderr
    )
    assert sorted(f.name for f in out.iterdir()) == ["request.json"]
    done = program(*asked, "--mode=text", "--config.sample.max_gen_len=2")
    assert done.returncode == cli.DONE, done.stderr
    assert len((out / "answers.jsonl").read_text().splitlines()) == 1


def test_other_errors_stay_what_they_are():
    with pytest.raises(KeyError), buckets.explain_out_of_memory("", ""):
        raise KeyError("a")
    with (
        pytest.raises(GenerateError, match="out of memory: x; y"),
        buckets.explain_out_of_memory("x", "y"),
    ):
        np.zeros(2**58)
    assert buckets.format_mib(3 * 2**30) == "3,072 MiB"
