"""Embeddings of many pictures and texts, in batches of few shapes, over all devices of a process.

    pictures   batches of `batch` a device, the last one filled up with copies that are dropped
    texts      sorted by length, each batch cut to the first of LENGTHS that holds its longest text

Rows are split over the devices, weights stand on each. Processes embed their own shares.
"""

from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32

from medmax_jax.biomedclip import PAD, BiomedClip, image_embeddings, text_embeddings
from medmax_jax.mesh import AXES, ROWS

LENGTHS = (32, 64, 128)  # tokens; the next is the context. A caption has about 40


class Embedder:
    """The model on all devices of this process. `batch`: rows of a device."""

    def __init__(self, model: BiomedClip, *, batch: int):
        devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
        self._mesh = jax.sharding.Mesh(devices, AXES, (AxisType.Explicit,) * 3)
        self._rows = batch * devices.size
        self._model = jax.device_put(model, NamedSharding(self._mesh, P()))

    def images(
        self, pictures: Iterable[Float32[np.ndarray, "h w 3"]]
    ) -> Float32[np.ndarray, "n E"]:
        """A unit vector a picture, in order; a batch of them in memory at a time."""
        found = [self._run(image_embeddings, np.stack(part)) for part in self._parts(pictures)]
        return np.concatenate(found) if found else self._none()

    def texts(self, ids: Int32[np.ndarray, "n T"]) -> Float32[np.ndarray, "n E"]:
        """A unit vector a row of ids, in order."""
        lengths = (ids != PAD).sum(1)
        order = np.argsort(lengths, kind="stable")
        found = self._none(len(ids))
        for start in range(0, len(ids), self._rows):
            part = order[start : start + self._rows]
            longest = int(lengths[part].max())
            width = next((n for n in LENGTHS if longest <= n < ids.shape[1]), ids.shape[1])
            found[part] = self._run(text_embeddings, ids[part, :width])
        return found

    def _parts(self, pictures: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
        part: list[np.ndarray] = []
        for picture in pictures:
            part.append(picture)
            if len(part) == self._rows:
                yield part
                part = []
        if part:
            yield part

    def _run(self, embed: Callable[[BiomedClip, Array], Array], rows: np.ndarray) -> np.ndarray:
        full = np.concatenate([rows, np.repeat(rows[:1], self._rows - len(rows), axis=0)])
        with jax.set_mesh(self._mesh):
            place = NamedSharding(self._mesh, P(ROWS, *[None] * (full.ndim - 1)))
            return np.asarray(embed(self._model, jax.device_put(full, place)))[: len(rows)]

    def _none(self, count: int = 0) -> Float32[np.ndarray, "n E"]:
        return np.zeros((count, self._model.text.proj_out.kernel.shape[-1]), np.float32)
