"""Provides the command line and the exit statuses that all programs share.

python -m medmax_jax.train --config=configs/tiny.py --workdir=D [--config.optim.peak_lr=1e-3 ..]

0  done      1  an error that the user can fix, in one line      2  wrong usage or config
75  interrupted; the same command resumes from where it stopped (EX_TEMPFAIL)
"""

import logging
import os
import pathlib
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import app, flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, config_flags

from medmax_jax.config import ConfigError
from medmax_jax.io.errors import printable_text

DONE, ERROR, USAGE, INTERRUPTED = 0, 1, 2, 75
RESUME = "run the same command again to resume"
STOPPED = f"interrupted; {RESUME}"


class Interrupted(RuntimeError):
    """Raised when a signal stopped the program in a state from which the same command resumes."""


def run(
    main: Callable[[ConfigDict, str], Any],
    *,
    errors: tuple[type[Exception], ...],
    defaults: dict[str, str] | None = None,
    folder: str = "workdir",
) -> None:
    """Read the flags, call `main(config, workdir)` and exit with one of the statuses above.

    `errors`: exceptions whose message is all that the user needs. Any other exception is a bug and
    shows its traceback. `defaults`: flag values of a program that can be started without them.
    `folder`: the name of the flag that sets the workdir.
    """
    settings = config_flags.DEFINE_config_file(
        "config", None, "config file, for example configs/tiny.py"
    )
    workdir = flags.DEFINE_string(folder, None, "folder that the program writes to")
    flags.mark_flags_as_required(["config", folder])

    def guarded(_: list[str]) -> int:
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every operation
        init_distributed(os.environ)
        try:
            main(settings.value, workdir.value)
        except ConfigError as error:
            return _fail(error, USAGE)
        except (Interrupted, KeyboardInterrupt) as error:
            print(printable_text(str(error)) or STOPPED, file=sys.stderr, flush=True)
            return INTERRUPTED
        except errors as error:
            return _fail(error, ERROR)
        return DONE

    given_flags = {word.split("=")[0].lstrip("-") for word in sys.argv[1:]}
    # Not set as flag defaults: absl would read the config and its overrides too early.
    missing = {k: v for k, v in (defaults or {}).items() if k not in given_flags}
    sys.argv[1:1] = [f"--{name}={value}" for name, value in missing.items()]
    app.run(guarded, flags_parser=_parse)


def init_distributed(environment: Mapping[str, str]) -> None:
    """Connect to the other hosts of a run, before anything touches a device.

    MEDMAX_MULTIHOST=1                        where JAX detects the hosts: Cloud TPU, Slurm, k8s
    MEDMAX_COORDINATOR=host:port MEDMAX_PROCESSES=2 MEDMAX_PROCESS=0   elsewhere
    """
    if address := environment.get("MEDMAX_COORDINATOR"):
        count, own = (int(environment[f"MEDMAX_{name}"]) for name in ("PROCESSES", "PROCESS"))
        jax.distributed.initialize(address, num_processes=count, process_id=own)
    elif environment.get("MEDMAX_MULTIHOST") == "1":
        jax.distributed.initialize()


class WorkdirError(OSError):
    """Raised for a --workdir that cannot be written to."""


def open_workdir(workdir: str | os.PathLike, flag: str = "--workdir") -> pathlib.Path:
    """Return the folder, created where missing; raise WorkdirError where no file can be created."""
    if os.fspath(workdir).startswith("gs://"):
        raise WorkdirError(
            f"{flag} {workdir} is not a local or mounted folder; mount the bucket (Cloud Storage "
            "FUSE) or a disk that the hosts share, see docs/guides/launch.md. Models and records "
            "may be stored on gs://"
        )
    folder = pathlib.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise WorkdirError(
            f"{flag} {workdir} is not writable ({error.strerror}); use another folder"
        ) from error


class Stop:
    """Record SIGINT and SIGTERM, so that a loop can check for them after each step.

    with Stop() as stop:
        while ... and not stop.poll(): ...      # "" or the signal's name

    A second signal ends the process at once. In a run of several hosts, each must call `poll`
    equally often: JAX catches the SIGTERM of any host and reports it to all hosts at the same call,
    some calls later.
    """

    def __init__(self) -> None:
        self.requested = ""
        self._calls = 0

    def __enter__(self) -> "Stop":
        if jax.process_count() == 1:
            handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._note)
        else:
            handlers = {signal.SIGINT: lambda *_: signal.raise_signal(signal.SIGTERM)}
        self._before = {n: signal.signal(n, handler) for n, handler in handlers.items()}
        return self

    def poll(self) -> str:
        """Return the signal that this process, or any host of the run, has received so far."""
        if jax.process_count() > 1 and not self.requested:
            self._calls += 1
            if multihost_utils.reached_preemption_sync_point(self._calls):
                self.requested = "SIGTERM to a host"
        return self.requested

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.requested = signal.Signals(number).name
        for handled in self._before:
            signal.signal(handled, signal.SIG_DFL)
        # not print: its buffer may be in use at this moment
        os.write(
            2,
            f"\n{self.requested}: stopping after this step; repeat it to stop at once\n".encode(),
        )


def _parse(argv: list[str]) -> list[str]:
    if {"--help", "-h"} & set(argv):
        print(sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), sep="\n")
        print(flags.FLAGS.module_help(sys.modules[__name__]))
        sys.exit(DONE)
    try:
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.to_dict()  # a file that failed to load raises when it is first used
    except flags.Error as error:
        sys.exit(_fail(error, USAGE))
    except Exception as error:  # noqa: BLE001  the file is Python: it can raise anything
        sys.exit(_fail(_explain_usage_error(argv, error), USAGE))
    if len(rest) > 1:
        sys.exit(_fail(f"unexpected argument {rest[1]!r}; write flags as --name=value", USAGE))
    return rest


def _explain_usage_error(argv: list[str], error: Exception) -> str:
    """Return which argument the config rejected: its error names only one part of the path."""
    words = set(re.findall(r"\w+", str(error)))
    for flag in (arg.split("=")[0] for arg in argv if arg.startswith("--config.")):
        unknown = isinstance(error, AttributeError | KeyError)
        if unknown and words & set(flag.removeprefix("--config.").split(".")):
            return f"{flag} is not a field of the config; configs/base.py lists all fields"
    return f"--config: {type(error).__name__}: {error}"


def _fail(error: object, status: int) -> int:
    if isinstance(error, OSError) and error.filename is not None:  # Python's own text for it
        error = f"{error.filename}: {error.strerror}; check the path and its permissions"
    print(printable_text(f"error: {error}"), file=sys.stderr, flush=True)
    return status
