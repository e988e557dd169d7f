"""medmax_jax: MedMax in JAX. Importing the package changes no setting of Flax or JAX.

Modules are stateless pytrees, which the jit, grad and scan of JAX itself accept. Where NNX would
treat a module as a graph of objects (`nnx.split`, `nnx.iter_modules`), the call passes
`graph=False` (Flax FLIP 5310): tree mode is selected per call, and the models of the caller keep
their own mode.
"""

import os
import signal
import sys

__version__ = "0.2.0"

if [os.path.basename(word) for word in sys.argv[:1]] in (["-m"], ["medmax"]):
    # `python -m PROGRAM` and `medmax` import this package before the program: until the program
    # reads its arguments, Ctrl-C ends it at once, which a callback of an import could lose.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
