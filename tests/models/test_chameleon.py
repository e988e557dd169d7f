"""Chameleon's behavior: packing, cached decoding, remat, dropout, bf16, true sizes, errors."""

import chameleon_setup as setup
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import chameleon_cases as cases

from medmax_jax import sharding
from medmax_jax.config import Lora, Mesh, Model, Vocab, build
from medmax_jax.configs import base as base_config
from medmax_jax.configs import chameleon_30b
from medmax_jax.models import chameleon, kv_cache, layers
from medmax_jax.sharding import make_mesh

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
BOTH = pytest.mark.parametrize("case", cases.CASES.values(), ids=cases.CASES)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        yield


def load(case: cases.Case, lora: Lora = setup.NO_LORA, **changes) -> chameleon.Chameleon:
    arrays = cases.weights(case, lora=lora.rank > 0)
    return setup.load(setup.config(case, **changes), arrays, lora)


@setup.jit
def hidden(model, ids, segments, positions):
    return model.hidden(ids, segments, positions, key=None)


def tokens(*shape: int) -> np.ndarray:
    return RNG.integers(0, cases.SIZE, shape).astype(np.int32)


@BOTH
def test_packed_row_equals_its_documents(case):
    """Row 0 packs three documents and padding; rows 1 to 3 contain one of them each."""
    lengths, total = (7, 4, 9), 22
    ids, segments, positions = (np.zeros((4, total), np.int32) for _ in range(3))
    segments[0, 20:], ids[:, :] = 0, 1
    starts = np.cumsum((0, *lengths))
    for d, (start, n) in enumerate(zip(starts, lengths, strict=False)):
        ids[d + 1, :n] = ids[0, start : start + n] = tokens(n)
        segments[0, start : start + n], segments[d + 1, :n] = d + 1, 1
        positions[0, start : start + n] = positions[d + 1, :n] = np.arange(n)
    got = np.asarray(hidden(load(case), *(jnp.asarray(a) for a in (ids, segments, positions))))
    assert np.isfinite(got).all()
    for d, (start, n) in enumerate(zip(starts, lengths, strict=False)):
        np.testing.assert_allclose(got[0, start : start + n], got[d + 1, :n], atol=2e-5)


@BOTH
def test_decoding_equals_the_full_forward(case):
    """Prompts of 9, 4 and 6 tokens in chunks of 5, then single steps; rows differ and some idle."""
    ids, prompts, total = tokens(3, 12), (9, 4, 6), 12
    model = load(case)
    expected = np.asarray(hidden(model, *setup.rows(ids)))
    decode = setup.jit(lambda m, *args: kv_cache.decode(m, *args, slots=None, span=16))
    cache = kv_cache.init_cache(model.config, num_slots=3, cache_length=16, cache_dtype="model")
    got, done = np.full_like(expected, np.nan), [0, 0, 0]

    def feed(width, counts):
        nonlocal cache
        chunk, positions = np.full((3, width), 7, np.int32), np.full((3, width), -1, np.int32)
        for b, n in enumerate(counts):
            chunk[b, :n] = ids[b, done[b] : done[b] + n]
            positions[b, :n] = np.arange(done[b], done[b] + n)
        out, cache = decode(model, jnp.asarray(chunk), cache, jnp.asarray(positions))
        assert np.isfinite(out).all()
        for b, n in enumerate(counts):
            got[b, done[b] : done[b] + n] = out[b, :n]
            done[b] += n

    for _ in range(2):
        feed(5, [min(5, p - d) for p, d in zip(prompts, done, strict=True)])
    step = 0
    while min(done) < total:
        feed(1, [int(d < total and (b + step) % 3 > 0) for b, d in enumerate(done)])
        step += 1
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert not np.asarray(cache.k)[:, :, :, total:].any()  # idle tokens wrote nothing
    assert np.asarray(cache.v)[:, :, :, :total].all()


def lora_loss(graph, base, ids, segments, positions):
    def loss(lora, key):
        model = nnx.merge(graph, lora, base)
        return (model.hidden(ids, segments, positions, key=key) ** 2).mean()

    return loss


@pytest.mark.parametrize(
    "policies",
    [("attn", "all"), pytest.param(("dots", "qkv_attn", "attn_offload"), marks=pytest.mark.slow)],
    ids=str,
)
def test_remat_policies_agree(policies):
    """They agree with dropout too: the recomputed masks are those of the forward pass."""
    lora, arrays = Lora(rank=4, alpha=6.0, dropout=0.3), cases.weights(cases.SWIN, lora=True)
    batch, results, sizes = setup.rows(tokens(2, 8)), {}, {}
    for remat in ("none", *policies):
        model = setup.load(setup.config(cases.SWIN, remat=remat), arrays, lora)
        graph, adapters, base = chameleon.split_adapters(model)
        loss = lora_loss(graph, base, *batch)
        results[remat] = jax.device_get(setup.jit(jax.value_and_grad(loss))(adapters, KEY))
        saved = jax.eval_shape(lambda p, loss=loss: jax.vjp(lambda p: loss(p, KEY), p)[1], adapters)
        sizes[remat] = [
            x.shape for x in jax.tree.leaves(saved) if x.shape[:2] == (3, 2) and x.ndim > 3
        ]
    for remat in results:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            results[remat],
            results["none"],
        )
    heads, keys, stream = (3, 2, 8, 8, 8), (3, 2, 4, 8, 8), (3, 2, 8, 64)
    saved = {
        "all": [stream], "attn": [stream, heads], "qkv_attn": [stream, heads, heads, keys, keys]
    }  # fmt: skip
    for remat in saved.keys() & sizes.keys():
        assert sorted(sizes[remat]) == sorted(saved[remat])
        assert len(sizes["none"]) > len(sizes[remat])


def test_dropout_depends_on_its_key_only():
    model, batch = (
        load(cases.BASE, Lora(rank=4, alpha=6.0, dropout=0.5)),
        setup.rows(tokens(2, 8)),
    )
    run = setup.jit(lambda m, key: m.hidden(*batch, key=key))
    first, repeated, other = (np.asarray(run(model, jax.random.key(k))) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, repeated)
    assert np.abs(first - other).max() > 1e-2
    off = load(cases.BASE, Lora(rank=4, alpha=6.0, dropout=0.0))
    np.testing.assert_array_equal(run(model, None), run(off, None))
    assert np.abs(first - run(model, None)).max() > 1e-2


def test_bf16_represents_a_large_residual_stream():
    """A trained 7B reaches 9e4 in the residual stream; fp16 would overflow, bf16 must not."""
    ids, outputs = setup.rows(cases.ids()), {}
    for dtype in ("float32", "bfloat16"):
        arrays = cases.weights(cases.BASE, lora=False)
        arrays["embed_tokens.embedding"] *= 1e4
        arrays["layers.self_attn.o_proj.kernel"] *= 1e4  # layers that matter next to it
        arrays["layers.mlp.down_proj.kernel"] *= 1e4
        model = setup.load(setup.config(cases.BASE, compute_dtype=dtype, param_dtype=dtype), arrays)
        outputs[dtype] = np.asarray(hidden(model, *ids), np.float32)
        assert hidden(model, *ids).dtype == dtype
    assert np.isfinite(outputs["bfloat16"]).all()
    error = outputs["bfloat16"] - outputs["float32"]
    assert error.std() < 0.03 * outputs["float32"].std()  # bf16: 8 bits, 0.4 % per operation


def sizes(config: Model, vocab: Vocab, lora: Lora) -> tuple[int, int]:
    """Compute the numbers of base and adapter parameters by arithmetic."""
    d, f, r = config.hidden_size, config.intermediate_size, lora.rank
    q, kv = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    matrices = [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]
    gains = 2 * d + 4 * config.qk_norm_shards * config.head_dim
    layer = sum(a * b for a, b in matrices) + gains
    adapters = sum(r * (a + b) for a, b in matrices)
    return 2 * vocab.size * d + d + config.num_layers * layer, config.num_layers * adapters


@pytest.mark.parametrize(
    "file, base_count, lora_count",
    [(base_config, 7_013_158_912, 39_976_960), (chameleon_30b, 34_293_522_432, 108_920_832)],
    ids=["7B", "30B"],
)
def test_true_sizes(file, base_count, lora_count):
    config = file.get_config()
    model, vocab = build(Model, config.model), build(Vocab, config.vocab)
    lora = build(Lora, config.lora)
    assert sizes(model, vocab, lora) == (base_count, lora_count)
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=2, tp=4))):
        like = chameleon.abstract_model(model, vocab, lora)
        _, adapters, base = chameleon.split_adapters(like)
        assert chameleon.count_parameters(adapters) == lora_count
        assert chameleon.count_parameters(base) == base_count
        assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
        assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
        ids = jax.ShapeDtypeStruct((8, 2_048), jnp.int32)
        run = lambda m, i: m.logits(m.hidden(i, i, i, key=KEY))  # noqa: E731
        logits = jax.eval_shape(run, like, ids)
        assert (logits.shape, logits.dtype) == ((8, 2_048, 65_536), jnp.float32)


def test_heads_must_split_over_tp():
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=8))):
        with pytest.raises(
            ValueError, match="num_kv_heads is 4, not divisible by config.mesh.tp = 8"
        ):
            chameleon.create_model(setup.config(cases.SWIN), setup.VOCAB, setup.NO_LORA, key=KEY)


def test_large_models_on_cpus_have_no_fp32_copy(monkeypatch):
    """XLA would convert the layers of all iterations at once: at 7B 27 GB for 14 GB of bf16."""
    sizes = dict(hidden_size=256, num_heads=4, num_kv_heads=4, head_dim=64, intermediate_size=512)
    dtypes = dict(param_dtype="bfloat16", compute_dtype="bfloat16")
    model = setup.config(cases.BASE, num_layers=8, **sizes, **dtypes)
    net = chameleon.create_model(model, setup.VOCAB, setup.NO_LORA, key=KEY)
    row = setup.rows(tokens(1, 16))
    program = sharding.jit(lambda net, *row: net.hidden(*row, key=None))
    copy = 2 * sum(x.nbytes for x in jax.tree.leaves(net.layers))
    temporary, states = [], []
    for limit in (sharding.LARGE_BYTES, 0):
        monkeypatch.setattr(sharding, "LARGE_BYTES", limit)
        compiled = program.lower(net, *row).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
        states.append(np.asarray(compiled(net, *row), np.float32))
    assert temporary[1] < copy / 2 < copy <= temporary[0]
    np.testing.assert_array_equal(*states)


def test_ids_are_no_bf16_numbers():
    """In bf16, ids 65,533 to 65,535 would all be 65,536."""
    table = np.arange(65_536 * 2, dtype=np.float32).reshape(65_536, 2) % 251
    embed = layers.Embed(65_536, 2, dtype="bfloat16", key=KEY)
    embed.embedding = nnx.Param(jnp.asarray(table, jnp.bfloat16))
    ids = np.array([[8_195, 65_533, 65_534, 65_535]], np.int32)
    np.testing.assert_array_equal(
        np.asarray(embed(jnp.asarray(ids), "bfloat16"), np.float32), table[ids]
    )
