"""One call and many of them against a real server that also answers badly, slowly or not at all."""

import email.utils
import json
import threading
import time

import llm_server
import pytest
from llm_server import completion, replies, serving

from data import asking, endpoint, outgoing
from data.asking import Ask, Cache
from data.endpoint import Endpoint, EndpointError, NoReply, Reply
from data.journal import JournalError, open_journal

HELLO = [{"role": "user", "content": "hello"}]
GOOD = completion("hi")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)


def at(url: str, **changes) -> Endpoint:
    settings = dict(model="m", url=url, parameters={"temperature": 0}, listed=frozenset())
    settings |= dict(key_env="", timeout_s=5.0, retries=2, max_wait_s=5.0, max_reply_bytes=100_000)
    return Endpoint(**(settings | dict(price_in=None, price_out=None) | changes))


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


def test_dripping_bytes_do_not_stretch_the_timeout():
    with serving(replies(("drip", 5))) as llm:
        start = time.monotonic()
        with pytest.raises(NoReply, match=r"after 2 attempts \((more than 0.3 s|timed out)"):
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
        (b'{"error": "quota"}', "no choices with a message"),
        (completion(None), "no text in the message"),
        (completion("  "), "no text in the message"),
        (completion("hal", finish="length"), "cut off at the most tokens allowed"),
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


# The guard and the key.


def test_the_guard_comes_before_the_first_byte():
    with serving() as llm:
        with pytest.raises(outgoing.OutgoingError, match="credentialed data may not go to"):
            ask(llm.url, "credentialed")
        assert llm.connections == 0
        assert ask(llm.url, "credentialed", listed=outgoing.hosts([llm.url])).text
    assert llm.connections == 1


def test_the_key_comes_from_the_environment_and_shows_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("TEST_KEY", "sk-secret123\n")
    echo = completion("your key is sk-secret123")
    with serving(replies(echo)) as llm, open_journal(tmp_path / "calls") as journal:
        found = list(ask_all(at(llm.url, key_env="TEST_KEY"), "a", cache=Cache(journal)))
    assert llm.keys == ["Bearer sk-secret123"]
    assert found[0][1].text == "your key is [key]"
    assert "secret" not in (tmp_path / "calls").read_text()
    with serving(lambda *_: ("status", 401, {"X": "y"})) as llm:
        with pytest.raises(EndpointError) as caught:
            ask(llm.url, key_env="TEST_KEY")
    assert "secret" not in str(caught.value)


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


# Many calls.


def ask_all(where: Endpoint, names, *, cache: Cache, concurrency=4, stopped=lambda: False):
    asks = [Ask(id=n, messages=[{"role": "user", "content": n}], data_class="open") for n in names]
    return asking.ask_all(where, asks, cache, concurrency=concurrency, stopped=stopped)


NAMES = [f"q{i}" for i in range(12)]


def of(request: dict) -> str:
    return request["messages"][0]["content"]


def test_nothing_is_asked_twice(tmp_path):
    with serving(lambda request, n: completion(of(request).upper())) as llm:
        for _ in range(2):
            with open_journal(tmp_path / "calls") as journal:
                cache = Cache(journal)
                found = {o.id: r.text for o, r in ask_all(at(llm.url), NAMES * 2, cache=cache)}
            assert found == {name: name.upper() for name in NAMES}
        assert sorted(map(of, llm.requests)) == sorted(NAMES)
        with open_journal(tmp_path / "calls") as journal:
            other = at(llm.url, parameters={"temperature": 1})
            assert len(list(ask_all(other, NAMES, cache=Cache(journal)))) == 12
    assert len(llm.requests) == 24


def test_some_are_asked_at_once_and_no_more(tmp_path):
    def behave(request, n):
        time.sleep(0.1)
        return GOOD

    with serving(behave) as llm, open_journal(tmp_path / "calls") as journal:
        list(ask_all(at(llm.url), NAMES, cache=Cache(journal), concurrency=3))
    assert llm.most_at_once == 3


def test_one_that_is_refused_has_that_reply(tmp_path):
    """Even as the first: what was doubtful is believed once the endpoint answered another."""
    with serving(lambda request, n: 400 if of(request) == "q0" else GOOD) as llm:
        for _ in range(2):
            with open_journal(tmp_path / "calls") as journal:
                found = {
                    o.id: r
                    for o, r in ask_all(at(llm.url), NAMES, cache=Cache(journal), concurrency=1)
                }
            assert found["q0"].status == 400 and len(found) == 12
    assert len(llm.requests) == 12


@pytest.mark.parametrize("bad", [400, b"<html>", completion("x", finish="length"), 500])
def test_an_endpoint_that_never_answers_well_stops_the_work(tmp_path, bad):
    with serving(lambda request, n: bad) as llm, open_journal(tmp_path / "calls") as journal:
        with pytest.raises(EndpointError, match="10 calls in a row had no usable reply"):
            list(ask_all(at(llm.url, retries=0), NAMES, cache=Cache(journal)))
    assert (tmp_path / "calls").read_bytes() == b""


def test_a_few_without_a_reply_are_told_apart(tmp_path):
    with serving(lambda request, n: 500 if of(request) == "q3" else GOOD) as llm:
        with open_journal(tmp_path / "calls") as journal:
            found = {o.id: r for o, r in ask_all(at(llm.url), NAMES, cache=Cache(journal))}
            assert [i for i, r in found.items() if isinstance(r, NoReply)] == ["q3"]
            again = list(ask_all(at(llm.url), ["q3"], cache=Cache(journal)))
            assert isinstance(again[0][1], NoReply)  # asked again, since it was not recorded
    assert len(llm.requests) == 11 + 2 * 3


def test_asked_to_stop_it_takes_what_is_in_flight(tmp_path):
    def behave(request, n):
        time.sleep(0.3)
        return GOOD

    with serving(behave) as llm, open_journal(tmp_path / "calls") as journal:
        stop = lambda: len(llm.requests) >= 3  # noqa: E731
        found = list(ask_all(at(llm.url), NAMES, cache=Cache(journal), concurrency=3, stopped=stop))
    assert len(found) == len(llm.requests) == 3 and all(r.text == "hi" for _, r in found)


def test_a_fatal_error_ends_all(tmp_path):
    with serving(lambda request, n: 401 if of(request) == "q5" else GOOD) as llm:
        with open_journal(tmp_path / "calls") as journal:
            with pytest.raises(EndpointError, match="status 401"):
                list(ask_all(at(llm.url), NAMES, cache=Cache(journal), concurrency=1))
    assert len(llm.requests) == 6


def test_the_estimate_leaves_out_what_is_known(tmp_path):
    asks = [Ask(id=n, messages=[{"role": "user", "content": n * 20}], data_class="open")
            for n in ("ab", "cd", "ab")]  # fmt: skip
    with serving(replies(GOOD)) as llm, open_journal(tmp_path / "calls") as journal:
        cache, where = Cache(journal), at(llm.url)
        both = asking.estimate(where, asks, cache, tokens_out=7)
        assert both == dict(calls=2, tokens_in=2 * (10 + 8), tokens_out=14)
        list(asking.ask_all(where, asks[:1], cache, concurrency=1, stopped=lambda: False))
        assert asking.estimate(where, asks, cache, tokens_out=7)["calls"] == 1


# The journal.


def test_a_line_that_a_crash_cut_short_is_taken_off(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    with open_journal(path) as journal:
        assert journal.rows == [{"a": 1}]
        journal.append({"a": "half \ud800 pair"}, {"a": 3})
    with open_journal(path) as journal:
        assert [row["a"] for row in journal.rows] == [1, "half \ud800 pair", 3]


@pytest.mark.parametrize("bad", [b"{\n", b"[1]\n", b'{"a": 1}\x00\n', b"[" * 100_000 + b"\n"])
def test_damage_is_an_error(tmp_path, bad):
    path = tmp_path / "j"
    path.write_bytes(b'{"a": 1}\n' + bad + b'{"a": 2}\n')
    with pytest.raises(JournalError, match="line 2: not"), open_journal(path):
        pass


def test_one_process_writes(tmp_path):
    with open_journal(tmp_path / "j"):
        with pytest.raises(JournalError, match="another process is writing it"):
            with open_journal(tmp_path / "j"):
                pass
    with open_journal(tmp_path / "j"):
        pass


def test_a_new_journal_is_its_owners(tmp_path):
    with open_journal(tmp_path / "j"):
        assert (tmp_path / "j").stat().st_mode & 0o077 == 0
    with pytest.raises(JournalError, match="cannot be opened"), open_journal(tmp_path / "no" / "j"):
        pass


def test_a_cache_that_is_none(tmp_path):
    (tmp_path / "calls").write_text('{"key": "a"}\n')
    with open_journal(tmp_path / "calls") as journal:
        with pytest.raises(EndpointError, match="a line is no reply; name another cache"):
            Cache(journal)
