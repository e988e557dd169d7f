"""Runs this project's side of gpu.py's decode and vq parts; one request per line, as jax_side.py.

decode   a prompt is read, then `count` tokens are written greedily, in one jitted loop
vq       images to codes and back
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import jax_side
import numpy as np
import sides

from medmax_jax import config as medmax_jax_config
from medmax_jax import sharding
from medmax_jax.models import kv_cache, vqgan

COLUMNS = 256  # logits that are compared


class Decoder:
    """Holds a model with cache capacity for a prompt and its answer."""

    def __init__(self, spec: dict[str, Any]):
        run = medmax_jax_config.from_config_dict(spec["run"])
        self.prompt = jnp.asarray(np.load(spec["prompts"])["ids"][: spec["rows"]])
        self.count, self.mesh = spec["count"], sharding.make_mesh(run.mesh)
        with jax.set_mesh(self.mesh):
            self.prompt = jax.device_put(
                self.prompt, jax.sharding.NamedSharding(self.mesh, sharding.BATCH)
            )
            self.model = jax_side.create(run)
            start = time.perf_counter()
            self.read = jax.jit(functools.partial(_read, config=run.model, count=self.count))
            self.write = jax.jit(functools.partial(_write, count=self.count), donate_argnums=2)
            self.steps(1)
        self.compile_seconds = round(time.perf_counter() - start, 2)

    def losses(self, count: int) -> dict[str, Any]:
        """Return the logits after the prompt of the first row."""
        with jax.set_mesh(self.mesh):
            logits, _ = self.read(self.model, self.prompt)
        return dict(losses=np.asarray(logits)[0, -1, :COLUMNS].tolist())

    def steps(self, count: int) -> dict[str, Any]:
        """Return the seconds of prompt and answer together."""
        seconds = []
        with jax.set_mesh(self.mesh):
            for _ in range(count):
                start = time.perf_counter()
                jax.block_until_ready(self.write(self.model, *self.read(self.model, self.prompt)))
                seconds.append(time.perf_counter() - start)
        return dict(seconds=seconds)

    def about(self) -> dict[str, Any]:
        """Return the values of jax_side.Trainer.about."""
        return jax_side.device() | dict(compile_seconds={"both": self.compile_seconds})


def _read(
    model: Any, ids: jax.Array, *, config: medmax_jax_config.Model, count: int
) -> tuple[Any, Any]:
    rows, length = ids.shape
    cache = kv_cache.init_cache(
        config, num_slots=rows, cache_length=length + count, cache_dtype="model"
    )
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
    positions = jax.sharding.reshard(positions, sharding.BATCH)
    hidden, cache = kv_cache.decode(model, ids, cache, positions, slots=None, span=length + count)
    return model.logits(hidden[:, -1:]), cache


def _write(model: Any, logits: jax.Array, cache: Any, *, count: int) -> jax.Array:
    rows, start = logits.shape[0], cache.k.shape[3] - count

    def body(carry: tuple, position: jax.Array) -> tuple[tuple, jax.Array]:
        token, cache = carry
        positions = jnp.full((rows, 1), position, jnp.int32, out_sharding=sharding.BATCH)
        span = cache.k.shape[3]
        hidden, cache = kv_cache.decode(model, token, cache, positions, slots=None, span=span)
        token = jax.sharding.reshard(
            model.logits(hidden).argmax(-1).astype(jnp.int32), sharding.BATCH
        )
        return (token, cache), token

    token = jax.sharding.reshard(logits.argmax(-1).astype(jnp.int32), sharding.BATCH)
    positions = start + jnp.arange(count - 1, dtype=jnp.int32)
    return jax.lax.scan(body, (token, cache), positions)[1]


class Images:
    """Runs the VQGAN."""

    def __init__(self, spec: dict[str, Any]):
        vq = medmax_jax_config.build(medmax_jax_config.VQ, spec["vq"])
        self.model = jax_side.fill(vqgan.abstract(vq), None)
        self.pixels = jnp.asarray(np.load(spec["images"])["pixels"][: spec["rows"]])
        start = time.perf_counter()
        self.codes = jax.block_until_ready(vqgan.encode(self.model, self.pixels))
        jax.block_until_ready(vqgan.decode_codes(self.model, self.codes))
        self.compile_seconds = round(time.perf_counter() - start, 2)

    def losses(self, count: int) -> dict[str, Any]:
        """Return the codes of the first image."""
        return dict(losses=np.asarray(self.codes[0]).reshape(-1).tolist())

    def steps(self, count: int) -> dict[str, Any]:
        """Return the seconds to encode, and to decode, which the other side cannot."""
        seconds, decode_seconds = [], []
        for _ in range(count):
            for call, inputs, times in (
                (vqgan.encode, self.pixels, seconds),
                (vqgan.decode_codes, self.codes, decode_seconds),
            ):
                start = time.perf_counter()
                jax.block_until_ready(call(self.model, inputs))
                times.append(time.perf_counter() - start)
        return dict(seconds=seconds, decode_seconds=decode_seconds)

    def about(self) -> dict[str, Any]:
        """Return the values of jax_side.Trainer.about."""
        return jax_side.device() | dict(compile_seconds={"both": self.compile_seconds})


def main() -> None:
    """Compile, then serve requests."""
    spec = sides.read_spec(__doc__)
    side = {"decode": Decoder, "vq": Images}[spec["part"]](spec)
    sides.serve({"losses": side.losses, "steps": side.steps, "about": side.about})


if __name__ == "__main__":
    main()
