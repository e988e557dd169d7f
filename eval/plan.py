"""What an evaluation will ask before it asks: requests, tokens, judge's calls, price, minutes.

Tokens in of pictures and words are counted as data/asking.py does, tokens out are the bound of each
family: both are the most that is paid for. Minutes come from the rate at which this workdir was
filled before; without one there is none to state, and the first batches' rate is shown instead.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data import asking
from eval import endpoint_model, history, loop, opening, probes, tasks
from eval.settings import Settings
from eval.suites import Suite

VOTED = {"vqa_open": 1, "multimodal": 2, "visual_chat": 2}  # a judge's calls for one vote
OF_RECORDS = "records.jsonl"


class PlanError(ValueError):
    """An evaluation that would cost too much; the message names the price and the mend."""


def plan(
    settings: Settings, found: Suite, named: opening.Named, workdir: Path, shard: loop.Shard
) -> dict[str, Any]:
    """Of what is left; raises where data may not go or where it would cost more than max_usd."""
    mine = [item for n, item in enumerate(found.items) if n % shard.count == shard.index]
    paths = [workdir / OF_RECORDS, *workdir.glob("records.shard_*_of_*.jsonl")]
    done = {record["id"] for path in paths for record in loop.read(path)}
    left = [item for item in mine if item.id not in done]
    asks = [loop.ask(item, found.folder, settings.mode, settings.prompt) for item in left]
    about = dict(
        items=len(mine),
        requests=len(left),
        by_family={f: n for f in tasks.FAMILIES if (n := sum(i.family == f for i in left))},
        probe_requests=probe_requests(settings, named, mine),
        judge_calls=judge_calls(settings, mine),
        **_tokens(settings, named, asks, shard.file(workdir / opening.CALLS)),
        minutes=_minutes(workdir, shard, len(left)),
    )
    most = settings.service.max_usd if named.kind == "endpoint" else None
    if most is not None and about["usd"] > most:
        raise PlanError(
            f"config.service.max_usd is {most:g} but {about['requests']} requests cost about "
            f"{about['usd']:.4f} USD; raise it, or ask fewer items with config.counts"
        )
    return about


def probe_requests(settings: Settings, named: opening.Named, items: Sequence[tasks.Item]) -> int:
    """At most so many requests more; none of answers that are there already."""
    if opening.asks_nobody(named):
        return 0
    return probes.count(items, settings.probes, settings.probe_families)


def judge_calls(settings: Settings, items: Sequence[tasks.Item]) -> int:
    """At least so many calls, where each first reply can be read; 0 without a judge."""
    if not settings.judge.endpoint:
        return 0
    return settings.judge.repeats * sum(VOTED.get(item.family, 0) for item in items)


def say(about: dict[str, Any], progress: Callable[[str], None]) -> None:
    """The plan in words."""
    families = ", ".join(f"{n} {family}" for family, n in about["by_family"].items()) or "nothing"
    progress(f"plan: {about['requests']} of {about['items']} items left to ask ({families})")
    usd = "" if about["usd"] is None else f", at most about {about['usd']:.4f} USD"
    progress(
        f"plan: about {about['tokens_in']} tokens in, at most {about['tokens_out']} out{usd}; "
        f"probes: {about['probe_requests']} requests more; judge: {about['judge_calls']} calls"
    )
    minutes = about["minutes"]
    if minutes is None:
        progress("plan: no rate of this workdir yet; the first batches will show how long it takes")
    else:
        progress(f"plan: {minutes:.1f} minutes at the rate of this workdir so far")


def _tokens(
    settings: Settings, named: opening.Named, asks: Sequence, calls: Path
) -> dict[str, Any]:
    if named.kind == "endpoint":
        endpoint = endpoint_model.connect(named.where, settings.service, field="service")
        able = [ask for ask in asks if ask.mode in endpoint_model.EndpointModel.modes]
        about = endpoint_model.estimate(endpoint, able, opening.known_replies(calls))
        return {name: about[name] for name in ("tokens_in", "tokens_out", "usd")}
    if named.kind not in ("native", "hf"):
        return dict(tokens_in=0, tokens_out=0, usd=None)
    words = sum(len(part) for ask in asks for part in ask.parts if isinstance(part, str))
    shown = sum(isinstance(part, Path) for ask in asks for part in ask.parts)
    return dict(
        tokens_in=words // asking.CHARS_PER_TOKEN + shown * asking.TOKENS_PER_PICTURE,
        tokens_out=sum(min(ask.max_tokens, settings.sample.max_gen_len) for ask in asks),
        usd=None,
    )


def _minutes(workdir: Path, shard: loop.Shard, left: int) -> float | None:
    if not left:
        return 0.0
    past = history.totals(workdir).get(shard.file(workdir / OF_RECORDS).name)
    if not past or not past["recorded"] or not past["seconds"]:
        return None
    return left * past["seconds"] / past["recorded"] / 60
