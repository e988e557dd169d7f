"""The evaluation suite: tasks, scores, intervals and reports.

api      evaluate, from Python: one's own model on items, a JSONL file, or the embedded sample.
compare  Status 0: compared. 1: an error to mend, in one line. 2: wrong usage.
config   What configs/eval_*.py say; configs/eval_tiny.py has every field with its meaning.
report   Writes D/report.html again, of the summary.json and records.jsonl that eval.run left in D.
run      Evaluates one model and writes records.jsonl, summary.json, report.html and what
         docs/eval.md lists
suite    The cards as a Markdown table, or the numbers of others: python -m eval.suite [published].
"""

import importlib
import sys

if __name__ == "eval":
    # `python -m eval.PROGRAM` in a checkout: nothing is loaded under two names.
    sys.modules[__name__] = importlib.import_module("medmax_jax.eval")
else:
    from medmax_jax.eval.api import evaluate
    from medmax_jax.eval.reporting.comparison import compare


__all__ = ["compare", "evaluate"]
