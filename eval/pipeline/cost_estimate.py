"""Estimates an evaluation before it runs: requests, tokens, judge calls, price and minutes.

Input tokens of images and text, those of the shots too, are counted as
medmax_jax/endpoints/cached_chat_api.py does, output tokens are the bound of each family: both are
upper bounds of what is paid for. Minutes come from the rate at which this workdir was filled
before; without such a rate none is stated, and the rate of the first batches is reported instead.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from medmax_jax.endpoints import cached_chat_api, egress
from medmax_jax.endpoints.chat_api import TransientError, check_ready, cost
from medmax_jax.eval.config import Settings
from medmax_jax.eval.metrics.per_record import CLOSED_FAMILIES
from medmax_jax.eval.models import base, loading
from medmax_jax.eval.models import endpoint as endpoint_model
from medmax_jax.eval.pipeline import inference, judging, perturbation, verbalized_confidence
from medmax_jax.eval.records import EvalRecord, Item, read_records
from medmax_jax.eval.tasks import probes
from medmax_jax.eval.tasks.families import FAMILIES
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
    minutes are of the items, of their probes and of the requests for the confidence in answers.
    """
    shard_items = eval_set.items[shard.index :: shard.count]
    left, probe_items = _remaining_items(settings, eval_set, spec, workdir, shard)
    confidence = _confidence_requests(settings, eval_set, spec, workdir, shard)
    calls = cached_chat_api.known_replies(shard.file(workdir / loading.CALLS))
    parts = [
        _tokens(settings, spec, _requests(settings, eval_set, left, workdir), calls),
        _bound(settings, spec, _requests(settings, eval_set, probe_items, workdir)),
        _bound(settings, spec, confidence),
    ]
    estimate = dict(
        items=len(shard_items),
        requests=len(left),
        by_family={f: n for f in FAMILIES if (n := sum(i.family == f for i in left))},
        probe_requests=len(probe_items),
        confidence_requests=len(confidence),
        **_judge_cost(settings, eval_set, shard_items),
        **{name: _sum(part[name] for part in parts) for name in ("tokens_in", "tokens_out", "usd")},
        minutes=_minutes(workdir, shard, len(left) + len(probe_items) + len(confidence)),
        own_bound=_own_bound(settings, spec),
    )
    max_usd = settings.service.max_usd if spec.kind == "endpoint" else None
    if max_usd is not None and estimate["usd"] > max_usd:
        stated = f" and {len(confidence)} of config.verbalized_confidence" if confidence else ""
        raise PlanError(
            f"config.service.max_usd is {max_usd:g} but {len(left)} requests and "
            f"{len(probe_items)} of probes{stated} cost about {estimate['usd']:.4f} USD; increase "
            "it, or reduce config.counts or config.probes"
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
        [r for r in _requests(settings, eval_set, items, workdir) if r.mode in modes]
        for items in _remaining_items(settings, eval_set, spec, workdir, shard)
    )
    further = (*probe_requests, *_confidence_requests(settings, eval_set, spec, workdir, shard))
    for data_class in {request.data_class for request in (*left, *further)}:
        egress.check(endpoint.url, data_class, listed=endpoint.listed)
    if not left and not further:
        return
    try:
        check_ready(endpoint)
    except TransientError:
        calls = cached_chat_api.known_replies(shard.file(workdir / loading.CALLS))
        if further or calls is None:
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
    settings: Settings,
    eval_set: EvalSet,
    items: Sequence[Item],
    workdir: Path | None = None,
) -> list[base.ModelRequest]:
    """Return the requests; images that were perturbed in the workdir before are those images."""
    requests = [
        inference.make_request(item, eval_set.folder, settings.mode, settings.prompt)
        for item in items
    ]
    if not settings.perturbation or workdir is None:
        return requests
    changed = functools.partial(
        perturbation.perturbed_parts, folder=workdir / perturbation.FOLDER, write=False
    )
    return [dataclasses.replace(r, parts=changed(r.parts, r.id)) for r in requests]


def _confidence_requests(
    settings: Settings, eval_set: EvalSet, spec: loading.ModelSpec, workdir: Path, shard: Shard
) -> list[base.ModelRequest]:
    """Return the remaining requests for the confidence in answers.

    An answer that is not recorded yet has its maximum length. The run that merges the shards makes
    these requests, of several hosts the first one.
    """
    merges = shard.count == 1 or (shard.index == 0 and jax.process_count() == shard.count)
    if not settings.verbalized_confidence or not merges:
        return []
    if verbalized_confidence.unsupported_reason(spec.kind):
        return []
    files = inference.shard_files(workdir / OF_RECORDS)
    answers = {
        record.id: verbalized_confidence.answer_of(record)
        for path in files
        for record in read_records(path)
    }
    items = [item for item in eval_set.items if item.family in CLOSED_FAMILIES]
    bounds = {family: FAMILIES[family].tokens[settings.mode] for family in CLOSED_FAMILIES}
    if spec.kind == "endpoint":
        endpoint = endpoint_model.make_endpoint(spec.where, settings.service, field="service")
        bounds = {f: endpoint_model.reply_bound(endpoint, n) for f, n in bounds.items()}
    requests = []
    for item in _without_record(items, workdir / verbalized_confidence.CONFIDENCE):
        longest = "x" * bounds[item.family] * cached_chat_api.CHARS_PER_TOKEN
        if answer := answers.get(item.id, longest):
            arguments = (eval_set.folder, settings.mode, settings.prompt)
            requests.append(verbalized_confidence.make_request(item, answer, *arguments))
    return requests


def _judge_cost(settings: Settings, eval_set: EvalSet, items: Sequence[Item]) -> dict[str, Any]:
    """Return judge calls if each first reply is readable, and USD at most for full answers."""
    if not settings.judge.endpoint:
        return dict(judge_calls=0, judge_usd=None)
    judge = judging.make_judge(settings.judge)
    judged_items = [item for item in items if item.family in judging.judged_families(judge)]
    requests = _requests(settings, eval_set, judged_items)
    records = [
        EvalRecord.of(
            item, text=request.id.ljust(request.max_tokens * cached_chat_api.CHARS_PER_TOKEN)
        )
        for item, request in zip(judged_items, requests, strict=True)
    ]
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
    if n := estimate["confidence_requests"]:
        progress(f"plan: confidence in answers: {n} requests in addition")
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
