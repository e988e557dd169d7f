"""The objective: sum over positions of weight x negative log-likelihood; its text and image parts.

    ids      BOS  a   BOI  c0  c1  EOI  SEP  b   EOS        hidden[t] predicts ids[t + 1]
    weights   0   0    0   0   0    0    0   .5  .5         weights[t] belongs to predicting ids[t]

The weights come from the loader, so packing, masking and `document | token` weighing are settled
before this file: the objective is the same number whatever the rows, the chunks or the mesh. Logits
are fp32 and never masked (a mask on image ids would make the loss on image targets infinite).
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from data.loader import Batch
from medmax_jax import mesh
from medmax_jax.chameleon import Chameleon
from medmax_jax.config import Vocab
from medmax_jax.vocab import is_image

# fp32 logits that one device holds at a time: 2**26 x 4 bytes = 256 MiB, small beside the weights
# of a 7B model and large enough that a chunk keeps the matrix units busy.
CHUNK_LOGITS = 2**26


def objective(
    model: Chameleon, batch: Batch, key: PRNGKeyArray | None, *, vocab: Vocab
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of a global batch, and sums for reports; `key=None` switches dropout off.

    The sums are unweighted: `text_nll / text_count` is the mean over scored text targets. Image
    targets are the image codes; BOI and EOI count as text.
    """
    hidden = model.hidden(batch.ids, batch.segments, batch.positions, key=key)
    # The last position predicts nothing. Not jnp.roll: with one row a [1, 1] slice in it has lost
    # its sharding, which jax 0.11 minds.
    targets, weights = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (batch.ids, batch.weights))
    kernel = model.lm_head.kernel[...]
    nll = token_nll(hidden, kernel, targets, chunks=num_chunks(hidden, kernel))
    scored, image = weights > 0, is_image(targets, vocab)
    return (weights * nll).sum(), {
        "text_nll": jnp.where(scored & ~image, nll, 0).sum(),
        "text_count": (scored & ~image).sum(dtype=jnp.float32),
        "image_nll": jnp.where(scored & image, nll, 0).sum(),
        "image_count": (scored & image).sum(dtype=jnp.float32),
    }


def token_nll(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunks: int,
) -> Float[Array, "B T"]:
    """-log p(targets[b, t] | hidden[b, t]) over the whole vocabulary, in fp32.

    With several chunks (a divisor of T) the logits of one chunk exist at a time, and the backward
    pass makes them again. The vocabulary may be sharded over tp.
    """
    rows, length, width = hidden.shape
    if length % chunks:
        raise ValueError(f"{chunks} chunks do not divide {length} tokens; use a divisor")
    kernel = jax.reshard(kernel, P(None, "tp"))  # one gather over fsdp, not one a chunk
    if chunks == 1:
        return _nll(hidden, kernel, targets)
    parts = (
        jnp.moveaxis(hidden.reshape(rows, chunks, length // chunks, width), 1, 0),  # [C, B, T/C, D]
        jnp.moveaxis(targets.reshape(rows, chunks, length // chunks), 1, 0),
    )
    chunk = jax.checkpoint(_nll, prevent_cse=False)  # scan already keeps the two passes apart
    _, nll = jax.lax.scan(lambda _, part: (None, chunk(part[0], kernel, part[1])), None, parts)
    return jnp.moveaxis(nll, 0, 1).reshape(rows, length)


def num_chunks(hidden: Float[Array, "B T D"], kernel: Float[Array, "D V"]) -> int:
    """The smallest divisor of T with which a device's logits of a chunk are within CHUNK_LOGITS."""
    rows, length, _ = jax.typeof(hidden).sharding.shard_shape(hidden.shape)
    vocab = jax.typeof(kernel).sharding.shard_shape(kernel.shape)[1]
    fitting = (c for c in range(1, length) if length % c == 0)
    return next((c for c in fitting if rows * (length // c) * vocab <= CHUNK_LOGITS), length)


def _nll(
    hidden: Float[Array, "B T D"], kernel: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    # One axis of tokens: with two, the kernel's gradient sums over both, for which XLA's CPU
    # backend has no matrix product (2.3 times the time of the whole loss at the tiny size).
    rows = jnp.reshape(hidden, (-1, hidden.shape[-1]), out_sharding=P(mesh.ROWS, None))  # [B*T, D]
    logits = jnp.einsum(
        "nd,dv->nv",
        rows,
        kernel.astype(hidden.dtype),
        out_sharding=P(mesh.ROWS, "tp"),
        preferred_element_type=jnp.float32,
    )
    # take_along_axis cannot index an axis that is sharded; a comparison can.
    flat = jnp.reshape(targets, (-1,), out_sharding=P(mesh.ROWS))
    hit = flat[:, None] == jnp.arange(kernel.shape[1])
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.where(hit, logits, 0).sum(-1)
    return jnp.reshape(nll, targets.shape, out_sharding=mesh.BATCH)
