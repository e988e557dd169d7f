"""`medmax serve` in another process, asked by the openai client as it is published."""

import base64
import io
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import openai
import PIL.Image
import pytest
from serving_setup import make_adapter, make_folder, serving

from medmax_jax import serve
from medmax_jax.serving import api_requests

QUESTION = "Is it a CT?"
LONG = 1_500  # tokens: hundreds of chunks
ROWS, QUEUE, BODY_MIB = 2, 3, 1
NOTICE = "Research only, not for clinical use."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("serving") / "base")
    adapter = make_adapter(tmp_path_factory.mktemp("adapters") / "mine", folder)
    with serving(
        tmp_path_factory.mktemp("log") / "serve.log", f"--model={folder}",
        f"--adapter=mine={adapter}", f"--rows={ROWS}", "--image_rows=1", f"--queue={QUEUE}",
        f"--max_body_mib={BODY_MIB}", "--max_pixels=10000", "--drain_s=60",
    ) as server:  # fmt: skip
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300) as client:
        yield client


def png(side=8, color=60):
    file = io.BytesIO()
    PIL.Image.new("RGB", (side, side), (color, 200, 90)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def image(url=None):
    return {"type": "image_url", "image_url": {"url": url or f"data:image/png;base64,{png()}"}}


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {"role": "user", "content": content}


def ask(client, *parts, **fields):
    fields = dict(model="base", max_tokens=12) | fields
    return client.chat.completions.create(messages=[user(*(parts or (QUESTION,)))], **fields)


def post(server, path, data, **headers):
    """Status, headers and body of a request that the client would not send."""
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(f"{server.url}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


# Replies.


def test_models_are_the_base_and_the_adapters(client):
    assert [m.id for m in client.models.list()] == ["base", "mine"]
    assert client.models.retrieve("mine").parent == "base"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.param == "model" and error.value.code == "model_not_found"


def test_text_of_the_base_and_of_an_adapter(client):
    replies = {name: ask(client, image(), QUESTION, model=name) for name in ("base", "mine")}
    for name, reply in replies.items():
        (choice,) = reply.choices
        assert reply.model == name and reply.object == "chat.completion"
        assert choice.finish_reason == "length" and isinstance(choice.message.content, str)
        assert reply.usage.completion_tokens == 12
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12
        assert reply.metadata["notice"] == NOTICE
    texts = [reply.choices[0].message.content for reply in replies.values()]
    assert texts[0] != texts[1]
    assert ask(client, image(), QUESTION).choices[0].message.content == texts[0]
    assert ask(client, QUESTION, image()).choices[0].message.content != texts[0]


def test_a_stream_has_the_same_text(client):
    whole = ask(client, max_tokens=60, logprobs=True)
    chunks = list(
        ask(client, max_tokens=60, stream=True, logprobs=True,
            stream_options={"include_usage": True})
    )  # fmt: skip
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and len(chunks) > 4
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert len(chunks[-2].choices[0].logprobs.content) == 60
    assert [t.logprob for t in chunks[-2].choices[0].logprobs.content] == pytest.approx(
        [t.logprob for t in whole.choices[0].logprobs.content], abs=1e-5
    )
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert len({c.id for c in chunks}) == 1
    assert all(c.metadata["notice"] == NOTICE for c in chunks)


def test_choices_seed_and_stop(client):
    sampled = dict(temperature=1.5, top_p=0.95, n=3, max_tokens=30)
    first, again, other = (ask(client, **sampled, seed=seed) for seed in (5, 5, 6))
    texts = [[c.message.content for c in r.choices] for r in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3
    assert first.metadata["seed"] == "5" and first.usage.completion_tokens == 90
    unseeded = [ask(client, **sampled) for _ in range(2)]
    assert unseeded[0].metadata["seed"] != unseeded[1].metadata["seed"]
    whole = ask(client, max_tokens=30).choices[0].message.content
    stopped = ask(client, max_tokens=30, stop=[whole[8:11]]).choices[0]
    assert stopped.message.content == whole[: whole.index(whole[8:11])]
    assert stopped.finish_reason == "stop"


def test_images_in_replies_and_back_in_a_prompt(client):
    fields = dict(modalities=["text", "image"], max_tokens=30, seed=1)
    parts = ask(client, **fields).choices[0].message.content
    kinds = [part["type"] for part in parts]
    assert "image_url" in kinds and "text" in kinds
    url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    decoded = PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert decoded.size == (4, 4) and NOTICE in decoded.info["Comment"]
    streamed = []
    for chunk in ask(client, **fields, stream=True):
        delta = chunk.choices[0].delta
        streamed += [delta.content] if delta.content else getattr(delta, "images", None) or []
    assert [p["image_url"]["url"] for p in streamed if isinstance(p, dict)] == [
        part["image_url"]["url"] for part in parts if part["type"] == "image_url"
    ]
    assert "".join(p for p in streamed if isinstance(p, str)) == "".join(
        part["text"] for part in parts if part["type"] == "text"
    )
    messages = [user(QUESTION), {"role": "assistant", "content": parts}, user("And now?")]
    reply = client.chat.completions.create(model="base", messages=messages, max_tokens=4)
    assert reply.usage.completion_tokens == 4


def test_image_generation(client):
    made = client.images.generate(model="mine", prompt="A CT.", n=2, size="4x4",
                                  extra_body={"seed": 3, "image_temperature": 9.0})  # fmt: skip
    made_images = [PIL.Image.open(io.BytesIO(base64.b64decode(i.b64_json))) for i in made.data]
    assert len(made_images) == 2 and all(NOTICE in p.info["Comment"] for p in made_images)
    assert made.usage.output_tokens == 8
    assert not np.array_equal(*made_images)


def test_requests_as_evaluation_suites_send_them(server, client):
    """The bodies of lmms-eval (05ed5a7, chat/openai.py) and VLMEvalKit (00006c5, api/gpt.py)."""
    lmms_eval = dict(messages=[user(image(), QUESTION)], model="mine", max_tokens=16, temperature=0)
    reply = client.chat.completions.create(**lmms_eval)
    assert reply.usage.completion_tokens == 16
    jpeg = {"type": "image_url"}
    jpeg["image_url"] = dict(url=f"data:image/jpeg;base64,{png()}", detail="low")
    messages = [{"role": "system", "content": "Answer."}, user(jpeg, QUESTION)]
    vlmeval = dict(model="mine", messages=messages, n=1, temperature=0, max_tokens=16)
    status, _, body = post(
        server, "/chat/completions", json.dumps(vlmeval).encode(), Authorization="Bearer sk-x"
    )
    text = json.loads(body)["choices"][0]["message"]["content"]
    assert status == 200 and text.strip() and text != reply.choices[0].message.content


# Bad input: the interface's own error objects, with the field.


@pytest.mark.parametrize(
    "fields, status, param, message",
    [
        (dict(model="other"), 404, "model", "'other' does not exist; use one of base, mine"),
        (dict(model=7), 400, "model", "model is 7; it must be one of base, mine"),
        (dict(messages=[]), 400, "messages", "a list of 1 to 1000 messages"),
        (dict(messages=[{"role": "x", "content": "a"}]), 400, "messages[0].role", "'x'"),
        (dict(messages=[user(QUESTION), {"role": "assistant", "content": "a"}]), 400,
         "messages[1].role", "user in the last message"),
        (dict(messages=[{"role": "user", "content": None}]), 400, "messages[0].content", "None"),
        (dict(messages=[user({"type": "audio"})]), 400, "messages[0].content[0].type", "image_url"),
        (dict(messages=[user(QUESTION, {"type": "image_url"})]), 400,
         "messages[0].content[1].image_url", "has no data"),
        (dict(messages=[user(image("data:image/png;base64,"))]), 400,
         "messages[0].content[0].image_url", "has no data"),
        (dict(messages=[user(image("data:text/html;base64,AAAA"))]), 400,
         "messages[0].content[0].image_url", "the media type text/html; it must be image/"),
        (dict(messages=[user(image("data:image/png;base64,AAAA"))]), 400,
         "messages[0].content[0].image_url", "not an image in a supported format"),
        (dict(messages=[user(image("data:image/png;base64,A*A"))]), 400,
         "messages[0].content[0].image_url", "no valid base64"),
        (dict(messages=[user(image("http://127.0.0.1/a.png"))]), 400,
         "messages[0].content[0].image_url", "fetches no URL and reads no file"),
        (dict(messages=[user(image("file:///etc/passwd"))]), 400,
         "messages[0].content[0].image_url", "fetches no URL and reads no file"),
        (dict(messages=[user(*[image()] * 400)]), 400, "messages", "400 images of 6 tokens"),
        (dict(messages=[user(image(f"data:image/png;base64,{png(side=101)}"))]), 400,
         "messages[0].content[0].image_url", "10201|101 x 101 pixels; the limit is 10000"),
        (dict(messages=[user("CT" * 3_000)]), 400, "messages", "but the context"),
        (dict(messages=[user("<image>")]), 400, "messages", "contains <image>"),
        (dict(n=0), 400, "n", "n is 0; it must be an integer of 1 to 16"),
        (dict(seed=-1), 400, "seed", "0 to 4294967295"),
        (dict(max_tokens=0), 400, "max_tokens", "max_tokens is 0"),
        (dict(max_completion_tokens=4), 400, "max_tokens", "max_tokens is 12; it must be max_comp"),
        (dict(temperature=-1), 400, "temperature", "at least 0"),
        (dict(temperature=1e-9), 400, "temperature", "at least 1e-06 .temperature=0 selects"),
        (dict(top_p=2), 400, "top_p", "top_p is 2.0; it must be above 0"),
        (dict(top_p="x"), 400, "top_p", "a number"),
        (dict(stop=[""]), 400, "stop", "1 to 256 characters"),
        (dict(modalities=["audio"]), 400, "modalities", "audio"),
        (dict(logprobs=True, top_logprobs=2), 400, "top_logprobs", "only chosen tokens"),
        (dict(frequency_penalty=1), 400, "frequency_penalty", "it must be 0"),
        (dict(extra_body={"nonsense": 1}), 400, "nonsense", "is not a field of this server"),
    ],
)  # fmt: skip
def test_error_objects(client, fields, status, param, message):
    with pytest.raises(openai.APIStatusError, match=message) as error:
        client.chat.completions.create(
            **(dict(model="base", messages=[user(QUESTION)], max_tokens=12) | fields)
        )
    assert (error.value.status_code, error.value.param) == (status, param)
    assert error.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "data, headers, status, message",
    [
        (b"{", {}, 400, "the body"),
        (b"[]", {}, 400, "not a JSON object"),
        (b'{"model": "a", "model": "b"}', {}, 400, "twice"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "Content-Type is text/plain"),
        (b"{}", {"Content-Length": str(BODY_MIB * 2**20 + 1)}, 413, "more than 1,048,576 bytes"),
        (b"{}", {"Host": "attacker.example"}, 400, "Invalid host header"),
    ],
)
def test_requests_that_no_client_sends(server, data, headers, status, message):
    found, _, body = post(server, "/chat/completions", data, **headers)
    assert found == status and message in body.decode()
    if "Host" not in headers:
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_unknown_routes_are_error_objects(server):
    status, _, body = post(server, "/completions", b"{}")
    assert status == 404 and "/v1/completions" in json.loads(body)["error"]["message"]
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{server.url}/chat/completions")
    error.value.close()
    assert error.value.code == 405


# Clients that go, read slowly or are too many.


def raw_stream(server, receive=None):
    """A connection whose reply, a long stream, is not read."""
    body = json.dumps(dict(model="base", messages=[user(QUESTION)], max_tokens=LONG, stream=True))
    connection = socket.socket()
    if receive:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.connect(("127.0.0.1", server.port))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
    head += f"application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    return connection


def test_vanished_clients_free_their_rows(server, client):
    before = server.metric("generated_tokens_total")
    connections = [raw_stream(server) for _ in range(ROWS)]
    server.wait("requests_running", ROWS)
    for connection in connections:
        assert connection.recv(100)
        connection.close()
    with pytest.raises(openai.APITimeoutError):  # waits for a complete reply, and leaves
        ask(client, max_tokens=LONG, timeout=0.3)
    server.wait("requests_running", 0)
    server.wait("cache_slots_used", 0)
    assert server.metric("generated_tokens_total") - before < 3 * LONG
    assert ask(client).usage.completion_tokens == 12


def test_a_slow_reader_delays_no_one(server, client):
    with raw_stream(server, receive=1_024) as slow:
        server.wait("requests_running", 1)
        assert ask(client).usage.completion_tokens == 12  # while the other one is running
        server.wait("requests_running", 0)  # its answer is complete, though it has read nothing
        text, read = b"", 0
        while b"[DONE]" not in text[-100:]:
            assert (piece := slow.recv(65_536)), "the stream was cut"
            text += piece
            read += 1
        assert text.count(b'"content":') > 10 and read > 10


def test_a_full_queue_is_429_with_retry_after(server, client):
    connections = [raw_stream(server) for _ in range(ROWS)]
    server.wait("requests_running", ROWS)
    connections += [raw_stream(server) for _ in range(QUEUE)]
    server.wait("requests_waiting", QUEUE)
    with pytest.raises(openai.RateLimitError, match="requests wait already") as error:
        ask(client, model="mine")
    assert 1 <= int(error.value.response.headers["Retry-After"]) <= 60
    assert error.value.code == "queue_full"
    with pytest.raises(openai.RateLimitError):
        ask(client, n=4)  # none of the four is left behind
    for connection in connections:
        connection.close()
    server.wait("requests_running", 0)
    server.wait("requests_waiting", 0)


# The program.


@pytest.mark.parametrize(
    "words, message",
    [
        (["--adapter=x"], "--adapter is 'x'; use the form NAME=P"),
        (["--adapter=tiny=a"], "the name 'tiny' is given twice"),
        (["--rows=0"], "--rows is 0; it must be at least 1"),
        (["--host=0.0.0.0"], "so other machines can reach the server; set --api_key_env"),
        (["--api_key_env=NO_SUCH_KEY"], "has no key of at least 16 ASCII characters"),
        (["--port=99999"], "--port is 99999; it must be 0 to 65535"),
        (["--settings=x"], "--settings: 'x' is unknown; use one of meta, medmax, medmax_eval"),
    ],
)
def test_wrong_usage_is_one_line(capsys, words, message):
    try:
        status = serve.main(["--model=medmax_jax/tiny", "--compile_cache=off", *words])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status in (1, 2) and message in error and error.count("\n") == 1


def test_every_other_field_is_refused_or_changes_nothing():
    assert not (api_requests.CHAT & set(api_requests.NEUTRAL))


def test_sigterm_finishes_what_runs(server, client):
    """The last test of this server."""
    replies = []
    thread = threading.Thread(target=lambda: replies.append(ask(client, max_tokens=LONG)))
    thread.start()
    server.wait("requests_running", 1)
    server.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", server.port)).close()
        except ConnectionRefusedError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("it still accepts connections")
    thread.join(60)
    assert replies[0].usage.completion_tokens == LONG
    assert server.process.wait(60) == 0
    assert server.log.read_text().endswith("stopped\n")
