"""Requests with their own settings share a batch; they are added and cancelled while it runs."""

import dataclasses

import pytest
from generate_setup import CODES, DRAWN, SAMPLE, VOCAB, prompts
from test_generate import adapter, folder, g  # noqa: F401

from medmax_jax.generation import engine, sampling_params, scheduler
from medmax_jax.generation import requests as prompt_requests

HOT = dataclasses.replace(
    DRAWN, text_temperature=2.0, text_top_p=0.7, repetition_penalty=1.0, image_temperature=1.5
)
ONE_STREAM = dataclasses.replace(
    DRAWN, guidance_scale_text=1.0, guidance_scale_image=1.0, image_greedy=True
)
SETTINGS = [  # settings, mode, seed
    (dataclasses.replace(SAMPLE, max_gen_len=40), "text", 0),
    (DRAWN, "mixed", 7),
    (dataclasses.replace(HOT, max_gen_len=5), "text", 1),
    (HOT, "image", 2**32 - 1),
    (ONE_STREAM, "image", 3),
    (dataclasses.replace(DRAWN, boi_ends=True), "mixed", 7),
    (dataclasses.replace(DRAWN, budget="segment", max_gen_len=3), "mixed", 4),
    (dataclasses.replace(SAMPLE, max_gen_len=24), "mixed", 0),
]


@pytest.fixture(scope="module")
def e(g):  # noqa: F811
    sizes = engine.EngineSizes(batch_size=4, num_slots=12, cache_length=64, cache_dtype="model")
    return engine.make_engine(g.model, VOCAB, g.mesh, sizes, codes=CODES)


@pytest.fixture(scope="module")
def queued():
    made = []
    for index, (prompt, (sample, mode, seed)) in enumerate(zip(prompts(8), SETTINGS, strict=True)):
        (request,) = prompt_requests.make_requests(
            [prompt], sample, VOCAB, mode=mode, names=[str(index)], codes=CODES, context=64
        )
        settings = sampling_params.resolve(sample, VOCAB, mode=mode, codes=CODES)
        made.append(
            scheduler.QueuedRequest(index=index, request=request, settings=settings, seed=seed)
        )
    return made


@pytest.fixture(scope="module")
def alone(e, queued):
    """Return the answer to each request in an engine that serves no other one."""
    answers = []
    for q in queued:
        *_, last = scheduler.run_requests(e, [q.request], q.settings, q.seed)
        answers.append(last[0].tokens.tolist())
    return answers


def finish(batch):
    answers = {}
    while batch.queue or any(batch.running):
        for output in scheduler.step(batch):
            if output.done:
                answers[output.index] = output.tokens.tolist()
    return answers


def test_rows_have_their_own_settings(e, queued, alone):
    batch = scheduler.open_batch(e)
    for q in queued:
        scheduler.add(batch, q)
    with engine.exclusive_use(e):
        answers = finish(batch)
    assert [answers[i] for i in range(len(queued))] == alone
    assert len(set(map(tuple, alone))) == len(alone)
    assert e.slot_table.free.all()


def test_requests_are_added_and_cancelled_while_others_run(e, queued, alone):
    batch = scheduler.open_batch(e)
    for q in queued[:5]:
        scheduler.add(batch, q)
    with engine.exclusive_use(e):
        first = scheduler.step(batch)
        running = [r.index for r in batch.running if r]
        scheduler.cancel(batch, running[0])
        scheduler.cancel(batch, 4)  # not admitted yet
        scheduler.cancel(batch, 99)  # finished or unknown: nothing happens
        for q in queued[5:]:
            scheduler.add(batch, q)
        answers = {o.index: o.tokens.tolist() for o in first if o.done} | finish(batch)
    assert sorted(answers) == sorted(set(range(8)) - {running[0], 4})
    assert all(answers[i] == alone[i] for i in answers)
    assert e.slot_table.free.all()
