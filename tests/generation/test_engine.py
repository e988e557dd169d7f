"""The engine: nothing is read twice, few programs, guidance in few lanes, scoring, chat, pieces."""

import dataclasses
import itertools
import signal

import jax
import numpy as np
import pytest
import test_generate as micro
from generate_setup import CODES, DRAWN, MODEL, SAMPLE, VOCAB
from test_generate import adapter, folder, g  # noqa: F401

from medmax_jax.generation import api, decode_loop, engine, model_bundle, scheduler
from medmax_jax.generation import requests as prompt_requests
from medmax_jax.models import vocab as ids

RNG = np.random.default_rng(5)


@pytest.fixture
def long_g(g):  # noqa: F811
    """The same weights with room for an image of 64 codes: positions are all that a context is."""
    g.model.config = dataclasses.replace(MODEL, context_length=192)
    yield g
    g.model.config = MODEL


def words(count):
    return RNG.integers(VOCAB.text_start, VOCAB.size, count).astype(np.int32)


def image(count=CODES):
    return np.r_[ids.BOI, RNG.integers(4, 20, count), ids.EOI].astype(np.int32)


def made(g, *, rows=4, lanes=None, slots=64, codes=CODES, kind="model"):  # noqa: F811
    lanes = lanes or 3 * rows
    fixed = dict(codes=codes, rows=rows, lanes=lanes, slots=slots, kind=kind)
    return engine.make_engine(g.model, VOCAB, g.mesh, **fixed)


def asked(prompts, sample, mode="text", names=None, codes=CODES, context=64):
    return prompt_requests.make_requests(
        prompts, sample, VOCAB, mode=mode, names=names, codes=codes, context=context
    )


def answers(e, requests, sample, mode="text"):
    found = {}
    for news in scheduler.run_requests(e, requests, sample, mode=mode, seed=7):
        found |= {each.index: each.tokens.tolist() for each in news if each.done}
    return [found[i] for i in range(len(requests))]


def test_ten_questions_on_one_image_read_it_once(long_g):
    """Same tokens as one by one; the model reads the picture once instead of ten times."""
    shown = np.r_[ids.BOS, image(64)].astype(np.int32)
    prompts = [np.r_[shown, words(3 + i % 4), ids.SEP].astype(np.int32) for i in range(10)]
    names = [str(i) for i in range(10)]
    fixed = dict(codes=64, context=192)
    alone = []
    for prompt, name in zip(prompts, names, strict=True):
        e = made(long_g, rows=1, lanes=3, slots=128, codes=64)
        alone += answers(e, asked([prompt], DRAWN, names=[name], **fixed), DRAWN)
    e = made(long_g, rows=8, lanes=8, slots=128, codes=64)
    assert answers(e, asked(prompts, DRAWN, names=names, **fixed), DRAWN) == alone
    assert e.tokens_prefilled == len(shown) + sum(len(p) - len(shown) - 1 for p in prompts)


def test_a_second_image_reads_only_what_closed_the_first(g):  # noqa: F811
    """The unconditional lane of an image becomes the image-only one; the full one goes on."""
    first = np.r_[ids.BOS, words(6), ids.SEP].astype(np.int32)
    e = made(g, rows=4)
    (codes,) = answers(e, asked([first], DRAWN, "image"), DRAWN, "image")
    read, more = e.tokens_prefilled, words(3)
    second = np.r_[first, ids.BOI, codes, ids.EOI, more].astype(np.int32)
    (request,) = asked([second], DRAWN, "image")
    plain = micro.Plain(g)
    (found,) = answers(e, [request], DRAWN, "image")
    assert found == plain.answer(second, DRAWN, "image", request.number)
    # full: the last code, EOI and the words; image-only: the last code and EOI; BOS was there
    assert e.tokens_prefilled - read == (2 + len(more)) + 2
    assert read == len(first)


def test_guidance_waits_for_lanes_and_gives_them_back(g):  # noqa: F811
    """With lanes for one image at a time: the same answers, no lane left behind."""
    prompts, names = micro.prompts(), list("abcde")
    wide, narrow = made(g, rows=4, lanes=12), made(g, rows=4, lanes=6)
    requests = asked(prompts, DRAWN, "image", names)
    assert answers(wide, requests, DRAWN, "image") == answers(narrow, requests, DRAWN, "image")
    assert wide.slot_table.free.all() and narrow.slot_table.free.all()
    with pytest.raises(
        prompt_requests.GenerateError, match="1 lanes beside 4 rows; guidance needs 2"
    ):
        answers(made(g, rows=4, lanes=5), asked(prompts, DRAWN, "mixed"), DRAWN, "mixed")


def test_one_prompt_without_an_image_needs_one_lane_of_guidance(g):  # noqa: F811
    """What the command line asks for one picture of words: an engine of exactly its size."""
    prompt = np.r_[ids.BOS, words(6), ids.SEP].astype(np.int32)
    ((_, found),) = api.generate_tokens(
        g, [prompt], DRAWN, mode="image", seed=0, names=None, rows=1
    )
    (request,) = asked([prompt], DRAWN, "image")
    made_alone = answers(made(g, rows=1, lanes=3), [request], DRAWN, "image")
    assert [len(tokens) for tokens in found] == [len(tokens) for tokens in made_alone]


def test_text_runs_no_lane_of_guidance(g):  # noqa: F811
    """While nobody writes an image, as many lanes run as there are rows."""
    e = made(g, rows=4, lanes=12)
    answers(e, asked(micro.prompts(), SAMPLE, "mixed"), SAMPLE, "mixed")
    runs = [p for p in e.programs if p[0] == "run"]
    assert {width for _, _, width, _, draws in runs if draws == "text"} == {4}


@pytest.mark.slow
def test_guidance_scales_that_need_no_streams(g):  # noqa: F811
    """Scales 1 and 1 are the full stream alone; s and s need no image-only stream."""
    prompts = micro.prompts()
    for text, pictures, most in ((1.0, 1.0, 0), (2.0, 2.0, 1)):  # most: lanes beside the row's
        sample = dataclasses.replace(
            DRAWN, guidance_scale_text=text, guidance_scale_image=pictures, image_greedy=True
        )
        requests = asked(prompts, sample, "image")
        e = made(g, rows=4, lanes=4 * (1 + most))
        found = answers(e, requests, sample, "image")
        plain = micro.Plain(g)
        expected = [plain.answer(p, sample, "image", 0) for p in prompts]
        assert found == expected


def test_programs_are_few_and_counted(g):  # noqa: F811
    """What the engine says it asked for is what was compiled; a second suite compiles nothing."""
    jitted = (
        decode_loop.prefill,
        decode_loop.copy_slots,
        decode_loop.set_seen_tokens,
        decode_loop.decode_chunk,
        decode_loop.score_tokens,
    )
    size = lambda: sum(f._cache_size() for f in jitted)  # noqa: E731
    before = size()
    e, names = made(g, rows=3, lanes=9), [str(i) for i in range(12)]  # sizes of no other test
    first = answers(e, asked(micro.prompts(12), DRAWN, "mixed", names), DRAWN, "mixed")
    assert size() - before == len(e.programs) <= 10
    again = answers(e, asked(micro.prompts(12), DRAWN, "mixed", names), DRAWN, "mixed")
    hotter = dataclasses.replace(DRAWN, text_temperature=1.7)
    answers(e, asked(micro.prompts(9)[::-1], hotter, "mixed"), hotter, "mixed")
    assert again == first
    assert size() - before == len(e.programs) <= 12


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["text", "mixed"])
def test_bytes_in_the_cache_change_little(g, mode):  # noqa: F811
    """Greedy answers agree with those of the whole cache up to a choice that was close."""
    sample = dataclasses.replace(SAMPLE, image_greedy=True)
    prompts, plain = micro.prompts(), micro.Plain(g)
    requests = asked(prompts, sample, mode, list("abcde"))
    whole = answers(made(g), requests, sample, mode)
    narrow = answers(made(g, kind="int8"), requests, sample, mode)
    agreed = 0
    for prompt, one, other in zip(prompts, whole, narrow, strict=True):
        same = len(list(itertools.takewhile(lambda p: p[0] == p[1], zip(one, other, strict=False))))
        agreed += same
        if same < min(len(one), len(other)) and mode == "text":
            scores = plain.logits([*prompt, *one[:same]])
            assert abs(scores[one[same]] - scores[other[same]]) < 0.3
    assert agreed > sum(map(len, whole)) / 2


@pytest.mark.parametrize(
    "sample", [pytest.param(SAMPLE, marks=pytest.mark.slow), DRAWN], ids=["greedy", "drawn"]
)
def test_budgets_by_segment_and_an_image_that_ends_the_answer(g, sample):  # noqa: F811
    """As the releases count: anew after each image; or BOI as an end. Against the plain loop."""
    names, prompts = list("abcdefgh"), micro.prompts(8)
    for change in (dict(budget="segment", max_gen_len=3), dict(boi_ends=True)):
        changed = dataclasses.replace(sample, **change)
        requests = asked(prompts, changed, "mixed", names)
        plain = micro.Plain(g)
        expected = [plain.answer(r.tokens, changed, "mixed", r.number) for r in requests]
        assert answers(made(g), requests, changed, "mixed") == expected
        if "boi_ends" in change and sample is DRAWN:
            assert any(a[-1] == ids.BOI for a in expected)


def test_likelihoods_are_those_of_the_whole_forward(g):  # noqa: F811
    prompts = [np.r_[ids.BOS, image(), words(4), ids.SEP].astype(np.int32) for _ in range(5)]
    options = [[words(n) for n in (1, 3, 2)[: 1 + i % 3]] for i in range(5)]
    e, plain = made(g, rows=2, lanes=2), micro.Plain(g)
    found = engine.score_options(e, prompts, options)
    for prompt, each, scored in zip(prompts, options, found, strict=True):
        for option, (likely, best) in zip(each, scored, strict=True):
            tokens = prompt.tolist()
            for token, value, first in zip(option.tolist(), likely, best, strict=True):
                logits = plain.logits(tokens).astype(np.float64)
                want = logits[token] - np.logaddexp.reduce(logits)
                assert abs(value - want) < 1e-4 and first == (logits.argmax() == token)
                tokens.append(token)
    assert e.tokens_prefilled == sum(
        len(p) - 1 for p in prompts
    )  # options are not read with their prompts
    assert e.slot_table.free.all()


def test_scores_of_words(g):  # noqa: F811
    (scores,) = api.score(g, [["Is it a CT?"]], [["yes", "no, it is not"]])
    assert all(s.total < 0 and s.mean == s.total / s.tokens for s in scores)
    assert scores[1].tokens > scores[0].tokens
    assert api.score(g, [], []) == []
    with pytest.raises(
        prompt_requests.GenerateError, match="prompt 0 has no options, or an empty one"
    ):
        api.score(g, [["a"]], [["yes", ""]])
    with pytest.raises(ValueError, match="a prompt's words have <image>"):
        api.score(g, [["a"]], [["yes", "<image>"]])
    with pytest.raises(
        prompt_requests.GenerateError, match="options of prompt 0 are 'yes'; write a list"
    ):
        api.score(g, [["a"]], ["yes"])
    with pytest.raises(prompt_requests.GenerateError, match="1 prompts but 2 lists of options"):
        api.score(g, [["a"]], [["yes"], ["no"]])
    with pytest.raises(prompt_requests.GenerateError, match="rows is 0"):
        api.score(g, [["a"]], [["yes"]], rows=0)
    with pytest.raises(prompt_requests.GenerateError, match="the model holds 64; shorten them"):
        api.score(g, [["a"]], [["word " * 64]])


def test_a_chat_reads_each_turn_once(g):  # noqa: F811
    """Turn two equals one long prompt; only its own words are read."""
    sample = dataclasses.replace(SAMPLE, max_gen_len=4)
    talk = api.Chat(g, sample, mode="text", seed=0)
    picture = np.array([1, 2, 3, 4])
    talk.send([picture, "Is it?"])
    before, read = talk.tokens, talk.engine.tokens_prefilled
    second = talk.send(["Is it a CT?"])
    question = g.tokenizer.encode("Is it a CT?")
    whole = np.r_[before, question, ids.SEP].astype(np.int32)
    assert (talk.tokens[: len(whole)] == whole).all() and talk.tokens[-1] == ids.SEP
    (alone,) = micro.written(g, [whole], sample, "text", names=None)
    assert model_bundle.decode_segments(g, [np.array(alone)])[0][0].text == second[0].text
    unread = talk.engine.tokens_prefilled - read
    assert len(question) <= unread <= len(question) + 2  # EOS or the last word, and SEP
    with pytest.raises(
        prompt_requests.GenerateError, match="the model holds 64; shorten the prompt"
    ):
        talk.send(["word " * 60])
    with pytest.raises(ValueError, match="mode is 'film'"):
        api.Chat(g, sample, mode="film", seed=0)


def test_an_engine_too_small_for_a_prompt(g):  # noqa: F811
    e, sample = made(g, rows=1, slots=16), dataclasses.replace(SAMPLE, max_gen_len=2)
    with pytest.raises(
        prompt_requests.GenerateError, match="holds 16; make the engine with more slots"
    ):
        answers(e, asked([np.r_[ids.BOS, words(16)]], sample), sample)
    for change, message in ((dict(rows=0), "rows is 0"), (dict(slots=65), "the model holds 64")):
        with pytest.raises(prompt_requests.GenerateError, match=message):
            made(g, **(dict(rows=1) | change))
    (short,) = asked([np.r_[ids.BOS, words(4)]], sample)
    assert answers(e, [short], sample)


@pytest.mark.parametrize("mode", ["text", pytest.param("mixed", marks=pytest.mark.slow)])
def test_pieces_make_up_the_answers(g, mode):  # noqa: F811
    prompts = [["Is it a CT?"], ["Draw."], ["chest"]]
    fixed = dict(mode=mode, seed=3)
    whole = api.generate(g, prompts, DRAWN, **fixed)
    shown = lambda p: p.text if isinstance(p, model_bundle.Text) else p.codes.tolist()  # noqa: E731
    told, ended = [[] for _ in prompts], set()
    for index, part in api.stream_chunks(g, prompts, DRAWN, **fixed):
        assert index not in ended
        if part is None:
            ended.add(index)
        elif (
            isinstance(part, model_bundle.Text)
            and told[index][-1:]
            and isinstance(told[index][-1], str)
        ):
            told[index][-1] += part.text
        else:
            told[index].append(
                part.text if isinstance(part, model_bundle.Text) else part.codes.tolist()
            )
    shown = lambda p: p.text if isinstance(p, model_bundle.Text) else p.codes.tolist()  # noqa: E731
    assert told == [[shown(p) for p in answer if shown(p) != ""] for answer in whole]
    assert ended == {0, 1, 2}


@pytest.mark.slow
def test_a_caller_may_leave_in_the_middle(g):  # noqa: F811
    e = made(g, rows=2, lanes=6)
    long = dataclasses.replace(DRAWN, max_gen_len=60)
    served = scheduler.run_requests(
        e, asked(micro.prompts(), long, "mixed"), long, mode="mixed", seed=0
    )
    next(served)
    served.close()
    assert e.slot_table.free.all()


def test_an_error_in_the_middle_leaves_no_lane_behind(g):  # noqa: F811
    """An option of no tokens fails once the prompts are in their lanes; a long prompt before."""
    e, short, option = made(g, rows=2, lanes=2, slots=32), np.r_[ids.BOS, words(8)], words(3)
    long = np.r_[ids.BOS, words(40)]
    before = engine.score_options(e, [short], [[option]])

    class Interrupted(list):
        """Ctrl-C when the engine looks at it."""

        def __getitem__(self, place):
            if e.busy:
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(place)

    for prompts, options, error in (
        ([short, words(8)], [[option], [words(0)]], ValueError),
        ([short, long], [[option], [option]], ValueError),
        ([short, words(8)], [[option], Interrupted([option])], KeyboardInterrupt),
    ):
        with pytest.raises(error):
            engine.score_options(e, prompts, options)
        assert e.slot_table.free.all() and e.cache is None
        again = engine.score_options(e, [short], [[option]])
        np.testing.assert_array_equal(again[0][0], before[0][0])
        assert e.slot_table.free.all()


def test_an_engine_writes_one_suite_at_a_time(g):  # noqa: F811
    """A chat whose last answer still stands open refuses the next turn, until it is closed."""
    talk = api.Chat(g, dataclasses.replace(SAMPLE, max_gen_len=30), mode="text", seed=0)
    open_one = talk.stream_chunks(["Is it?"])
    next(open_one)
    for ask in (
        lambda: talk.send(["Is it a CT?"]),
        lambda: engine.score_options(talk.engine, [talk.tokens], [[words(2)]]),
    ):
        with pytest.raises(
            prompt_requests.GenerateError, match="in the middle of other answers; finish"
        ):
            ask()
    open_one.close()
    assert isinstance(talk.send(["Is it a CT?"])[0], model_bundle.Text)


@pytest.mark.slow
def test_a_merged_adapter_answers_alike(g, folder, adapter):  # noqa: F811
    beside = model_bundle.load(folder, adapter=adapter)
    inside = model_bundle.load(folder, adapter=adapter, merge=True)
    assert len(jax.tree.leaves(inside.model)) == len(jax.tree.leaves(g.model))
    tokens = micro.prompts()
    one, other = (
        micro.written(x, tokens, SAMPLE, "text", names=list("abcde")) for x in (beside, inside)
    )
    assert one == other


@pytest.mark.slow
def test_bf16_by_request(folder):  # noqa: F811
    half = model_bundle.load(folder, dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(half.model)} == {"bfloat16"}
    (answer,) = api.generate(half, [["Is it?"]], SAMPLE, mode="text", seed=0)
    assert isinstance(answer[0], model_bundle.Text)
    with pytest.raises(prompt_requests.GenerateError, match="dtype is 'float16'"):
        model_bundle.load(folder, dtype="float16")


def test_named_settings():
    meta, medmax = api.defaults("meta"), api.defaults("medmax")
    assert (meta.text_temperature, medmax.text_temperature) == (0.7, 1.0)
    assert meta.boi_ends and not medmax.boi_ends and medmax.budget == "segment"
    with pytest.raises(prompt_requests.GenerateError, match="use one of meta, medmax, medmax_eval"):
        api.defaults("anole")
