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
from medmax_jax.eval.models import base, loading
from medmax_jax.eval.models import endpoint as endpoint_model
from medmax_jax.eval.pipeline import inference, judging
from medmax_jax.eval.records import EvalRecord, Item
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.eval.tasks import probes
from medmax_jax.eval.tasks.selection import EvalSet, Shard
from medmax_jax.io import journal

OF_RECORDS = "records.jsonl"


class PlanError(ValueError):
    """Raised for an evaluation that costs too much; the message names the price and the fix."""


def estimate_cost(
    settings: Settings, eval_set: EvalSet, spec: loading.ModelSpec, workdir: Path, shard: Shard
) -> dict[str, Any]:
    """Return the estimate of the remaining work.

    Raises where data may not be sent or where it would cost more than max_usd. Tokens, price and
    minutes are of the items and of their probes.
    """
    shard_items = eval_set.items[shard.index :: shard.count]
    left, probe_items = _remaining_items(settings, eval_set, spec, workdir, shard)
    calls = cached_chat_api.known_replies(shard.file(workdir / loading.CALLS))
    parts = [
        _tokens(settings, spec, _requests(settings, eval_set, left), calls),
        _bound(settings, spec, _requests(settings, eval_set, probe_items)),
    ]
    estimate = dict(
        items=len(shard_items),
        requests=len(left),
        by_family={f: n for f in task_items.FAMILIES if (n := sum(i.family == f for i in left))},
        probe_requests=len(probe_items),
        **_judge_cost(settings, eval_set, shard_items),
        **{name: _sum(part[name] for part in parts) for name in ("tokens_in", "tokens_out", "usd")},
        minutes=_minutes(workdir, shard, len(left) + len(probe_items)),
        own_bound=_own_bound(settings, spec),
    )
    max_usd = settings.service.max_usd if spec.kind == "endpoint" else None
    if max_usd is not None and estimate["usd"] > max_usd:
        raise PlanError(
            f"config.service.max_usd is {max_usd:g} but {len(left)} requests and "
            f"{len(probe_items)} of probes cost about {estimate['usd']:.4f} USD; increase it, or "
            "reduce config.counts or config.probes"
        )
    return estimate


def check_endpoint(
    settings: Settings, eval_set: EvalSet, spec: loading.ModelSpec, workdir: Path, shard: Shard
) -> None:
    """Raise within seconds where the evaluated endpoint may not be used or is down.

    Where every reply is recorded or cached, the endpoint need not be reachable.
    """
    if spec.kind != "endpoint":
        return
    endpoint = endpoint_model.make_endpoint(spec.where, settings.service, field="service")
    modes = endpoint_model.EndpointModel.modes
    left, probe_requests = (
        [request for request in _requests(settings, eval_set, items) if request.mode in modes]
        for items in _remaining_items(settings, eval_set, spec, workdir, shard)
    )
    for data_class in {request.data_class for request in (*left, *probe_requests)}:
        egress.check(endpoint.url, data_class, listed=endpoint.listed)
    if not left and not probe_requests:
        return
    try:
        check_ready(endpoint)
    except TransientError:
        calls = cached_chat_api.known_replies(shard.file(workdir / loading.CALLS))
        if probe_requests or calls is None:
            raise
        if endpoint_model.estimate(endpoint, left, calls)["calls"]:
            raise


def _remaining_items(
    settings: Settings, eval_set: EvalSet, spec: loading.ModelSpec, workdir: Path, shard: Shard
) -> tuple[list[Item], list[Item]]:
    """Return the items of this part without a record, and those of the probes."""
    left = _without_record(eval_set.items[shard.index :: shard.count], workdir / OF_RECORDS)
    probe_items = []
    if not loading.is_recorded(spec):
        makers = probes.probe_items(eval_set.items, settings.probes, settings.probe_families)
        for name, items_of in makers.items():
            items = items_of(settings.seed, None)[shard.index :: shard.count]
            probe_items += _without_record(items, workdir / f"probe_{name}.jsonl")
    return left, probe_items


def _without_record(items: Sequence[Item], out: Path) -> list[Item]:
    """Return the items without a record in a file of `out`."""
    done = {row["id"] for path in inference.shard_files(out) for row in journal.read_jsonl(path)}
    return [item for item in items if item.id not in done]


def _requests(
    settings: Settings, eval_set: EvalSet, items: Sequence[Item]
) -> list[base.ModelRequest]:
    return [
        inference.make_request(item, eval_set.folder, settings.mode, settings.prompt)
        for item in items
    ]


def _judge_cost(settings: Settings, eval_set: EvalSet, items: Sequence[Item]) -> dict[str, Any]:
    """Return judge calls if each first reply is readable, and USD at most for full answers."""
    if not settings.judge.endpoint:
        return dict(judge_calls=0, judge_usd=None)
    judged_items = [item for item in items if item.family in judging.JUDGED_FAMILIES]
    requests = _requests(settings, eval_set, judged_items)
    records = [
        EvalRecord.of(
            item, text=request.id.ljust(request.max_tokens * cached_chat_api.CHARS_PER_TOKEN)
        )
        for item, request in zip(judged_items, requests, strict=True)
    ]
    judge = judging.make_judge(settings.judge)
    estimate = judging.estimate(judge, records, released=settings.judge.paper)
    return dict(judge_calls=estimate["calls"], judge_usd=estimate["usd"])


def _sum(values: Iterable[Any]) -> Any:
    values = list(values)
    return None if None in values else sum(values)


def report_estimate(estimate: dict[str, Any], progress: Callable[[str], None]) -> None:
    """Log the estimate as text."""
    families = (
        ", ".join(f"{n} {family}" for family, n in estimate["by_family"].items()) or "nothing"
    )
    progress(f"plan: {estimate['requests']} of {estimate['items']} items remain ({families})")
    usd, judge_usd = (
        "" if estimate[name] is None else f", at most about {estimate[name]:.4f} USD"
        for name in ("usd", "judge_usd")
    )
    progress(f"plan: probes: {estimate['probe_requests']} requests in addition")
    progress(
        f"plan: in total about {estimate['tokens_in']} input tokens, at most "
        f"{estimate['tokens_out']} output tokens{usd}; judge: {estimate['judge_calls']} calls"
        f"{judge_usd}"
    )
    if estimate["own_bound"]:
        progress(f"plan: {estimate['own_bound']}")
    minutes = estimate["minutes"]
    if minutes is None:
        progress("plan: no duration is estimated yet; the first batches report the rate")
    else:
        progress(f"plan: {minutes:.1f} minutes at the past rate of this workdir")


def _own_bound(settings: Settings, spec: loading.ModelSpec) -> str:
    if spec.kind != "endpoint":
        return ""
    endpoint = endpoint_model.make_endpoint(spec.where, settings.service, field="service")
    return endpoint_model.own_bound(endpoint)


def _tokens(
    settings: Settings,
    spec: loading.ModelSpec,
    requests: Sequence[base.ModelRequest],
    calls: cached_chat_api.Cache | None,
) -> dict[str, Any]:
    if spec.kind != "endpoint":
        return _bound(settings, spec, requests)
    endpoint = endpoint_model.make_endpoint(spec.where, settings.service, field="service")
    supported = [
        request for request in requests if request.mode in endpoint_model.EndpointModel.modes
    ]
    estimate = endpoint_model.estimate(endpoint, supported, calls)
    return {name: estimate[name] for name in ("tokens_in", "tokens_out", "usd")}


def _bound(
    settings: Settings, spec: loading.ModelSpec, requests: Sequence[base.ModelRequest]
) -> dict[str, Any]:
    """Return an upper bound without reading images or earlier replies."""
    if spec.kind not in ("native", "hf", "endpoint"):
        return dict(tokens_in=0, tokens_out=0, usd=None)
    characters = sum(
        len(part) for request in requests for part in request.parts if isinstance(part, str)
    )
    n_images = sum(isinstance(part, Path) for request in requests for part in request.parts)
    tokens_in = (
        characters // cached_chat_api.CHARS_PER_TOKEN + n_images * cached_chat_api.TOKENS_PER_IMAGE
    )
    if spec.kind != "endpoint":
        max_tokens = settings.sample.max_gen_len
        tokens_out = sum(min(request.max_tokens, max_tokens) for request in requests)
        return dict(tokens_in=tokens_in, tokens_out=tokens_out, usd=None)
    endpoint = endpoint_model.make_endpoint(spec.where, settings.service, field="service")
    tokens_in += len(requests) * cached_chat_api.TOKENS_PER_MESSAGE
    tokens_out = sum(
        endpoint_model.reply_bound(endpoint, request.max_tokens) for request in requests
    )
    usd = cost(endpoint, tokens_in, tokens_out)
    return dict(tokens_in=tokens_in, tokens_out=tokens_out, usd=usd)


def _minutes(workdir: Path, shard: Shard, left: int) -> float | None:
    if not left:
        return 0.0
    counts = inference.totals(workdir).get(shard.file(workdir / OF_RECORDS).name)
    if not counts or not counts["recorded"] or not counts["seconds"]:
        return None
    return left * counts["seconds"] / counts["recorded"] / 60
