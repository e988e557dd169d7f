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
CORRECT, RELATIVE = "judge_correct", "judge_relative"
READ_CHARS = 20_000  # of the end of a reply, where the verdict is
LEAST, MOST = 1, 10  # of a comparison
# Names that the provider moves to other weights; gpt-oss has weights of its own.
_MOVES = re.compile(r"(?:chatgpt|gpt-(?!oss)|o\d)(?!.*\d{4}-?\d{2}-?\d{2}$)(?!.*-\d{4}$)|.*latest$")

Progress = Callable[[str], None]


class JudgeError(ValueError):
    """Raised for an unusable judge; the message names the field and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """Configures the judge and its repeats. `attempts`: calls per vote until a reply is readable.

    `max_usd`: no call begins once this amount is spent; None for no limit. `tokens_out`: of a
    reply, for the estimate.
    """

    endpoint: Endpoint
    repeats: int
    attempts: int
    concurrency: int
    seed: int
    max_usd: float | None
    tokens_out: int

    def __post_init__(self):
        for name in ("repeats", "attempts", "concurrency", "tokens_out"):
            if getattr(self, name) < 1:
                raise JudgeError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if "temperature" not in self.endpoint.parameters:
            raise JudgeError("parameters: no temperature, so the endpoint's own; set it, best to 0")
        if "seed" in self.endpoint.parameters:
            raise JudgeError(
                "parameters: seed is set for each repeat; remove it, and set judge.seed"
            )
        if _MOVES.match(self.endpoint.model):
            raise JudgeError(
                f"model {self.endpoint.model!r} is a name that moves; pin one with its date, like "
                "gpt-4o-mini-2024-07-18"
            )
        if self.max_usd is not None and cost(self.endpoint, 0, 0) is None:
            raise JudgeError("max_usd needs price_in and price_out; give both, or no limit")

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of model, parameters, prompts and repeats.

        Verdicts with equal fingerprints are comparable.
        """
        facts = [self.endpoint.model, dict(self.endpoint.parameters), self.repeats, self.seed]
        facts += [_prompt(CORRECT), _prompt(RELATIVE)]
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
    """Holds the votes on one case: 0 or 1, or (reference, answer) scores; None: see `why`."""

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
    return _judged(judge, CORRECT, cases, cache, stopped, progress)


def relative(
    judge: Judge,
    cases: Sequence[Case],
    cache: cached_chat_api.Cache,
    *,
    stopped: Callable[[], bool],
    progress: Progress,
) -> tuple[list[Judgment], Usage]:
    """Return `repeats` votes per case, each the mean of both orders to cancel position bias."""
    return _judged(judge, RELATIVE, cases, cache, stopped, progress)


def estimate(
    judge: Judge, kind: str, cases: Sequence[Case], cache: cached_chat_api.Cache | None
) -> dict[str, Any]:
    """Return the remaining calls, tokens and USD if every first reply can be read."""
    total = dict(calls=0, tokens_in=0, tokens_out=0)
    for repeat in range(judge.repeats):
        asks = [ask for _, ask in _asks(kind, cases)]
        about = cached_chat_api.estimate(
            _seeded(judge, repeat, 0), asks, cache, tokens_out=judge.tokens_out
        )
        total = {name: total[name] + about[name] for name in total}
    return total | {"usd": cost(judge.endpoint, total["tokens_in"], total["tokens_out"])}


def parse_verdict(kind: str, text: str, tag: str) -> float | tuple[float, float] | None:
    """Return the last tagged verdict of a reply: 0 or 1, or (first, second); None without one.

    A verdict inside the reasoning of a reasoning model does not count.
    """
    found = None
    final = reasoning.final_answer(text) or ""
    for one in _objects(final[-READ_CHARS:]):
        if one.get("case") != tag:
            continue
        if kind == CORRECT and isinstance(one.get("correct"), bool):
            found = float(one["correct"])
        elif kind == RELATIVE and all(_is_score(one.get(name)) for name in ("first", "second")):
            found = (float(one["first"]), float(one["second"]))
    return found


def messages(kind: str, case: Case, *, swapped: bool) -> tuple[Messages, str]:
    """Return the request for a case and its verdict's tag. `swapped`: the answer is first."""
    told: dict[str, str] = {"question": case.question}
    if kind == CORRECT:
        told |= {"reference": case.reference, "answer": case.answer}
    else:
        both = [case.reference, case.answer]
        first, second = reversed(both) if swapped else both
        told |= {"context": case.context, "first": first, "second": second}
    tag = hashlib.sha256(json.dumps([kind, case.id, told]).encode()).hexdigest()[:8]
    user = json.dumps({"case": tag} | told, ensure_ascii=False, indent=1)
    asked = [{"role": "system", "content": _prompt(kind)}, {"role": "user", "content": user}]
    return asked, tag


def _judged(judge: Judge, kind: str, cases, cache, stopped, progress):
    about = estimate(judge, kind, cases, cache)
    where = egress.parse_address(judge.endpoint.url).name
    progress(
        f"{judge.endpoint.model} at {where} gets the texts of {len(cases)} answers: at most "
        f"{about['calls']} calls, {_usd(about['usd'])}, more where a reply cannot be read"
    )
    if judge.max_usd is not None and about["usd"] > judge.max_usd:
        raise JudgeError(
            f"max_usd is {judge.max_usd:g} but judging costs {_usd(about['usd'])}; raise it, or "
            "judge fewer answers"
        )
    run = _VotingRun(judge, kind, cases, cache, stopped)
    for repeat in range(judge.repeats):
        run.repeat(repeat)
    progress(
        f"spent: {run.spent.calls} calls, {run.spent.tokens_in} tokens in, "
        f"{run.spent.tokens_out} out, {_usd(run.spent.usd)}"
    )
    return [run.result(number) for number in range(len(cases))], run.spent


class _VotingRun:
    """Collects votes: (case, swapped) -> one for each repeat whose reply could be read."""

    def __init__(self, judge: Judge, kind: str, cases: Sequence[Case], cache, stopped):
        self.judge, self.kind, self.cases, self.cache = judge, kind, cases, cache
        self.asked_to_stop = stopped
        self.spent = Usage(usd=cost(judge.endpoint, 0, 0))
        self.votes: dict[tuple[int, bool], dict[int, Any]] = {}
        self.why: dict[int, list[str]] = {}

    def repeat(self, number: int) -> None:
        left = dict(_asks(self.kind, self.cases))
        for attempt in range(self.judge.attempts):
            endpoint = _seeded(self.judge, number, attempt)
            again = dict(left)
            for place, found in self._replies(endpoint, left):
                vote = self._read(place, found)
                if vote is not None:
                    self.votes.setdefault(place, {})[number] = vote
                if vote is not None or isinstance(found, TransientError):
                    del again[place]  # the number of attempts is exhausted
            left = again
            if not left or self.stopped():
                break
        for index, _ in left:
            if self.stopped():
                self.why.setdefault(index, []).append("not asked: stopped, or max_usd is spent")

    def result(self, index: int) -> Judgment:
        straight = self.votes.get((index, False), {})
        if self.kind == CORRECT:
            votes = tuple(straight.values())
        else:
            turned = self.votes.get((index, True), {})
            votes = tuple(
                ((a + d) / 2, (b + c) / 2)
                for n, (a, b) in straight.items()
                for c, d in [turned.get(n, (None, None))]
                if c is not None
            )
        return Judgment(id=self.cases[index].id, votes=votes, why=tuple(self.why.get(index, ())))

    def stopped(self) -> bool:
        most = self.judge.max_usd
        return self.asked_to_stop() or (most is not None and self.spent.usd >= most)

    def _replies(self, endpoint: Endpoint, left: dict) -> Iterator[tuple[tuple[int, bool], Any]]:
        places = {ask.id: place for place, ask in left.items()}
        new = {
            cached_chat_api.cache_key(endpoint, ask.messages)
            for ask in left.values()
            if self.cache.get(cached_chat_api.cache_key(endpoint, ask.messages)) is None
        }
        found = cached_chat_api.complete_all(
            endpoint,
            left.values(),
            self.cache,
            concurrency=self.judge.concurrency,
            stopped=self.stopped,
        )
        for ask, reply in found:
            key = cached_chat_api.cache_key(endpoint, ask.messages)
            if key in new and isinstance(reply, Reply):
                new.discard(key)
                self._pay(ask, reply)
            yield places[ask.id], reply

    def _pay(self, ask: cached_chat_api.ChatRequest, reply: Reply) -> None:
        """Add the cost of a reply; characters count where a server reports no tokens."""
        asked = sum(len(message["content"]) for message in ask.messages)
        spent, each = self.spent, cached_chat_api.CHARS_PER_TOKEN
        spent.calls += 1
        spent.tokens_in += asked // each if reply.tokens_in is None else reply.tokens_in
        spent.tokens_out += (
            len(reply.text) // each if reply.tokens_out is None else reply.tokens_out
        )
        spent.usd = cost(self.judge.endpoint, spent.tokens_in, spent.tokens_out)

    def _read(self, place: tuple[int, bool], found: Reply | TransientError):
        index, swapped = place
        why = self.why.setdefault(index, [])
        if isinstance(found, TransientError):
            why.append(str(found))
            return None
        if found.problem:
            why.append(found.problem)
            return None
        tag = messages(self.kind, self.cases[index], swapped=swapped)[1]
        vote = parse_verdict(self.kind, found.text, tag)
        if vote is None:
            why.append(f"no verdict in {found.text[-80:]!r}")
        return vote


def _asks(
    kind: str, cases: Sequence[Case]
) -> Iterator[tuple[tuple[int, bool], cached_chat_api.ChatRequest]]:
    for index, case in enumerate(cases):
        for swapped in (False, True) if kind == RELATIVE else (False,):
            asked, _ = messages(kind, case, swapped=swapped)
            name = f"{index} {swapped}"
            ask = cached_chat_api.ChatRequest(id=name, messages=asked, data_class=case.data_class)
            yield (index, swapped), ask


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
            found, end = decoder.raw_decode(text, start)
            yield found
        except (ValueError, RecursionError):
            end = start + 1
        start = text.find("{", end)


def _is_score(value: Any) -> bool:
    return type(value) in (int, float) and LEAST <= value <= MOST


def _usd(usd: float | None) -> str:
    return "no prices given" if usd is None else f"{usd:.4f} USD"


def _prompt(name: str) -> str:
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").strip()
