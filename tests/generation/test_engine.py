"""The engine: prefix reuse, few programs, few slots for guidance, scoring, chat, streaming."""

import dataclasses
import itertools
import signal

import jax
import numpy as np
import pytest
import test_generate as micro
from generate_setup import CODES, DRAWN, MODEL, SAMPLE, VOCAB
from test_generate import adapter, folder, g  # noqa: F401

from medmax_jax.generation import api, decode_loop, engine, model_bundle, sampling_params, scheduler
from medmax_jax.generation import requests as prompt_requests
from medmax_jax.models import vocab as ids

RNG = np.random.default_rng(5)


@pytest.fixture
def long_g(g):  # noqa: F811
    """Return the same weights with a context that fits an image of 64 codes."""
    g.model.config = dataclasses.replace(MODEL, context_length=192)
    yield g
    g.model.config = MODEL


def text_tokens(count):
    return RNG.integers(VOCAB.text_start, VOCAB.size, count).astype(np.int32)


def image_tokens(count=CODES):
    return np.r_[ids.BOI, RNG.integers(4, 20, count), ids.EOI].astype(np.int32)


def make_engine(
    g,  # noqa: F811
    *,
    batch_size=4,
    num_slots=None,
    cache_length=64,
    codes=CODES,
    cache_dtype="model",
):
    sizes = engine.EngineSizes(
        batch_size=batch_size,
        num_slots=num_slots or 3 * batch_size,
        cache_length=cache_length,
        cache_dtype=cache_dtype,
    )
    return engine.make_engine(g.model, VOCAB, g.mesh, sizes, codes=codes)


def make_requests(prompts, sample, mode="text", names=None, codes=CODES, context=64):
    return prompt_requests.make_requests(
        prompts, sample, VOCAB, mode=mode, names=names, codes=codes, context=context
    )


def run(e, requests, sample, mode="text", seed=7):
    settings = sampling_params.resolve(sample, VOCAB, mode=mode, codes=e.codes)
    return scheduler.run_requests(e, requests, settings, seed)


def answers(e, requests, sample, mode="text"):
    tokens = {}
    for outputs in run(e, requests, sample, mode):
        tokens |= {output.index: output.tokens.tolist() for output in outputs if output.done}
    return [tokens[i] for i in range(len(requests))]


def test_ten_questions_on_one_image_prefill_it_once(long_g):
    """The tokens equal those of separate engines; the image is computed once, not ten times."""
    image = np.r_[ids.BOS, image_tokens(64)].astype(np.int32)
    prompts = [np.r_[image, text_tokens(3 + i % 4), ids.SEP].astype(np.int32) for i in range(10)]
    names = [str(i) for i in range(10)]
    alone = []
    for prompt, name in zip(prompts, names, strict=True):
        e = make_engine(long_g, batch_size=1, num_slots=3, cache_length=128, codes=64)
        alone += answers(
            e, make_requests([prompt], DRAWN, names=[name], codes=64, context=192), DRAWN
        )
    e = make_engine(long_g, batch_size=8, num_slots=8, cache_length=128, codes=64)
    assert (
        answers(e, make_requests(prompts, DRAWN, names=names, codes=64, context=192), DRAWN)
        == alone
    )
    assert e.tokens_prefilled == len(image) + sum(len(p) - len(image) - 1 for p in prompts)


def test_second_image_prefills_only_the_end_of_the_first(g):  # noqa: F811
    """The unconditional slot of an image becomes the image-only one; the full one continues."""
    first = np.r_[ids.BOS, text_tokens(6), ids.SEP].astype(np.int32)
    e = make_engine(g, batch_size=4)
    (codes,) = answers(e, make_requests([first], DRAWN, "image"), DRAWN, "image")
    prefilled, text = e.tokens_prefilled, text_tokens(3)
    second = np.r_[first, ids.BOI, codes, ids.EOI, text].astype(np.int32)
    (request,) = make_requests([second], DRAWN, "image")
    plain = micro.Plain(g)
    (answer,) = answers(e, [request], DRAWN, "image")
    assert answer == plain.answer(second, DRAWN, "image", request.sample_seed)
    # full: the last code, EOI and the text; image-only: the last code and EOI; BOS was cached
    assert e.tokens_prefilled - prefilled == (2 + len(text)) + 2
    assert prefilled == len(first)


def test_guidance_waits_for_slots_and_releases_them(g):  # noqa: F811
    """With slots for one image at a time the answers are equal, and all slots are free after."""
    prompts, names = micro.prompts(), list("abcde")
    wide, narrow = (
        make_engine(g, batch_size=4, num_slots=12),
        make_engine(g, batch_size=4, num_slots=6),
    )
    requests = make_requests(prompts, DRAWN, "image", names)
    assert answers(wide, requests, DRAWN, "image") == answers(narrow, requests, DRAWN, "image")
    assert wide.slot_table.free.all() and narrow.slot_table.free.all()
    with pytest.raises(
        prompt_requests.GenerateError, match="5 cache slots for a batch of 4; guidance needs 2 more"
    ):
        answers(
            make_engine(g, batch_size=4, num_slots=5),
            make_requests(prompts, DRAWN, "mixed"),
            DRAWN,
            "mixed",
        )


def test_prompt_without_image_needs_one_guidance_slot(g):  # noqa: F811
    """One image from text runs in an engine of exactly its size."""
    prompt = np.r_[ids.BOS, text_tokens(6), ids.SEP].astype(np.int32)
    ((_, expected),) = api.generate_tokens(
        g, [prompt], DRAWN, mode="image", seed=0, names=None, batch_size=1
    )
    (request,) = make_requests([prompt], DRAWN, "image")
    exact = answers(make_engine(g, batch_size=1, num_slots=3), [request], DRAWN, "image")
    assert [len(tokens) for tokens in expected] == [len(tokens) for tokens in exact]


def test_text_runs_no_guidance_slots(g):  # noqa: F811
    """While no image is generated, as many slots run as there are rows."""
    e = make_engine(g, batch_size=4, num_slots=12)
    answers(e, make_requests(micro.prompts(), SAMPLE, "mixed"), SAMPLE, "mixed")
    runs = [p for p in e.programs if p[0] == "decode_chunk"]
    assert {width for _, _, width, _, draws in runs if draws == "text"} == {4}


@pytest.mark.slow
def test_guidance_scales_that_need_no_streams(g):  # noqa: F811
    """Scales 1 and 1 are the full stream alone; s and s need no image-only stream."""
    prompts = micro.prompts()
    for scale, streams in ((1.0, 0), (2.0, 1)):  # streams in addition to the full one
        sample = dataclasses.replace(
            DRAWN, guidance_scale_text=scale, guidance_scale_image=scale, image_greedy=True
        )
        requests = make_requests(prompts, sample, "image")
        e = make_engine(g, batch_size=4, num_slots=4 * (1 + streams))
        plain = micro.Plain(g)
        expected = [plain.answer(p, sample, "image", 0) for p in prompts]
        assert answers(e, requests, sample, "image") == expected


def test_programs_are_few_and_counted(g):  # noqa: F811
    """The programs that the engine lists are those compiled; a second run compiles nothing."""
    jitted = (
        decode_loop.prefill.default,
        decode_loop.copy_slots,
        decode_loop.set_seen_tokens,
        decode_loop.decode_chunk.default,
        decode_loop.score_tokens.default,
    )
    size = lambda: sum(f._cache_size() for f in jitted)  # noqa: E731
    before = size()
    e, names = (
        make_engine(g, batch_size=3, num_slots=9),
        [str(i) for i in range(12)],
    )  # sizes of no other test
    first = answers(e, make_requests(micro.prompts(12), DRAWN, "mixed", names), DRAWN, "mixed")
    assert size() - before == len(e.programs) <= 10
    repeated = answers(e, make_requests(micro.prompts(12), DRAWN, "mixed", names), DRAWN, "mixed")
    hotter = dataclasses.replace(DRAWN, text_temperature=1.7)
    answers(e, make_requests(micro.prompts(9)[::-1], hotter, "mixed"), hotter, "mixed")
    assert repeated == first
    assert size() - before == len(e.programs) <= 12


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["text", "mixed"])
def test_int8_cache_changes_little(g, mode):  # noqa: F811
    """Greedy answers agree with those of the exact cache up to a choice that was close."""
    sample = dataclasses.replace(SAMPLE, image_greedy=True)
    prompts, plain = micro.prompts(), micro.Plain(g)
    requests = make_requests(prompts, sample, mode, list("abcde"))
    exact = answers(make_engine(g), requests, sample, mode)
    int8 = answers(make_engine(g, cache_dtype="int8"), requests, sample, mode)
    agreed = 0
    for prompt, tokens, other in zip(prompts, exact, int8, strict=True):
        same = len(
            list(itertools.takewhile(lambda p: p[0] == p[1], zip(tokens, other, strict=False)))
        )
        agreed += same
        if same < min(len(tokens), len(other)) and mode == "text":
            scores = plain.logits([*prompt, *tokens[:same]])
            assert abs(scores[tokens[same]] - scores[other[same]]) < 0.3
    assert agreed > sum(map(len, exact)) / 2


@pytest.mark.parametrize(
    "sample", [pytest.param(SAMPLE, marks=pytest.mark.slow), DRAWN], ids=["greedy", "sampled"]
)
def test_segment_budget_and_boi_as_end_equal_the_plain_loop(g, sample):  # noqa: F811
    """As in the releases: the budget starts again after each image, or BOI ends an answer."""
    names, prompts = list("abcdefgh"), micro.prompts(8)
    for change in (dict(budget="segment", max_gen_len=3), dict(boi_ends=True)):
        changed = dataclasses.replace(sample, **change)
        requests = make_requests(prompts, changed, "mixed", names)
        plain = micro.Plain(g)
        expected = [plain.answer(r.tokens, changed, "mixed", r.sample_seed) for r in requests]
        assert answers(make_engine(g), requests, changed, "mixed") == expected
        if "boi_ends" in change and sample is DRAWN:
            assert any(a[-1] == ids.BOI for a in expected)


def test_likelihoods_equal_those_of_the_full_forward_pass(g):  # noqa: F811
    prompts = [
        np.r_[ids.BOS, image_tokens(), text_tokens(4), ids.SEP].astype(np.int32) for _ in range(5)
    ]
    options = [[text_tokens(n) for n in (1, 3, 2)[: 1 + i % 3]] for i in range(5)]
    e, plain = make_engine(g, batch_size=2, num_slots=2), micro.Plain(g)
    scores = engine.score_options(e, prompts, options)
    for prompt, of_prompt, scored in zip(prompts, options, scores, strict=True):
        for option, (likelihoods, best) in zip(of_prompt, scored, strict=True):
            tokens = prompt.tolist()
            for token, value, is_best in zip(option.tolist(), likelihoods, best, strict=True):
                logits = plain.logits(tokens).astype(np.float64)
                expected = logits[token] - np.logaddexp.reduce(logits)
                assert abs(value - expected) < 1e-4 and is_best == (logits.argmax() == token)
                tokens.append(token)
    assert e.tokens_prefilled == sum(len(p) - 1 for p in prompts)  # without the options
    assert e.slot_table.free.all()


def test_scores_of_text_options(g):  # noqa: F811
    (scores,) = api.score(g, [["Is it a CT?"]], [["yes", "no, it is not"]])
    assert all(s.total < 0 and s.mean == s.total / s.tokens for s in scores)
    assert scores[1].tokens > scores[0].tokens
    assert all(len(s.by_token) == s.tokens for s in scores)
    assert [sum(s.by_token) for s in scores] == pytest.approx([s.total for s in scores], abs=1e-4)
    assert api.score(g, [], []) == []
    with pytest.raises(
        prompt_requests.GenerateError, match="prompt 0 has no options, or an empty one"
    ):
        api.score(g, [["a"]], [["yes", ""]])
    with pytest.raises(ValueError, match="the text of a prompt contains <image>"):
        api.score(g, [["a"]], [["yes", "<image>"]])
    with pytest.raises(
        prompt_requests.GenerateError, match="options of prompt 0 are 'yes'; pass a list"
    ):
        api.score(g, [["a"]], ["yes"])
    with pytest.raises(prompt_requests.GenerateError, match="1 prompts but 2 lists of options"):
        api.score(g, [["a"]], [["yes"], ["no"]])
    with pytest.raises(prompt_requests.GenerateError, match=r"batch_size \(--rows\) is 0"):
        api.score(g, [["a"]], [["yes"]], batch_size=0)
    with pytest.raises(
        prompt_requests.GenerateError, match="context of the model has 64; shorten them"
    ):
        api.score(g, [["a"]], [["word " * 64]])


def test_chat_prefills_each_turn_once(g):  # noqa: F811
    """The second turn equals one long prompt; only its own text is computed."""
    sample = dataclasses.replace(SAMPLE, max_gen_len=4)
    chat = api.Chat(g, sample, mode="text", seed=0)
    chat.send([np.array([1, 2, 3, 4]), "Is it?"])
    before, prefilled = chat.tokens, chat.engine.tokens_prefilled
    second = chat.send(["Is it a CT?"])
    question = g.tokenizer.encode("Is it a CT?")
    prompt = np.r_[before, question, ids.SEP].astype(np.int32)
    assert (chat.tokens[: len(prompt)] == prompt).all() and chat.tokens[-1] == ids.SEP
    (alone,) = micro.generate(g, [prompt], sample, "text", names=None)
    assert model_bundle.decode_segments(g, [np.array(alone)])[0][0].text == second[0].text
    computed = chat.engine.tokens_prefilled - prefilled
    assert len(question) <= computed <= len(question) + 2  # EOS or the last token, and SEP
    with pytest.raises(
        prompt_requests.GenerateError, match="context of the model has 64; shorten the prompt"
    ):
        chat.send(["word " * 60])
    with pytest.raises(ValueError, match="mode is 'film'"):
        api.Chat(g, sample, mode="film", seed=0)


def test_engine_too_small_for_a_prompt_raises(g):  # noqa: F811
    e, sample = (
        make_engine(g, batch_size=1, cache_length=16),
        dataclasses.replace(SAMPLE, max_gen_len=2),
    )
    with pytest.raises(prompt_requests.GenerateError, match="slot holds 16; increase cache_length"):
        answers(e, make_requests([np.r_[ids.BOS, text_tokens(16)]], sample), sample)
    for change, message in (
        (dict(batch_size=0), r"batch_size \(--rows\) is 0"),
        (dict(batch_size=1, cache_length=65), "context of the model has 64"),
    ):
        with pytest.raises(prompt_requests.GenerateError, match=message):
            make_engine(g, **change)
    (short,) = make_requests([np.r_[ids.BOS, text_tokens(4)]], sample)
    assert answers(e, [short], sample)


@pytest.mark.parametrize("mode", ["text", pytest.param("mixed", marks=pytest.mark.slow)])
def test_streamed_chunks_add_up_to_the_answers(g, mode):  # noqa: F811
    def content(part):
        return part.text if isinstance(part, model_bundle.Text) else part.codes.tolist()

    prompts = [["Is it a CT?"], ["Draw."], ["chest"]]
    expected = api.generate(g, prompts, DRAWN, mode=mode, seed=3)
    streamed, ended = [[] for _ in prompts], set()
    for index, part in api.stream_chunks(g, prompts, DRAWN, mode=mode, seed=3):
        assert index not in ended
        segments = streamed[index]
        if part is None:
            ended.add(index)
        elif isinstance(part, model_bundle.Text) and segments and isinstance(segments[-1], str):
            segments[-1] += part.text
        else:
            segments.append(content(part))
    assert streamed == [
        [content(part) for part in answer if content(part) != ""] for answer in expected
    ]
    assert ended == {0, 1, 2}


@pytest.mark.slow
def test_closing_the_iterator_releases_all_slots(g):  # noqa: F811
    e = make_engine(g, batch_size=2, num_slots=6)
    long = dataclasses.replace(DRAWN, max_gen_len=60)
    outputs = run(e, make_requests(micro.prompts(), long, "mixed"), long, "mixed", seed=0)
    next(outputs)
    outputs.close()
    assert e.slot_table.free.all()


def test_error_while_scoring_releases_all_slots(g):  # noqa: F811
    """An option of no tokens fails after the prompts are in their slots; a long prompt before."""
    e, short, option = (
        make_engine(g, batch_size=2, num_slots=2, cache_length=32),
        np.r_[ids.BOS, text_tokens(8)],
        text_tokens(3),
    )
    long = np.r_[ids.BOS, text_tokens(40)]
    before = engine.score_options(e, [short], [[option]])

    class Interrupted(list):
        """Options that press Ctrl-C when the engine reads them."""

        def __getitem__(self, index):
            if e.busy:
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

    for prompts, options, error in (
        ([short, text_tokens(8)], [[option], [text_tokens(0)]], ValueError),
        ([short, long], [[option], [option]], ValueError),
        ([short, text_tokens(8)], [[option], Interrupted([option])], KeyboardInterrupt),
    ):
        with pytest.raises(error):
            engine.score_options(e, prompts, options)
        assert e.slot_table.free.all() and e.cache is None
        repeated = engine.score_options(e, [short], [[option]])
        np.testing.assert_array_equal(repeated[0][0], before[0][0])
        assert e.slot_table.free.all()


def test_engine_refuses_a_second_user(g):  # noqa: F811
    """A chat whose last answer is still open refuses the next turn until it is closed."""
    chat = api.Chat(g, dataclasses.replace(SAMPLE, max_gen_len=30), mode="text", seed=0)
    unfinished = chat.stream_chunks(["Is it?"])
    next(unfinished)
    for call in (
        lambda: chat.send(["Is it a CT?"]),
        lambda: engine.score_options(chat.engine, [chat.tokens], [[text_tokens(2)]]),
    ):
        with pytest.raises(
            prompt_requests.GenerateError, match="is generating other answers; finish"
        ):
            call()
    unfinished.close()
    assert isinstance(chat.send(["Is it a CT?"])[0], model_bundle.Text)


@pytest.mark.slow
def test_merged_adapter_gives_equal_answers(g, folder, adapter):  # noqa: F811
    separate = model_bundle.load(folder, adapter=adapter)
    merged = model_bundle.load(folder, adapter=adapter, merge=True)
    assert len(jax.tree.leaves(merged.model)) == len(jax.tree.leaves(g.model))
    tokens, names = micro.prompts(), list("abcde")
    expected = micro.generate(separate, tokens, SAMPLE, "text", names=names)
    assert micro.generate(merged, tokens, SAMPLE, "text", names=names) == expected


@pytest.mark.slow
def test_load_in_bf16(folder):  # noqa: F811
    half = model_bundle.load(folder, dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(half.model)} == {"bfloat16"}
    (answer,) = api.generate(half, [["Is it?"]], SAMPLE, mode="text", seed=0)
    assert isinstance(answer[0], model_bundle.Text)
    with pytest.raises(prompt_requests.GenerateError, match="dtype is 'float16'"):
        model_bundle.load(folder, dtype="float16")


def test_settings_of_the_released_programs():
    meta, medmax = api.defaults("meta"), api.defaults("medmax")
    assert (meta.text_temperature, medmax.text_temperature) == (0.7, 1.0)
    assert meta.boi_ends and not medmax.boi_ends and medmax.budget == "segment"
    with pytest.raises(prompt_requests.GenerateError, match="use one of meta, medmax, medmax_eval"):
        api.defaults("anole")
