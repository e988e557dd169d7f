"""python benchmarks/serve.py [--rounds 3] [--clients 32] [--requests 96] [--minutes 0]

Measures `medmax serve` with the openai client, on CPU.

    engine   tokens/s of medmax_jax/generation/scheduler.py in this process, 8 rows, greedy text
    server   tokens/s of the same prompts by 32 clients of a server in another process, streamed
    ratio    server / engine, the medians of alternating rounds

--minutes M then runs a soak of M minutes: the clients ask the shipped model, each with a nonce as
its seed; 10% cancel their stream, 5% send something malformed.

    mixed    replies with the answer to another nonce than their own: must be 0
    lost     rows and KV-cache slots in use after the last request: must be 0
    memory   MiB of the server after a fifth of the time, and at the end

The last line is one JSON object.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import openai

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from medmax_jax import arguments, cli
from medmax_jax.checkpoints import safetensors_file
from medmax_jax.config import Mesh, Model, Vocab, build
from medmax_jax.generation import api, engine, model_bundle, sampling_params, scheduler
from medmax_jax.generation import requests as prompt_requests
from medmax_jax.models import chameleon
from medmax_jax.sharding import make_mesh

TINY = ROOT / "medmax_jax" / "tiny"
SIZES = {
    "38m": dict(hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64,
                intermediate_size=1536),
    "tiny": {},  # the shipped model, for a test
}  # fmt: skip
NEW = 96  # tokens of an answer
NONCES = 64  # of the soak, each with its answer
SOAK_TOKENS = 24


@contextlib.contextmanager
def serving(folder: pathlib.Path, rows: int, log: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Run a server while the block runs; yield its URL and its process id."""
    command = [sys.executable, "-m", "medmax_jax.serve", f"--model={folder}", "--name=m",
               "--port=0", f"--rows={rows}", "--queue=256"]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
    try:
        line = process.stdout.readline()
        if not (match := re.search(r"http://\S+", line)):
            raise SystemExit(f"error: the server did not start: {log.read_text()[-2000:]}")
        yield match[0], process.pid
    finally:
        process.terminate()
        process.wait(60)


def make_model(scratch: pathlib.Path, size: str) -> pathlib.Path:
    """Return a model folder with random weights of this size, and the shipped tokenizer."""
    if not SIZES[size]:
        return TINY
    settings = json.loads((TINY / "config.json").read_text())
    settings["model"] |= SIZES[size]
    folder = scratch / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "vqgan.safetensors"):
        (folder / name).symlink_to(TINY / name)
    config, vocab = build(Model, settings["model"]), build(Vocab, settings["vocab"])
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        model = chameleon.create_model(config, vocab, chameleon.NO_LORA, key=jax.random.key(0))
        safetensors_file.save(
            folder / "model.safetensors", safetensors_file.flatten_named(model), {}
        )
    return folder


class OwnEngine:
    """The engine of this process, which answers the prompts without a server."""

    def __init__(self, folder: pathlib.Path, rows: int) -> None:
        """Load the model."""
        self.g = g = model_bundle.load(folder)
        sizes = engine.EngineSizes(
            batch_size=rows, num_slots=rows + 4, cache_length=g.config.context_length,
            cache_dtype="model",
        )  # fmt: skip
        codes = g.vq_config.codes_per_image
        self.engine = engine.make_engine(g.model, g.vocab, g.mesh, sizes, codes=codes)
        self.sample = dataclasses.replace(api.defaults("medmax_eval"), max_gen_len=NEW)

    def rate(self, prompts: list[str]) -> float:
        """Return the tokens per second."""
        g, codes = self.g, self.g.vq_config.codes_per_image
        begin, count = time.perf_counter(), 0
        tokens = model_bundle.prompt_tokens(g, [[p] for p in prompts], end_of_turn=True)
        requests = prompt_requests.make_requests(
            tokens, self.sample, g.vocab, mode="text", names=None, codes=codes,
            context=g.config.context_length,
        )  # fmt: skip
        settings = sampling_params.resolve(
            self.sample, g.vocab, mode="text", codes=codes, barred=g.tokenizer.barred
        )
        for outputs in scheduler.run_requests(self.engine, requests, settings, 0):
            for output in outputs:
                if output.done:
                    g.tokenizer.decode(output.tokens)
                    count += len(output.tokens)
        return count / (time.perf_counter() - begin)


async def server_rate(url: str, prompts: list[str], clients: int) -> float:
    """Return the tokens per second of all clients together."""
    waiting, counts = list(prompts), []
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=1_200) as client:

        async def work() -> None:
            while waiting:
                stream = await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": waiting.pop()}],
                    max_tokens=NEW, stream=True, stream_options={"include_usage": True},
                )  # fmt: skip
                usages = [chunk.usage async for chunk in stream if chunk.usage]
                counts.append(usages[-1].completion_tokens)

        begin = time.perf_counter()
        await asyncio.gather(*[work() for _ in range(clients)])
    return sum(counts) / (time.perf_counter() - begin)


def measure_rate(scratch: pathlib.Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the rates of the engine alone and of the server, in turn."""
    folder = make_model(scratch, args.size)
    rng, words = np.random.default_rng(0), "scan chest brain left right mass CT MRI film of".split()
    prompts = [" ".join(rng.choice(words, 40)) + f" {n}" for n in range(args.requests)]
    own, rates = OwnEngine(folder, args.rows), {"engine": [], "server": []}
    with serving(folder, args.rows, scratch / "rate.log") as (url, _):
        for number in range(args.rounds + 1):
            pair = own.rate(prompts), asyncio.run(server_rate(url, prompts, args.clients))
            if number:  # the first round compiles
                for name, rate in zip(rates, pair, strict=True):
                    rates[name].append(round(rate, 1))
                print(
                    f"round {number}: engine {pair[0]:.1f}, server {pair[1]:.1f} tokens/s",
                    flush=True,
                )
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return medians | dict(ratio=round(medians["server"] / medians["engine"], 3), rounds=rates)


# ---- Soak ----


class Soak:
    """Clients that ask, cancel and send malformed requests, and check each reply."""

    def __init__(self, url: str, pid: int) -> None:
        """Create it without replies."""
        self.url, self.pid = url, pid
        self.client = openai.AsyncOpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)
        self.counts: Counter[str] = Counter()
        self.answers: dict[int, str] = {}
        self.random = random.Random(0)

    def fields(self, nonce: int) -> dict[str, Any]:
        """Return a request whose answer only this nonce has, or few others."""
        return dict(
            model="m", messages=[{"role": "user", "content": f"Is scan {nonce} a CT?"}],
            max_tokens=SOAK_TOKENS, temperature=2.0, seed=nonce,
        )  # fmt: skip

    async def ask(self, nonce: int) -> str:
        """Return a complete answer; the reply must state the seed that was sent."""
        reply = await self.client.chat.completions.create(**self.fields(nonce))
        if reply.metadata["seed"] != str(nonce):
            self.counts["mixed"] += 1
        return reply.choices[0].message.content

    async def check(self, nonce: int) -> None:
        """Compare an answer with the one that the nonce had alone."""
        text = await self.ask(nonce)
        self.counts["complete"] += 1
        if text != self.answers[nonce]:
            others = {answer for n, answer in self.answers.items() if n != nonce}
            self.counts["mixed" if text in others else "changed"] += 1

    async def cancel(self, nonce: int) -> None:
        """Leave a stream, before or while it is generated."""
        stream = await self.client.chat.completions.create(**self.fields(nonce), stream=True)
        if self.random.random() < 0.5:
            await anext(aiter(stream))
        await stream.close()
        self.counts["cancelled"] += 1

    async def malformed(self, nonce: int) -> None:
        """Send something that must be refused, or leave in the middle of a request."""
        self.counts["malformed"] += 1
        fields = self.fields(nonce)
        wrong = self.random.choice(
            [dict(model="other"), dict(n=0), dict(messages=[{"role": "user", "content": [7]}]),
             dict(extra_body={"nonsense": 1}), None]
        )  # fmt: skip
        if wrong is None:
            host, port = re.search(r"//(.*):(\d+)/", self.url).groups()
            _, writer = await asyncio.open_connection(host, int(port))
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            head += "Content-Type: application/json\r\nContent-Length: 999\r\n\r\n{"
            writer.write(head.encode())
            await writer.drain()
            writer.close()
            return
        try:
            await self.client.chat.completions.create(**(fields | wrong))
            self.counts["accepted, though malformed"] += 1
        except (openai.BadRequestError, openai.NotFoundError):
            pass

    async def work(self, end: float) -> None:
        """Send requests until the end."""
        while time.monotonic() < end:
            nonce, kind = self.random.randrange(NONCES), self.random.random()
            action = self.cancel if kind < 0.10 else self.malformed if kind < 0.15 else self.check
            try:
                await action(nonce)
            except openai.OpenAIError as error:
                self.counts[f"failed: {type(error).__name__}"] += 1

    async def run(self, seconds: float, clients: int) -> dict[str, Any]:
        """Return what was counted, and the memory of the server over time."""
        for nonce in range(NONCES):
            self.answers[nonce] = await self.ask(nonce)
        memory, end = [], time.monotonic() + seconds

        async def watch() -> None:
            while time.monotonic() < end:
                memory.append(resident_mib(self.pid))
                await asyncio.sleep(min(5.0, seconds / 20))

        await asyncio.gather(watch(), *[self.work(end) for _ in range(clients)])
        await asyncio.sleep(5)
        used = ("requests_running", "requests_waiting", "cache_slots_used")
        lost = sum(map(self.gauge, used))
        distinct = len(set(self.answers.values()))
        return dict(
            self.counts, mixed=self.counts["mixed"], nonces=NONCES, distinct_answers=distinct,
            minutes=round(seconds / 60, 1), lost=lost,
            memory=[round(memory[len(memory) // 5], 1), round(memory[-1], 1)],
        )  # fmt: skip

    def gauge(self, name: str) -> float:
        """Return a number of the server's metrics."""
        text = urllib.request.urlopen(self.url.replace("/v1", "/metrics")).read().decode()
        return float(re.search(rf'medmax_{name}{{model="m"}} (\S+)', text)[1])


def resident_mib(pid: int) -> float:
    """Return the memory of a process."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def main() -> None:
    """Run the program."""
    parser = arguments.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8, help="answers at a time, on both sides")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3, help="0: no rates, the soak alone")
    parser.add_argument("--minutes", type=float, default=0.0, help="length of the soak; 0: none")
    parser.add_argument("--size", choices=SIZES, default="38m")
    args = parser.parse_args()
    cli.skip_absent_tpu()
    summary: dict[str, Any] = dict(clients=args.clients, rows=args.rows, size=args.size)
    summary["load"] = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        if args.rounds:
            summary |= measure_rate(scratch, args)
        if args.minutes:
            with serving(TINY, args.rows, scratch / "soak.log") as (url, pid):
                summary["soak"] = asyncio.run(Soak(url, pid).run(60 * args.minutes, args.clients))
                summary["soak"]["load"] = os.getloadavg()[0]
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
