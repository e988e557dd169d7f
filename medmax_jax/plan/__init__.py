"""Predict whether a run fits, how fast it can be and what it costs, before it starts.

__main__       Predict whether a run fits, its best possible speed and its cost.
api            Predict whether a run fits, how fast it can be and what it costs: the program as a
               function.
analytic       Estimate memory by part and bytes on the network by arithmetic, roughly and within a
               second.
compile        Compile the actual training step, and the decode loop, for a machine that is not
               available.
compile_cache  Cache the compiler's answers in a folder: each program is compiled once, and work can
               resume.
hlo_analysis   Parse a compiled program's text: its collectives, their counts and bytes; cycles.
search         Search the best mesh, batch and remat of a machine: arithmetic ranks, compiling
               decides.
table          Write the tables of docs/reference/plan_7b.md: models x machines x lengths, each with
               its best mesh, batch and remat.
topology       Define machines by name, and their devices for the compiler; compiling for a TPU
               needs no TPU.
"""

from medmax_jax import make_callable
from medmax_jax.plan.api import plan

__all__ = ["plan"]

make_callable(__name__)
