"""Estimates an evaluation before it runs: requests, tokens, judge calls, price and minutes.

Input tokens of images and text are counted as medmax_jax/endpoints/cached_chat_api.py does, output
tokens are the bound of each family: both are upper bounds of what is paid for. Minutes come from
the rate at which this workdir was filled before; without such a rate none is stated, and the rate
of the first batches is reported instead.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.endpoints import cached_chat_api, egress
from medmax_jax.endpoints.chat_api import TransientError, check_ready, cost
from medmax_jax.eval.config import Settings
from medmax_jax.eval.metrics import per_record
from medmax_jax.eval.models import base, loading
from medmax_jax.eval.models import endpoint as endpoint_model
from medmax_jax.eval.pipeline import inference, judging
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.eval.tasks import probes
from medmax_jax.eval.tasks.selection import EvalSet, Shard
from medmax_jax.io import journal

OF_RECORDS = "records.jsonl"


class PlanError(ValueError):
    """Raised for an evaluation that costs too much; the message names the price and the fix."""


def estimate_cost(
    settings: Settings, found: EvalSet, named: loading.ModelSpec, workdir: Path, shard: Shard
) -> dict[str, Any]:
    """Return the estimate of the remaining work.

    Raises where data may not be sent or where it would cost more than max_usd. Tokens, price and
    minutes are of the items and of their probes.
    """
    mine = found.items[shard.index :: shard.count]
    left, again = _to_ask(settings, found, named, workdir, shard)
    calls = cached_chat_api.known_replies(shard.file(workdir / loading.CALLS))
    priced = [
        _tokens(settings, named, _asks(settings, found, left), calls),
        _bound(settings, named, _asks(settings, found, again)),
    ]
    about = dict(
        items=len(mine),
        requests=len(left),
        by_family={f: n for f in task_items.FAMILIES if (n := sum(i.family == f for i in left))},
        probe_requests=len(again),
        **_judge(settings, found, mine),
        **{name: _sum(one[name] for one in priced) for name in ("tokens_in", "tokens_out", "usd")},
        minutes=_minutes(workdir, shard, len(left) + len(again)),
        own_bound=_own_bound(settings, named),
    )
    most = settings.service.max_usd if named.kind == "endpoint" else None
    if most is not None and about["usd"] > most:
        raise PlanError(
            f"config.service.max_usd is {most:g} but {len(left)} requests and {len(again)} of "
            f"probes cost about {about['usd']:.4f} USD; raise it, ask fewer items with "
            "config.counts, or fewer config.probes"
        )
    return about


def check_endpoint(
    settings: Settings, found: EvalSet, named: loading.ModelSpec, workdir: Path, shard: Shard
) -> None:
    """Raise within seconds where the evaluated endpoint may not be used or is down.

    Where every reply is recorded or cached, the endpoint need not be reachable.
    """
    if named.kind != "endpoint":
        return
    endpoint = endpoint_model.make_endpoint(named.where, settings.service, field="service")
    modes = endpoint_model.EndpointModel.modes
    left, again = (
        [ask for ask in _asks(settings, found, items) if ask.mode in modes]
        for items in _to_ask(settings, found, named, workdir, shard)
    )
    for data_class in {ask.data_class for ask in (*left, *again)}:
        egress.check(endpoint.url, data_class, listed=endpoint.listed)
    if not left and not again:
        return
    try:
        check_ready(endpoint)
    except TransientError:
        calls = cached_chat_api.known_replies(shard.file(workdir / loading.CALLS))
        if again or calls is None or endpoint_model.estimate(endpoint, left, calls)["calls"]:
            raise


def _to_ask(
    settings: Settings, found: EvalSet, named: loading.ModelSpec, workdir: Path, shard: Shard
) -> tuple[list[task_items.Item], list[task_items.Item]]:
    """Return the items of this part without a record, and those of the probes."""
    left, again = _left(found.items[shard.index :: shard.count], workdir / OF_RECORDS), []
    if not loading.is_recorded(named):
        asked = probes.probe_items(found.items, settings.probes, settings.probe_families)
        for name, items_of in asked.items():
            some = items_of(settings.seed, None)[shard.index :: shard.count]
            again += _left(some, workdir / f"probe_{name}.jsonl")
    return left, again


def _left(items: Sequence[task_items.Item], out: Path) -> list[task_items.Item]:
    """Return the items without a record in a file of `out`."""
    done = {
        record["id"] for path in inference.shard_files(out) for record in journal.read_jsonl(path)
    }
    return [item for item in items if item.id not in done]


def _asks(
    settings: Settings, found: EvalSet, items: Sequence[task_items.Item]
) -> list[base.ModelRequest]:
    return [
        inference.make_request(item, found.folder, settings.mode, settings.prompt) for item in items
    ]


def _judge(settings: Settings, found: EvalSet, items: Sequence[task_items.Item]) -> dict[str, Any]:
    """Return judge calls if each first reply is readable, and USD at most for full answers."""
    if not settings.judge.endpoint:
        return dict(judge_calls=0, judge_usd=None)
    some = [item for item in items if item.family in ("vqa_open", *per_record.PAIRWISE_FAMILIES)]
    records = [
        inference.item_fields(item)
        | {"text": asked.id.ljust(asked.max_tokens * cached_chat_api.CHARS_PER_TOKEN)}
        for item, asked in zip(some, _asks(settings, found, some), strict=True)
    ]
    one = judging.make_judge(settings.judge)
    about = judging.estimate(one, records, released=settings.judge.paper)
    return dict(judge_calls=about["calls"], judge_usd=about["usd"])


def _sum(numbers: Iterable[Any]) -> Any:
    numbers = list(numbers)
    return None if None in numbers else sum(numbers)


def report_estimate(about: dict[str, Any], progress: Callable[[str], None]) -> None:
    """Log the estimate as text."""
    families = ", ".join(f"{n} {family}" for family, n in about["by_family"].items()) or "nothing"
    progress(f"plan: {about['requests']} of {about['items']} items left to ask ({families})")
    usd, judged = (
        "" if about[name] is None else f", at most about {about[name]:.4f} USD"
        for name in ("usd", "judge_usd")
    )
    progress(f"plan: probes: {about['probe_requests']} requests more")
    progress(
        f"plan: with them about {about['tokens_in']} tokens in, at most {about['tokens_out']} out"
        f"{usd}; judge: {about['judge_calls']} calls{judged}"
    )
    if about["own_bound"]:
        progress(f"plan: {about['own_bound']}")
    minutes = about["minutes"]
    if minutes is None:
        progress("plan: no rate of this workdir yet; the first batches will show how long it takes")
    else:
        progress(f"plan: {minutes:.1f} minutes at the rate of this workdir so far")


def _own_bound(settings: Settings, named: loading.ModelSpec) -> str:
    if named.kind != "endpoint":
        return ""
    endpoint = endpoint_model.make_endpoint(named.where, settings.service, field="service")
    return endpoint_model.own_bound(endpoint)


def _tokens(
    settings: Settings,
    named: loading.ModelSpec,
    asks: Sequence[base.ModelRequest],
    calls: cached_chat_api.Cache | None,
) -> dict[str, Any]:
    if named.kind != "endpoint":
        return _bound(settings, named, asks)
    endpoint = endpoint_model.make_endpoint(named.where, settings.service, field="service")
    able = [ask for ask in asks if ask.mode in endpoint_model.EndpointModel.modes]
    about = endpoint_model.estimate(endpoint, able, calls)
    return {name: about[name] for name in ("tokens_in", "tokens_out", "usd")}


def _bound(
    settings: Settings, named: loading.ModelSpec, asks: Sequence[base.ModelRequest]
) -> dict[str, Any]:
    """Return an upper bound without reading images or earlier replies."""
    if named.kind not in ("native", "hf", "endpoint"):
        return dict(tokens_in=0, tokens_out=0, usd=None)
    words = sum(len(part) for ask in asks for part in ask.parts if isinstance(part, str))
    shown = sum(isinstance(part, Path) for ask in asks for part in ask.parts)
    tokens_in = words // cached_chat_api.CHARS_PER_TOKEN + shown * cached_chat_api.TOKENS_PER_IMAGE
    if named.kind != "endpoint":
        most = settings.sample.max_gen_len
        tokens_out = sum(min(ask.max_tokens, most) for ask in asks)
        return dict(tokens_in=tokens_in, tokens_out=tokens_out, usd=None)
    endpoint = endpoint_model.make_endpoint(named.where, settings.service, field="service")
    tokens_in += len(asks) * cached_chat_api.TOKENS_PER_MESSAGE
    tokens_out = sum(endpoint_model.reply_bound(endpoint, ask.max_tokens) for ask in asks)
    usd = cost(endpoint, tokens_in, tokens_out)
    return dict(tokens_in=tokens_in, tokens_out=tokens_out, usd=usd)


def _minutes(workdir: Path, shard: Shard, left: int) -> float | None:
    if not left:
        return 0.0
    past = inference.totals(workdir).get(shard.file(workdir / OF_RECORDS).name)
    if not past or not past["recorded"] or not past["seconds"]:
        return None
    return left * past["seconds"] / past["recorded"] / 60
