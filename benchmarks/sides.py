"""Runs the sides of a benchmark: processes that answer one request per line, and alternate.

    parent   side.ask(do="steps", count=3)   -->  {"do": "steps", "count": 3}    on the side's stdin
    side     serve(lambda: Trainer(spec))    -->  {"seconds": [1.9, 1.8, 1.8]}   on its stdout

An exception is an answer too, {"error": ...}, and ends the side. A side sleeps while the other
works, so both have all of the machine in turn. Only the standard
library is needed: a side may run in another Python.
"""

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

PROBE = (
    "import importlib.util, sys; "
    "print(next((n for n in sys.argv[1:] if not importlib.util.find_spec(n)), ''))"
)

# In the messages of XLA, of generation/buckets.py and of torch.
OUT_OF_MEMORY = ("resource_exhausted", "out of memory")


class Failed(RuntimeError):
    """Raised for a side that ended before its answer."""

    def __init__(self, message: str, *, outcome: str = "failed"):
        super().__init__(message)
        self.outcome = outcome  # or "out of memory", "time limit"


class Side:
    """Runs a process that serves requests, for `limit_s` seconds at most."""

    def __init__(
        self, name: str, command: list[str], *, limit_s: float = 86_400, **environment: str
    ):
        self.name, self.limit_s, self._stopped = name, limit_s, False
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | environment,
        )  # fmt: skip
        self._timer = threading.Timer(limit_s, self._stop)
        self._timer.daemon = True
        self._timer.start()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to one request; other output of the side goes to stderr."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, perhaps with an error to read
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                if "error" in answer:
                    raise Failed(f"{self.name}: {answer['error']}", outcome=answer["outcome"])
                return answer
            print(f"{self.name}: {line.rstrip()}", file=sys.stderr)
        raise self._failed(request)

    def close(self) -> None:
        """End the process by closing its stdin; its limit holds to its end."""
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself
            self._process.stdin.close()
        self._process.wait()
        self._timer.cancel()
        self._process.stdout.close()

    def _stop(self) -> None:
        self._stopped = True
        self._process.kill()

    def _failed(self, request: dict[str, Any]) -> Failed:
        self.close()
        if self._stopped:
            return Failed(f"{self.name} was stopped after {self.limit_s:g} s", outcome="time limit")
        code = self._process.returncode
        return Failed(
            f"{self.name} ended with exit code {code} on request {request}; its error is above"
        )


def read_spec(text: str, *packages: str) -> dict[str, Any]:
    """Return the content of the SPEC.json on the command line of a side; `text`: its docstring.

    Called before `packages` are imported: without one of them, or without a file, the process ends
    with one line and status 2.
    """
    words, problem, spec = _words(text), "SPEC.json is required; --help explains it", {}
    if words[1:] or words and words[0].startswith("-"):
        problem = f"{words[-1]} is not an argument; the only one is SPEC.json"
    elif words:
        try:
            with open(words[0]) as file:
                spec, problem = json.load(file), ""
        except (OSError, ValueError) as error:
            problem = f"{words[0]}: {error}; the benchmark that starts this side writes it"
    _require(problem, packages)
    return spec


def read_step(text: str, *packages: str) -> list[str]:
    """Return STEP, SCRATCH and what follows on the command line of a side of true_size.py.

    Called before `packages` are imported, as `read_spec` is.
    """
    words = _words(text)
    problem = "" if words[1:] else "STEP and SCRATCH are required; --help explains them"
    if words and words[0].startswith("-"):
        problem = f"{words[0]} is not an argument; the arguments are STEP and SCRATCH"
    _require(problem, packages)
    return words


def _words(text: str) -> list[str]:
    """Return the command line of a side; with --help, print `text` and exit."""
    words = sys.argv[1:]
    if {"-h", "--help"} & {*words}:
        print(text)
        sys.exit(0)
    return words


def _require(problem: str, packages: Sequence[str]) -> None:
    """Exit with one line and status 2 for a problem, or else for a missing package."""
    for name in packages if not problem else ():
        if not importlib.util.find_spec(name):
            problem = f"{sys.executable} has no {name}; use a Python that has it"
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


def serve(make: Callable[[], Any]) -> None:
    """Answer requests until stdin is closed with the methods of what `make` returns.

    `do` of a request names the method, the rest are its arguments.
    """
    try:
        served = make()
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(getattr(served, request.pop("do"))(**request)), flush=True)
    except Exception as error:  # noqa: BLE001  every failure is a result of the benchmark
        traceback.print_exc()
        text = str(error) or type(error).__name__
        memory = any(part in text.lower() for part in OUT_OF_MEMORY)
        outcome = "out of memory" if memory else "failed"
        print(json.dumps(dict(error=text.splitlines()[0], outcome=outcome)), flush=True)
        sys.exit(1)


def missing(python: str, packages: list[str]) -> str:
    """Return the first package that this Python lacks; empty when it has all."""
    done = subprocess.run(
        [python, "-c", PROBE, *packages], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def median(values: list[float]) -> float:
    """Return the median to four digits, as results are printed."""
    return float(f"{statistics.median(values):.4g}")


def agree(ours: list[float], theirs: list[float], *, within: float) -> dict[str, Any]:
    """Check whether two curves of losses agree and change.

    `ok` requires every pair within `within` of each other, relative, and a curve that moves by ten
    times that: two sides that train nothing would agree as well.
    """
    difference = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    change = abs(ours[0] - ours[-1]) / abs(ours[0])
    ok = difference <= within and change >= 10 * within
    return dict(
        ok=ok, difference=difference, change=change, within=within, ours=ours, theirs=theirs
    )
