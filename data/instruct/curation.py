"""Curate interleaved instructions from captioned images, in the published stages.

    captions -> score    >= threshold: drops statistical figures   keep low unscored
             -> caption  an LLM keeps or drops it, with a reason   keep drop unparsable refused
             -> images   exactly one image file                    keep several missing
             -> writing  an LLM writes question, answer           written invalid unparsable refused
             -> documents.jsonl, the released schema; report.json, where the counts add up

Each decision is one line of its stage's file and on disk before the next stage; each call is cached
(cached_chat_api.py), so the same command resumes. Only captions leave this machine, never an image.
The stages are the paper's; prompts and rules are ours and the threshold is the user's, since those
of the paper are not published.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.data.instruct import replies as instruct_replies
from medmax_jax.data.instruct.captions import Row
from medmax_jax.data.instruct.replies import SEPARATOR, Invalid, Prompt, Unparsable
from medmax_jax.data.mixture import INTERLEAVED
from medmax_jax.endpoints import cached_chat_api, egress
from medmax_jax.endpoints.cached_chat_api import Cache, ChatRequest
from medmax_jax.endpoints.chat_api import Endpoint, Reply, TransientError, cost
from medmax_jax.io.journal import open_journal
from medmax_jax.io.progress import ItemProgress
from medmax_jax.io.text_files import TextFileError, read_json_object
from medmax_jax.storage import image_paths
from medmax_jax.storage.atomic_folder import private_folder
from medmax_jax.storage.folder import Folder

STAGES = {  # the verdict with which a row continues to the next stage
    "score": "keep",
    "caption": "keep",
    "images": "keep",
    "writing": "written",
}
PROMPT_OF = {"caption": "caption_filter", "writing": "instruction"}
TOKENS_OUT = {
    "caption": 40,
    "writing": 450,
}  # of a reply, about; only the estimate uses it
DOCUMENTS, REPORT, RUN, CALLS = "documents.jsonl", "report.json", "run.json", "calls.jsonl"
BATCH = 1_000  # decisions written at once if no call is made
PROGRESS_S = 5.0

Progress = Callable[[str], None]
Decision = dict[str, Any]  # one decision: id, verdict, reason, and what the verdict is about


class InstructError(ValueError):
    """A curation that cannot continue; the message names the problem and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to curate. `score_of`: agreement of image and caption; None if there is none."""

    threshold: float
    score_of: Callable[[Row], float | None]
    filter: Endpoint
    writer: Endpoint
    prompts: Mapping[str, Prompt]
    images: Path
    concurrency: int

    def endpoint(self, stage: str) -> Endpoint:
        """Return the endpoint that a stage uses."""
        return {"caption": self.filter, "writing": self.writer}[stage]


def check(rows: Sequence[Row], settings: Settings) -> None:
    """Raise, before the first call, for anything that would stop the work in the middle."""
    if not settings.images.is_dir():
        raise InstructError(
            f"{settings.images}: no such folder; set --images to the folder of the images"
        )
    for number, row in enumerate(rows, start=1):
        secret = row.data_class == egress.CREDENTIALED
        for name in row.images:
            label = f"image of row {number}" if secret else ""
            image_paths.resolve(settings.images, name, label=label)
    strict = egress.strictest(row.data_class for row in rows)
    for stage in PROMPT_OF:
        endpoint = settings.endpoint(stage)
        egress.check(endpoint.url, strict, listed=endpoint.listed)


def estimate(rows: Sequence[Row], settings: Settings, cache: Cache | None) -> dict[str, Any]:
    """Return calls, tokens and USD at most: as if no caption were dropped. Nothing is sent."""
    scored = [row for row in rows if _score_decision(row, settings)["verdict"] == "keep"]
    reached = {"caption": scored, "writing": [row for row in scored if len(row.images) == 1]}
    estimates: dict[str, Any] = {}
    for stage, stage_rows in reached.items():
        endpoint = settings.endpoint(stage)
        requests = (_request(stage, row, settings) for row in stage_rows)
        usage = cached_chat_api.estimate(endpoint, requests, cache, tokens_out=TOKENS_OUT[stage])
        usd = cost(endpoint, usage["tokens_in"], usage["tokens_out"])
        estimates[stage] = usage | {"usd": usd}
    return estimates | {"usd": _total(estimates[stage]["usd"] for stage in reached)}


def curate(
    rows: Sequence[Row],
    out: str | Path,
    settings: Settings,
    *,
    progress: Progress,
    stopped: Callable[[], bool],
    calls: str | Path | None = None,
) -> dict[str, Any]:
    """Take every row through the stages; return the report, which is also written to `out`.

    `stopped`: returns true to end soon; the report then counts the rest as undecided. `calls`: the
    journal of replies, which several folders may share in sequence; `out`/calls.jsonl if None.
    """
    check(rows, settings)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    secret = any(row.data_class == egress.CREDENTIALED for row in rows)
    with contextlib.ExitStack() as stack:
        if secret:
            stack.enter_context(private_folder(out))
        journal = stack.enter_context(open_journal(calls or out / CALLS))
        work = _CurationRun(out, settings, Cache(journal), progress, stopped)
        _check_same(out / RUN, rows, settings)
        remaining, stages, outcome = list(rows), {}, {}
        for stage, onward in STAGES.items():
            lines, stages[stage] = work.stage(stage, remaining)
            outcome |= {i: (stage, line["verdict"]) for i, line in lines.items()}
            undecided = {row.id for row in remaining} - set(lines)
            outcome |= {i: (stage, "undecided") for i in undecided}
            remaining = [row for row in remaining if lines.get(row.id, {}).get("verdict") == onward]
        report = _report(rows, outcome, stages, work)
        if not stopped():
            documents = [_document(row, lines[row.id]) for row in remaining]
            text = "".join(json.dumps(document) + "\n" for document in documents)
            _write(out / DOCUMENTS, text)
        _write(out / REPORT, json.dumps(report, indent=1) + "\n")
    return report


class _CurationRun:
    """The state that all stages share, and the path of a row through one stage."""

    def __init__(
        self,
        out: Path,
        settings: Settings,
        cache: Cache,
        progress: Progress,
        stopped: Callable[[], bool],
    ):
        self.out, self.settings, self.cache = out, settings, cache
        self.progress, self.stopped = progress, stopped
        self.no_reply, self.last_error = 0, ""

    def stage(self, stage: str, rows: list[Row]) -> tuple[dict[str, Decision], dict[str, Any]]:
        """Return the decisions on `rows` by id, as far as there are any, and their counts."""
        number = list(STAGES).index(stage) + 1
        with open_journal(self.out / f"{number}_{stage}.jsonl") as journal:
            if any({"id", "verdict"} - set(line) for line in journal.rows):
                raise InstructError(
                    f"{journal.path}: a line is not a decision with id and verdict; use another "
                    "--out"
                )
            lines = {line["id"]: line for line in journal.rows}
            todo = [row for row in rows if row.id not in lines]
            clock = ItemProgress(len(todo), "rows", self.progress, every=PROGRESS_S)
            decide = self._decide_by_model if stage in PROMPT_OF else self._decide_locally
            for decisions in decide(stage, todo):
                journal.append(*decisions)
                lines |= {line["id"]: line for line in decisions}
                clock.tick(stage, len(decisions))
        lines = {row.id: lines[row.id] for row in rows if row.id in lines}
        counted = collections.Counter(line["verdict"] for line in lines.values())
        counts = dict(rows=len(rows), **counted, undecided=len(rows) - len(lines))
        return lines, counts | (self._usage(stage, rows) if stage in PROMPT_OF else {})

    def _decide_locally(self, stage: str, rows: list[Row]) -> Iterator[list[Decision]]:
        decide = {"score": _score_decision, "images": _image_decision}[stage]
        for start in range(0, len(rows), BATCH):
            if self.stopped():
                return
            batch = rows[start : start + BATCH]
            yield [{"id": row.id, **decide(row, self.settings)} for row in batch]

    def _decide_by_model(self, stage: str, rows: list[Row]) -> Iterator[list[Decision]]:
        replies = cached_chat_api.complete_all(
            self.settings.endpoint(stage),
            (_request(stage, row, self.settings) for row in rows),
            self.cache,
            concurrency=self.settings.concurrency,
            stopped=self.stopped,
        )
        for request, reply in replies:
            if isinstance(reply, TransientError):
                self.no_reply, self.last_error = self.no_reply + 1, str(reply)
            else:
                yield [{"id": request.id, **_reply_decision(stage, reply)}]

    def _usage(self, stage: str, rows: list[Row]) -> dict[str, Any]:
        """Return the usage of the replies on `rows`, in this run and earlier ones."""
        endpoint = self.settings.endpoint(stage)
        requests = (_request(stage, row, self.settings) for row in rows)
        keys = {cached_chat_api.cache_key(endpoint, request.messages) for request in requests}
        replies = [reply for key in keys if (reply := self.cache.get(key)) is not None]
        tokens_in = sum(reply.tokens_in or 0 for reply in replies)
        tokens_out = sum(reply.tokens_out or 0 for reply in replies)
        return dict(
            calls=len(replies),
            calls_without_usage=sum(None in (r.tokens_in, r.tokens_out) for r in replies),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            usd=cost(endpoint, tokens_in, tokens_out),
        )


def _reply_decision(stage: str, reply: Reply) -> Decision:
    """Return the decision of a reply; an unusable reply is kept as received."""
    if reply.problem:
        verdict = "unparsable" if reply.status == 200 else "refused"
        return dict(verdict=verdict, reason=reply.problem, raw=reply.raw)
    try:
        if stage == "caption":
            keep, reason = instruct_replies.read_verdict(reply.text)
            return dict(verdict="keep" if keep else "drop", reason=reason)
        question, answer = instruct_replies.read_instruction(reply.text)
        return dict(verdict="written", reason="", question=question, answer=answer)
    except Unparsable as error:
        return dict(verdict="unparsable", reason=str(error), raw=reply.text)
    except Invalid as error:
        return dict(verdict="invalid", reason=str(error), raw=reply.text)


def _score_decision(row: Row, settings: Settings) -> Decision:
    score = settings.score_of(row)
    if score is None:
        return dict(verdict="unscored", reason="score is null")
    low = score < settings.threshold
    reason = f"{score:g} {'<' if low else '>='} {settings.threshold:g}"
    return dict(verdict="low" if low else "keep", reason=reason)


def _image_decision(row: Row, settings: Settings) -> Decision:
    if len(row.images) != 1:
        return dict(verdict="several", reason=f"{len(row.images)} images")
    if not (settings.images / row.images[0]).is_file():
        return dict(verdict="missing", reason=f"no file {row.images[0]}")
    return dict(verdict="keep", reason="one image")


def _request(stage: str, row: Row, settings: Settings) -> ChatRequest:
    prompt = settings.prompts[PROMPT_OF[stage]]
    return ChatRequest(id=row.id, messages=prompt.messages(row.caption), data_class=row.data_class)


def _document(row: Row, line: Decision) -> dict[str, Any]:
    return dict(
        id=row.id,
        text=f"{line['question']}{SEPARATOR}{line['answer']}",
        image_path=row.images[0],
        task=INTERLEAVED,
        source=row.source,
        credential="yes" if row.data_class == egress.CREDENTIALED else "no",
        data_class=row.data_class,
        group=row.group,
        turns=1,
    )


def _report(
    rows: Sequence[Row],
    outcome: dict[str, tuple[str, str]],
    stages: dict[str, Any],
    work: _CurationRun,
) -> dict[str, Any]:
    ends = collections.Counter(" ".join(outcome[row.id]) for row in rows)
    if ends.total() != len(rows):
        raise InstructError(f"{ends.total()} outcomes of {len(rows)} rows; report this as a bug")
    return dict(
        rows=len(rows),
        written=ends["writing written"],
        undecided=sum(n for name, n in ends.items() if name.endswith(" undecided")),
        outcomes=dict(sorted(ends.items())),
        stages=stages,
        usd=_total(stages[stage]["usd"] for stage in PROMPT_OF),
        calls_now=work.cache.new_calls,
        no_reply_now=work.no_reply,
        last_error=work.last_error,
    )


def _check_same(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Reject a folder whose decisions were made from other rows or by other rules."""
    endpoints = {stage: settings.endpoint(stage) for stage in PROMPT_OF}
    facts = dict(
        captions=_digest([dataclasses.astuple(row) for row in rows]),
        scores=_digest([settings.score_of(row) for row in rows]),
        threshold=settings.threshold,
        prompts=_digest({name: dataclasses.astuple(p) for name, p in settings.prompts.items()}),
        endpoints={s: [e.model, e.url, dict(e.parameters)] for s, e in endpoints.items()},
    )
    facts = json.loads(json.dumps(facts))
    if not path.exists():
        return _write(path, json.dumps(facts, indent=1) + "\n")
    try:
        stored = read_json_object(path)
    except TextFileError as error:
        raise InstructError(f"{error}: damaged; use another --out") from error
    if differing := [name for name in facts if stored.get(name) != facts[name]]:
        name = differing[0]
        raise InstructError(
            f"{path.parent}: was started with {name} {stored.get(name)}, but this command has "
            f"{facts[name]}; use another --out, and --calls {path.parent / CALLS} to reuse its "
            "replies"
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _total(parts: Iterable[float | None]) -> float | None:
    """Return the sum, or None if one part is not known."""
    parts = list(parts)
    return None if None in parts else sum(parts)


def _write(path: Path, text: str) -> None:
    Folder(path.parent).write(path.name, [text.encode()])  # atomic
