"""Judges the records of a workdir and writes judgments.jsonl, one line per record and kind.

    records.jsonl -> open answers           correct         \\  strict: eval/metrics/llm_judge.py,
                                            texts only,
                     chat, interleaved      relative        /   with what the model was shown
                     open answers           paper_open      \\  the release's own messages, one call
                     chat, interleaved      paper_relative  /   at the endpoint's own temperature
                  -> medmax_jax/endpoints/cached_chat_api.py (guard, judge_calls.jsonl) ->
                  judgments.jsonl

"Release" means the MedMax release. A line is {id, kind, votes, why, judge, case}: `judge` is the
fingerprint, `case` a hash of the judged content. Nothing is judged twice. A line without votes is
unscored and is retried by the next run: unreadable replies come from the cache, and only missing
replies are requested. For the paper kinds the vote is the unchanged reply, which
eval/metrics/release.py parses. `max_usd` applies to all runs of a workdir together.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.endpoints import cached_chat_api, egress
from medmax_jax.endpoints.chat_api import (
    Endpoint,
    Reply,
    TransientError,
    check_ready,
    cost,
    variable,
)
from medmax_jax.eval.config import JudgeSettings
from medmax_jax.eval.metrics import llm_judge, per_record, release
from medmax_jax.eval.metrics.per_record import CORRECT, PAPER_OPEN, PAPER_RELATIVE, RELATIVE
from medmax_jax.eval.models.endpoint import make_endpoint
from medmax_jax.eval.pipeline import inference
from medmax_jax.eval.records import EvalRecord, Item, is_credentialed, read_records
from medmax_jax.io import journal as io_journal
from medmax_jax.io.journal import open_journal

CALLS, RECORDS = "judge_calls.jsonl", "records.jsonl"
KINDS = {CORRECT: llm_judge.CORRECT, RELATIVE: llm_judge.RELATIVE}
JUDGED_FAMILIES = ("vqa_open", *per_record.PAIRWISE_FAMILIES)  # families
IMAGE_MARK = "<image>"  # where a row places its image; not part of the question's text
Progress = Callable[[str], None]


def make_judge(settings: JudgeSettings) -> llm_judge.Judge:
    """Return the judge of a config; raise before any call where it cannot be used."""
    key = settings.service.key_env
    if key and not os.environ.get(key):
        raise llm_judge.JudgeError(
            f"config.judge.service.key_env is {variable(key)!r}, a variable that is not set; "
            "export it, or leave the field empty for an endpoint without keys"
        )
    endpoint = make_endpoint(settings.endpoint, settings.service, field="judge.service")
    return llm_judge.Judge(
        # A verdict is at the end of a reply, and a reply without text has none.
        endpoint=dataclasses.replace(endpoint, takes_cut=False, takes_empty=False),
        repeats=settings.repeats,
        attempts=settings.attempts,
        concurrency=settings.service.concurrency,
        seed=settings.seed,
        max_usd=settings.service.max_usd,
        tokens_out=settings.tokens_out,
    )


def check_hosts(judge: llm_judge.Judge, items: Sequence[Item]) -> None:
    """Raise OutgoingError where answers to the items may not go to the judge."""
    data_class = egress.strictest(
        item.data_class for item in items if item.family in JUDGED_FAMILIES
    )
    egress.check(judge.endpoint.url, data_class, listed=judge.endpoint.listed)


def estimate(
    judge: llm_judge.Judge, records: Sequence[EvalRecord], *, released: bool
) -> dict[str, Any]:
    """Return calls, tokens and USD if nothing is cached and every first reply can be read."""
    return _price(judge, _work(judge, records, {}, released), None)


def check_judge(settings: JudgeSettings, items: Sequence[Item], workdir: Path) -> None:
    """Raise early where the judge may not receive these items or is not reachable.

    A judge that has nothing left to do in this workdir need not be reachable.
    """
    if not settings.endpoint:
        return
    judge = make_judge(settings)
    check_hosts(judge, items)
    per_record.check_names(workdir.glob("*.jsonl"))
    items = [item for item in items if item.family in JUDGED_FAMILIES]
    records = {
        record.id: record
        for path in inference.shard_files(workdir / RECORDS)
        for record in read_records(path)
    }
    left = [item for item in items if item.id not in records]
    if not left:
        rows = io_journal.read_jsonl(workdir / per_record.JUDGMENTS)
        judgments = {(row["id"], row["kind"], row["judge"]): row for row in rows}
        item_records = [records[item.id] for item in items]
        work = _work(judge, item_records, judgments, settings.paper)
        left = _price(judge, work, cached_chat_api.known_replies(workdir / CALLS))["calls"]
    if left:
        check_ready(judge.endpoint)


def judge_records(
    judge: llm_judge.Judge,
    records: Sequence[EvalRecord],
    workdir: str | Path,
    *,
    released: bool,
    stopped: Callable[[], bool],
    progress: Progress,
) -> dict[str, Any]:
    """Judge the records without votes; return the judge, its cost and the unscored records.

    `released`: also with the messages of the MedMax release. Raises JudgeError before the first
    call where the complete run would cost more than `max_usd`.
    """
    workdir = Path(workdir)
    with (
        open_journal(workdir / CALLS) as journal,
        open_journal(workdir / per_record.JUDGMENTS) as lines,
    ):
        cache, budget = cached_chat_api.Cache(journal), _Budget(judge.endpoint, journal.rows)
        judgments = {(row["id"], row["kind"], row["judge"]): row for row in lines.rows}
        work = _work(judge, records, judgments, released)
        _check_price(judge, _price(judge, work, cache), budget.usd())
        for kind, kind_work in work.items():
            progress(f"judging {len(kind_work)} answers: {kind}")
            if kind in KINDS:
                rows = _strict(judge, budget, kind, kind_work, cache, stopped, progress)
            else:
                rows = _paper(judge, budget, kind, kind_work, cache, stopped)
            new = [row for row in rows if judgments.get((row["id"], kind, row["judge"])) != row]
            lines.append(*new)
            judgments |= {(row["id"], kind, row["judge"]): row for row in new}
    by_kind = _records_by_kind(records, released)
    counts = {
        kind: sum(bool(judgments[r.id, kind, judge.fingerprint]["votes"]) for r in kind_records)
        for kind, kind_records in by_kind.items()
    }
    return dict(
        judge=judge.fingerprint,
        model=judge.endpoint.model,
        host=egress.parse_address(judge.endpoint.url).name,
        repeats=judge.repeats,
        calls=len(budget.rows),
        usd=budget.usd(),
        judged=counts,
        unscored={kind: len(by_kind[kind]) - counts[kind] for kind in by_kind},
    )


def judge_case(record: EvalRecord) -> llm_judge.Case:
    """Return the case that strict mode judges: the text shown to the model, and its text answer."""
    return llm_judge.Case(
        id=record.id,
        question=record.prompt.replace(IMAGE_MARK, "").strip(),
        context=record.context,
        reference=record.answer,
        answer=per_record.answer_text(record),
        data_class=record.data_class,
    )


def paper_messages(record: EvalRecord, model: str) -> list[dict[str, str]]:
    """Return the messages of the MedMax release.

    `model`: the name that its visual chat shows the judge with the answer.
    """
    released = dict(record.released)
    if record.family == "vqa_open":
        return release.open_messages(record.prompt, record.answer, record.text)
    if record.family == "multimodal":
        return release.multimodal_messages(record.prompt, record.answer, record.text)
    question = released.get("prompt", record.prompt)
    row = {name: released.get(name, "") for name in ("fig_label", "fig_caption", "in_text_mention")}
    shown = {  # defect 8: the complete record, including the model's name
        "question_id": record.id,
        "prompt": question,
        "text": record.text,
        "answer_id": record.id,
        "model_id": model,
        "metadata": {},
    }
    return release.chat_messages(row | {"gpt4_answer": record.answer}, question, shown)


def _records_by_kind(records: Sequence[EvalRecord], released: bool) -> dict[str, list[EvalRecord]]:
    open_records = [r for r in records if r.family == "vqa_open" and not r.error]
    pairwise = [r for r in records if r.family in per_record.PAIRWISE_FAMILIES and not r.error]
    by_kind = {CORRECT: open_records, RELATIVE: pairwise}
    if released:
        by_kind |= {PAPER_OPEN: open_records, PAPER_RELATIVE: pairwise}
    return {kind: kind_records for kind, kind_records in by_kind.items() if kind_records}


def _work(
    judge: llm_judge.Judge, records: Sequence[EvalRecord], judgments: Mapping, released: bool
) -> dict[str, list[tuple[EvalRecord, str]]]:
    """Return kind -> (record, hash of its case) of all records that have no votes yet."""
    work: dict[str, list[tuple[EvalRecord, str]]] = {}
    for kind, kind_records in _records_by_kind(records, released).items():
        for number, record in enumerate(kind_records, start=1):
            case = _hash(kind, record)
            row = judgments.get((record.id, kind, judge.fingerprint))
            if row is not None and row["case"] != case:
                credentialed = is_credentialed(record)
                name = f"answer number {number}" if credentialed else f"item {record.id}"
                raise llm_judge.JudgeError(
                    f"{name}: {kind} was judged on another answer or question; use a new workdir, "
                    f"or remove {per_record.JUDGMENTS}"
                )
            if row is None or not row["votes"]:
                work.setdefault(kind, []).append((record, case))
    return work


def _hash(kind: str, record: EvalRecord) -> str:
    if kind in KINDS:
        content: Any = dataclasses.asdict(judge_case(record))
    else:
        content = paper_messages(record, "")
    return hashlib.sha256(json.dumps([kind, content]).encode()).hexdigest()[:16]


def _strict(judge, budget, kind, work, cache, stopped, progress) -> Iterator[dict[str, Any]]:
    """Yield one line per answer, once all are judged."""
    vote = llm_judge.correctness if kind == CORRECT else llm_judge.relative
    cases = [judge_case(record) for record, _ in work]
    limited = dataclasses.replace(judge, max_usd=budget.left(judge.max_usd))
    verdicts, _ = vote(limited, cases, cache, stopped=stopped, progress=progress)
    for (record, case), verdict in zip(work, verdicts, strict=True):
        votes = [list(v) if isinstance(v, tuple) else v for v in verdict.votes]
        yield _line(judge, record, kind, votes, list(verdict.why), case)


def _paper(judge, budget, kind, work, cache, stopped) -> Iterator[dict[str, Any]]:
    def enough() -> bool:
        return stopped() or budget.left(judge.max_usd) == 0

    endpoint, replies = _own_temperature(judge.endpoint), {}
    requests = _paper_requests(judge, [record for record, _ in work])
    for request, reply in cached_chat_api.complete_all(
        endpoint, requests, cache, concurrency=judge.concurrency, stopped=enough
    ):
        replies[request.id] = reply
    for record, case in work:
        reply = replies.get(record.id, TransientError(llm_judge.NOT_REQUESTED))
        why = getattr(reply, "problem", str(reply))
        votes = [reply.text] if isinstance(reply, Reply) and not why else []
        yield _line(judge, record, kind, votes, [why] if why else [], case)


def _paper_requests(
    judge: llm_judge.Judge, records: Sequence[EvalRecord]
) -> Iterator[cached_chat_api.ChatRequest]:
    for record in records:
        messages = paper_messages(record, record.model or "model")
        yield cached_chat_api.ChatRequest(
            id=record.id, messages=messages, data_class=record.data_class
        )


def _own_temperature(endpoint: Endpoint) -> Endpoint:
    """Return the endpoint without a temperature; the bounds of the user are sent.

    Defect 17: the release sets a temperature and never sends it.
    """
    parameters = {
        name: value for name, value in endpoint.parameters.items() if name != "temperature"
    }
    return dataclasses.replace(endpoint, parameters=parameters)


def _line(judge: llm_judge.Judge, record, kind, votes, why, case) -> dict[str, Any]:
    return dict(id=record.id, kind=kind, votes=votes, why=why, judge=judge.fingerprint, case=case)


def _price(
    judge: llm_judge.Judge, work: Mapping, cache: cached_chat_api.Cache | None
) -> dict[str, Any]:
    total = dict(calls=0, tokens_in=0, tokens_out=0)
    for kind, kind_work in work.items():
        if kind in KINDS:
            part = llm_judge.estimate(
                judge, KINDS[kind], [judge_case(r) for r, _ in kind_work], cache
            )
        else:
            requests = _paper_requests(judge, [record for record, _ in kind_work])
            endpoint = _own_temperature(judge.endpoint)
            part = cached_chat_api.estimate(endpoint, requests, cache, tokens_out=judge.tokens_out)
        total = {name: total[name] + part[name] for name in total}
    return total | {"usd": cost(judge.endpoint, total["tokens_in"], total["tokens_out"])}


def _check_price(judge: llm_judge.Judge, price: Mapping[str, Any], spent: float | None) -> None:
    if judge.max_usd is not None and price["usd"] > judge.max_usd - spent:
        raise llm_judge.JudgeError(
            f"max_usd is {judge.max_usd:g} and {spent:.4f} of it is spent in this workdir, but the "
            f"rest costs {price['usd']:.4f} USD; increase it, or judge fewer answers"
        )


class _Budget:
    """Sums the USD of all replies in a journal, including those of earlier runs.

    Where a server reports no token counts, they are estimated from characters.
    """

    def __init__(self, endpoint: Endpoint, rows: list[dict[str, Any]]):
        self.rows, self._endpoint, self._seen = rows, endpoint, 0
        self._tokens_in = self._tokens_out = 0

    def usd(self) -> float | None:
        """Return the USD spent; None without prices."""
        for row in self.rows[self._seen :]:
            written = len(row["text"]) // cached_chat_api.CHARS_PER_TOKEN
            self._tokens_in += row["tokens_in"] or 0
            self._tokens_out += written if row["tokens_out"] is None else row["tokens_out"]
            self._seen += 1
        return cost(self._endpoint, self._tokens_in, self._tokens_out)

    def left(self, most: float | None) -> float | None:
        """Return the remaining budget; None without a limit."""
        return None if most is None else max(0.0, most - self.usd())
