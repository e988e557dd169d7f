"""The engine service against generation itself; limits, cancellation, failures and its end."""

import dataclasses
import socket
import threading
import urllib.error
import urllib.request

import numpy as np
import openai
import PIL.Image
import pytest
import uvicorn
from generate_setup import CODES, SAMPLE
from serving_setup import CONTEXT, make_adapter, make_folder

from medmax_jax.checkpoints import safetensors_file
from medmax_jax.generation import api, engine, model_bundle, sampling_params, scheduler
from medmax_jax.generation import requests as prompt_requests
from medmax_jax.generation.requests import GenerateError
from medmax_jax.serving import (
    Failed,
    Finished,
    GenerationRequest,
    ImageDone,
    Limits,
    QueueFullError,
    Service,
    ServiceClosedError,
    TextDelta,
)
from medmax_jax.serving.api_requests import ReadOptions
from medmax_jax.serving.app import AppSettings, make_app

ROWS, QUEUE = 2, 4
SIZES = engine.EngineSizes(
    batch_size=ROWS, num_slots=ROWS + 2, cache_length=256, cache_dtype="model"
)
QUESTION = "Is it a CT?"
SHORT = dataclasses.replace(SAMPLE, max_gen_len=40)
LONG = dataclasses.replace(SAMPLE, max_gen_len=220)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("serving") / "base")


@pytest.fixture(scope="module")
def bundles(folder, tmp_path_factory):
    base = model_bundle.load(folder)
    adapter = make_adapter(tmp_path_factory.mktemp("adapters") / "mine", folder)
    return {"base": base, "mine": model_bundle.with_adapter(base, folder, adapter)}


@pytest.fixture(scope="module")
def service(bundles):
    service = Service(bundles, SIZES, Limits(queue=QUEUE, request_s=300.0), log=print)
    yield service
    service.close(drain_s=5.0)


@pytest.fixture(scope="module")
def engines(bundles):
    """Engines of the same sizes, so that the same programs compute what is expected."""
    return {
        name: engine.make_engine(g.model, g.vocab, g.mesh, SIZES, codes=CODES)
        for name, g in bundles.items()
    }


@pytest.fixture
def image():
    return PIL.Image.fromarray(np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3) * 5)


def request(service, turns=((QUESTION,),), *, model="base", sample=SHORT, mode="text", **options):
    return GenerationRequest(
        model=model, prompt=service.prompt(turns), sample=sample, mode=mode, **options
    )


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def parts_of(events):
    """Text and codes in order, as generate returns them."""
    parts = []
    for event in events:
        if isinstance(event, ImageDone):
            parts.append(event.codes.tolist())
        elif isinstance(event, TextDelta) and parts and isinstance(parts[-1], str):
            parts[-1] += event.text
        elif isinstance(event, TextDelta):
            parts.append(event.text)
    return parts


def expected_tokens(e, g, ticket):
    """The answer of the engine alone."""
    asked = ticket.request
    requests = prompt_requests.make_requests(
        [asked.prompt], asked.sample, g.vocab, mode=asked.mode, names=None, codes=CODES,
        context=CONTEXT,
    )  # fmt: skip
    settings = sampling_params.resolve(
        asked.sample, g.vocab, mode=asked.mode, codes=CODES, barred=g.tokenizer.barred
    )
    *_, last = scheduler.run_requests(e, requests, settings, asked.sample.seed)
    return last[0].tokens


def expected_parts(e, g, ticket):
    """The answer of the engine alone, as text and codes."""
    (segments,) = model_bundle.decode_segments(g, [expected_tokens(e, g, ticket)])
    return [s.text if isinstance(s, model_bundle.Text) else s.codes.tolist() for s in segments]


def expected_scores(e, g, prompt, options):
    encoded = api.encode_options(g, options, "the prompt")
    ((*scores,),) = engine.score_options(e, [prompt], [encoded])
    return [float(likelihoods.sum()) for likelihoods, _ in scores]


def idle(service):
    """Until no slot is in use: the thread measures after it has delivered the last event."""
    service.encode([]).result()
    service.encode([]).result()
    return all(served.engine.slot_table.free.all() for served in service._models.values())


def test_adapters_use_the_arrays_of_the_base(bundles):
    base, adapted = (safetensors_file.flatten_named(g.model) for g in bundles.values())
    assert all(adapted[name] is array for name, array in base.items())
    assert len(adapted) > len(base)


def test_answers_equal_those_of_generation(service, bundles, engines, image):
    """Both models, text and mixed answers at the same time; the prompts contain images."""
    asked = [("base", "text"), ("mine", "text"), ("base", "mixed")]
    turns = [[image, QUESTION]]
    tickets = [
        service.submit(request(service, turns, model=name, mode=mode)) for name, mode in asked
    ]
    for (name, mode), ticket in zip(asked, tickets, strict=True):
        *events, end = list(ticket)
        assert parts_of(events) == expected_parts(engines[name], bundles[name], ticket)
        assert isinstance(end, Finished) and end.prompt_tokens == len(ticket.request.prompt)
        assert end.reason == "length" and end.completion_tokens >= 40
        assert any(isinstance(event, ImageDone) for event in events) == (mode == "mixed")
    assert idle(service)


def test_turns_are_those_of_a_chat(service, bundles, image):
    turns = [[image, QUESTION], ["yes"], ["Of what?"]]
    apart = model_bundle.prompt_tokens(bundles["base"], turns, end_of_turn=True)
    expected = np.concatenate([apart[0], *[tokens[1:] for tokens in apart[1:]]])
    np.testing.assert_array_equal(service.prompt(turns), expected)


def test_a_stop_text_ends_the_answer_and_frees_the_row(service):
    whole = text_of(service.submit(request(service, sample=LONG)))
    stop = whole[60:64]
    *events, end = list(service.submit(request(service, sample=LONG, stop=("never", stop))))
    assert text_of(events) == whole[: whole.index(stop)]
    assert end.reason == "stop" and end.completion_tokens < 220
    assert idle(service)


def test_likelihoods_while_all_rows_are_in_use(service, bundles, engines):
    running = [service.submit(request(service, sample=LONG)) for _ in range(ROWS + 1)]
    prompt, options = service.prompt([[QUESTION]]), ["yes", "no"]
    expected = expected_scores(engines["base"], bundles["base"], prompt, options)
    scores = service.score("base", prompt, options).result()
    assert [s.total for s in scores] == pytest.approx(expected, abs=1e-4)
    answers = [list(ticket) for ticket in running]
    assert all(isinstance(events[-1], Finished) for events in answers)
    with pytest.raises(GenerateError, match="an option have .* tokens, but a cache slot holds 256"):
        service.score("base", service.prompt([[QUESTION]]), ["CT" * 400])


def test_logprobs_are_the_likelihoods_of_the_answer(service, bundles, engines):
    e, g = engines["base"], bundles["base"]
    ticket = service.submit(request(service, logprobs=True))
    *_, end = list(ticket)
    tokens = expected_tokens(e, g, ticket)
    (((likelihoods, _),),) = engine.score_options(e, [ticket.request.prompt], [[tokens]])
    assert [t.logprob for t in end.logprobs] == pytest.approx(likelihoods.tolist(), abs=1e-4)
    assert [t.token for t in end.logprobs] == [
        g.tokenizer.decode([token]) for token in tokens.tolist()
    ]


def test_queue_is_bounded_and_cancelled_requests_leave_it(service):
    tickets = [service.submit(request(service, sample=LONG)) for _ in range(ROWS)]
    for ticket in tickets:
        next(iter(ticket))  # it runs
    waiting = [service.submit(request(service)) for _ in range(QUEUE)]
    with pytest.raises(QueueFullError, match="4 requests wait already.*holds 4") as error:
        service.submit(request(service, model="mine"))
    assert 1 <= error.value.retry_after_s <= 60
    for ticket in [*tickets, waiting[0]]:
        ticket.cancel()
    for ticket in tickets:
        assert [e for e in ticket][-1].kind == "cancelled"
    assert [e.kind for e in waiting[0]] == ["cancelled"]
    assert all(isinstance(list(ticket)[-1], Finished) for ticket in waiting[1:])
    waiting[1].cancel()  # it has ended: nothing happens
    assert idle(service)


def test_a_request_has_a_deadline(bundles):
    service = Service({"base": bundles["base"]}, SIZES, Limits(queue=9, request_s=1e-3), log=print)
    *_, end = service.submit(request(service, sample=LONG))
    assert end == Failed("time", "no answer within 0 seconds")
    service.close(drain_s=0.0)


def test_a_failed_engine_ends_its_rows_and_goes_on(service, monkeypatch):
    """Out of memory in a chunk: the requests in rows fail, those in the queue are answered."""
    step, failing = scheduler.step, threading.Event()

    def fail_once(batch, **options):
        if failing.is_set() and all(batch.running):
            failing.clear()
            raise GenerateError("out of memory: batch size 2 needs too much")
        return step(batch, **options)

    monkeypatch.setattr(scheduler, "step", fail_once)
    running = [service.submit(request(service, sample=LONG)) for _ in range(ROWS)]
    for ticket in running:
        next(iter(ticket))
    queued = service.submit(request(service))
    failing.set()
    for ticket in running:
        end = list(ticket)[-1]
        assert end.kind == "engine" and end.message.startswith("out of memory: batch size 2")
    expected = text_of(service.submit(request(service)))
    assert text_of(queued) == expected and len(expected) > 10
    assert idle(service)


@pytest.mark.parametrize(
    "turns, message",
    [
        ([], "the last message is empty"),
        ([["a"], [""]], "the last message is empty"),
        ([["\ud800"]], "half of a surrogate pair"),
        ([[np.zeros(3, np.int32)]], "an image has 3 codes; it must have 4"),
        ([[np.zeros(CODES, np.int32)] * 400], "400 images of 6 tokens each.*at most 341"),
        ([["CT" * 3_000]], "the prompt has .* tokens and its answer needs 1, but the context"),
    ],
)
def test_prompts_that_are_refused(service, turns, message):
    with pytest.raises(GenerateError, match=message):
        service.prompt(turns)


def test_requests_that_are_refused(service):
    with pytest.raises(KeyError):
        service.submit(request(service, model="other"))
    with pytest.raises(GenerateError, match="sample.text_top_p is 2"):
        service.submit(request(service, sample=dataclasses.replace(SHORT, text_top_p=2.0)))
    with pytest.raises(GenerateError, match="but a cache slot holds 256"):
        service.submit(request(service, [["CT" * 400]]))


def test_a_path_in_a_prompt_is_text(service):
    """A client must not learn whether a file exists on the server."""
    assert len(service.prompt([[__file__]])) > 10


def test_the_api_key_is_required_but_for_health(service):
    """The application itself, on a socket of this process."""
    key = "sk-of-this-test-only"
    settings = AppSettings(
        read=ReadOptions(sample=SHORT, max_pixels=100), max_body_bytes=1_000, api_key=key,
        local=False,
    )  # fmt: skip
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(make_app(service, settings), log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listener]))
    thread.start()
    try:
        for wrong in ("sk-of-this-test", key + "x", "none"):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=wrong, max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError, match="missing or wrong") as error:
                    client.models.list()
                assert error.value.code == "invalid_api_key" and key not in str(error.value)
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            urllib.request.urlopen(f"{url}/metrics")
        refused.value.close()
        with urllib.request.urlopen(f"{url}/health") as reply:
            assert reply.status == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
            assert [model.id for model in client.models.list()] == ["base", "mine"]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def test_close_finishes_what_was_accepted(bundles):
    service = Service({"base": bundles["base"]}, SIZES, Limits(queue=9, request_s=300.0), log=print)
    tickets = [service.submit(request(service)) for _ in range(ROWS + 1)]
    closing = threading.Thread(target=service.close, kwargs=dict(drain_s=120.0))
    closing.start()
    assert all(isinstance(list(ticket)[-1], Finished) for ticket in tickets)
    closing.join()
    assert not service.alive
    with pytest.raises(ServiceClosedError, match="shutting down"):
        service.submit(tickets[0].request)
    with pytest.raises(ServiceClosedError):
        service.encode([])


def test_close_ends_what_takes_too_long(bundles):
    service = Service({"base": bundles["base"]}, SIZES, Limits(queue=9, request_s=300.0), log=print)
    ticket = service.submit(request(service, sample=LONG))
    next(iter(ticket))
    service.close(drain_s=0.0)
    assert list(ticket)[-1].kind == "closed"
