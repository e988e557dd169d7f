"""Speculative Jacobi decoding: the distribution of the draws, and the loop against one code."""

import dataclasses
import functools
import itertools

import generate_setup as setup
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import test_generate as micro
from test_engine import answers, make_engine, make_requests, text_tokens
from test_generate import folder, g  # noqa: F401

from medmax_jax.checkpoints import safetensors_file
from medmax_jax.config import Mesh, Vocab
from medmax_jax.generation import decode_loop, jacobi, model_bundle, sampling_params, scheduler
from medmax_jax.generation.requests import GenerateError
from medmax_jax.models import chameleon, guidance_streams, kv_cache
from medmax_jax.models import vocab as ids
from medmax_jax.sharding import make_mesh

SLOW = pytest.mark.slow
PASSES, FAILS = 1e-3, 1e-6  # bounds of the chi-square test's p-value
KINDS, CODES, DRAWS = 4, 4, 100_000
ALL = list(itertools.product(range(KINDS), repeat=CODES))  # images


def p_value(images, expected):
    """Return the chi-square test of [N, CODES] images against the probability of each of ALL."""
    counts = np.bincount(np.ravel_multi_index(images.T, (KINDS,) * CODES), minlength=len(ALL))
    expected = expected * len(images)
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    return scipy.stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue


def joint(table):
    """Return the probability of each image; table: prefix -> probabilities of the next code."""
    chances = np.array([np.prod([table[x[:i]][x[i]] for i in range(CODES)]) for x in ALL])
    return chances / chances.sum()


# ---- The rules, on distributions that are drawn at random ----


@functools.cache
def random_table():
    rng = np.random.default_rng(0)
    prefixes = [x for n in range(CODES) for x in itertools.product(range(KINDS), repeat=n)]
    return {x: rng.dirichlet(np.full(KINDS, 0.4)) for x in prefixes}


def simulate(config, *, seed=0):
    """Return DRAWS images of the rule in which the model is the table, and the passes of each."""
    table, powers = np.zeros((CODES, KINDS**CODES, KINDS), np.float32), KINDS ** np.arange(CODES)
    for x, chances in random_table().items():
        table[len(x), int(np.dot(x, powers[: len(x)]))] = chances
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(DRAWS))

    def one_pass(state):
        drafts, settled, steps = state
        noise = jacobi.draw_noise(config, keys, settled, steps, kinds=KINDS)
        filled = jacobi.fill(config, drafts, settled, noise, kinds=KINDS)
        places = jnp.minimum(settled[:, None] + jnp.arange(config.window), CODES - 1)
        before = jnp.arange(CODES) < places[..., None]
        prefix = (filled.codes[:, None, :CODES] * powers * before).sum(-1)
        logits, limit = jnp.log(jnp.asarray(table)[places, prefix]), jnp.maximum(CODES - settled, 1)
        _, accepted, new = jacobi.verify(config, filled, settled, logits, noise, limit)
        active = settled < CODES
        keep = lambda a, b: jnp.where(active.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
        return jax.tree.map(keep, new, drafts), settled + accepted * active, steps + active

    zeros = jnp.zeros(DRAWS, jnp.int32)
    drafts = jacobi.empty_drafts(config, DRAWS, codes=CODES, kinds=KINDS)
    run = jax.jit(lambda s: jax.lax.while_loop(lambda s: (s[1] < CODES).any(), one_pass, s))
    drafts, _, steps = run((drafts, zeros, zeros))
    return np.asarray(drafts.codes[:, :CODES]), np.asarray(steps)


def config_of(rule="speculative", init="vertical", window=3):
    return jacobi.JacobiConfig(window=window, rule=rule, init=init)


@pytest.mark.parametrize(
    "config",
    [config_of(init=init) for init in jacobi.INITS]
    + [pytest.param(config_of("gumbel"), marks=SLOW)]
    + [pytest.param(config_of(window=w, init=i), marks=SLOW) for w in (2, 4) for i in jacobi.INITS],
    ids=str,
)
def test_draws_have_the_joint_distribution(config):
    images, steps = simulate(config)
    assert p_value(images, joint(random_table())) > PASSES
    assert steps.mean() < 0.85 * CODES


def redraw_without_residual(drafts, q, p, uniform):
    kept = jacobi_speculative(drafts, q, p, uniform) == drafts
    noise = -jnp.log(-jnp.log(uniform[..., 1:]))
    return jnp.where(kept, drafts, jnp.argmax(noise + jnp.log(p), axis=-1))


def verify_with_stale_q(config, drafts, *args):
    draws, accepted, new = jacobi_verify(config, drafts, *args)
    return draws, accepted, new._replace(q=drafts.q)


jacobi_speculative, jacobi_verify = jacobi.speculative_draws, jacobi.verify


@pytest.mark.parametrize(
    "name, mutation",
    [("speculative_draws", redraw_without_residual), ("verify", verify_with_stale_q)],
)
def test_mutations_of_the_rule_change_the_distribution(monkeypatch, name, mutation):
    monkeypatch.setattr(jacobi, name, mutation)
    assert p_value(simulate(config_of())[0], joint(random_table())) < FAILS


@pytest.mark.parametrize(
    "init, guesses",
    [
        ("repeat", [4, 4, 4, 4, 4]),  # the last settled code
        ("horizontal", [5, 5, 5, 2, 2]),  # the last draft; in the next row the code above
        ("vertical", [5, 0, 1, 2, 3]),
        ("random", [-1, -1, -1, -1, -1]),
    ],
)
def test_places_that_guesses_are_copied_from(init, guesses):
    """Of an image of 4 x 4 codes 0 to 4 are settled and 5 is a draft; the others are copied."""
    config = config_of(init=init, window=6)
    source = jacobi._source(config, jnp.arange(5, 11)[None], jnp.array([[5]]), jnp.array([[5]]), 16)
    expected = {"horizontal": [5, 5, 4, 4, 4], "vertical": [2, 3, 4, 5, 2]}.get(init, guesses)
    assert source[0, 1:].tolist() == expected


# ---- The compiled loop ----

VOCAB = Vocab(size=setup.VOCAB.size, image_codes=KINDS, text_start=setup.VOCAB.text_start)
MODEL = dataclasses.replace(setup.MODEL, num_layers=1, context_length=32)
ROWS = 12_500  # at a time
PROMPT = np.r_[
    [ids.BOS, ids.BOI], 4 + np.arange(CODES) % KINDS, [ids.EOI, VOCAB.text_start + 7, ids.SEP]
].astype(np.int32)


STREAMS = [
    guidance_streams.guidance_stream(PROMPT, len(PROMPT), stream, VOCAB) for stream in range(3)
]
SAMPLED = dataclasses.replace(
    setup.SAMPLE, image_temperature=1.5, image_top_p=0.95, guidance_scale_text=2.0
)
UNGUIDED = dict(guidance_scale_text=1.0, guidance_scale_image=1.0)
PLAIN = dict(image_temperature=1.0, image_top_p=1.0)


@pytest.fixture(scope="module")
def strong():
    """Return a model of 4 codes whose distributions depend much on the codes before."""
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        like = chameleon.abstract_model(MODEL, VOCAB, chameleon.NO_LORA)
        weights = setup.noise(like, std=0.4)

        def put(path, leaf):
            return jax.device_put(weights[safetensors_file.dotted_name(path)], leaf.sharding)

        yield jax.tree_util.tree_map_with_path(put, like)


def loop_images(model, sample):
    """Return DRAWS images of the compiled loop."""
    settings = sampling_params.resolve(sample, VOCAB, mode="image", codes=CODES)
    tokens, places = np.zeros((3, 16), np.int32), np.full((3, 16), -1, np.int32)
    for tokens_of, places_of, stream in zip(tokens, places, STREAMS, strict=True):
        tokens_of[: len(stream)], places_of[: len(stream)] = stream, np.arange(len(stream))
    cache = kv_cache.init_cache(MODEL, num_slots=3, cache_length=32, cache_dtype="model")
    slots = np.arange(3, dtype=np.int32)
    cache = decode_loop.prefill(model, None, cache, tokens, places, slots, span=32)
    every = lambda x: jax.device_put(np.tile(np.asarray(x), (1, ROWS, 1, 1, 1)), x.sharding)  # noqa: E731
    params = jax.tree.map(lambda x: np.full(ROWS, x), settings.params)
    images = []
    for batch in range(DRAWS // ROWS):
        rows = decode_loop.empty_rows(ROWS)
        rows = rows._replace(
            token=np.full(ROWS, ids.BOI, np.int32),
            slots=np.arange(3 * ROWS, dtype=np.int32).reshape(ROWS, 3),
            positions=np.tile(np.array([len(s) for s in STREAMS], np.int32), (ROWS, 1)),
            image_tokens_left=np.full(ROWS, CODES + 1, np.int32),
            sample_seed=np.arange(batch * ROWS, (batch + 1) * ROWS, dtype=np.int32),
            done=np.zeros(ROWS, bool),
        )
        *_, out = decode_loop.decode_chunk(
            model, None, jax.tree.map(every, cache), rows,
            jnp.zeros((ROWS, VOCAB.size), bool), decode_loop.empty_drafts(ROWS, settings.config),
            params, config=settings.config, width=3 * ROWS, span=32, draws="codes",
        )  # fmt: skip
        images.append(np.asarray(out)[:, :CODES] - ids.IMAGE_START)
    return np.concatenate(images)


def ancestral(model, sample):
    """Return the probability of each of ALL by definition: complete sequences, in numpy."""
    prefixes = [x for n in range(CODES) for x in itertools.product(range(KINDS), repeat=n)]
    sequences = [
        [*stream, ids.BOI, *(ids.IMAGE_START + np.array(x, int))]
        for stream in STREAMS
        for x in prefixes
    ]
    tokens, real = (
        np.zeros((len(sequences), 32), np.int32),
        np.zeros((len(sequences), 32), np.int32),
    )
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)], real[row, : len(sequence)] = sequence, 1
    positions = np.tile(np.arange(32), (len(tokens), 1))
    forward = jax.jit(lambda m, *inputs: m.logits(m.hidden(*inputs, key=None)))
    logits = forward(model, tokens, real, positions)
    last = np.asarray(logits, np.float64)[np.arange(len(tokens)), real.sum(1) - 1]
    full, none, image = last[:, 4 : 4 + KINDS].reshape(3, len(prefixes), KINDS)
    scores = none + sample.guidance_scale_image * (image - none)
    scores = (scores + sample.guidance_scale_text * (full - image)) / sample.image_temperature
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    order = np.argsort(-chances, axis=1)
    sorted_ = np.take_along_axis(chances, order, 1)
    dropped = np.cumsum(sorted_, 1) - sorted_ >= sample.image_top_p
    np.put_along_axis(chances, order, np.where(dropped, 0, sorted_), 1)
    return joint(dict(zip(prefixes, chances / chances.sum(1, keepdims=True), strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "window, init, changes",
    [
        *[(3, init, {}) for init in jacobi.INITS],
        *[(3, init, UNGUIDED | PLAIN) for init in jacobi.INITS],
        (4, "vertical", UNGUIDED),
        (2, "random", PLAIN),
    ],
)
def test_loop_samples_the_joint_distribution(strong, window, init, changes):
    """All streams verify together: the distribution is that of the guided logits."""
    sample = dataclasses.replace(
        SAMPLED, jacobi_window=window, jacobi_rule="speculative", jacobi_init=init, **changes
    )
    assert p_value(loop_images(strong, sample), ancestral(strong, sample)) > PASSES


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mutation",
    [("speculative_draws", redraw_without_residual), ("verify", verify_with_stale_q)],
)
def test_mutations_change_what_the_loop_samples(strong, monkeypatch, name, mutation):
    monkeypatch.setattr(jacobi, name, mutation)
    jax.clear_caches()
    sample = dataclasses.replace(SAMPLED, jacobi_window=3, jacobi_rule="speculative")
    assert p_value(loop_images(strong, sample), ancestral(strong, sample)) < FAILS
    jax.clear_caches()


def with_window(sample, window=3, rule="gumbel", **changes):
    return dataclasses.replace(sample, jacobi_window=window, jacobi_rule=rule, **changes)


GREEDY = dataclasses.replace(setup.SAMPLE, image_greedy=True)


@pytest.mark.parametrize(
    "mode, sample, changes, cache",
    [
        ("image", setup.DRAWN, {}, "model"),
        ("mixed", setup.DRAWN, {}, "model"),
        pytest.param("image", GREEDY, dict(rule="speculative"), "model", marks=SLOW),
        pytest.param("image", GREEDY, dict(window=4), "model", marks=SLOW),
        pytest.param("mixed", GREEDY, dict(rule="speculative"), "model", marks=SLOW),
        pytest.param("mixed", setup.DRAWN, dict(window=2), "int8", marks=SLOW),
        pytest.param("mixed", setup.DRAWN, dict(budget="segment"), "model", marks=SLOW),
    ],
)
def test_tokens_equal_those_of_one_code_per_pass(g, mode, sample, changes, cache):  # noqa: F811
    """With continuous batching, guidance that waits for slots, text and images in one batch."""
    names, prompts = list("abcdefgh"), micro.prompts(8)
    requests = make_requests(prompts, sample, mode, names)
    run = lambda sample: answers(  # noqa: E731
        make_engine(g, batch_size=3, num_slots=7, cache_dtype=cache), requests, sample, mode
    )
    assert run(with_window(sample, **changes)) == run(
        dataclasses.replace(sample, budget=changes.get("budget", sample.budget))
    )


def test_long_images_take_fewer_passes(g):  # noqa: F811
    """64 codes and a window that does not divide them; prefixes are recorded as with one code."""
    g.model.config = dataclasses.replace(setup.MODEL, context_length=192)
    try:
        first = np.r_[ids.BOS, text_tokens(6), ids.SEP].astype(np.int32)
        ends = []
        for window in (0, 10):
            sample = with_window(setup.DRAWN, window)
            e = make_engine(g, batch_size=2, cache_length=192, codes=64)
            ask = lambda prompt: make_requests([prompt], sample, "image", ["a"], 64, 192)  # noqa: B023, E731
            (codes,) = answers(e, ask(first), sample, "image")
            second = np.r_[first, ids.BOI, codes, ids.EOI, 8_800, ids.SEP].astype(np.int32)
            settings = sampling_params.resolve(sample, setup.VOCAB, mode="image", codes=64)
            (*_, [last]) = scheduler.run_requests(e, ask(second), settings, 7)
            ends.append((codes, last.tokens.tolist(), e.tokens_prefilled, last.steps))
        assert ends[0][:3] == ends[1][:3]
        assert ends[0][3] == 64 > ends[1][3] + 5
    finally:
        g.model.config = setup.MODEL


@pytest.mark.parametrize("mode", ["image", pytest.param("mixed", marks=SLOW)])
def test_speculative_draws_depend_on_the_sample_alone(g, folder, mode):  # noqa: F811
    """Not on the batch, the order, or the mesh."""
    prompts, names = micro.prompts(), list("abcde")
    sample = with_window(setup.DRAWN, rule="speculative", max_gen_len=4)
    expected = micro.generate(g, prompts, sample, mode, names=names)
    reverse = micro.generate(g, prompts[::-1], sample, mode, names=names[::-1], batch_size=2)
    sharded = model_bundle.load(folder, mesh=make_mesh(Mesh(data=1, fsdp=2, tp=2)))
    assert expected == reverse[::-1] == micro.generate(sharded, prompts, sample, mode, names=names)
    assert micro.generate(g, prompts, sample, mode, names=list("fghij")) != expected


def test_text_runs_the_program_of_one_token(g):  # noqa: F811
    """A window compiles one program for each size; while no image is open, none."""
    e = make_engine(g, batch_size=4, num_slots=12)
    sample = with_window(setup.SAMPLE)
    answers(e, make_requests(micro.prompts(), sample, "mixed"), sample, "mixed")
    runs = {(p[1].jacobi, p[-1]) for p in e.programs if p[0] == "decode_chunk"}
    assert runs <= {(None, "text"), (config_of("gumbel"), "both")} and (None, "text") in runs


def test_invalid_options_name_the_field(g):  # noqa: F811
    resolve = functools.partial(sampling_params.resolve, vocab=VOCAB, mode="image", codes=CODES)
    for changes, message in [
        (dict(jacobi_window=5), "jacobi_window is 5; it must be at most the 4 codes of an image"),
        (dict(jacobi_window=1), "jacobi_window is 1; it must be 0 or at least 2"),
        (dict(jacobi_window=-2), "jacobi_window is -2; it must be 0 or at least 2"),
        (dict(jacobi_rule="exact"), "jacobi_rule is 'exact'; it must be speculative or gumbel"),
        (dict(jacobi_init="left"), "jacobi_init is 'left'; it must be repeat or horizontal or"),
    ]:
        with pytest.raises(GenerateError, match=f"sample.{message}"):
            resolve(dataclasses.replace(setup.SAMPLE, **changes))
