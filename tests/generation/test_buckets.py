"""Real out-of-memory errors: the message states the allocation, and the engine recovers."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import run_setup
from generate_setup import CODES, MODEL, VOCAB, VQ_CONFIG
from test_generate import folder, g, program  # noqa: F401

from medmax_jax import cli
from medmax_jax.checkpoints import safetensors_file
from medmax_jax.config import Mesh, to_dict
from medmax_jax.generation import buckets, engine
from medmax_jax.generation.requests import GenerateError
from medmax_jax.models import chameleon
from medmax_jax.sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[2]

# Text of 512 rows sorts the vocabulary of each: one array of 123 MiB. Images need none.
CHUNK = """
rows = 512
sample = dataclasses.replace(setup.DRAWN, max_gen_len=1)
sizes = engine.EngineSizes(
    batch_size=rows, num_slots=3 * rows, cache_length=64, cache_dtype="model"
)
e = engine.make_engine(g.model, g.vocab, g.mesh, sizes, codes=setup.CODES)

def answers(mode):
    batch = requests.make_requests(
        setup.prompts(), sample, g.vocab, mode=mode, names=None, codes=setup.CODES, context=64
    )
    settings = sampling_params.resolve(sample, g.vocab, mode=mode, codes=setup.CODES)
    chunks = scheduler.run_requests(e, batch, settings, seed=7)
    return {o.index: o.tokens.tolist() for outputs in chunks for o in outputs if o.done}

text, image = answers("text"), answers("image")
with memory_limit(64):
    try:
        answers("text")
    except requests.GenerateError as error:
        message, cause = str(error), str(error.__cause__)
    empty = e.cache is None and bool(e.slot_table.free.all())
    smaller = answers("image") == image
print(json.dumps([message, cause, empty, smaller, answers("text") == text]))
"""
LOAD = """
try:
    with memory_limit(176):
        model_bundle.load(sys.argv[2])
except requests.GenerateError as error:
    print(json.dumps([str(error)]))
"""
# Attention inside the VQGAN over 64 x 64 positions needs 64 MiB per image, 512 MiB for eight.
IMAGES = """
import numpy as np, PIL.Image
large = dataclasses.replace(setup.VQ_CONFIG, image_size=128)
g = dataclasses.replace(g, vq_config=large)
images = [PIL.Image.new("RGB", (9, 7), (10 * i, 0, 0)) for i in range(8)]
codes = model_bundle.encode(g, images)
model_bundle.decode(g, codes)
messages = []
for call in (lambda: model_bundle.encode(g, images), lambda: model_bundle.decode(g, codes)):
    with memory_limit(64):
        try:
            call()
        except requests.GenerateError as error:
            messages.append(str(error))
print(json.dumps(messages))
"""
CHILD = """
import contextlib, dataclasses, json, os, resource, sys, time
sys.path[:0] = ["tests/support"]
import generate_setup as setup
from medmax_jax.generation import engine
from medmax_jax.generation import model_bundle
from medmax_jax.generation import requests
from medmax_jax.generation import sampling_params
from medmax_jax.generation import scheduler

def used(_):
    time.sleep(0.01)
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

@contextlib.contextmanager
def memory_limit(mib):
    before = min(map(used, range(50)))  # memory of the last program is released a little later
    resource.setrlimit(resource.RLIMIT_AS, (before + mib * 2**20, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

g = model_bundle.load(sys.argv[1])
"""


def run_script(script, *folders):
    """Return what the script prints last; a memory limit applies to a complete process."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD + script, *map(str, folders)],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=run_setup.environment(),  # one device
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_engine_recovers_from_out_of_memory_during_decoding(folder):  # noqa: F811
    message, cause, empty, smaller, recovered = run_script(CHUNK, folder)
    assert "Out of memory allocating" in cause
    assert message.startswith(
        "out of memory: batch size 512 and cache length 64 need 1536 cache slots (24 MiB) in "
        "addition to the model (2 MiB). To fix: reduce the batch size (--rows; --config.rows of "
        "an evaluation) or "
    )
    assert 'max_gen_len) or use an int8 cache (--cache=int8, cache_dtype="int8") (' in message
    assert empty and smaller and recovered


def test_out_of_memory_while_weights_are_loaded(folder, tmp_path):  # noqa: F811
    """The file is mapped, 144 MiB; then there is no memory for its first large matrix."""
    wide = dataclasses.replace(MODEL, hidden_size=2_048)
    sections = dict(model=to_dict(wide), vocab=to_dict(VOCAB), vq=to_dict(VQ_CONFIG))
    (tmp_path / "config.json").write_text(json.dumps(sections))
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        like = safetensors_file.flatten_named(
            chameleon.abstract_model(wide, VOCAB, chameleon.NO_LORA)
        )
    safetensors_file.save(
        tmp_path / "model.safetensors", jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like), {}
    )
    (message,) = run_script(LOAD, folder, tmp_path)
    assert f"out of memory: the weights in {tmp_path} need " in message
    assert "--config.mesh.fsdp" in message and "--quant (MemoryError)" in message


def test_out_of_memory_in_the_vqgan(folder):  # noqa: F811
    encoding, decoding = run_script(IMAGES, folder)
    for message in (encoding, decoding):
        assert "out of memory: the VQGAN processes 8 images of 128 px at once, in addi" in message
        assert "reduce the batch size, whose cache shares this memory (--rows; " in message


def test_engine_larger_than_the_machine(g):  # noqa: F811
    for cache_dtype, fix in (
        ("model", 'or use an int8 cache (--cache=int8, cache_dtype="int8") ('),
        ("int8", "len) ("),
    ):
        sizes = engine.EngineSizes(
            batch_size=2**20, num_slots=2**28, cache_length=64, cache_dtype=cache_dtype
        )
        with pytest.raises(GenerateError) as error:
            engine.make_engine(g.model, VOCAB, g.mesh, sizes, codes=CODES)
        assert "out of memory: batch size 1048576 and cache length 64 need" in str(error.value)
        assert fix in str(error.value)


def test_program_out_of_memory_leaves_a_reusable_folder(folder, tmp_path):  # noqa: F811
    """The context has 2^34 tokens; then the same folder accepts another request."""
    big, out = tmp_path / "big", tmp_path / "out"
    big.mkdir()
    for file in folder.iterdir():
        (big / file.name).symlink_to(file)
    settings = json.loads((folder / "config.json").read_text())
    settings["model"]["context_length"] = 2**34
    (big / "config.json").unlink()
    (big / "config.json").write_text(json.dumps(settings))
    request = (f"--model={big}", f"--out={out}", "--prompt=Is it?")
    done = program(*request, "--mode=mixed")
    assert done.returncode == cli.ERROR and "Traceback" not in done.stderr
    message = "error: out of memory: batch size 1 and cache length 17179869184 need 3 cache slots"
    assert message in done.stderr
    assert sorted(f.name for f in out.iterdir()) == ["request.json"]
    done = program(*request, "--mode=text", "--config.sample.max_gen_len=2")
    assert done.returncode == cli.DONE, done.stderr
    assert len((out / "answers.jsonl").read_text().splitlines()) == 1


def test_other_errors_are_passed_on():
    with pytest.raises(KeyError), buckets.explain_out_of_memory("", ""):
        raise KeyError("a")
    with (
        pytest.raises(GenerateError, match="out of memory: x. To fix: y"),
        buckets.explain_out_of_memory("x", "y"),
    ):
        np.zeros(2**58)
    assert buckets.format_mib(3 * 2**30) == "3,072 MiB"
