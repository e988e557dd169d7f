"""Define the flags of commands that call an endpoint, and the types of their values, for argparse.

--credentialed_host HOST:PORT    --concurrency N    --timeout S    --retries N
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

from medmax_jax.endpoints.chat_api import EndpointError, parse_model_at_url
from medmax_jax.io.text_files import TextFileError, parse_json


def add_call_flags(add_flag: Callable[..., Any], *, sent: str) -> None:
    """Add the flags above; `sent` names what a credentialed host may receive, in the plural."""
    add_flag(
        "--credentialed_host", action="append", default=[], metavar="HOST:PORT",
        help=f"host that may receive credentialed {sent}; may be repeated",
    )  # fmt: skip
    add_flag("--concurrency", type=count, default=8, help="number of concurrent calls")
    add_flag("--timeout", type=positive, default=120.0, metavar="S", help="timeout of one call")
    add_flag("--retries", type=count, default=6, help="retries of one call")


def model_at_url(text: str) -> tuple[str, str]:
    """Return (model, URL) of MODEL@URL; raise ArgumentTypeError for anything else."""
    try:
        return parse_model_at_url(text)
    except EndpointError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def json_object(text: str) -> dict[str, Any]:
    """Return a JSON object; raise ArgumentTypeError for anything else."""
    try:
        value = parse_json(text, "the flag")
    except TextFileError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return value


def finite(text: str) -> float:
    """Return a number; raise ArgumentTypeError for an infinite one and NaN."""
    if not math.isfinite(number := float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def positive(text: str) -> float:
    """Return a finite number above 0; raise ArgumentTypeError for another one."""
    if (number := finite(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def count(text: str) -> int:
    """Return an integer of at least 1; raise ArgumentTypeError for another one."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1; use 1 or more")
    return number
