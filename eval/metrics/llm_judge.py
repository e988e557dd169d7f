"""Judges answers with a language model: several votes, both orders, tagged verdicts.

    cases -> messages, the texts as JSON strings -> medmax_jax/endpoints/cached_chat_api.py (guard,
    cache, retries)
          -> the last verdict with the case's own tag -> votes; none: retried, then unscored

The tag is a hash of the case with its answer, so no answer can contain a verdict on itself: a
verdict with another tag, or none, does not count, wherever it appears. Each repeat has its own
`seed` among the parameters, which is part of the cache's key together with the pinned model; the
same run repeats no request.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.endpoints import cached_chat_api, egress, reasoning
from medmax_jax.endpoints.chat_api import Endpoint, Messages, Reply, TransientError, cost

FOLDER = Path(__file__).parents[1] / "prompts"
CORRECT, RELATIVE, READ = "judge_correct", "judge_relative", "judge_read"
NOT_REQUESTED = "not requested: stopped, or max_usd is spent"
READ_CHARS = 20_000  # of the end of a reply, where the verdict is
MIN_SCORE, MAX_SCORE = 1, 10  # of a comparison
# Names that the provider moves to other weights; gpt-oss has weights of its own.
_UNPINNED = re.compile(
    r"(?:chatgpt|gpt-(?!oss)|o\d)(?!.*\d{4}-?\d{2}-?\d{2}$)(?!.*-\d{4}$)|.*latest$"
)
_STATED = re.compile("[A-Z]|yes|no|none")

Progress = Callable[[str], None]


class JudgeError(ValueError):
    """Raised for an unusable judge; the message names the field and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """Configures the judge and its repeats. `attempts`: calls per vote until a reply is readable.

    `max_usd`: no call begins once this amount is spent; None for no limit. `tokens_out`: of a
    reply, for the estimate. `read_unparsed`: it also reads the answers that cannot be parsed.
    """

    endpoint: Endpoint
    repeats: int
    attempts: int
    concurrency: int
    seed: int
    max_usd: float | None
    tokens_out: int
    read_unparsed: bool = False

    def __post_init__(self):
        for name in ("repeats", "attempts", "concurrency", "tokens_out"):
            if getattr(self, name) < 1:
                raise JudgeError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if "temperature" not in self.endpoint.parameters:
            raise JudgeError(
                "parameters: temperature is missing, so the endpoint would use its own; set it, "
                "preferably to 0"
            )
        if "seed" in self.endpoint.parameters:
            raise JudgeError(
                "parameters: seed is set for each repeat; remove it, and set judge.seed"
            )
        if _UNPINNED.match(self.endpoint.model):
            raise JudgeError(
                f"model {self.endpoint.model!r} is a name that the provider may assign to other "
                "weights; use a name with a date, like gpt-4o-mini-2024-07-18"
            )
        if self.max_usd is not None and cost(self.endpoint, 0, 0) is None:
            raise JudgeError(
                "max_usd requires price_in and price_out; set both, or remove the limit"
            )

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of model, parameters, prompts and repeats.

        Verdicts with equal fingerprints are comparable.
        """
        facts = [self.endpoint.model, dict(self.endpoint.parameters), self.repeats, self.seed]
        facts += [_prompt(CORRECT), _prompt(RELATIVE)]
        facts += [_prompt(READ)] if self.read_unparsed else []
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Holds an answer to be judged, with the class of its data."""

    id: str
    question: str
    context: str
    reference: str
    answer: str
    data_class: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgment:
    """Holds the votes on one case: 0 or 1, (reference, answer) scores, or what it states.

    Without votes: see `why`.
    """

    id: str
    votes: tuple
    why: tuple[str, ...]


@dataclasses.dataclass
class Usage:
    """Counts this run's own calls; `usd` is None without prices."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float | None = None


def correctness(
    judge: Judge,
    cases: Sequence[Case],
    cache: cached_chat_api.Cache,
    *,
    stopped: Callable[[], bool],
    progress: Progress,
) -> tuple[list[Judgment], Usage]:
    """Return `repeats` votes of 0 or 1 on each case."""
    return _collect_votes(judge, CORRECT, cases, cache, stopped, progress)


def relative(
    judge: Judge,
    cases: Sequence[Case],
    cache: cached_chat_api.Cache,
    *,
    stopped: Callable[[], bool],
    progress: Progress,
) -> tuple[list[Judgment], Usage]:
    """Return `repeats` votes per case, each the mean of both orders to cancel position bias."""
    return _collect_votes(judge, RELATIVE, cases, cache, stopped, progress)


def read(
    judge: Judge,
    cases: Sequence[Case],
    cache: cached_chat_api.Cache,
    *,
    stopped: Callable[[], bool],
    progress: Progress,
) -> tuple[list[Judgment], Usage]:
    """Return `repeats` votes per case: the letter it states, "yes", "no" or "none".

    The judge is not shown the reference.
    """
    return _collect_votes(judge, READ, cases, cache, stopped, progress)


def estimate(
    judge: Judge, kind: str, cases: Sequence[Case], cache: cached_chat_api.Cache | None
) -> dict[str, Any]:
    """Return the remaining calls, tokens and USD if every first reply can be read."""
    total = dict(calls=0, tokens_in=0, tokens_out=0)
    for repeat in range(judge.repeats):
        requests = [request for _, request in _requests(kind, cases)]
        pass_estimate = cached_chat_api.estimate(
            _seeded(judge, repeat, 0), requests, cache, tokens_out=judge.tokens_out
        )
        total = {name: total[name] + pass_estimate[name] for name in total}
    return total | {"usd": cost(judge.endpoint, total["tokens_in"], total["tokens_out"])}


def parse_verdict(kind: str, text: str, tag: str) -> float | tuple[float, float] | str | None:
    """Return the last tagged verdict of a reply: 0 or 1, (first, second), or what is stated.

    None without one.

    A verdict inside the reasoning of a reasoning model does not count.
    """
    verdict = None
    final = reasoning.final_answer(text) or ""
    for candidate in _objects(final[-READ_CHARS:]):
        if candidate.get("case") != tag:
            continue
        if kind == CORRECT and isinstance(candidate.get("correct"), bool):
            verdict = float(candidate["correct"])
        elif kind == READ and _STATED.fullmatch(str(candidate.get("states"))):
            verdict = candidate["states"]
        elif kind == RELATIVE and all(
            _is_score(candidate.get(name)) for name in ("first", "second")
        ):
            verdict = (float(candidate["first"]), float(candidate["second"]))
    return verdict


def messages(kind: str, case: Case, *, swapped: bool) -> tuple[Messages, str]:
    """Return the request for a case and its verdict's tag. `swapped`: the answer is first."""
    fields: dict[str, str] = {"question": case.question}
    if kind == CORRECT:
        fields |= {"reference": case.reference, "answer": case.answer}
    elif kind == READ:
        fields |= {"answer": case.answer}
    else:
        both = [case.reference, case.answer]
        first, second = reversed(both) if swapped else both
        fields |= {"context": case.context, "first": first, "second": second}
    tag = hashlib.sha256(json.dumps([kind, case.id, fields]).encode()).hexdigest()[:8]
    user = json.dumps({"case": tag} | fields, ensure_ascii=False, indent=1)
    request = [{"role": "system", "content": _prompt(kind)}, {"role": "user", "content": user}]
    return request, tag


def _collect_votes(judge: Judge, kind: str, cases, cache, stopped, progress):
    total = estimate(judge, kind, cases, cache)
    where = egress.parse_address(judge.endpoint.url).name
    progress(
        f"{judge.endpoint.model} at {where} receives the texts of {len(cases)} answers: at most "
        f"{total['calls']} calls, {_usd(total['usd'])}; more for replies that cannot be parsed"
    )
    if judge.max_usd is not None and total["usd"] > judge.max_usd:
        raise JudgeError(
            f"max_usd is {judge.max_usd:g} but judging costs {_usd(total['usd'])}; increase it, "
            "or judge fewer answers"
        )
    voting = _VotingRun(judge, kind, cases, cache, stopped)
    for repeat in range(judge.repeats):
        voting.repeat(repeat)
    progress(
        f"spent: {voting.usage.calls} calls, {voting.usage.tokens_in} tokens in, "
        f"{voting.usage.tokens_out} out, {_usd(voting.usage.usd)}"
    )
    return [voting.result(number) for number in range(len(cases))], voting.usage


class _VotingRun:
    """Collects votes: (case, swapped) -> one for each repeat whose reply could be read."""

    def __init__(self, judge: Judge, kind: str, cases: Sequence[Case], cache, stopped):
        self.judge, self.kind, self.cases, self.cache = judge, kind, cases, cache
        self.stop_requested = stopped
        self.usage = Usage(usd=cost(judge.endpoint, 0, 0))
        self.votes: dict[tuple[int, bool], dict[int, Any]] = {}
        self.why: dict[int, list[str]] = {}

    def repeat(self, number: int) -> None:
        left = dict(_requests(self.kind, self.cases))
        for attempt in range(self.judge.attempts):
            endpoint = _seeded(self.judge, number, attempt)
            retries = dict(left)
            for key, reply in self._replies(endpoint, left):
                vote = self._read(key, reply)
                if vote is not None:
                    self.votes.setdefault(key, {})[number] = vote
                if vote is not None or isinstance(reply, TransientError):
                    del retries[key]  # the number of attempts is exhausted
            left = retries
            if not left or self.stopped():
                break
        for index, _ in left:
            if self.stopped():
                self.why.setdefault(index, []).append(NOT_REQUESTED)

    def result(self, index: int) -> Judgment:
        in_order = self.votes.get((index, False), {})
        if self.kind != RELATIVE:
            votes = tuple(in_order.values())
        else:
            in_reverse = self.votes.get((index, True), {})
            votes = tuple(
                ((a + d) / 2, (b + c) / 2)
                for n, (a, b) in in_order.items()
                for c, d in [in_reverse.get(n, (None, None))]
                if c is not None
            )
        return Judgment(id=self.cases[index].id, votes=votes, why=tuple(self.why.get(index, ())))

    def stopped(self) -> bool:
        limit = self.judge.max_usd
        return self.stop_requested() or (limit is not None and self.usage.usd >= limit)

    def _replies(self, endpoint: Endpoint, left: dict) -> Iterator[tuple[tuple[int, bool], Any]]:
        keys_by_id = {request.id: vote_key for vote_key, request in left.items()}
        new = {
            cached_chat_api.cache_key(endpoint, request.messages)
            for request in left.values()
            if self.cache.get(cached_chat_api.cache_key(endpoint, request.messages)) is None
        }
        replies = cached_chat_api.complete_all(
            endpoint,
            left.values(),
            self.cache,
            concurrency=self.judge.concurrency,
            stopped=self.stopped,
        )
        for request, reply in replies:
            key = cached_chat_api.cache_key(endpoint, request.messages)
            if key in new and isinstance(reply, Reply):
                new.discard(key)
                self._pay(request, reply)
            yield keys_by_id[request.id], reply

    def _pay(self, request: cached_chat_api.ChatRequest, reply: Reply) -> None:
        """Add the cost of a reply; characters count where a server reports no tokens."""
        characters = sum(len(message["content"]) for message in request.messages)
        usage, per_token = self.usage, cached_chat_api.CHARS_PER_TOKEN
        usage.calls += 1
        usage.tokens_in += characters // per_token if reply.tokens_in is None else reply.tokens_in
        usage.tokens_out += (
            len(reply.text) // per_token if reply.tokens_out is None else reply.tokens_out
        )
        usage.usd = cost(self.judge.endpoint, usage.tokens_in, usage.tokens_out)

    def _read(self, key: tuple[int, bool], reply: Reply | TransientError):
        index, swapped = key
        why = self.why.setdefault(index, [])
        if isinstance(reply, TransientError):
            why.append(str(reply))
            return None
        if reply.problem:
            why.append(reply.problem)
            return None
        tag = messages(self.kind, self.cases[index], swapped=swapped)[1]
        vote = parse_verdict(self.kind, reply.text, tag)
        if vote is None:
            why.append(f"no verdict in {reply.text[-80:]!r}")
        return vote


def _requests(
    kind: str, cases: Sequence[Case]
) -> Iterator[tuple[tuple[int, bool], cached_chat_api.ChatRequest]]:
    for index, case in enumerate(cases):
        for swapped in (False, True) if kind == RELATIVE else (False,):
            request, _ = messages(kind, case, swapped=swapped)
            name = f"{index} {swapped}"
            chat_request = cached_chat_api.ChatRequest(
                id=name, messages=request, data_class=case.data_class
            )
            yield (index, swapped), chat_request


def _seeded(judge: Judge, repeat: int, attempt: int) -> Endpoint:
    """Set a seed per repeat and attempt: otherwise the cache would return the first reply."""
    seed = judge.seed + repeat + judge.repeats * attempt
    return dataclasses.replace(
        judge.endpoint, parameters={**judge.endpoint.parameters, "seed": seed}
    )


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the outermost JSON objects of a text, with any text around them."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
            yield value
        except (ValueError, RecursionError):
            end = start + 1
        start = text.find("{", end)


def _is_score(value: Any) -> bool:
    return type(value) in (int, float) and MIN_SCORE <= value <= MAX_SCORE


def _usd(usd: float | None) -> str:
    return "no prices set" if usd is None else f"{usd:.4f} USD"


def _prompt(name: str) -> str:
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").strip()
