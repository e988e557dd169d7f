"""Runs this project's side of training benchmarks: the step of train.py, on weights of a formula.

python jax_side.py SPEC.json, then one request per line (sides.py). SPEC has the config of a run
and how many batches to hold; they come from its records through the loader.
"""

import dataclasses
import functools
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
import same_weights
import sides

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import medmax_jax
from medmax_jax import config, sharding
from medmax_jax.checkpoints.safetensors_file import dotted_name
from medmax_jax.data import loader
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Document, Layout
from medmax_jax.models import chameleon, quantization
from medmax_jax.models.vocab import BOS, EOS, SEP
from medmax_jax.training import step

FIRST_TEXT = 8_712  # ids below are images and controls


def write_records(folder: pathlib.Path, run: config.Run, *, count: int) -> None:
    """Write full text documents of one row each, with ids by Zipf's law so that a model can learn.

    Answers are 1/4 to 3/4 of a document: by `loss_weight` document each weighs the same.
    """
    rng, length = np.random.default_rng(0), run.data.seq_len
    chance = 1 / np.arange(1, run.vocab.size - FIRST_TEXT + 1)

    def document(number: int) -> Document:
        text = FIRST_TEXT + rng.choice(len(chance), length, p=chance / chance.sum())
        text[0], text[rng.integers(length // 4, 3 * length // 4)], text[-1] = BOS, SEP, EOS
        return Document(
            tokens=text.astype(np.int32), image_path="", task="VQA", source="synthetic",
            credential="no", turns=1, group=str(number), id=str(number),
        )  # fmt: skip

    layout = Layout(vocab=run.vocab, codes_per_image=run.vq.codes_per_image, tokenizer="", vqgan="")
    documents = (document(number) for number in range(count))
    writer.write(folder, documents, shard_size=1_024, layout=layout, notes={})


def write_batches(path: pathlib.Path, run: config.Run, *, count: int) -> None:
    """Write the first batches of the run, for the other side."""
    source = loader.train_batches(run, run.data.train)
    batches = [source.batch(number) for number in range(count)]
    names = ("ids", "weights")
    np.savez(path, **{n: np.concatenate([getattr(batch, n) for batch in batches]) for n in names})


def create(run: config.Run) -> chameleon.Chameleon:
    """Create the model of same_weights.py, each weight initialized in its shards.

    Weights are quantized if the config requires it.
    """
    like = chameleon.abstract_model(run.model, run.vocab, run.lora)
    return fill(like, run.model)


def fill(like: Any, model: config.Model | None) -> Any:
    """Return the tree with arrays for shapes. `model`: where matrices may be quantized."""
    leaves = jax.tree_util.tree_flatten_with_path(like)
    filled: dict[str, jax.Array] = {}
    for path, leaf in leaves[0]:
        name = dotted_name(path)
        if name.endswith(".qvalue"):  # its scale is the leaf after or before it
            filled |= _quantized(name.removesuffix(".qvalue"), leaf, model)
        elif not name.endswith("kernel.scale"):
            filled[name] = _fill_leaf(name, leaf)
    placed = [jax.device_put(filled[dotted_name(path)], leaf.sharding) for path, leaf in leaves[0]]
    return jax.tree.unflatten(leaves[1], placed)


def _fill_leaf(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
    stacked = name.startswith("layers.")
    shape = like.shape[1:] if stacked else like.shape

    @functools.partial(jax.jit, out_shardings=like.sharding)
    def fill(salts: jax.Array) -> jax.Array:
        values = jax.lax.map(lambda salt: _layer(name, salt, shape).astype(like.dtype), salts)
        return values.reshape(like.shape)

    return fill(_salts(name, like.shape[0] if stacked else 1))


def _salts(name: str, layers: int) -> jax.Array:
    return jnp.array([same_weights.salt(name, layer) for layer in range(layers)], jnp.uint32)


def _layer(name: str, salt: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the numbers of one layer in fp32."""
    wide = same_weights.width(name, shape[0])
    if wide is None:
        return jnp.full(shape, same_weights.constant(name), jnp.float32)
    index = jax.lax.iota(np.uint32, math.prod(shape))
    bits = same_weights.bits(index, salt, np.uint32)
    return ((bits.astype(jnp.float32) / 2**24 - 0.5) * np.float32(wide)).reshape(shape)


def _quantized(name: str, like: jax.ShapeDtypeStruct, model: config.Model) -> dict[str, jax.Array]:
    """Return a stack of matrices in nf4 or int8, as by convert/native.py, but on the device."""
    layers, rows, columns = like.shape
    packed = model.quant in quantization.PACKED

    @jax.jit
    def quantize(salt: jax.Array) -> tuple[jax.Array, jax.Array]:
        dense = _layer(name, salt, ((2 if packed else 1) * rows, columns)).astype(model.param_dtype)
        tiles = {0: quantization.TILE} if packed else {}
        matrix = qwix.quantize(
            dense.astype(jnp.float32), model.quant, channelwise_axes=(1,), tiled_axes=tiles
        )
        scale = matrix.scale.astype(jnp.float32)
        if not packed:
            return matrix.qvalue, scale
        codes = matrix.qvalue.astype(jnp.uint8)
        return codes[0::2] | (codes[1::2] << 4), scale

    pairs = [quantize(salt) for salt in _salts(name, layers)]
    codes, scales = (jnp.stack(parts) for parts in zip(*pairs, strict=True))
    return {f"{name}.qvalue": codes, f"{name}.scale": scales}


class Trainer:
    """Holds a model and its compiled steps."""

    def __init__(self, run: config.Run, *, batches: int):
        self.run, self.mesh = run, sharding.make_mesh(run.mesh)
        with jax.set_mesh(self.mesh):
            self.graph, self.trainable, self.frozen = step.split_trainable(
                create(run), run.train.trains
            )
            source = loader.train_batches(run, run.data.train)
            stats = [source.stats(number) for number in range(batches)]
            self.tokens, squared = (
                sum(getattr(of_batch, name) for of_batch in stats)
                for name in ("tokens", "squared_lengths")
            )
            self.attended_length = squared / self.tokens
            self.batches = [
                sharding.shard_batch(source.batch(number), self.mesh) for number in range(batches)
            ]
        self.key = jax.random.key(run.train.seed, impl=run.train.prng_impl)
        self.compile_seconds: dict[str, float] = {}
        self.restart()
        self.compiled = self._compiled("with dropout", run)

    def restart(self) -> None:
        """Restore the first weights and create a new optimizer; a step donates its state."""
        with jax.set_mesh(self.mesh):
            self.state = step.init_state(jax.tree.map(jnp.copy, self.trainable), self.run)
        self.at = 0

    def _compiled(self, name: str, run: config.Run) -> Any:
        start = time.perf_counter()
        with jax.set_mesh(self.mesh):
            train_step = step.make_train_step(self._graph(run), run)
            compiled = train_step.lower(
                self.state, self.frozen, self.batches[0], self.key
            ).compile()
        self.compile_seconds[name] = round(time.perf_counter() - start, 2)
        return compiled

    def _graph(self, run: config.Run) -> Any:
        like = chameleon.abstract_model(run.model, run.vocab, run.lora)
        return step.split_trainable(like, run.train.trains)[0]

    def advance(self, compiled: Any) -> Any:
        """Return the sums of the next step, without waiting for them."""
        batch = self.batches[self.at % len(self.batches)]
        self.at += 1
        with jax.set_mesh(self.mesh):
            self.state, sums = compiled(self.state, self.frozen, batch, self.key)
        return sums

    def losses(self, count: int) -> dict[str, Any]:
        """Return the losses of the first steps, without dropout."""
        self.restart()
        no_dropout = dataclasses.replace(self.run.lora, dropout=0.0)
        compiled = self._compiled("without dropout", dataclasses.replace(self.run, lora=no_dropout))
        losses = [float(self.advance(compiled).loss.total) for _ in range(count)]
        self.restart()
        return dict(losses=losses)

    def steps(self, count: int) -> dict[str, Any]:
        """Return the seconds of each of `count` steps."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            jax.block_until_ready(self.advance(self.compiled))
            seconds.append(time.perf_counter() - start)
        return dict(seconds=seconds)

    def about(self) -> dict[str, Any]:
        """Return versions, compile times, and planned and used device memory."""
        planned = self.compiled.memory_analysis()
        return device() | dict(
            compile_seconds=self.compile_seconds,
            tokens=self.tokens / len(self.batches),  # of a step, without padding
            attended_length=self.attended_length,
            trained=chameleon.count_parameters(self.trainable),
            temporaries_gib=round(planned.temp_size_in_bytes / 2**30, 3),
            arguments_gib=round(planned.argument_size_in_bytes / 2**30, 3),
        )


def device() -> dict[str, Any]:
    """Return the device and the versions."""
    stats = jax.devices()[0].memory_stats() or {}
    return dict(
        versions={
            "medmax_jax": medmax_jax.__version__,
            "jax": jax.__version__,
            "python": sys.version.split()[0],
        },
        runtime=jax.devices()[0].client.platform_version,
        device=jax.devices()[0].device_kind,
        peak_gib=round(stats["peak_bytes_in_use"] / 2**30, 3) if stats else None,
    )


def main() -> None:
    """Compile, then serve requests."""
    spec = sides.read_spec(__doc__)
    sides.serve(lambda: Trainer(config.from_config_dict(spec["run"]), batches=spec["batches"]))


if __name__ == "__main__":
    main()
