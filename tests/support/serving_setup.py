"""A micro model whose greedy answers never end by themselves, and a server in another process."""

import contextlib
import json
import pathlib
import re
import subprocess
import sys
import time
import urllib.request

import jax
from generate_setup import LORA, MODEL, VOCAB, VQ_CONFIG, noise
from run_setup import environment

from medmax_jax.checkpoints import safetensors_file
from medmax_jax.checkpoints.export import base_fingerprint
from medmax_jax.config import Mesh, to_dict
from medmax_jax.models import chameleon, tokenizer, vqgan
from medmax_jax.models import vocab as ids
from medmax_jax.sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[2]
CONTEXT = 2_048


def make_folder(folder: pathlib.Path) -> pathlib.Path:
    """A model folder with random weights; the logit of EOS is always 0, and others are higher."""
    sections = dict(model=to_dict(MODEL), vocab=to_dict(VOCAB), vq=to_dict(VQ_CONFIG))
    sections["model"]["context_length"] = CONTEXT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(sections))
    (folder / "tokenizer.json").write_text(tokenizer.train(["Is it a CT of the chest?"], VOCAB))
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        model = noise(chameleon.abstract_model(MODEL, VOCAB, chameleon.NO_LORA), std=0.1)
        model["lm_head.kernel"] *= 4
        model["lm_head.kernel"][:, ids.BOI] *= 2
        model["lm_head.kernel"][:, ids.EOS] = 0
        safetensors_file.save(folder / "model.safetensors", model, {})
        safetensors_file.save(
            folder / "vqgan.safetensors", noise(vqgan.abstract(VQ_CONFIG), std=0.1), {}
        )
    return folder


def make_adapter(folder: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """An adapter that changes answers."""
    folder.mkdir()
    settings = to_dict(LORA) | {"base": base_fingerprint(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        like = chameleon.split_adapters(chameleon.abstract_model(MODEL, VOCAB, LORA))[1]
    safetensors_file.save(folder / "adapter.safetensors", noise(like, std=0.5), {})
    return folder


class Server:
    """A server in another process."""

    def __init__(self, process: subprocess.Popen, url: str, log: pathlib.Path):
        self.process, self.url, self.log = process, url, log
        self.port = int(re.search(r":(\d+)/", url)[1])

    def metric(self, name: str, model: str = "base") -> float:
        """A gauge or a counter by model."""
        with urllib.request.urlopen(self.url.replace("/v1", "/metrics"), timeout=60) as reply:
            text = reply.read().decode()
        found = re.search(rf'medmax_{name}{{model="{model}"}} (\S+)', text)
        return float(found[1]) if found else 0.0

    def wait(self, name: str, value: float) -> None:
        """Until a gauge has this value."""
        end = time.monotonic() + 60
        while (now := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} is {now}, not {value}\n{self.log.read_text()}"
            time.sleep(0.02)


@contextlib.contextmanager
def serving(log: pathlib.Path, *words: str, **variables: str):
    """A Server while the block runs."""
    command = [sys.executable, "-m", "medmax_jax", "serve", "--port=0", *words]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT,
            env=environment() | variables,
        )  # fmt: skip
    try:
        line = process.stdout.readline()
        match = re.search(r"http://\S+", line)
        assert match, log.read_text()
        yield Server(process, match[0], log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
