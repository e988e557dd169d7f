"""Computes the objective, the sum of weight x negative log-likelihood, and sums for reports.

    ids      BOS  a   BOI  c0  c1  EOI  SEP  b   EOS        hidden[t] predicts ids[t + 1]
    weights   0   0    0   0   0    0    0   .5  .5         weights[t] is for predicting ids[t]

The weights come from the loader, so packing, masking and `document | token` weighting are decided
before this file: the objective is the same number for all rows, chunks and meshes. Logits are fp32
and never masked (a mask on image ids would make the loss on image targets infinite). With
config.loss.z, weight x z (log Z)^2 is added for each target.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from medmax_jax.config import ZLoss
from medmax_jax.models.chameleon import Chameleon
from medmax_jax.models.vocab import is_image
from medmax_jax.sharding import BATCH, ROWS
from medmax_jax.training.batch import MAX_GROUPS, Batch
from medmax_jax.training.cross_entropy import num_chunks, weighted_nll
from medmax_jax.training.metrics import LOWEST

NO_Z_LOSS = ZLoss(text=0.0, image=0.0)


def training_objective(
    model: Chameleon,
    batch: Batch,
    key: PRNGKeyArray | None,
    *,
    trains: str,
    z: ZLoss = NO_Z_LOSS,
    residual_dropout: float = 0.0,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict[str, Array]]]:
    """Return the loss of a global batch, with sums and maxima for reports; `key=None`: no dropout.

    The sums are unweighted, over scored targets, in total and for each kind of document, text and
    image separately: `text_nll / text_count` is the mean over scored text targets. Image targets
    are the image codes; BOI and EOI count as text. The maxima are over the same targets, LOWEST
    where there are none. `trains`: config.train.trains.
    """
    hidden, norms = model.hidden_and_norms(
        batch.ids, batch.segments, batch.positions, key=key, residual_dropout=residual_dropout
    )
    # The last position predicts nothing. Not jnp.roll: with one row a [1, 1] slice in it has lost
    # its sharding, which is an error in jax 0.11.
    shift_left = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))  # noqa: E731
    targets, weights, kinds = (shift_left(x) for x in (batch.ids, batch.weights, batch.kinds))
    head, image = model.head(), is_image(targets, model.vocab)
    coefficients = None if z == NO_Z_LOSS else jnp.where(image, z.image, z.text)
    total, values = weighted_nll(
        hidden, head, targets, weights, coefficients,
        trains_kernel=trains == "full", chunks=num_chunks(hidden, head.kernel),
    )  # fmt: skip
    z_loss = jnp.float32(0)
    if coefficients is not None:
        z_loss = (weights * coefficients * values.log_z**2).sum()
    nll_sums, counts = sum_by_group(values.nll, weights > 0, 2 * kinds + image)
    sums = {
        "text_nll": nll_sums[:, 0].sum(),
        "text_count": counts[:, 0].sum(),
        "image_nll": nll_sums[:, 1].sum(),
        "image_count": counts[:, 1].sum(),
        "kind_nll": nll_sums,
        "kind_count": counts,
        "z_loss": z_loss,
    }
    maxima = {}
    for name, targets_of in (("text", (weights > 0) & ~image), ("image", (weights > 0) & image)):
        sums[f"{name}_log_z"] = jnp.where(targets_of, values.log_z, 0).sum()
        sums[f"{name}_hidden_norm"] = jnp.where(targets_of, norms, 0).sum()
        maxima[f"{name}_log_z_max"] = jnp.where(targets_of, values.log_z, LOWEST).max()
        maxima[f"{name}_max_logit"] = jnp.where(targets_of, values.max_logit, LOWEST).max()
    return total, (sums, maxima)


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
