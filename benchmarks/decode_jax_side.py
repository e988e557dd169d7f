"""Runs this project's side of decode_cpu.py: the engine on weights of a formula.

python decode_jax_side.py SPEC.json, then one request per line (sides.py). SPEC: run, the config;
codes, per image; words, tokens per prompt for one; prompts, of the text benchmark.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
import sides
from jax_side import create

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from medmax_jax import config, sharding
from medmax_jax.generation import api, engine, model_bundle, sampling_params, scheduler
from medmax_jax.generation import requests as prompt_requests
from medmax_jax.models.vocab import BOI, BOS, EOI, SEP

IMAGES = (
    "a blood smear", "a chest X-ray", "an MRI of the brain", "a CT of the abdomen",
    "an angiography image", "a bone scan of the whole body", "a fundus photograph",
    "an ultrasound image",
)  # fmt: skip


class Decoder:
    """Holds a model, and answers the requests of the parent."""

    def __init__(self, spec: dict[str, Any]):
        run = config.from_config_dict(spec["run"])
        run = dataclasses.replace(run, lora=dataclasses.replace(run.lora, rank=0))
        self.run, self.codes, self.prompts = run, spec["codes"], spec["prompts"]
        self.mesh = sharding.make_mesh(run.mesh)
        with jax.set_mesh(self.mesh):
            self.model = create(run)
        self.rng, self.count = np.random.default_rng(0), spec["words"]

    def fresh(self, rows: int, streams: int, cache_length: int) -> engine.Engine:
        """Return a fresh engine; its programs are compiled once per size."""
        sizes = engine.EngineSizes(
            batch_size=rows,
            num_slots=streams * rows,
            cache_length=min(cache_length, self.run.model.context_length),
            cache_dtype="model",
        )
        return engine.make_engine(self.model, self.run.vocab, self.mesh, sizes, codes=self.codes)

    def serve(self, e: engine.Engine, prompts: list[np.ndarray], sample, mode: str):
        """Return the seconds, and the tokens of each answer."""
        requests = [
            prompt_requests.Request(np.asarray(p, np.int32), n, sample.max_gen_len)
            for n, p in enumerate(prompts)
        ]
        start, answers = time.perf_counter(), {}
        settings = sampling_params.resolve(sample, self.run.vocab, mode=mode, codes=self.codes)
        for outputs in scheduler.run_requests(e, requests, settings, seed=0):
            answers |= {output.index: output.tokens.tolist() for output in outputs}
        return time.perf_counter() - start, [answers[n] for n in range(len(prompts))]

    def text(self, rows: int, new: int) -> dict[str, Any]:
        """Generate greedy text, as the other side does."""
        sample = dataclasses.replace(
            self.run.sample, text_greedy=True, max_gen_len=new, repetition_penalty=1.0
        )
        prompts = self.prompts[:rows]
        e = self.fresh(rows, 1, len(prompts[0]) + new)
        seconds, tokens = self.serve(e, prompts, sample, "text")
        return dict(seconds=seconds, tokens=tokens)

    def image(self) -> list[int]:
        """Return a random image."""
        vocab = self.run.vocab
        return [BOI, *(4 + self.rng.integers(0, vocab.image_codes, self.codes)).tolist(), EOI]

    def words(self, count: int) -> list[int]:
        """Return random text tokens."""
        vocab = self.run.vocab
        return self.rng.integers(vocab.text_start, vocab.size, count).tolist()

    def guided(self, streams: int, rows: int) -> dict[str, Any]:
        """Generate one image per row with guidance streams.

        1 stream without guidance, 2 with, 3 after a prompt with an image.
        """
        scales = dict(guidance_scale_text=1.0, guidance_scale_image=1.0) if streams == 1 else {}
        sample = dataclasses.replace(self.run.sample, **scales)
        image = self.image() if streams == 3 else []
        prompts = [[BOS, *image, *self.words(self.count), SEP, BOI] for _ in range(rows)]
        e = self.fresh(rows, streams, len(prompts[0]) + self.codes + 1)
        seconds, tokens = self.serve(e, prompts, sample, "image")
        return dict(seconds=seconds, tokens=sum(map(len, tokens)))

    def interleaved(self, rows: int, count: int) -> dict[str, Any]:
        """Generate text, an image, text: prompts that end with BOI, in mixed mode, in batches.

        `rows`: prompts at a time.
        """
        sample = dataclasses.replace(self.run.sample, max_gen_len=24, image_greedy=False)
        self.rng = np.random.default_rng(1)
        prompts = [[BOS, *self.words(self.count), SEP, BOI] for _ in range(count)]
        cache_length = 32 + self.codes + 3 * 32 + self.codes
        seconds, tokens = self.serve(self.fresh(rows, 3, cache_length), prompts, sample, "mixed")
        return dict(seconds=seconds, tokens=sum(map(len, tokens)))

    def shared(self, together: bool, questions: int) -> dict[str, Any]:
        """Answer questions on one image, eight tokens each: in one engine or one engine each."""
        sample = dataclasses.replace(self.run.sample, text_greedy=True, max_gen_len=8)
        self.rng = np.random.default_rng(2)
        image = self.image()
        prompts = [[BOS, *image, *self.words(12), SEP] for _ in range(questions)]
        cache_length = len(prompts[0]) + 8
        if together:
            seconds, tokens = self.serve(
                self.fresh(questions, 1, cache_length), prompts, sample, "text"
            )
            return dict(seconds=seconds, tokens=tokens)
        engines = [self.fresh(questions, 1, cache_length) for _ in prompts]  # the same programs
        runs = [self.serve(e, [p], sample, "text") for e, p in zip(engines, prompts, strict=True)]
        return dict(seconds=sum(s for s, _ in runs), tokens=[t[0] for _, t in runs])

    def jacobi(self, window: int, rows: int) -> dict[str, Any]:
        """Generate one image per row with the shipped model and the default settings."""
        g, codes = self.tiny, self.tiny.vq_config.codes_per_image
        sample = dataclasses.replace(api.defaults("medmax_eval"), jacobi_window=window)
        texts = [[f"Generate {phrase}."] for phrase in IMAGES[:rows]]
        requests = prompt_requests.make_requests(
            api.prompt_tokens(g, texts, end_of_turn=True), sample, g.vocab, mode="image",
            names=IMAGES[:rows], codes=codes, context=g.config.context_length,
        )  # fmt: skip
        settings = sampling_params.resolve(
            sample, g.vocab, mode="image", codes=codes, barred=g.tokenizer.barred
        )
        sizes = engine.EngineSizes(
            batch_size=rows, num_slots=2 * rows, cache_length=256, cache_dtype="model"
        )
        e = engine.make_engine(g.model, g.vocab, g.mesh, sizes, codes=codes)
        start, answers, steps = time.perf_counter(), {}, {}
        for outputs in scheduler.run_requests(e, requests, settings, seed=0):
            answers |= {output.index: output.tokens.tolist() for output in outputs}
            steps |= {output.index: output.steps for output in outputs}
        return dict(
            seconds=time.perf_counter() - start,
            steps=sum(steps.values()) / rows,
            tokens=[answers[n] for n in range(rows)],
        )

    @functools.cached_property
    def tiny(self) -> model_bundle.ModelBundle:
        """Return the shipped model with its adapter."""
        package = ROOT / "medmax_jax"
        return model_bundle.load(package / "tiny", adapter=package / "tiny_adapter")

    def about(self) -> dict[str, Any]:
        """Return the versions."""
        return dict(jax=jax.__version__, device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    SPEC = sides.read_spec(__doc__)
    sides.serve(lambda: Decoder(SPEC))
