"""Concurrent calls of a real server, none repeated, and the journal that stores the replies."""

import os
import threading
import time

import pytest
from llm_server import at, completion, replies, serving, short_waits  # noqa: F401

from medmax_jax.endpoints import cached_chat_api
from medmax_jax.endpoints.cached_chat_api import Cache, ChatRequest
from medmax_jax.endpoints.chat_api import Endpoint, EndpointError, TransientError
from medmax_jax.io.journal import JournalError, open_journal
from medmax_jax.storage.atomic_folder import private_umask

GOOD = completion("hi")


def ask_all(where: Endpoint, names, *, cache: Cache, concurrency=4, stopped=lambda: False):
    asks = [
        ChatRequest(id=n, messages=[{"role": "user", "content": n}], data_class="open")
        for n in names
    ]
    return cached_chat_api.complete_all(
        where, asks, cache, concurrency=concurrency, stopped=stopped
    )


NAMES = [f"q{i}" for i in range(12)]


def of(request: dict) -> str:
    return request["messages"][0]["content"]


def test_no_request_is_sent_twice(tmp_path):
    with serving(lambda request, n: completion(of(request).upper())) as llm:
        for _ in range(2):
            with open_journal(tmp_path / "calls") as journal:
                cache = Cache(journal)
                replies_by_id = {
                    o.id: r.text for o, r in ask_all(at(llm.url), NAMES * 2, cache=cache)
                }
            assert replies_by_id == {name: name.upper() for name in NAMES}
        assert sorted(map(of, llm.requests)) == sorted(NAMES)
        with open_journal(tmp_path / "calls") as journal:
            other = at(llm.url, parameters={"temperature": 1})
            assert len(list(ask_all(other, NAMES, cache=Cache(journal)))) == 12
    assert len(llm.requests) == 24


def test_concurrency_is_limited(tmp_path):
    together = threading.Barrier(3)

    def behave(request, n):
        together.wait(timeout=20)
        return GOOD

    with serving(behave) as llm, open_journal(tmp_path / "calls") as journal:
        list(ask_all(at(llm.url), NAMES, cache=Cache(journal), concurrency=3))
    assert llm.most_at_once == 3


def test_refused_request_keeps_its_reply(tmp_path):
    """Even the first: a doubtful reply is accepted once the endpoint answered another request."""
    with serving(lambda request, n: 400 if of(request) == "q0" else GOOD) as llm:
        for _ in range(2):
            with open_journal(tmp_path / "calls") as journal:
                replies_by_id = {
                    o.id: r
                    for o, r in ask_all(at(llm.url), NAMES, cache=Cache(journal), concurrency=1)
                }
            assert replies_by_id["q0"].status == 400 and len(replies_by_id) == 12
    assert len(llm.requests) == 12


@pytest.mark.parametrize("bad", [400, b"<html>", completion("x", finish="length"), 500])
def test_endpoint_without_usable_replies_stops_the_run(tmp_path, bad):
    with serving(lambda request, n: bad) as llm, open_journal(tmp_path / "calls") as journal:
        with pytest.raises(EndpointError, match="10 calls in a row had no usable reply"):
            list(ask_all(at(llm.url, retries=0), NAMES, cache=Cache(journal)))
    assert (tmp_path / "calls").read_bytes() == b""


def test_requests_without_reply_are_reported_separately(tmp_path):
    with serving(lambda request, n: 500 if of(request) == "q3" else GOOD) as llm:
        with open_journal(tmp_path / "calls") as journal:
            replies_by_id = {o.id: r for o, r in ask_all(at(llm.url), NAMES, cache=Cache(journal))}
            assert [i for i, r in replies_by_id.items() if isinstance(r, TransientError)] == ["q3"]
            again = list(ask_all(at(llm.url), ["q3"], cache=Cache(journal)))
            assert isinstance(
                again[0][1], TransientError
            )  # requested again, because it was not recorded
    assert len(llm.requests) == 11 + 2 * 3


def test_stop_collects_requests_in_flight(tmp_path):
    together = threading.Barrier(3)

    def behave(request, n):
        together.wait(timeout=20)
        return GOOD

    with serving(behave) as llm, open_journal(tmp_path / "calls") as journal:
        stop = lambda: len(llm.requests) >= 3  # noqa: E731
        replies_by_id = list(
            ask_all(at(llm.url), NAMES, cache=Cache(journal), concurrency=3, stopped=stop)
        )
    assert len(replies_by_id) == len(llm.requests) == 3 and all(
        r.text == "hi" for _, r in replies_by_id
    )


def test_fatal_error_stops_all_requests(tmp_path):
    with serving(lambda request, n: 401 if of(request) == "q5" else GOOD) as llm:
        with open_journal(tmp_path / "calls") as journal:
            with pytest.raises(EndpointError, match="status 401"):
                list(ask_all(at(llm.url), NAMES, cache=Cache(journal), concurrency=1))
    assert len(llm.requests) == 6


def test_fatal_error_does_not_wait_for_retries(tmp_path):
    def behave(request, n):
        if of(request) == "q0":
            time.sleep(0.3)
            return 401
        return ("status", 429, {"Retry-After": "30"})

    start = time.monotonic()
    with serving(behave) as llm, open_journal(tmp_path / "calls") as journal:
        with pytest.raises(EndpointError, match="status 401"):
            list(ask_all(at(llm.url, max_wait_s=60.0), NAMES, cache=Cache(journal)))
    assert time.monotonic() - start < 10 and len(llm.requests) == 4


def test_estimate_excludes_cached_replies(tmp_path):
    asks = [ChatRequest(id=n, messages=[{"role": "user", "content": n * 20}], data_class="open")
            for n in ("ab", "cd", "ab")]  # fmt: skip
    with serving(replies(GOOD)) as llm, open_journal(tmp_path / "calls") as journal:
        cache, where = Cache(journal), at(llm.url)
        both = cached_chat_api.estimate(where, asks, cache, tokens_out=7)
        assert both == dict(calls=2, tokens_in=2 * (10 + 8), tokens_out=14)
        list(
            cached_chat_api.complete_all(
                where, asks[:1], cache, concurrency=1, stopped=lambda: False
            )
        )
        assert cached_chat_api.estimate(where, asks, cache, tokens_out=7)["calls"] == 1


# The journal.


def test_truncated_last_line_is_removed(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    with open_journal(path) as journal:
        assert journal.rows == [{"a": 1}]
        journal.append({"a": "half \ud800 pair"}, {"a": 3})
    with open_journal(path) as journal:
        assert [row["a"] for row in journal.rows] == [1, "half \ud800 pair", 3]


@pytest.mark.parametrize("bad", [b"{\n", b"[1]\n", b'{"a": 1}\x00\n', b"[" * 100_000 + b"\n"])
def test_damaged_journal_is_an_error(tmp_path, bad):
    path = tmp_path / "j"
    path.write_bytes(b'{"a": 1}\n' + bad + b'{"a": 2}\n')
    with pytest.raises(JournalError, match="line 2: not"), open_journal(path):
        pass


def test_only_one_process_writes_a_journal(tmp_path):
    with open_journal(tmp_path / "j"):
        with pytest.raises(JournalError, match="another process is writing it"):
            with open_journal(tmp_path / "j"):
                pass
    with open_journal(tmp_path / "j"):
        pass


def test_full_disk_leaves_no_partial_line(tmp_path, monkeypatch):
    real = os.write

    def full(descriptor, data):
        if len(data) > 5:
            return real(descriptor, data[:5])
        raise OSError(28, "No space left on device")

    with open_journal(tmp_path / "j") as journal:
        journal.append({"a": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(JournalError, match="No space left on device.; free disk space"):
                journal.append({"a": 2})
        journal.append({"a": 3})
    with open_journal(tmp_path / "j") as journal:
        assert journal.rows == [{"a": 1}, {"a": 3}]


def test_new_journal_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with open_journal(tmp_path / "j"), private_umask(), open_journal(tmp_path / "private"):
            modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("j", "private")]
    finally:
        os.umask(before)
    assert modes == [0o640, 0o600]
    with pytest.raises(JournalError, match="cannot open"), open_journal(tmp_path / "no" / "j"):
        pass


def test_invalid_cache_is_rejected(tmp_path):
    (tmp_path / "calls").write_text('{"key": "a"}\n')
    with open_journal(tmp_path / "calls") as journal:
        with pytest.raises(EndpointError, match="a line is not a reply; use another cache"):
            Cache(journal)
