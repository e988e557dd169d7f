"""Define the command `python -m data.prepare instruct`: its flags, cost estimate and cost report.

python -m data.prepare instruct --from captions.jsonl --images D --out D2 \\
    --scores scores.jsonl --threshold 0.3 --key_env OPENAI_API_KEY \\
    --endpoint gpt-4o@https://api.openai.com/v1 --price_in 2.5 --price_out 10 \\
    --filter_endpoint gpt-4o-mini@https://api.openai.com/v1 --filter_price_in .. [--dry_run]
"""

import argparse
import logging
from pathlib import Path
from typing import Any

from medmax_jax import arguments, cli
from medmax_jax.data.instruct import captions, curation, replies
from medmax_jax.data.instruct.curation import InstructError
from medmax_jax.endpoints import cached_chat_api, egress
from medmax_jax.endpoints.chat_api import Endpoint, EndpointError, check_ready
from medmax_jax.endpoints.flags import add_call_flags, finite, json_object, model_at_url, positive
from medmax_jax.io.journal import JournalError
from medmax_jax.storage.image_paths import ImagePathError

log = logging.getLogger("medmax_jax.prepare")

ERRORS = (
    InstructError,
    ImagePathError,
    captions.CaptionsError,
    replies.PromptError,
    egress.OutgoingError,
    EndpointError,
    JournalError,
    cli.WorkdirError,
)
MAX_REPLY_BYTES = 4_000_000  # a thousand times what these prompts request
WRITER = {"temperature": 0, "max_tokens": 1_200}
FILTER = {"temperature": 0, "max_tokens": 120}


def add(commands: Any) -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = commands.add_parser("instruct", help="write instructions from captions with an LLM")
    add_flag = parser.add_argument
    add_flag("--from", dest="source", type=Path, required=True, help="captions, JSONL")
    add_flag("--images", type=Path, required=True, help="folder of the images")
    add_flag("--scores", type=Path, required=True, help="JSONL with id and score")
    add_flag("--threshold", type=finite, required=True, help="minimum score of a row that is kept")
    add_flag("--out", type=arguments.folder, required=True, help="folder to write, or to resume")
    add_flag(
        "--endpoint", type=model_at_url, required=True, metavar="MODEL@URL",
        help="model endpoint that writes the instructions",
    )  # fmt: skip
    add_flag(
        "--filter_endpoint", type=model_at_url, metavar="MODEL@URL",
        help="model endpoint that filters captions; default: --endpoint",
    )  # fmt: skip
    for role in ("", "filter_"):
        add_flag(f"--{role}key_env", metavar="NAME", help="environment variable with the API key")
        add_flag(
            f"--{role}parameters", type=json_object, metavar="JSON",
            help="request parameters, sent unchanged",
        )  # fmt: skip
        add_flag(f"--{role}price_in", type=_price, metavar="USD", help="per million tokens in")
        add_flag(f"--{role}price_out", type=_price, metavar="USD", help="per million tokens out")
    add_flag("--prompts", type=Path, default=replies.FOLDER, help="folder of prompts")
    add_flag("--calls", type=Path, help="file of cached replies; default: OUT/calls.jsonl")
    add_call_flags(add_flag, sent="captions")
    add_flag(
        "--max_wait", type=positive, default=90.0, metavar="S", help="maximum wait between retries"
    )
    add_flag("--dry_run", action="store_true", help="print the estimated cost; send nothing")
    parser.set_defaults(run=run, resumes=True)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command; return the report, or with --dry_run the estimate."""
    rows = captions.read_rows(args.source)
    settings = _settings(args, rows)
    curation.check(rows, settings)
    calls = args.calls or args.out / curation.CALLS
    estimate = curation.estimate(rows, settings, cached_chat_api.known_replies(calls))
    log.info("%d rows; remaining calls, at most: %s", len(rows), _format_estimate(estimate))
    if args.dry_run:
        return estimate
    with cli.open_workdir(args.out, "--out"):
        pass  # raises before a request that could not be stored
    if estimate["caption"]["calls"]:  # else which rows are still to be written depends on replies
        for stage in curation.PROMPT_OF:
            check_ready(settings.endpoint(stage))
    with cli.Stop() as stop:
        report = curation.curate(
            rows,
            args.out,
            settings,
            progress=log.info,
            stopped=lambda: bool(stop.requested),
            calls=calls,
        )
    if stop.requested:
        raise cli.Interrupted(f"{cli.STOPPED}: {report['undecided']} rows are undecided")
    if report["undecided"]:
        raise cli.Interrupted(
            f"{report['undecided']} of {len(rows)} rows had no reply; rerun the same command to "
            f"request them again. {args.out / curation.DOCUMENTS} contains the "
            f"{report['written']} written documents. Last error: {report['last_error']}"
        )
    return report


def _settings(args: argparse.Namespace, rows: list[captions.Row]) -> curation.Settings:
    secret = any(row.data_class == egress.CREDENTIALED for row in rows)
    scores = captions.read_scores(args.scores, secret=secret)
    unknown = [n for n, row in enumerate(rows) if row.id not in scores]
    if unknown:
        first = f"row {unknown[0] + 1}" if secret else repr(rows[unknown[0]].id)
        raise captions.CaptionsError(
            f"{args.scores}: {len(unknown)} rows have no score, the first is {first}; add their "
            "scores, or the score null to exclude them"
        )
    writer = _make_endpoint(args, "", args.endpoint, args.key_env, args.parameters or WRITER)
    model_at_url = args.filter_endpoint or args.endpoint
    # A key is sent only to the host that it was given for.
    host = egress.parse_address(model_at_url[1]).name
    same = host == egress.parse_address(args.endpoint[1]).name
    key_env = args.filter_key_env or (args.key_env if same else "")
    role = "filter_" if args.filter_endpoint else ""
    filter_parameters = args.filter_parameters or FILTER
    return curation.Settings(
        threshold=args.threshold,
        score_of=lambda row: scores[row.id],
        filter=_make_endpoint(args, role, model_at_url, key_env, filter_parameters),
        writer=writer,
        prompts=replies.load_prompts(args.prompts),
        images=args.images,
        concurrency=args.concurrency,
    )


def _make_endpoint(
    args: argparse.Namespace,
    role: str,
    model_at_url: tuple[str, str],
    key_env: str | None,
    parameters: dict[str, Any],
) -> Endpoint:
    return Endpoint(
        model=model_at_url[0],
        url=model_at_url[1],
        parameters=parameters,
        listed=egress.parse_allowed_hosts(args.credentialed_host),
        key_env=key_env or "",
        timeout_s=args.timeout,
        retries=args.retries,
        max_wait_s=args.max_wait,
        max_reply_bytes=MAX_REPLY_BYTES,
        price_in=getattr(args, f"{role}price_in"),
        price_out=getattr(args, f"{role}price_out"),
    )


def _format_estimate(estimate: dict[str, Any]) -> str:
    parts = [
        f"{stage} {estimate[stage]['calls']} calls, about {estimate[stage]['tokens_in']} input "
        f"tokens and {estimate[stage]['tokens_out']} output tokens"
        for stage in curation.PROMPT_OF
    ]
    usd = estimate["usd"]
    cost = "set prices for a cost estimate" if usd is None else f"about {usd:.2f} USD"
    return "; ".join([*parts, cost])


def _price(text: str) -> float:
    if (number := finite(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0; use 0 or more")
    return number
