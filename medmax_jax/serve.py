"""Serve a model and its adapters over HTTP, as the OpenAI interface with images in both directions.

python -m medmax_jax.serve --model=medmax_jax/tiny --adapter mine=medmax_jax/tiny_adapter

    POST /v1/chat/completions, /v1/images/generations    GET /v1/models, /health, /metrics

A request names the base or an adapter as its model. All requests share one engine per name, on one
device. The server listens on this machine only; --host opens it, and then requires --api_key_env.
SIGTERM finishes what runs and refuses new requests. Research only, not for clinical use.
"""

import argparse
import dataclasses
import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import PurePosixPath

import uvicorn

from medmax_jax import arguments, cli
from medmax_jax.checkpoints import export
from medmax_jax.configs.sampling import SETS
from medmax_jax.generation import api, sampling_params
from medmax_jax.generation.engine import EngineSizes
from medmax_jax.generation.requests import GenerateError
from medmax_jax.io.errors import printable_text
from medmax_jax.io.progress import log_to_stderr, report_waiting
from medmax_jax.models import kv_cache
from medmax_jax.serving import startup
from medmax_jax.serving.api_requests import ReadOptions
from medmax_jax.serving.app import AppSettings, make_app
from medmax_jax.serving.service import Limits, Service
from medmax_jax.storage.folder import StorageError

ERRORS = (ValueError, OSError, StorageError, export.ExportError)
CONNECTIONS = 64  # in addition to those whose requests run or wait
MIN_KEY_CHARS = 16
LEAST = dict(rows=1, image_rows=0, cache_length=0, queue=1, request_s=1, max_body_mib=1,
             max_pixels=1, drain_s=0)  # fmt: skip


def _parser() -> arguments.Parser:
    parser = arguments.Parser(
        prog="python -m medmax_jax.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="P", help="model folder")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=P",
                        help="an adapter, or the workdir of its training run, and its name; may be "
                        "repeated")  # fmt: skip
    for flag, kind, default, text in (
        ("--name", str, "", "name of the base; empty: the last part of --model"),
        ("--host", str, "127.0.0.1", "address to listen on"),
        ("--port", int, 8000, "port; 0: a free one"),
        ("--api_key_env", str, "", "environment variable with the key that clients must send"),
        ("--rows", int, 8, "answers that are generated at a time, for each name"),
        ("--image_rows", int, 2, "images with guidance at a time, in two more KV-cache slots each"),
        ("--jacobi_window", int, 0, "image codes per pass, see sample.jacobi_window; 0: one"),
        ("--cache_length", int, 0, "tokens of a prompt and its answer; 0: the model's context"),
        ("--queue", int, 64, "requests that wait"),
        ("--request_s", float, 600.0, "seconds from a request to the end of its answer"),
        ("--max_body_mib", int, 20, "MiB of a request"),
        ("--max_pixels", int, 16_000_000, "pixels of an image in a request"),
        ("--drain_s", int, 30, "seconds to finish what runs after SIGTERM"),
        ("--compile_cache", str, "", "folder of compiled programs; off: none; empty: the user's"),
    ):
        shown = f" (default: {default})" if default else ""
        metavar = {int: "N", float: "N", str: "TEXT"}[kind]
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=text + shown)
    parser.add_argument("--settings", choices=SETS, default="medmax_eval",
                        help="sampling settings that a request does not set")  # fmt: skip
    parser.add_argument("--cache", choices=kv_cache.CACHE_DTYPES, default="model",
                        help="KV-cache dtype: the compute dtype (model) or int8")  # fmt: skip
    return parser


def serve(args: argparse.Namespace) -> None:
    """Load the models and serve them until a signal."""
    for flag, least in LEAST.items():
        if (value := getattr(args, flag)) < least:
            raise GenerateError(f"--{flag} is {value}; it must be at least {least}")
    key = _api_key(args)
    names = _names(args)
    listener = startup.bind(args.host, args.port)
    with report_waiting("loading the model", log_to_stderr):
        bundles = startup.load_bundles(args.model, names)
        base = bundles[next(iter(bundles))]
        sample = dataclasses.replace(api.defaults(args.settings), jacobi_window=args.jacobi_window)
        codes = base.vq_config.codes_per_image
        sampling_params.resolve(sample, base.vocab, mode="mixed", codes=codes)  # or raises
        sizes = EngineSizes(
            batch_size=args.rows,
            num_slots=args.rows + 2 * args.image_rows,
            cache_length=args.cache_length or base.config.context_length,
            cache_dtype=args.cache,
        )
        limits = Limits(queue=args.queue, request_s=args.request_s)
        service = Service(bundles, sizes, limits, log=log_to_stderr)
    settings = AppSettings(
        read=ReadOptions(sample=sample, max_pixels=args.max_pixels),
        max_body_bytes=args.max_body_mib * 2**20,
        api_key=key,
        local=_is_local(args.host),
    )
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(service, settings),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=args.rows * len(bundles) + args.queue + CONNECTIONS,
            timeout_graceful_shutdown=args.drain_s,
        )
    )
    listener.listen()  # from the line below on, connections wait for the server
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(bundles)} at http://{shown}:{port}/v1", flush=True)
    # uvicorn raises the signal again once it has finished; the exit status of the program is 0
    before = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        service.close(drain_s=0.0)  # the server has waited for its clients
        for number, handler in before.items():
            signal.signal(number, handler)
    log_to_stderr("stopped")


def _names(args: argparse.Namespace) -> dict[str, str]:
    """Return name -> path of the base, "", and of each adapter; raise GenerateError."""
    base = args.name or PurePosixPath(args.model.rstrip("/")).name
    names = {base: ""}
    for given in args.adapter:
        name, sign, path = given.partition("=")
        if not sign or not name or not path:
            raise GenerateError(f"--adapter is {given!r}; use the form NAME=P")
        if name in names:
            raise GenerateError(f"--adapter: the name {name!r} is given twice; use another one")
        names[name] = path
    return names


def _api_key(args: argparse.Namespace) -> str:
    """Return the API key, "" for none; raise GenerateError where the server would be open."""
    if not args.api_key_env:
        if not _is_local(args.host):
            raise GenerateError(
                f"--host is {args.host}, so other machines can reach the server; set --api_key_env "
                "to a variable with a key, or keep --host=127.0.0.1"
            )
        return ""
    key = os.environ.get(args.api_key_env, "").strip()
    if len(key) < MIN_KEY_CHARS or not key.isascii():
        raise GenerateError(
            f"--api_key_env: the variable has no key of at least {MIN_KEY_CHARS} ASCII characters; "
            "set one, for example: openssl rand -hex 24"
        )
    return key


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    cli.skip_absent_tpu()
    cli.use_compile_cache(args.compile_cache)
    try:
        serve(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return cli.INTERRUPTED
    except ERRORS as error:
        print(printable_text(f"error: {error}"), file=sys.stderr)
        return cli.ERROR
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
