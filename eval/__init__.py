"""The evaluation suite: tasks, scores, intervals and reports.

api      Evaluates a model from Python: on items, on a JSONL file, or on the embedded sample.
compare  Status 0: compared. 1: an error, reported in one line. 2: wrong usage.
config   Defines the fields of configs/eval_*.py; configs/eval_tiny.py documents every field.
records  Defines an item of the suite, and the record of its answer: one line of records.jsonl.
report   Rewrites D/report.html from the summary.json and records.jsonl that eval.run left in D.
results  Defines the result of an evaluation: summary.json, and the row of one metric in it.
run      Evaluates one model and writes records.jsonl, summary.json, report.html and what
         docs/guides/eval.md lists
suite    Prints the tasks, or published scores, as Markdown: python -m eval.suite [published].
"""

import importlib
import sys

if __name__ == "eval":
    # `python -m eval.PROGRAM` in a checkout: no module is loaded under two names.
    sys.modules[__name__] = importlib.import_module("medmax_jax.eval")
else:
    from medmax_jax.eval.api import evaluate
    from medmax_jax.eval.reporting.comparison import compare


__all__ = ["compare", "evaluate"]
