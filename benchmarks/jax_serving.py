"""Runs this project's side of the parts decode, image and vq; one request per line (sides.py).

decode   a prompt is read, then text is written greedily, by the engine of generation
image    an image per row, sampled with two guidance streams, by the same engine
vq       images to codes, or back
"""

import time
from typing import Any

import decode_jax_side
import jax
import jax.numpy as jnp
import jax_side
import numpy as np
import sides

from medmax_jax import config as medmax_jax_config
from medmax_jax import sharding
from medmax_jax.models import vqgan

COLUMNS = 256  # logits that are compared
GUIDED = 2  # streams: with the prompt, and without


class Decoder(decode_jax_side.Decoder):
    """Holds a model, and repeats one request to the engine."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__(spec)
        self.part, self.rows, self.new = spec["part"], spec["rows"], spec["count"]

    def losses(self, count: int) -> dict[str, Any]:
        """Return the logits after the prompt of the first row."""
        ids = jnp.asarray(self.prompts[:1], jnp.int32)
        with jax.set_mesh(self.mesh):
            ids = jax.device_put(ids, jax.sharding.NamedSharding(self.mesh, sharding.BATCH))
            logits = _last_logits(self.model, ids)
        return dict(losses=np.asarray(logits)[0, -1, :COLUMNS].tolist())

    def steps(self, count: int) -> dict[str, Any]:
        """Return the seconds of prompts and answers together, and the tokens written."""
        seconds, tokens = [], []
        for _ in range(count):
            if self.part == "image":
                done = self.guided(streams=GUIDED, rows=self.rows)
                tokens.append(done["tokens"])
            else:
                done = self.text(self.rows, self.new)
                tokens.append(sum(map(len, done["tokens"])))
            seconds.append(done["seconds"])
        return dict(seconds=seconds, work=tokens)

    def about(self) -> dict[str, Any]:
        """Return the device and the versions."""
        return jax_side.device()


@jax.jit
def _last_logits(model: Any, ids: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    positions = jax.sharding.reshard(positions, sharding.BATCH)
    hidden = model.hidden(ids, jnp.ones_like(ids), positions, key=None)
    return model.logits(hidden[:, -1:])


class Images:
    """Runs the VQGAN in one direction."""

    def __init__(self, spec: dict[str, Any]):
        vq = medmax_jax_config.build(medmax_jax_config.VQ, spec["vq"])
        self.model = jax_side.fill(vqgan.abstract(vq), None)
        pixels = jnp.asarray(np.load(spec["images"])["pixels"][: spec["rows"]])
        self.call, self.input = vqgan.encode, pixels
        if spec["call"] == "decode":
            shape = (spec["rows"], vq.codes_per_side, vq.codes_per_side)
            codes = np.random.default_rng(0).integers(vq.num_codes, size=shape)
            self.call, self.input = vqgan.decode_codes, jnp.asarray(codes, jnp.int32)

    def losses(self, count: int) -> dict[str, Any]:
        """Return the codes of the first image."""
        return dict(losses=np.asarray(self.call(self.model, self.input)[0]).reshape(-1).tolist())

    def steps(self, count: int) -> dict[str, Any]:
        """Return the seconds of each of `count` batches."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            jax.block_until_ready(self.call(self.model, self.input))
            seconds.append(time.perf_counter() - start)
        return dict(seconds=seconds)

    def about(self) -> dict[str, Any]:
        """Return the device, the versions, and the least work: FLOPs, and every value once."""
        cost = self.call.lower(self.model, self.input).cost_analysis()
        like = (self.model, self.input, jax.eval_shape(self.call, self.model, self.input))
        moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
        return jax_side.device() | dict(flops=cost["flops"], bytes=moved)


if __name__ == "__main__":
    SPEC = sides.read_spec(__doc__)
    sides.serve(lambda: (Images if SPEC["part"] == "vq" else Decoder)(SPEC))
