"""Calls to a real server that also replies incorrectly, slowly or not at all."""

import base64
import dataclasses
import email.utils
import html
import json
import re
import shutil
import ssl
import subprocess
import threading
import time
import urllib.parse

import llm_server
import pytest
from llm_server import at, completion, replies, serving, short_waits  # noqa: F401

from medmax_jax.endpoints import cached_chat_api, chat_api, egress
from medmax_jax.endpoints.chat_api import EndpointError, Reply, TransientError
from medmax_jax.io.journal import open_journal

HELLO = [{"role": "user", "content": "hello"}]
GOOD = completion("hi")


def ask(url: str, data_class: str = "open", **changes) -> Reply:
    return chat_api.request_completion(
        at(url, **changes), HELLO, data_class, wait=threading.Event().wait
    )


def test_usable_reply():
    with serving(replies(GOOD)) as llm:
        reply = ask(llm.url)
    assert reply == Reply(status=200, text="hi", finish="stop", tokens_in=100, tokens_out=10)
    assert llm.requests == [{"model": "m", "messages": HELLO, "temperature": 0}]
    assert llm.keys == [None]


# Retries.


def test_429_waits_for_the_requested_time():
    too_many_requests = ("status", 429, {"Retry-After": "0.6"})
    with serving(replies(too_many_requests, GOOD)) as llm:
        assert ask(llm.url).text == "hi"
    assert llm.times[1] - llm.times[0] >= 0.6


def test_retry_after_may_be_a_date():
    until = email.utils.formatdate(time.time() + 2, usegmt=True)
    with serving(replies(("status", 503, {"Retry-After": until}), GOOD)) as llm:
        assert ask(llm.url).text == "hi"
    assert llm.times[1] - llm.times[0] >= 0.9  # the date is in seconds


@pytest.mark.parametrize("junk", ["soon", "-1", "1e9999", "9" * 4_000, "\x7f"])
def test_invalid_retry_after_is_ignored(junk):
    with serving(replies(("status", 429, {"Retry-After": junk}), GOOD)) as llm:
        assert ask(llm.url).text == "hi"


def test_requested_wait_above_the_maximum_is_an_error():
    with serving(replies(("status", 429, {"Retry-After": "3600"}))) as llm:
        with pytest.raises(
            TransientError, match="requests a wait of 3600 s .* longer than max_wait_s 5"
        ):
            ask(llm.url)
    assert len(llm.requests) == 1


@pytest.mark.parametrize(
    "bad", [500, 502, 503, 408, 429, "reset", ("cut", GOOD), b"<html>", b"[]", b"{}",
            b'{"choices": []}', b'{"choices": [null]}', b'{"choices": [{"message": "hi"}]}',
            b'{"choices": ' * 50_000, b"\xff\xfe{", b"1" * 5_000],
)  # fmt: skip
def test_transient_failures_are_retried(bad):
    with serving(replies(bad, GOOD)) as llm:
        assert ask(llm.url, max_reply_bytes=10**6).text == "hi"
    assert len(llm.requests) == 2


def test_slow_replies_are_retried():
    with serving(replies(("slow", 0.6), GOOD)) as llm:
        assert ask(llm.url, timeout_s=0.3).text == "hi"


@pytest.mark.parametrize("how", ["drip", "drip headers", "drip, no length"])
def test_slowly_sent_bytes_do_not_extend_the_timeout(how):
    with serving(replies((how, 5))) as llm:
        start = time.monotonic()
        with pytest.raises(TransientError, match=r"no reply after 2 attempts \(more than 0.3 s\)"):
            ask(llm.url, timeout_s=0.3, retries=1)
    assert time.monotonic() - start < 2 and len(llm.requests) == 2


@pytest.mark.parametrize("bad", [500, "reset", ("cut", GOOD)])
def test_exhausted_retries_raise(bad):
    with serving(replies(bad)) as llm:
        with pytest.raises(TransientError, match="m at 127.0.0.1:.*: no reply after 3 attempts"):
            ask(llm.url)
    assert len(llm.requests) == 3


def test_refused_connections_are_retried_and_reported():
    with pytest.raises(TransientError, match="refused"):
        ask(llm_server.free_url())


def test_waiting_stops_on_request():
    stop = threading.Event()
    stop.set()
    with serving(replies(500)) as llm, pytest.raises(TransientError, match="stopped while waiting"):
        chat_api.request_completion(at(llm.url), HELLO, "open", wait=stop.wait)
    assert len(llm.requests) == 1


# Replies that cannot be used.


@pytest.mark.parametrize(
    "body, problem",
    [
        (b"<html>no</html>", "not JSON"),
        (b'{"id": "quota"}', "no choices with a message"),
        (completion(None), "no text in the message"),
        (completion("  "), "no text in the message"),
        (
            completion("hal", finish="length"),
            "cut off at the token limit (finish_reason length; no max_tokens was sent)",
        ),
    ],
)
def test_unusable_reply_is_kept(body, problem):
    with serving(replies(body)) as llm:
        reply = ask(llm.url)
    assert (reply.status, reply.problem, reply.text) == (200, problem, "")
    assert reply.raw == body.decode()


def test_huge_reply_is_neither_read_nor_retried():
    with serving(replies(("huge", 2**30))) as llm:
        start = time.monotonic()
        reply = ask(llm.url)
    assert reply.problem == "longer than 100000 bytes" and len(reply.raw) == chat_api.RAW_CHARS
    assert len(llm.requests) == 1 and time.monotonic() - start < 5


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": -1}, {"prompt_tokens": "7"},
                                   {"prompt_tokens": True}, {"prompt_tokens": 1e3}])  # fmt: skip
def test_invalid_usage_counts_are_ignored(usage):
    body = json.dumps(json.loads(GOOD) | {"usage": usage}).encode()
    with serving(replies(body)) as llm:
        reply = ask(llm.url)
    assert (reply.text, reply.tokens_in, reply.tokens_out) == ("hi", None, None)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_refused_request_is_a_reply(status):
    with serving(replies(status)) as llm:
        reply = ask(llm.url)
    assert reply.status == status and reply.problem.startswith(f"status {status}: ")
    assert len(llm.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_settings_raise_immediately(status):
    with serving(replies(status)) as llm:
        with pytest.raises(EndpointError, match=f"status {status}: .* check the URL") as caught:
            ask(llm.url)
    assert not isinstance(caught.value, TransientError) and len(llm.requests) == 1


def test_redirects_are_not_followed():
    with (
        serving() as other,
        serving(replies(("status", 307, {"Location": f"{other.url}/chat/completions"}))) as llm,
    ):
        with pytest.raises(EndpointError, match="redirects to another URL"):
            ask(llm.url)
    assert other.connections == 0


def test_no_proxy_is_used(monkeypatch):
    with serving() as proxy, serving(replies(GOOD)) as llm:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert ask(llm.url).text == "hi"
    assert proxy.connections == 0


# Bounds of tokens, empty answers, contents in parts, errors inside a 200.


@pytest.mark.parametrize(
    "parameters, sent",
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": None}, {}),
        ({"max_completion_tokens": 7, "max_tokens": None}, {"max_completion_tokens": 7}),
        ({"stop": None}, {"stop": None}),
    ],
)
def test_null_token_limit_is_not_sent(parameters, sent):
    with serving(replies(GOOD)) as llm:
        ask(llm.url, parameters=parameters)
    assert llm.requests == [{"model": "m", "messages": HELLO} | sent]


@pytest.mark.parametrize(
    "parameters, sent",
    [
        ({"max_tokens": 16}, "finish_reason length; max_tokens 16 was sent"),
        ({"max_completion_tokens": 9}, "finish_reason length; max_completion_tokens 9 was sent"),
        ({}, "finish_reason length; no max_tokens was sent"),
    ],
)
@pytest.mark.parametrize("text", ["", "half an answ"])
def test_reply_at_its_token_limit_names_the_limit(parameters, sent, text):
    with serving(replies(completion(text, finish="length"))) as llm:
        assert sent in ask(llm.url, parameters=parameters).problem
        reply = ask(llm.url, parameters=parameters, takes_cut=True, takes_empty=True)
    assert reply.text == text and (sent in reply.problem) == (not text)


def test_empty_text_is_a_reply_when_allowed():
    refusal = json.loads(completion(None))
    refusal["choices"][0]["message"]["refusal"] = "I cannot help with that."
    for body, text in [
        (completion(""), ""),
        (completion(None), ""),
        (json.dumps(refusal).encode(), "I cannot help with that."),
    ]:
        with serving(replies(body)) as llm:
            assert ask(llm.url).problem == "no text in the message"
            reply = ask(llm.url, takes_empty=True)
        assert (reply.problem, reply.text, reply.finish) == ("", text, "stop")
    for finish in ("content_filter", "tool_calls"):
        with serving(replies(completion("", finish=finish))) as llm:
            assert f"(finish_reason {finish})" in ask(llm.url, takes_empty=True).problem


@pytest.mark.parametrize(
    "content, text",
    [
        ([{"type": "text", "text": "yes"}], "yes"),
        ([{"type": "text", "text": "ye"}, {"type": "output_text", "text": "s"}], "yes"),
        ([{"type": "thinking", "thinking": [{"text": "no"}]}, {"type": "text", "text": "yes"}],
         "yes"),
        (["yes"], "yes"),
        ([{"type": "image_url", "image_url": {}}], None),
        ([{"type": "text"}], None),
        ([7], None),
        ({"text": "yes"}, None),
        (7, None),
    ],
)  # fmt: skip
def test_content_in_parts(content, text):
    with serving(replies(completion(content))) as llm:
        reply = ask(llm.url)
    assert (reply.text, reply.problem) == (text or "", "" if text else "no text in the message")


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "over quota", "code": 429}},
        {"error": "over quota"},
        {"object": "error", "message": "over quota", "code": 503},
        {"choices": [{"error": {"message": "over quota"}, "message": {"content": "hal"}}]},
    ],
)
def test_error_inside_a_200_is_retried_and_reported(body):
    data = json.dumps(body).encode()
    with serving(replies(data, GOOD)) as llm:
        assert ask(llm.url).text == "hi" and len(llm.requests) == 2
    with serving(replies(data)) as llm:
        with pytest.raises(TransientError, match="status 200 with an error: over quota"):
            ask(llm.url)


def test_error_inside_a_200_is_handled_like_its_stated_status():
    for code in (400, "400", "context_length_exceeded"):
        body = json.dumps({"error": {"message": "too long", "code": code}}).encode()
        with serving(replies(body)) as llm:
            reply = ask(llm.url)
        assert reply.problem == "status 200 with an error: too long" and len(llm.requests) == 1
        assert reply.status == 400
    body = json.dumps({"error": {"message": "no such model", "code": 404}}).encode()
    with serving(replies(body)) as llm:
        with pytest.raises(EndpointError, match="no such model .code 404.; check") as caught:
            ask(llm.url)
    assert not isinstance(caught.value, TransientError) and len(llm.requests) == 1


# Names, and whether a server listens.


@pytest.mark.parametrize(
    "text, expected",
    [
        ("m@http://h:1/v1/", ("m", "http://h:1/v1")),
        ("m@20250929@https://h/v1", ("m@20250929", "https://h/v1")),
        ("@cf/acme/vision@http://h/v1", ("@cf/acme/vision", "http://h/v1")),
        ("a@http://b@http://h/v1", ("a@http://b", "http://h/v1")),
    ],
)
def test_model_names_may_contain_at_signs(text, expected):
    assert chat_api.parse_model_at_url(text) == expected


@pytest.mark.parametrize("text", ["m", "m@", "@http://h/v1", "http://h/v1", "m@ftp://u:pass@h"])
def test_invalid_model_at_url_is_rejected(text):
    with pytest.raises(EndpointError, match="use the form MODEL@URL, as") as caught:
        chat_api.parse_model_at_url(text)
    assert "pass" not in str(caught.value)


@pytest.mark.parametrize(
    "url, why", [(None, "refused"), ("http://no-such-host.invalid:80/v1", "cannot be reached")]
)
def test_unreachable_server_is_reported_within_two_seconds(url, why):
    start = time.monotonic()
    with pytest.raises(TransientError, match=f"{why}.*; start the server, or correct the URL"):
        chat_api.check_ready(at(url or llm_server.free_url()))
    assert time.monotonic() - start < chat_api.CONNECT_S + 0.5


def test_check_ready_sends_nothing():
    with serving() as llm:
        chat_api.check_ready(at(llm.url))
    assert llm.requests == []


# TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate of 127.0.0.1, with its key in one file."""
    if not (openssl := shutil.which("openssl")):
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -keyout key -out cert".split()
    words += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def tls(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert", certificate / "key")
    return context


def test_https(certificate, tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert"))
    monkeypatch.setenv("TEST_KEY", "sk-secret123")
    with serving(replies(500, GOOD), tls) as llm:
        listed = egress.parse_allowed_hosts([llm.url])
        assert ask(llm.url, "credentialed", key_env="TEST_KEY", listed=listed).text == "hi"
    assert llm.keys == ["Bearer sk-secret123"] * 2


def test_untrusted_certificate_is_rejected(tls, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with serving(replies(GOOD), tls) as llm:
        with pytest.raises(EndpointError, match="certificate not trusted .*; set SSL_CERT_FILE"):
            ask(llm.url)
    assert llm.requests == []


def test_slow_https_times_out(certificate, tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert"))
    with serving(replies(("drip", 5), GOOD), tls) as llm:
        assert ask(llm.url, timeout_s=0.5).text == "hi"
    assert len(llm.requests) >= 2


# The guard and the key.


def test_egress_is_checked_before_the_first_byte():
    with serving() as llm:
        with pytest.raises(egress.OutgoingError, match="credentialed data may not be sent to"):
            ask(llm.url, "credentialed")
        assert llm.connections == 0
        assert ask(llm.url, "credentialed", listed=egress.parse_allowed_hosts([llm.url])).text
    assert llm.connections == 1


def test_key_is_read_from_the_environment_and_never_shown(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-secret123\n")
    with serving(replies(completion("your key is sk-secret123"))) as llm:
        assert ask(llm.url, key_env="TEST_KEY").text == "your key is [key]"
    assert llm.keys == ["Bearer sk-secret123"]


@pytest.mark.parametrize("status", [400, 401, 500])
def test_error_that_echoes_the_key_hides_it(monkeypatch, status):
    monkeypatch.setenv("TEST_KEY", "sk-secret123")
    with serving(replies(("says", status, b"bad key sk-secret123 of you"))) as llm:
        try:
            message = str(ask(llm.url, key_env="TEST_KEY", retries=0))
        except EndpointError as error:
            message = str(error)
    assert "bad key [key] of you" in message and "secret" not in message


SECRET = "sk-secret/123+45?abc"  # noqa: S105
ECHOES = {
    "plain": SECRET,
    "JSON": "".join(f"\\u{ord(c):04x}" for c in SECRET),
    "JSON, in part": SECRET.replace("s", "\\u0073").replace("/", "\\/"),
    "JSON twice": json.dumps(json.dumps("".join(f"\\u{ord(c):04X}" for c in SECRET))),
    "URL": "".join(f"%{ord(c):02X}" for c in SECRET),
    "URL, in part": urllib.parse.quote(SECRET, safe=""),
    "HTML": "".join(f"&#{ord(c)};" for c in SECRET),
    "hexadecimal": SECRET.encode().hex(),
    "base64": base64.b64encode(SECRET.encode()).decode(),
    "base64 of a user and it": base64.b64encode(f"me:{SECRET}".encode()).decode(),
    "base64, URL": base64.urlsafe_b64encode(f"x:{SECRET}".encode()).decode(),
}


def readings(text: str) -> str:
    """A text in each form in which it could be read."""
    plain = text
    for _ in range(3):
        plain = re.sub(r"\\+u(\w{4})", lambda m: chr(int(m[1], 16)), plain).replace("\\", "")
    coded = re.findall(r"[A-Za-z0-9+/_-]{16,}", text)
    decoded = [
        base64.b64decode(c[: len(c) // 4 * 4], altchars=b"-_") for c in coded if "+" not in c
    ]
    decoded += [base64.b64decode(c[: len(c) // 4 * 4]) for c in coded if not {"-", "_"} & set(c)]
    forms = [text, plain, urllib.parse.unquote(text), html.unescape(text)]
    return " ".join([*forms, *(d.decode(errors="replace") for d in decoded)])


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize(
    "place", ["status line", "code", "body", "error", "error in 200", "finish", "text", "end"]
)
def test_echoed_key_is_hidden_everywhere(monkeypatch, tmp_path, place, echo):
    monkeypatch.setenv("TEST_KEY", SECRET)
    quoted = echo if echo.startswith("\\u") else json.dumps(echo)[1:-1]  # JSON escapes as they are
    template = completion("TEXT", finish="END").decode()
    say = {
        "status line": ("raw", f"{echo} nonsense\r\n\r\n".encode()),
        "code": ("raw", f"HTTP/1.1 4x1 {echo}\r\n\r\n".encode()),
        "body": f'{{"choice": "{quoted}"}}'.encode(),
        "error": ("says", 400, f"no: {echo}".encode()),
        "error in 200": f'{{"error": {{"message": "{quoted}", "code": 400}}}}'.encode(),
        "finish": template.replace("TEXT", " ").replace("END", 30 * "x" + quoted).encode(),
        "text": template.replace("TEXT", f"it is {quoted}.").replace("END", "stop").encode(),
        "end": b" " * 4 + b"\xf0\x9f\xa9\xba" * (chat_api.RAW_CHARS - 14) + echo.encode(),
    }[place]
    with serving(replies(say)) as llm, open_journal(tmp_path / "calls") as journal:
        where = at(llm.url, key_env="TEST_KEY", retries=0)
        try:
            reply = chat_api.request_completion(where, HELLO, "open", wait=threading.Event().wait)
            cached_chat_api.Cache(journal).put("k", "m", reply)
            message = json.dumps(dataclasses.asdict(reply), ensure_ascii=False)
        except EndpointError as error:
            message = str(error)
        message += (tmp_path / "calls").read_text()
    assert llm.keys == [f"Bearer {SECRET}"]
    for part in (SECRET, "secret/123"):
        assert part not in readings(message)


def test_short_placeholder_key_does_not_change_replies(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "none")
    with serving(replies(completion("There is none."))) as llm:
        assert ask(llm.url, key_env="TEST_KEY").text == "There is none."


ESCAPES = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202eltr"


@pytest.mark.parametrize("place", ["status line", "body", "error", "error in 200", "finish"])
def test_escape_sequences_of_a_server_do_not_reach_a_terminal(place):
    finish = json.loads(completion(" ", finish=ESCAPES))
    say = {
        "status line": ("raw", f"{ESCAPES}\r\n\r\n".encode()),
        "body": ("says", 500, ESCAPES.encode()),
        "error": ("says", 404, ESCAPES.encode()),
        "error in 200": json.dumps({"error": {"message": ESCAPES, "code": 400}}).encode(),
        "finish": json.dumps(finish).encode(),
    }[place]
    with serving(replies(say)) as llm:
        try:
            message = ask(llm.url, retries=0).problem
        except EndpointError as error:
            message = str(error)
    assert message.isprintable() and "red" in message


def test_key_given_as_variable_name_is_hidden():
    with pytest.raises(EndpointError, match="variable .hidden: key_env is the NAME") as caught:
        chat_api.check_ready(at("http://localhost:1/v1", key_env="sk-secret123"))
    assert "secret123" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "two words", "sk-séc", "a\nb"])
def test_invalid_key_is_rejected(monkeypatch, value):
    monkeypatch.delenv("TEST_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEST_KEY", value)
    with serving() as llm:
        with pytest.raises(EndpointError, match="variable TEST_KEY has no usable key") as caught:
            ask(llm.url, key_env="TEST_KEY")
    assert llm.connections == 0 and (not value or value not in str(caught.value))


def test_key_is_sent_over_https_only(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-secret123")
    with pytest.raises(EndpointError, match="would be sent unencrypted over http"):
        ask("http://llm.invalid:8000/v1", key_env="TEST_KEY")


def test_reserved_parameters_are_rejected():
    with pytest.raises(EndpointError, match="'stream' is reserved"):
        at("http://localhost:1", parameters={"stream": True})
    with pytest.raises(EndpointError, match="has no model"):
        at("http://localhost:1", model="")


def test_cost():
    assert chat_api.cost(at("http://localhost:1"), 10, 10) is None
    priced = at("http://localhost:1", price_in=2.0, price_out=10.0)
    assert chat_api.cost(priced, 1_000_000, 200_000) == 4.0


@pytest.mark.parametrize(
    "behavior",
    [
        *(("says", status, b"no: hello") for status in (400, 404, 500)),
        ("raw", b"hello nonsense\r\n\r\n"),
        b'{"error": {"message": "no: hello", "code": 404}}',
        b'{"error": "no: hello"}',
    ],
)
@pytest.mark.parametrize("data_class", ["open", "credentialed"])
def test_server_text_about_credentialed_rows_is_not_quoted(behavior, data_class):
    with serving(replies(behavior)) as llm:
        try:
            listed = frozenset({egress.parse_address(llm.url).name})
            shown = ask(llm.url, data_class, listed=listed, retries=0).problem
        except (EndpointError, TransientError) as error:
            shown = str(error)
    assert shown and ("hello" in shown) == (data_class == "open")
