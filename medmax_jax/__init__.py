"""medmax_jax: MedMax in JAX. Importing the package changes no setting of Flax or JAX.

    from medmax_jax import evaluate, generate, load_config, plan, prepare_sample, train

imports what each name needs when it is first used, JAX included; `generate`, `plan` and `train` are
also the modules of the programs with these names.

Modules are stateless pytrees, which the jit, grad and scan of JAX itself accept. Where NNX would
treat a module as a graph of objects (`nnx.split`, `nnx.iter_modules`), the call passes
`graph=False` (Flax FLIP 5310): tree mode is selected per call, and the models of the caller keep
their own mode.
"""

import importlib
import os
import signal
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medmax_jax.cli import load_config
    from medmax_jax.data.prepare import prepare_sample
    from medmax_jax.eval.api import evaluate
    from medmax_jax.generate import generate
    from medmax_jax.plan.api import plan
    from medmax_jax.train import train

__all__ = ["evaluate", "generate", "load_config", "plan", "prepare_sample", "train"]
__version__ = "0.2.0"

_FUNCTIONS = {
    "evaluate": "medmax_jax.eval.api",
    "load_config": "medmax_jax.cli",
    "prepare_sample": "medmax_jax.data.prepare",
}
_PROGRAMS = ("generate", "plan", "train")


class _Program(types.ModuleType):
    """The module of a program; a call of it is a call of its function of the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(module: str) -> None:
    """Let the module of a program be called: an import sets medmax_jax.train to the module."""
    sys.modules[module].__class__ = _Program


def __getattr__(name: str) -> Any:
    """Import a name of the Python interface when it is first used."""
    if name in _PROGRAMS:
        return importlib.import_module(f"medmax_jax.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if [os.path.basename(word) for word in sys.argv[:1]] in (["-m"], ["medmax"]):
    # `python -m PROGRAM` and `medmax` import this package before the program: until the program
    # reads its arguments, Ctrl-C ends it at once, which a callback of an import could lose.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
