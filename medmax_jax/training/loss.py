"""Computes the objective, the sum of weight x negative log-likelihood, and sums for reports.

    ids      BOS  a   BOI  c0  c1  EOI  SEP  b   EOS        hidden[t] predicts ids[t + 1]
    weights   0   0    0   0   0    0    0   .5  .5         weights[t] is for predicting ids[t]

The weights come from the loader, so packing, masking and `document | token` weighting are decided
before this file: the objective is the same number for all rows, chunks and meshes. Logits are fp32
and never masked (a mask on image ids would make the loss on image targets infinite).
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from medmax_jax.models.chameleon import Chameleon
from medmax_jax.models.vocab import is_image
from medmax_jax.sharding import BATCH, ROWS
from medmax_jax.training.batch import MAX_GROUPS, Batch
from medmax_jax.training.cross_entropy import num_chunks, weighted_nll


def training_objective(
    model: Chameleon, batch: Batch, key: PRNGKeyArray | None, *, trains: str
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the loss of a global batch, and sums for reports; `key=None` disables dropout.

    The sums are unweighted, over scored targets, in total and for each kind of document, text and
    image separately: `text_nll / text_count` is the mean over scored text targets. Image targets
    are the image codes; BOI and EOI count as text. `trains`: config.train.trains.
    """
    hidden = model.hidden(batch.ids, batch.segments, batch.positions, key=key)
    # The last position predicts nothing. Not jnp.roll: with one row a [1, 1] slice in it has lost
    # its sharding, which is an error in jax 0.11.
    shift_left = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))  # noqa: E731
    targets, weights, kinds = (shift_left(x) for x in (batch.ids, batch.weights, batch.kinds))
    head = model.head()
    total, nll = weighted_nll(
        hidden, head, targets, weights,
        trains_kernel=trains == "full", chunks=num_chunks(hidden, head.kernel),
    )  # fmt: skip
    image = is_image(targets, model.vocab)
    nll_sums, counts = sum_by_group(nll, weights > 0, 2 * kinds + image)
    return total, {
        "text_nll": nll_sums[:, 0].sum(),
        "text_count": counts[:, 0].sum(),
        "image_nll": nll_sums[:, 1].sum(),
        "image_count": counts[:, 1].sum(),
        "kind_nll": nll_sums,
        "kind_count": counts,
    }


def sum_by_group(
    nll: Float[Array, "B T"], scored: Array, index: Int[Array, "B T"]
) -> tuple[Float[Array, "KINDS 2"], Float[Array, "KINDS 2"]]:
    """Sum and count the scored tokens by place = 2 * kind + image."""

    def local(nll, scored, index):
        values = jnp.stack([jnp.where(scored, nll, 0), scored.astype(jnp.float32)], -1)
        sums = jax.ops.segment_sum(values.reshape(-1, 2), index.reshape(-1), 2 * MAX_GROUPS)
        return jax.lax.psum(sums, ROWS)

    sums = jax.shard_map(local, in_specs=(BATCH,) * 3, out_specs=P())(nll, scored, index)
    return tuple(jnp.moveaxis(sums.reshape(MAX_GROUPS, 2, 2), -1, 0))
