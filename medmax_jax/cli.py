"""Provides the command line and the exit statuses that all programs share.

python -m medmax_jax.train --config=configs/tiny.py --workdir=D [--config.optim.peak_lr=1e-3 ..]

0  done      1  an error that the user can fix, in one line      2  wrong usage or config
75  interrupted; the same command resumes from where it stopped (EX_TEMPFAIL)
"""

import contextlib
import glob
import importlib.util
import logging
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import filelock
import jax
from absl import app, flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, config_flags

from medmax_jax import arguments
from medmax_jax import config as config_module
from medmax_jax.config import ConfigError
from medmax_jax.io.errors import printable_text
from medmax_jax.storage import workdir
from medmax_jax.storage.folder import Folder, StorageError
from medmax_jax.storage.workdir import Workdir

DONE, ERROR, USAGE, INTERRUPTED = 0, 1, 2, 75
RESUME = "run the same command again to resume"
STOPPED = f"interrupted; {RESUME}"
CACHE_BYTES = 2**30  # of the user's compile cache; the programs of the quickstart take 2 MB
MIN_COMPILE_SECONDS = 0.1  # of a program that is cached
ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")


class Interrupted(KeyboardInterrupt):
    """Raised when a signal stopped the program in a state from which the same command resumes."""


def run(
    main: Callable[[ConfigDict, str], Any],
    *,
    errors: tuple[type[Exception], ...],
    defaults: dict[str, str] | None = None,
    folder: str = "workdir",
    instead: str = "",
    compiles: bool = True,
) -> None:
    """Read the flags, call `main(config, workdir)` and exit with one of the statuses above.

    `errors`: exceptions whose message is all that the user needs. Any other exception is a bug and
    shows its traceback. `defaults`: flag values of a program that can be started without them.
    `folder`: the name of the flag that sets the workdir. `instead`: a flag without which `folder`
    is required. `compiles`: whether the program runs what it compiles, so that it has the flag
    --compile_cache.
    """
    settings = config_flags.DEFINE_config_file(
        "config", None, "config file, for example configs/tiny.py"
    )
    target = flags.DEFINE_string(folder, None, "folder that the program writes to")
    flags.mark_flags_as_required(["config"])
    flags.register_multi_flags_validator(
        [folder, instead] if instead else [folder],
        lambda given: any(given.values()),
        message=f"Flag --{folder} {arguments.REQUIRED}",
    )
    if compiles:
        flags.DEFINE_string(
            "compile_cache", "",
            "folder of compiled programs; empty: medmax_jax/compile in the user's cache folder, or "
            "D/compiled with several hosts; off: none",
        )  # fmt: skip

    def guarded(_: list[str]) -> int:
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every operation
        skip_absent_tpu()
        several_hosts = init_distributed(os.environ)
        if compiles and not flags.FLAGS.flag_values_dict().get("dry_run"):
            shared = Folder(f"{target.value}/compiled").path if several_hosts else ""
            use_compile_cache(flags.FLAGS.compile_cache or shared)
        try:
            main(settings.value, target.value)
        except ConfigError as error:
            return _fail(error, USAGE)
        except KeyboardInterrupt as error:
            print(printable_text(str(error)) or STOPPED, file=sys.stderr, flush=True)
            return INTERRUPTED
        except (*errors, StorageError) as error:
            return _fail(error, ERROR)
        return DONE

    sys.argv = with_shipped_config(sys.argv)
    given_flags = {word.split("=")[0].lstrip("-") for word in sys.argv[1:]}
    # Not set as flag defaults: absl would read the config and its overrides too early.
    missing = {k: v for k, v in (defaults or {}).items() if k not in given_flags}
    sys.argv[1:1] = [f"--{name}={value}" for name, value in missing.items()]
    app.run(guarded, flags_parser=lambda argv: _parse(argv, missing))


def skip_absent_tpu() -> None:
    """Keep JAX from trying, and reporting, a TPU that this machine does not have.

    JAX's own settings JAX_PLATFORMS and JAX_LOGGING_LEVEL take precedence.
    """
    if jax.config.jax_logging_level in (None, "NOTSET"):
        logging.getLogger("jax").setLevel(logging.WARNING)  # INFO: "Unable to initialize backend"
    devices = any(glob.glob(pattern) for pattern in ACCELERATORS)
    libtpu = "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu")
    if libtpu and not devices and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


def init_distributed(environment: Mapping[str, str]) -> bool:
    """Connect to the other hosts of a run, before anything touches a device; return if there are.

    MEDMAX_MULTIHOST=1                        where JAX detects the hosts: Cloud TPU, Slurm, k8s
    MEDMAX_COORDINATOR=host:port MEDMAX_PROCESSES=2 MEDMAX_PROCESS=0   elsewhere
    """
    if address := environment.get("MEDMAX_COORDINATOR"):
        count, own = (int(environment[f"MEDMAX_{name}"]) for name in ("PROCESSES", "PROCESS"))
        jax.distributed.initialize(address, num_processes=count, process_id=own)
        return True
    if environment.get("MEDMAX_MULTIHOST") == "1":
        jax.distributed.initialize()
        return True
    return False


def use_compile_cache(folder: str = "") -> None:
    """Read programs that an earlier start compiled from a folder, and write new ones to it.

    The default is a folder of the user, from which JAX removes the least recently used programs
    beyond CACHE_BYTES. "off" sets no folder. JAX's own settings take precedence, for example
    JAX_COMPILATION_CACHE_DIR. The key of a program contains the versions of JAX and of XLA, its
    options and the features of the processor, so machines can share a folder.
    """
    enabled = jax.config.jax_enable_compilation_cache
    if folder == "off" or jax.config.jax_compilation_cache_dir or not enabled:
        return
    if not folder:
        try:
            folder = str(_user_compile_cache())
        except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
            print(f"compile cache: off ({error}); --compile_cache=FOLDER sets one", file=sys.stderr)
            return
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
        limit = f"{CACHE_BYTES / 2**30:g} GiB"
        print(f"compile cache: {folder} (up to {limit}; --compile_cache=off)", file=sys.stderr)
    jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def _user_compile_cache() -> pathlib.Path:
    """Return the user's folder of compiled programs, without the remains of killed processes."""
    parent = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(parent).absolute() / "medmax_jax" / "compile"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:  # a program in it is executed
        raise PermissionError(f"other users can write to {folder}")
    with contextlib.suppress(filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=5):
        # JAX writes NAME-atime after NAME-cache; without it, it can neither use nor evict the entry
        for entry in folder.glob("*-cache"):
            if not entry.with_name(f"{entry.name.removesuffix('cache')}atime").exists():
                entry.unlink()
    return folder


class WorkdirError(OSError):
    """Raised for a --workdir that cannot be written to."""


CONTENTS = {  # the file by which the folder of a program is known
    "metrics.jsonl": "a training run",
    "records.jsonl": "an evaluation",
    "request.json": "answers of generate",
    "report.json": "a quickstart",
    "reproduction.json": "a reproduction",
}


@contextlib.contextmanager
def open_workdir(
    path: str | os.PathLike,
    flag: str = "--workdir",
    *,
    own: str = "",
    skip: Sequence[str] = (),
    writer: str = "",
    shared: bool = False,
) -> Iterator[Workdir]:
    """Open the folder that a program writes, local or gs://; see medmax_jax/storage/workdir.py.

    own: the file of CONTENTS that the program writes; a folder with another one is refused. In a
    run of several hosts the first one writes, and the others get an empty folder of a gs:// path;
    shared: each of them writes files of its own.

    Raises WorkdirError where no file can be created, StorageError where a bucket cannot be used.
    """
    with contextlib.ExitStack() as stack:
        # JAX is asked for a bucket only: the question initializes it.
        host = jax.process_index() if os.fspath(path).startswith("gs://") else 0
        mode = "empty" if host and not shared else "write"
        if host and not writer:
            writer = f"host-{host}"
        try:
            skip = (*skip, "compiled/*")  # JAX writes to a bucket itself
            work = stack.enter_context(workdir.opened(path, mode=mode, skip=skip, writer=writer))
            with tempfile.TemporaryFile(dir=work.folder):
                pass
        except OSError as error:
            raise WorkdirError(
                f"{flag} {path} is not writable ({error.strerror}); use another folder"
            ) from error
        for name, content in CONTENTS.items():
            if own and name != own and (work.folder / name).exists():
                raise WorkdirError(f"{flag} {path} contains {content} ({name}); use another folder")
        yield work


class Stop:
    """Record SIGINT and SIGTERM, so that a loop can check for them after each step.

    together: whether the hosts of a run stop at the same step; False: this process by itself.

    with Stop() as stop:
        while ... and not stop.poll(): ...      # "" or the signal's name

    A thread reports the first signal at once, also while the program compiles, and `activity`: what
    the program finishes first. A second signal ends the process at once; in an interactive session,
    such as a notebook, it raises KeyboardInterrupt. In a run of several hosts, each must call
    `poll` equally often: JAX catches the SIGTERM of any host and reports it to all hosts at the
    same call, some calls later.
    """

    def __init__(self, *, together: bool = True) -> None:
        self.requested = ""
        self._hosts = jax.process_count() if together else 1
        self.activity = "this step"
        self._ends_process = not hasattr(sys, "ps1")  # which interactive sessions have
        self._calls = 0
        self._wakeup: tuple[int, int] | None = None  # the thread's pipe; the wakeup fd before it

    def __enter__(self) -> "Stop":
        if self._hosts == 1:
            handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._note)
            end, begin = os.pipe()
            os.set_blocking(begin, False)
            self._wakeup = begin, signal.set_wakeup_fd(begin, warn_on_full_buffer=False)
            threading.Thread(target=self._report, args=(end,), daemon=True).start()
        else:
            handlers = {signal.SIGINT: lambda *_: signal.raise_signal(signal.SIGTERM)}
        self._before = {n: signal.signal(n, handler) for n, handler in handlers.items()}
        return self

    def progress(self, log: Callable[[str], None]) -> Callable[[str], None]:
        """Return a function that logs a line, and raises Interrupted once a signal was received."""

        def report(line: str) -> None:
            log(line)
            if self.requested:
                raise Interrupted(STOPPED)

        return report

    def poll(self) -> str:
        """Return the signal that this process, or any host of the run, has received so far."""
        if self._hosts > 1 and not self.requested:
            self._calls += 1
            if multihost_utils.reached_preemption_sync_point(self._calls):
                self.requested = "SIGTERM to a host"
        return self.requested

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: JAX's own
        if self._wakeup:
            begin, before = self._wakeup
            signal.set_wakeup_fd(before)
            os.close(begin)  # ends the thread

    def _note(self, number: int, _: object) -> None:
        """Handle a signal; Python runs this in the main thread, after a call of XLA has ended."""
        self.requested = signal.Signals(number).name
        for handled, before in self._before.items():
            signal.signal(handled, not self._ends_process and before or signal.SIG_DFL)

    def _report(self, end: int) -> None:
        """Report signals from a thread, which runs while the main thread is inside of XLA."""
        first = 0.0
        while number := os.read(end, 1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            if not first:
                first = time.monotonic()
                name = signal.Signals(number[0]).name
                text = f"\n{name}: stopping after {self.activity}; repeat it to stop at once\n"
                os.write(2, text.encode())  # not print: its buffer may be in use at this moment
            elif self._ends_process and time.monotonic() > first + 0.5:
                os._exit(INTERRUPTED)  # not earlier: a forked process may repeat the signal
        os.close(end)


def _parse(argv: list[str], defaults: Mapping[str, str]) -> list[str]:
    arguments.end_of_imports()
    words = {word.split("=")[0].lstrip("-") for word in argv[1:] if word.startswith("-")}
    if words & {"help", "h", "helpshort", "helpfull", "help_config"}:
        sys.exit(_help(argv, words, defaults))
    try:
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.to_dict()  # a file that failed to load raises when it is first used
    except flags.UnrecognizedFlagError as error:
        near = arguments.nearest(error.flagname, _own_flags())
        hint = f"did you mean --{near}?" if near else "--help lists all flags"
        sys.exit(_fail(f"--{error.flagname} is not a flag; {hint}", USAGE))
    except flags.Error as error:
        missing = arguments.missing_flags(error)
        sys.exit(_fail(arguments.required(missing) if missing else error, USAGE))
    except Exception as error:  # noqa: BLE001  the file is Python: it can raise anything
        sys.exit(_fail(explain_config_error(argv, error), USAGE))
    if len(rest) > 1:
        sys.exit(_fail(f"unexpected argument {rest[1]!r}; write flags as --name=value", USAGE))
    return rest


def _own_flags() -> list[str]:
    """Return the names of the program's flags, without those of absl."""
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    return [f.name for f in (*own, *flags.FLAGS.get_flags_for_module(__name__))]


def _help(argv: list[str], words: set[str], defaults: Mapping[str, str]) -> int:
    """Print the help that was requested; return the exit code."""
    program = sys.modules["__main__"]
    if "help_config" in words:
        try:
            config = read_config(argv)
            if config is None:
                return _fail("--help_config requires --config=FILE, whose fields it lists", USAGE)
            config.to_dict()
        except Exception as error:  # noqa: BLE001  the file is Python: it can raise anything
            return _fail(explain_config_error(argv, error), USAGE)
        path = pathlib.Path(_config_argument(argv))
        classes = [*arguments.source_files(program), pathlib.Path(config_module.__file__)]
        sources = [*classes, path, path.with_name("base.py")]
        print(arguments.config_help(config, [p for p in sources if p.is_file()]))
        return DONE
    print(program.__doc__)
    if "helpfull" in words:
        print(flags.FLAGS.get_help())
        return DONE
    print(arguments.flags_help(flags.FLAGS, _own_flags(), defaults))
    print(
        "\n--config.FIELD=VALUE overrides a field of the config; --help_config lists the fields of "
        "--config.\n--helpfull also lists the flags of absl."
    )
    return DONE


def _config_argument(argv: Sequence[str]) -> str:
    """Return the last value of --config, or ""."""
    path = ""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, sign, value = word.partition("=")
        if name in ("--config", "-config"):
            path = value if sign else following
    return path


def with_shipped_config(argv: Sequence[str]) -> list[str]:
    """Return the words; configs/NAME.py of --config is that of the package where it is no file."""
    path = _config_argument(argv)
    shipped = pathlib.Path(__file__).parent / path
    if not path.startswith("configs/") or os.path.exists(path) or not shipped.is_file():
        return list(argv)
    places = {f"{dashes}config={path}" for dashes in ("-", "--")} | {path}
    return [word.replace(path, str(shipped)) if word in places else word for word in argv]


def read_config(argv: Sequence[str], *, overrides: bool = True) -> ConfigDict | None:
    """Return the config of the --config of a command line, None without one."""
    if not (path := _config_argument(argv)):
        return None
    words = [word for word in argv if overrides and word.startswith("--config.")]
    line, values = ["program", f"--config={path}", *words], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=line)
    values(line)
    return values.config


def load_config(
    path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None
) -> ConfigDict:
    """Return the config of a file with some fields set, as --config and --config.FIELD=VALUE do.

    load_config("configs/tiny.py", {"optim.peak_lr": 1e-3}): where configs/tiny.py is no file, it is
    that of the package. Raises ConfigError with the message of the command line.
    """
    words = [f"--config.{field}={value}" for field, value in (overrides or {}).items()]
    argv = with_shipped_config(["medmax_jax", f"--config={os.fspath(path)}", *words])
    try:
        config = read_config(argv)
        assert config is not None
        config.to_dict()  # a file that failed to load raises when it is first used
    except Exception as error:  # noqa: BLE001  the file is Python: it can raise anything
        raise ConfigError(explain_config_error(argv, error)) from error
    return config


def explain_config_error(argv: Sequence[str], error: Exception) -> str:
    """Return which argument the config rejected: its error names only one part of the path."""
    path = pathlib.Path(_config_argument(argv))
    if not path.is_file():
        folders = path.parent, pathlib.Path(__file__).parent / path.parent
        stems = [p.stem for folder in folders for p in sorted(folder.glob("*.py"))]
        near = arguments.nearest(path.stem, stems)
        hint = f"did you mean {path.with_name(near + '.py')}?" if near else "configs/ has the files"
        return f"--config={path}: no such file; {hint}"
    try:
        config = read_config(argv, overrides=False)
        if config is not None and (message := arguments.unknown_field(argv, config)):
            return message
    except Exception:  # noqa: BLE001  the file itself is wrong: the error is reported below
        pass
    return f"--config: {type(error).__name__}: {error}"


def _fail(error: object, status: int) -> int:
    if isinstance(error, OSError) and error.filename is not None:  # Python's own text for it
        error = f"{error.filename}: {error.strerror}; check the path and its permissions"
    print(printable_text(f"error: {error}"), file=sys.stderr, flush=True)
    return status
