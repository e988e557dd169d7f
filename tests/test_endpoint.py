"""One call and many of them against a real server that also answers badly, slowly or not at all."""

import email.utils
import json
import shutil
import ssl
import subprocess
import threading
import time

import llm_server
import pytest
from llm_server import at, completion, replies, serving, short_waits  # noqa: F401

from data import endpoint, outgoing
from data.endpoint import EndpointError, NoReply, Reply

HELLO = [{"role": "user", "content": "hello"}]
GOOD = completion("hi")


def ask(url: str, data_class: str = "open", **changes) -> Reply:
    return endpoint.ask(at(url, **changes), HELLO, data_class, wait=threading.Event().wait)


def test_a_good_reply():
    with serving(replies(GOOD)) as llm:
        reply = ask(llm.url)
    assert reply == Reply(status=200, text="hi", finish="stop", tokens_in=100, tokens_out=10)
    assert llm.requests == [{"model": "m", "messages": HELLO, "temperature": 0}]
    assert llm.keys == [None]


# Retries.


def test_429_waits_as_long_as_it_is_told():
    told = ("status", 429, {"Retry-After": "0.6"})
    with serving(replies(told, GOOD)) as llm:
        assert ask(llm.url).text == "hi"
    assert llm.times[1] - llm.times[0] >= 0.6


def test_retry_after_may_be_a_date():
    until = email.utils.formatdate(time.time() + 2, usegmt=True)
    with serving(replies(("status", 503, {"Retry-After": until}), GOOD)) as llm:
        assert ask(llm.url).text == "hi"
    assert llm.times[1] - llm.times[0] >= 0.9  # the date has whole seconds


@pytest.mark.parametrize("junk", ["soon", "-1", "1e9999", "9" * 4_000, "\x7f"])
def test_a_retry_after_that_is_none_is_not_followed(junk):
    with serving(replies(("status", 429, {"Retry-After": junk}), GOOD)) as llm:
        assert ask(llm.url).text == "hi"


def test_too_long_a_wait_is_refused():
    with serving(replies(("status", 429, {"Retry-After": "3600"}))) as llm:
        with pytest.raises(NoReply, match="asks to wait 3600 s .* more than max_wait_s 5"):
            ask(llm.url)
    assert len(llm.requests) == 1


@pytest.mark.parametrize(
    "bad", [500, 502, 503, 408, 429, "reset", ("cut", GOOD), b"<html>", b"[]", b"{}",
            b'{"choices": []}', b'{"choices": [null]}', b'{"choices": [{"message": "hi"}]}',
            b'{"choices": ' * 50_000, b"\xff\xfe{", b"1" * 5_000],
)  # fmt: skip
def test_what_may_pass_is_asked_again(bad):
    with serving(replies(bad, GOOD)) as llm:
        assert ask(llm.url, max_reply_bytes=10**6).text == "hi"
    assert len(llm.requests) == 2


def test_slow_is_asked_again():
    with serving(replies(("slow", 0.6), GOOD)) as llm:
        assert ask(llm.url, timeout_s=0.3).text == "hi"


@pytest.mark.parametrize("how", ["drip", "drip headers", "drip, no length"])
def test_dripping_bytes_do_not_stretch_the_timeout(how):
    with serving(replies((how, 5))) as llm:
        start = time.monotonic()
        with pytest.raises(NoReply, match=r"no reply after 2 attempts \(more than 0.3 s\)"):
            ask(llm.url, timeout_s=0.3, retries=1)
    assert time.monotonic() - start < 2 and len(llm.requests) == 2


@pytest.mark.parametrize("bad", [500, "reset", ("cut", GOOD)])
def test_in_the_end_there_is_no_reply(bad):
    with serving(replies(bad)) as llm:
        with pytest.raises(NoReply, match="m at 127.0.0.1:.*: no reply after 3 attempts"):
            ask(llm.url)
    assert len(llm.requests) == 3


def test_nobody_listens():
    with pytest.raises(NoReply, match="refused"):
        ask(llm_server.free_url())


def test_waiting_is_given_up_when_asked_to():
    stop = threading.Event()
    stop.set()
    with serving(replies(500)) as llm, pytest.raises(NoReply, match="stopped while waiting"):
        endpoint.ask(at(llm.url), HELLO, "open", wait=stop.wait)
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
            "cut off at the most tokens allowed (finish_reason length; no max_tokens was sent)",
        ),
    ],
)
def test_a_reply_that_cannot_be_used_is_kept(body, problem):
    with serving(replies(body)) as llm:
        reply = ask(llm.url)
    assert (reply.status, reply.problem, reply.text) == (200, problem, "")
    assert reply.raw == body.decode()


def test_a_huge_reply_is_not_read_and_not_asked_again():
    with serving(replies(("huge", 2**30))) as llm:
        start = time.monotonic()
        reply = ask(llm.url)
    assert reply.problem == "longer than 100000 bytes" and len(reply.raw) == endpoint.RAW_CHARS
    assert len(llm.requests) == 1 and time.monotonic() - start < 5


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": -1}, {"prompt_tokens": "7"},
                                   {"prompt_tokens": True}, {"prompt_tokens": 1e3}])  # fmt: skip
def test_a_usage_that_is_no_count_is_not_believed(usage):
    body = json.dumps(json.loads(GOOD) | {"usage": usage}).encode()
    with serving(replies(body)) as llm:
        reply = ask(llm.url)
    assert (reply.text, reply.tokens_in, reply.tokens_out) == ("hi", None, None)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_request_can_be_refused(status):
    with serving(replies(status)) as llm:
        reply = ask(llm.url)
    assert reply.status == status and reply.problem.startswith(f"status {status}: ")
    assert len(llm.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_settings_are_an_error_at_once(status):
    with serving(replies(status)) as llm:
        with pytest.raises(EndpointError, match=f"status {status}: .* look at the URL") as caught:
            ask(llm.url)
    assert not isinstance(caught.value, NoReply) and len(llm.requests) == 1


def test_a_redirect_is_not_followed():
    with (
        serving() as other,
        serving(replies(("status", 307, {"Location": f"{other.url}/chat/completions"}))) as llm,
    ):
        with pytest.raises(EndpointError, match="redirects elsewhere"):
            ask(llm.url)
    assert other.connections == 0


def test_no_proxy_is_used(monkeypatch):
    with serving() as proxy, serving(replies(GOOD)) as llm:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert ask(llm.url).text == "hi"
    assert proxy.connections == 0


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
        listed = outgoing.hosts([llm.url])
        assert ask(llm.url, "credentialed", key_env="TEST_KEY", listed=listed).text == "hi"
    assert llm.keys == ["Bearer sk-secret123"] * 2


def test_a_certificate_that_nobody_vouches_for(tls, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with serving(replies(GOOD), tls) as llm:
        with pytest.raises(EndpointError, match="certificate not trusted .*; give SSL_CERT_FILE"):
            ask(llm.url)
    assert llm.requests == []


def test_https_that_drips(certificate, tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert"))
    with serving(replies(("drip", 5), GOOD), tls) as llm:
        assert ask(llm.url, timeout_s=0.5).text == "hi"
    assert len(llm.requests) >= 2


# The guard and the key.


def test_the_guard_comes_before_the_first_byte():
    with serving() as llm:
        with pytest.raises(outgoing.OutgoingError, match="credentialed data may not go to"):
            ask(llm.url, "credentialed")
        assert llm.connections == 0
        assert ask(llm.url, "credentialed", listed=outgoing.hosts([llm.url])).text
    assert llm.connections == 1


def test_the_key_comes_from_the_environment_and_shows_nowhere(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-secret123\n")
    with serving(replies(completion("your key is sk-secret123"))) as llm:
        assert ask(llm.url, key_env="TEST_KEY").text == "your key is [key]"
    assert llm.keys == ["Bearer sk-secret123"]


@pytest.mark.parametrize("status", [400, 401, 500])
def test_an_error_that_echoes_the_key_does_not_show_it(monkeypatch, status):
    monkeypatch.setenv("TEST_KEY", "sk-secret123")
    with serving(replies(("says", status, b"bad key sk-secret123 of you"))) as llm:
        try:
            said = str(ask(llm.url, key_env="TEST_KEY", retries=0))
        except EndpointError as error:
            said = str(error)
    assert "bad key [key] of you" in said and "secret" not in said


@pytest.mark.parametrize("value", [None, "", "two words", "sk-séc", "a\nb"])
def test_a_key_that_is_none(monkeypatch, value):
    monkeypatch.delenv("TEST_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEST_KEY", value)
    with serving() as llm:
        with pytest.raises(EndpointError, match="variable TEST_KEY has no usable key") as caught:
            ask(llm.url, key_env="TEST_KEY")
    assert llm.connections == 0 and (not value or value not in str(caught.value))


def test_a_key_goes_over_https_only(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-secret123")
    with pytest.raises(EndpointError, match="would be readable over http"):
        ask("http://llm.invalid:8000/v1", key_env="TEST_KEY")


def test_settings_that_are_ours():
    with pytest.raises(EndpointError, match="'stream' is not yours to set"):
        at("http://localhost:1", parameters={"stream": True})
    with pytest.raises(EndpointError, match="has no model"):
        at("http://localhost:1", model="")


def test_cost():
    assert endpoint.cost(at("http://localhost:1"), 10, 10) is None
    priced = at("http://localhost:1", price_in=2.0, price_out=10.0)
    assert endpoint.cost(priced, 1_000_000, 200_000) == 4.0
