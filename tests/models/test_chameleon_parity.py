"""Chameleon and its LoRA against the goldens of HF and PEFT, each shown to fail when we err.

The goldens come from tests/parity/make_chameleon.py. Tolerance: 2e-5 x max(1, std) in fp32.
"""

import pathlib

import chameleon_setup as setup
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from parity import chameleon_cases as cases

from medmax_jax.config import Lora, Mesh
from medmax_jax.models import attention, chameleon, layers
from medmax_jax.models.attention import reference_attention
from medmax_jax.sharding import HEADS, HID, make_mesh

PARITY = pathlib.Path(__file__).parents[1] / "parity"


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        yield


def golden(case: cases.Case, kind: str) -> dict[str, np.ndarray]:
    with np.load(PARITY / f"chameleon_{case.name}_{kind}.npz") as file:
        return dict(file)


def forward(model: chameleon.Chameleon) -> dict[str, np.ndarray]:
    @setup.jit
    def run(model, ids, segments, positions):
        hidden = model.hidden(ids, segments, positions, key=None)
        logits = model.logits(hidden)
        return dict(
            layers=model.hidden_states_by_layer(ids, segments, positions),
            hidden=hidden,
            logits=logits,
            logsumexp=jax.nn.logsumexp(logits, -1),
        )

    out = jax.device_get(run(model, *setup.rows(cases.ids())))
    return out | dict(logits=out["logits"][..., cases.COLUMNS])


def loss_of(model, ids, segments, positions):
    logits = model.logits(model.hidden(ids, segments, positions, key=None))
    hit = ids[:, 1:, None] == jnp.arange(cases.SIZE)
    nll = jax.nn.logsumexp(logits[:, :-1], -1) - jnp.where(hit, logits[:, :-1], 0).sum(-1)
    return nll[:, cases.SCORED].mean()


def train(model: chameleon.Chameleon) -> dict[str, np.ndarray]:
    """PEFT's five steps with optax: the same names as in the golden."""
    graph, lora, base = chameleon.split_adapters(model)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(cases.LR, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0),
    )

    @setup.jit
    def step(lora, opt, batch):
        loss, grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p, base), *batch))(lora)

        updates, opt = tx.update(grads, opt, lora)
        return optax.apply_updates(lora, updates), opt, loss, grads, optax.tree.norm(grads)

    batch, opt = setup.rows(cases.ids()), tx.init(lora)
    out, losses, norms = {}, [], []
    for i in range(cases.STEPS):
        lora, opt, loss, grads, norm = step(lora, opt, batch)
        if i == 0:
            out |= {f"grad.{n}": v for n, v in setup.named(grads).items()}
        losses.append(loss)
        norms.append(norm)
    out |= {f"after.{n}": v for n, v in setup.named(lora).items()}
    return jax.device_get(out | dict(losses=jnp.stack(losses), norms=jnp.stack(norms)))


def worst(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest difference in units of the tolerance; at most 1 is agreement."""
    assert set(ours) == set(theirs) - {"versions", "logits_std"}
    errors = {n: np.abs(ours[n] - theirs[n]).max() / cases.tolerance(n, theirs[n]) for n in ours}
    return max(errors.values())


@pytest.mark.parametrize("case", cases.CASES.values(), ids=cases.CASES)
def test_forward_equals_hf(case):
    theirs = golden(case, "forward")
    assert theirs["logits_std"] >= 1  # smaller logits would agree whatever the model does
    ours = forward(setup.load(setup.config(case), cases.weights(case, lora=False)))
    assert worst(ours, theirs) <= 1


@pytest.mark.parametrize("case", cases.CASES.values(), ids=cases.CASES)
def test_lora_training_equals_peft(case):
    model = setup.load(setup.config(case), cases.weights(case, lora=True), setup.LORA)
    assert worst(train(model), golden(case, "lora")) <= 1


def rope_of_neighbours(patch, arrays):
    def rope(x, cos, sin):
        even, odd = x[..., ::2], x[..., 1::2]
        turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
        return turned.reshape(x.shape)

    patch.setattr(chameleon, "rope", rope)


def norm_after_rope(patch, arrays):
    def qkv(self, x, angles, keys):
        q, k, v = (
            chameleon._heads(proj(x, HID, key=None), self.config.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(layers.rope(q, *angles)), self.k_norm(layers.rope(k, *angles)), v

    patch.setattr(chameleon.Attention, "qkv", qkv)


def no_query_bias(patch, arrays):
    arrays["layers.self_attn.q_norm.bias"] *= 0


def gains_swapped(patch, arrays):
    for name in ("layers.self_attn.q_norm.scale", "layers.self_attn.k_norm.scale"):
        arrays[name] = arrays[name][:, ::-1]


def keys_tiled(patch, arrays):
    def attend(q, k, v, mask):
        q, k, v, mask = (jax.sharding.reshard(a, P()) for a in (q, k, v, mask))
        k, v = (jnp.tile(a, (1, q.shape[1] // k.shape[1], 1, 1)) for a in (k, v))
        return jax.sharding.reshard(reference_attention(q, k, v, mask), HEADS)

    patch.setattr(attention, "attention", attend)


def sees_one_ahead(patch, arrays):
    order = np.arange(cases.TOKENS)
    ahead = order[:, None] + 1 >= order[None, :]
    patch.setattr(attention, "packed_mask", lambda s: jnp.broadcast_to(ahead, (2, *ahead.shape)))


MUTATIONS = {
    "RoPE turns neighbours": (cases.BASE, rope_of_neighbours, {}),
    "q/k-norm after RoPE": (cases.BASE, norm_after_rope, {}),
    "q-norm without bias": (cases.BASE, no_query_bias, {}),
    "a mask shifted by one": (cases.BASE, sees_one_ahead, {}),
    "RMSNorm eps 1e-3": (cases.BASE, None, dict(rms_norm_eps=1e-3)),
    "q/k-norm eps 1e-3": (cases.BASE, None, dict(qk_norm_eps=1e-3)),
    "RoPE theta 1e6": (cases.BASE, None, dict(rope_theta=1e6)),
    "norms after, not before": (cases.BASE, None, dict(swin_norm=True)),
    "norms before, not after": (cases.SWIN, None, dict(swin_norm=False)),
    "gains of the shards swapped": (cases.SWIN, gains_swapped, {}),
    "key heads tiled, not repeated": (cases.SWIN, keys_tiled, {}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_golden_shows_an_error(name, monkeypatch):
    case, mutate, changes = MUTATIONS[name]
    arrays = cases.weights(case, lora=False)
    if mutate:
        mutate(monkeypatch, arrays)
    model = setup.load(setup.config(case, **changes), arrays)
    ours = setup.jit(lambda m, *rows: m.hidden(*rows, key=None))(model, *setup.rows(cases.ids()))
    theirs = golden(case, "forward")["hidden"]
    assert np.abs(ours - theirs).max() > 3 * cases.tolerance("hidden", theirs)


@pytest.mark.parametrize("case", cases.CASES.values(), ids=cases.CASES)
@pytest.mark.parametrize("alpha_over_rank", [1.5, 6.0], ids=["alpha / rank", "alpha"])
def test_golden_shows_a_wrong_lora_scale(case, alpha_over_rank):
    lora = Lora(rank=4, alpha=4 * alpha_over_rank, dropout=0.0)
    model = setup.load(setup.config(case), cases.weights(case, lora=True), lora)
    first = golden(case, "lora")["losses"][0]
    off = abs(setup.jit(loss_of)(model, *setup.rows(cases.ids())) - first)
    assert (off <= cases.tolerance("losses", first)) == (alpha_over_rank == 1.5)
