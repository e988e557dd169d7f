"""Serve a page on this machine: chat with images, images from text, adapters side by side.

python -m medmax_jax.demo --model=medmax_jax/tiny --adapter=medmax_jax/tiny_adapter

The page is at http://127.0.0.1:7860 and only this machine can open it; from another one, forward
the port: ssh -L 7860:127.0.0.1:7860 HOST. It needs gradio: pip install "gradio>=6.31,<7".
"""

import argparse
import importlib.util
import logging
import os
import sys
import time
from pathlib import Path

from medmax_jax import arguments, cli
from medmax_jax.checkpoints import export
from medmax_jax.demo import uploads
from medmax_jax.generation.engine import EngineSizes
from medmax_jax.generation.output_files import NOTICE
from medmax_jax.io.errors import printable_text
from medmax_jax.io.progress import report_waiting
from medmax_jax.models import kv_cache
from medmax_jax.serving import startup
from medmax_jax.serving.service import Limits, Service
from medmax_jax.storage.folder import StorageError

INSTALL = 'the page requires gradio: pip install "gradio>=6.31,<7"'
ERRORS = (ValueError, OSError, StorageError, export.ExportError)
ROWS = 2  # answers that are generated at once: a 7B model has 2 GiB of cache per slot
QUEUE, REQUEST_S, DRAIN_S = 32, 600.0, 5.0


def _parser() -> arguments.Parser:
    parser = arguments.Parser(
        prog="python -m medmax_jax.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="P", help="model folder")
    add("--adapter", default="", metavar="A", help="adapter, or the workdir of the training run")
    add("--port", type=int, default=7860, help="port of 127.0.0.1; 0: a free one")
    add("--rows", type=int, default=ROWS, help="number of answers to generate at a time")
    add("--cache", default="model", choices=kv_cache.CACHE_DTYPES, help="dtype of the KV cache")
    add("--compile_cache", default="", metavar="D",
        help="folder of compiled programs; off: none; default: of the user's cache")  # fmt: skip
    return parser


def main() -> int:
    """Load the model, serve the page until a signal, and return the exit status."""
    args = _parser().parse_args()
    if importlib.util.find_spec("gradio") is None:
        print(f"error: {INSTALL}", file=sys.stderr)
        return cli.ERROR
    logging.getLogger("absl").setLevel(logging.ERROR)
    cli.skip_absent_tpu()
    cli.use_compile_cache(args.compile_cache)
    try:
        with uploads.temporary_folder():
            _serve(args)
    except KeyboardInterrupt:
        return cli.INTERRUPTED
    except ERRORS as error:
        print(f"error: {printable_text(str(error))}", file=sys.stderr)
        return cli.ERROR
    return cli.DONE


def _serve(args: argparse.Namespace) -> None:
    """Serve the page until SIGINT or SIGTERM."""
    with startup.bind("127.0.0.1", args.port) as bound:  # gradio binds it again
        port = bound.getsockname()[1]
    names = {_name(args.model): ""}
    if args.adapter:
        name = _name(args.adapter)
        names[f"{name} (adapter)" if name in names else name] = args.adapter
    with report_waiting("loading the model", print):
        bundles = startup.load_bundles(args.model, names)
    base, *others = bundles
    sizes = EngineSizes(
        batch_size=args.rows,
        num_slots=3 * args.rows,  # two more for the guidance of each image
        cache_length=bundles[base].config.context_length,
        cache_dtype=args.cache,
    )
    service = Service(bundles, sizes, Limits(queue=QUEUE, request_s=REQUEST_S), log=print)
    try:
        from medmax_jax.demo import page  # after the temporary folder was set

        adapter = "".join(others)
        models = page.Models(
            service=service, base=base, adapter=adapter, facts={"model": base, "adapter": adapter}
        )
        with cli.Stop(together=False) as stop:
            stop.activity = "the answers that are generated now"
            blocks = page.build(models)
            page.launch(blocks, port)
            print(f"http://127.0.0.1:{port}  {NOTICE} Ctrl-C ends the page.", flush=True)
            while not stop.requested:
                time.sleep(0.2)
            blocks.close()
    finally:
        service.close(drain_s=DRAIN_S)


def _name(path: str | os.PathLike) -> str:
    return Path(os.fspath(path).rstrip("/")).name


if __name__ == "__main__":
    sys.exit(main())
