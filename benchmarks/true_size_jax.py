"""This project's side of true_size.py: python true_size_jax.py STEP SCRATCH [MODEL].

Each step prints one JSON object as its last line, and leaves arrays in SCRATCH/arrays for
true_size_torch.py. SCRATCH/job.json has the settings.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import jax
import jax.numpy as jnp
import numpy as np
import sides
import true_size_make as make
from flax import nnx

from medmax_jax import config, sharding
from medmax_jax.checkpoints import export, safetensors_file
from medmax_jax.configs import medmax_7b_lora, sampling
from medmax_jax.convert import native as native_layout
from medmax_jax.data import loader
from medmax_jax.data.image_tokens import store_reader
from medmax_jax.generation import api, buckets, engine, model_bundle, sampling_params, scheduler
from medmax_jax.generation import requests as prompt_requests
from medmax_jax.models import chameleon, vocab, vqgan
from medmax_jax.plan import analytic
from medmax_jax.storage.folder import Folder
from medmax_jax.training import cross_entropy, step

PROMPT = "Generate a chest x-ray with a pleural effusion in the left lower lung."
LAST = 2  # layers whose gradients are compared
SHORT = 48  # tokens of a short row
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Job:
    """The folder of one run, and its settings."""

    scratch: pathlib.Path

    @property
    def settings(self) -> dict[str, Any]:
        """Return job.json: smoke, and numbers of tokens."""
        return json.loads((self.scratch / "job.json").read_text())

    def path(self, name: str) -> str:
        """Return a path below the folder."""
        return str(self.scratch / name)

    def save(self, name: str, **arrays: Any) -> None:
        """Save arrays, bfloat16 as the bits."""
        folder = self.scratch / "arrays"
        folder.mkdir(exist_ok=True)
        for key, x in arrays.items():
            x = np.asarray(x)
            x = x.view(np.uint16) if x.dtype == jnp.bfloat16 else x
            np.save(folder / f"{name}.{key}.npy", x)


def overrides(job: Job, *, tokens: int) -> dict[str, Any]:
    """Return the fields of configs/medmax_7b_lora.py that differ here, by dotted name."""
    stored = native_layout.settings(Folder(job.path("native")))
    fields = {
        f"{section}.{name}": value
        for section in ("vocab", "model", "vq")
        for name, value in config.to_dict(stored[section]).items()
    }
    fields |= {"model.remat": "all", "model.attention": "xla", "mesh.data": 1, "mesh.fsdp": 1}
    fields |= {"data.train": job.path("records"), "data.validation": "", "data.seq_len": tokens}
    longest = min(tokens, job.settings["tokens"] // 2)
    fields |= {"data.document_limit": longest, "data.batch_size": 1}
    fields |= {"train.init_from": job.path("native"), "train.compile": "default"}
    fields |= {"train.steps": 3, "train.log_every": 1, "train.eval_every": 0}
    return fields | {"train.checkpoint_every": 1}


def run_settings(job: Job, *, tokens: int) -> config.Run:
    """Return the settings of a training run on rows of `tokens`."""
    settings = medmax_7b_lora.get_config()
    with settings.unlocked():
        settings.update_from_flattened_dict(overrides(job, tokens=tokens))
    return config.from_config_dict(settings)


def on_one_device() -> Any:
    """Return the context in which every step runs."""
    return jax.set_mesh(sharding.make_mesh(config.Mesh(data=1, fsdp=1, tp=1)))


def inputs(job: Job) -> dict[str, Any]:
    """Write the random models, the tokenizer, the VQGAN; and the texts and images of documents."""
    smoke = job.settings["smoke"]
    size, layer = (make.SMOKE, make.SMOKE_LAYER) if smoke else (make.TRUE, make.LARGE_LAYER)
    written = make.write_meta(job.scratch / "meta", size, seed=0)
    print(f"7B: {written / GB:.2f} GB", flush=True)
    written = make.write_meta(job.scratch / "large_meta", layer, seed=1)
    print(f"one layer of the 30B: {written / GB:.2f} GB", flush=True)
    make.write_tokenizer(job.scratch / "meta" / "tokenizer")
    files = make.chosen_images()
    make.write_vqgan(job.scratch / "meta/tokenizer", size.vq, files=files["codebook"], seed=2)
    make.write_documents(job.scratch, files["documents"])
    return dict(images=len(files["documents"]))


def codes(job: Job) -> dict[str, Any]:
    """Decode the stored codes of the images, one image at a time."""
    stored = native_layout.settings(Folder(job.path("native")))
    vq = vqgan.load(pathlib.Path(job.path("native")) / "vqgan.safetensors", stored["vq"])
    store, files = store_reader.open_codes(job.path("codes")), make.chosen_images()["documents"]
    rows = np.stack([store.by_digest(store_reader.digest_of(make.SAMPLE / f)) for f in files])
    side = stored["vq"].codes_per_side
    pixels = make.pixels_of(files, stored["vq"].image_size)
    decoded = []
    for row in rows:
        grid = jnp.asarray(row.reshape(1, side, side), jnp.int32)
        decoded.append(np.asarray(vqgan.decode_codes(vq, grid)))
        print(f"decoded {len(decoded)} of {len(rows)} images", flush=True)
    job.save("vq", codes=rows.astype(np.int32), pixels=pixels, decoded=np.concatenate(decoded))
    return dict(images=len(rows), codes_per_image=rows.shape[1], used=len(np.unique(rows)))


def forward(job: Job) -> dict[str, Any]:
    """Save every layer's output and the logits of a packed row."""
    run = run_settings(job, tokens=job.settings["tokens"])
    batch = loader.train_batches(run, run.data.train).batch(0)
    with on_one_device():
        net = _load(job.path("native"), run.model, run.vocab)
        layers = sharding.jit(lambda net, *row: net.hidden_states_by_layer(*row))
        row = (batch.ids, batch.segments, batch.positions)
        hidden = layers(net, *row)
        logits = sharding.jit(lambda net, x: net.logits(net.norm(x)))(net, hidden[-1])
        job.save("forward", ids=row[0], segments=row[1], positions=row[2], logits=logits)
        job.save("forward", hidden=hidden)
        growth = jnp.std(hidden.astype(jnp.float32), axis=(1, 2, 3))
    return dict(
        tokens=int((batch.segments > 0).sum()), documents=int(batch.segments.max()),
        image_tokens=int(vocab.is_image(batch.ids, run.vocab).sum()),
        stream_std=[round(float(x), 2) for x in (growth[0], growth[-1])],
        stream_max=float(jnp.abs(hidden).max()),
    )  # fmt: skip


def gradient(job: Job) -> dict[str, Any]:
    """Save loss and gradients of one LoRA step of all layers, for the last two layers."""
    run = run_settings(job, tokens=job.settings["tokens"] // 2)
    batch = loader.train_batches(run, run.data.train).batch(0)
    return _gradient(job, "gradient", run, batch, job.path("native"))


def large_layer(job: Job) -> dict[str, Any]:
    """Save loss and gradients of the 30B's layer on a row of random ids."""
    stored = native_layout.settings(Folder(job.path("large")))
    run, tokens = run_settings(job, tokens=256), 256
    model = dataclasses.replace(stored["model"], remat="all")
    run = dataclasses.replace(run, model=model)
    rng = np.random.default_rng(0)
    ids = rng.integers(4, run.vocab.size, (1, tokens)).astype(np.int32)
    segments = np.repeat([[1, 2]], tokens // 2, axis=1).astype(np.int32)
    positions = np.tile(np.arange(tokens // 2, dtype=np.int32), 2)[None]
    weights = np.full(ids.shape, 1 / tokens, np.float32)
    batch = loader.Batch(ids, segments, positions, weights, np.zeros_like(ids))
    return _gradient(job, "large", run, batch, job.path("large"))


def _gradient(job: Job, name: str, run: config.Run, batch, folder: str) -> dict[str, Any]:
    last = min(LAST, run.model.num_layers)
    with on_one_device():
        like = chameleon.abstract_model(run.model, run.vocab, run.lora)
        graph, adapters, base = chameleon.split_adapters(like)
        base, rng = export.load(folder, base), np.random.default_rng(0)
        draw = lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32))  # noqa: E731
        adapters = jax.tree.map(draw, adapters)
        batch = sharding.shard_batch(batch, jax.sharding.get_mesh())

        def total(adapters, base, batch):
            net = nnx.merge(graph, adapters, base)
            states = net.hidden_states_by_layer(batch.ids, batch.segments, batch.positions)
            targets, weights = (
                jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (batch.ids, batch.weights)
            )
            hidden, head = net.norm(states[-1]), net.head()
            value, _ = cross_entropy.weighted_nll(
                hidden, head, targets, weights, trains_kernel=False,
                chunks=cross_entropy.num_chunks(hidden, head.kernel),
            )  # fmt: skip
            return value, states[-1 - last]

        step_of = sharding.jit(jax.value_and_grad(total, has_aux=True))
        (value, start), grads = step_of(adapters, base, batch)
        value = float(value)
        row = dict(ids=batch.ids, segments=batch.segments, positions=batch.positions)
        job.save(name, weights=batch.weights, x=start, **row)
        for kind, tree in (("adapter", adapters), ("grad", grads)):
            for leaf, x in safetensors_file.flatten_named(tree).items():
                job.save(f"{name}.{kind}", **{leaf: x[-last:]})
    return dict(tokens=int((batch.segments > 0).sum()), loss=value, layers=last)


def generate(job: Job) -> dict[str, Any]:
    """Save 32 greedy text tokens, and the first codes of an image with guidance."""
    base = dict(sampling.SETS["medmax_eval"]) | dict(repetition_penalty=1.0, image_greedy=True)
    sample = config.Sample(**base | dict(max_gen_len=job.settings["text_tokens"]))
    g = model_bundle.load(job.path("native"))
    prompt = model_bundle.prompt_tokens(g, [[PROMPT]], end_of_turn=True)
    (_, (text,)) = next(
        api.generate_tokens(g, prompt, sample, mode="text", seed=0, names=None, batch_size=1)
    )
    print(f"text: {g.tokenizer.decode(text)!r}", flush=True)
    codes = _first_codes(g, prompt, sample, job.settings["image_codes"])
    job.save("generate", prompt=prompt[0], text=text, codes=codes)
    job.save("generate", allowed=vocab.text_mask(g.vocab, g.tokenizer.barred))
    return dict(text_tokens=len(text), codes=len(codes))


def _first_codes(
    g: model_bundle.ModelBundle, prompt, sample: config.Sample, wanted: int
) -> np.ndarray:
    count, context = g.vq_config.codes_per_image, g.config.context_length
    settings = sampling_params.resolve(
        sample, g.vocab, mode="image", codes=count, barred=g.tokenizer.barred
    )
    requests = prompt_requests.make_requests(
        prompt, sample, g.vocab, mode="image", names=None, codes=count, context=context
    )
    streams = 1 + sampling_params.guidance_streams_needed(requests, settings)
    length = buckets.cache_length_for(
        len(requests[0].tokens), sample, mode="image", codes=count, context=context
    )
    sizes = engine.EngineSizes(
        batch_size=1, num_slots=streams, cache_length=length, cache_dtype="model"
    )
    e = engine.make_engine(g.model, g.vocab, g.mesh, sizes, codes=count)
    for (output,) in scheduler.run_requests(e, requests, settings, 0):
        print(f"{len(output.tokens)} codes", flush=True)
        if len(output.tokens) >= wanted or output.done:
            return output.tokens[:wanted]
    raise SystemExit("generation ended without codes")


def adapted(job: Job) -> dict[str, Any]:
    """Save logits of a short row by the base and the trained adapter, kept separate."""
    g = model_bundle.load(job.path("native"), adapter=job.path("run"))
    ids = _short_ids()
    with jax.set_mesh(g.mesh):
        job.save("adapted", ids=ids, logits=_logits(g.model, ids))
    return {}


def quantized(job: Job) -> dict[str, Any]:
    """Save every layer's output and the logits of a short row by the quantized models."""
    ids, found = _short_ids(), {}
    row = (ids, np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None])
    with on_one_device():
        for name in ("native", "int8", "nf4"):
            stored = native_layout.settings(Folder(job.path(name)))
            net = _load(job.path(name), stored["model"], stored["vocab"])
            hidden = sharding.jit(lambda net, *row: net.hidden_states_by_layer(*row))(net, *row)
            logits = sharding.jit(lambda net, x: net.logits(net.norm(x)))(net, hidden[-1])
            job.save(f"quantized.{name}", hidden=hidden, logits=logits)
            found[name] = np.asarray(logits, np.float32).reshape(-1)
            del net
    job.save("quantized", ids=row[0], segments=row[1], positions=row[2])
    return {
        name: round(float(np.corrcoef(found[name], found["native"])[0, 1]), 4)
        for name in ("int8", "nf4")
    }


def memory(job: Job) -> dict[str, Any]:
    """Compare what XLA's CPU client reports for the training step with medmax_jax.plan."""
    rows, found = (job.settings["tokens"] // 2, job.settings["tokens"]), []
    with on_one_device():
        for tokens in rows:
            run = run_settings(job, tokens=tokens)
            like = chameleon.abstract_model(run.model, run.vocab, run.lora)
            graph, trainable, frozen = step.split_trainable(like, "lora")
            state = sharding.with_shardings(
                jax.eval_shape(lambda t, run=run: step.init_state(t, run), trainable)
            )
            key = jax.eval_shape(lambda: jax.random.key(0))
            lowered = step.make_train_step(graph, run).lower(
                state, sharding.with_shardings(frozen), step.abstract_batch(run), key
            )
            reported = lowered.compile().memory_analysis()
            parts = analytic.estimate(run, _Unlimited())["parts"]
            kept = sum(parts[n] for n in ("base", "adapters", "optimiser"))
            work = sum(parts[n] for n in ("activations", "temporaries"))
            found.append(
                dict(
                    tokens=tokens, arguments_gib=round(reported.argument_size_in_bytes / 2**30, 3),
                    planned_arguments_gib=round(kept, 3),
                    temporaries_gib=round(reported.temp_size_in_bytes / 2**30, 3),
                    planned_temporaries_gib=round(work, 3),
                )
            )  # fmt: skip
            print(found[-1], flush=True)
    return dict(rows=found)


class _Unlimited:
    """A machine on which everything fits; analytic.estimate reads only this field here."""

    usable = 2**50


def _load(folder: str, model: config.Model, names: config.Vocab) -> chameleon.Chameleon:
    model = dataclasses.replace(model, remat="none")
    return export.load(folder, chameleon.abstract_model(model, names, chameleon.NO_LORA))


def _short_ids() -> np.ndarray:
    return np.random.default_rng(7).integers(4, vocab.RELEASED.size, (1, SHORT)).astype(np.int32)


def _logits(net: chameleon.Chameleon, ids: np.ndarray) -> jax.Array:
    row = (ids, np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None])
    return sharding.jit(lambda net, *row: net.logits(net.hidden(*row, key=None)))(net, *row)


STEPS = {
    f.__name__: f
    for f in (inputs, codes, forward, gradient, generate, adapted, quantized, large_layer, memory)
}

if __name__ == "__main__":
    STEP, SCRATCH, *_ = sides.read_step(__doc__)
    print(json.dumps(STEPS[STEP](Job(pathlib.Path(SCRATCH)))))
