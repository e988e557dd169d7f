"""The evaluation suite: tasks, scores, intervals and reports."""

from eval.comparing import compare
from eval.face import evaluate

__all__ = ["compare", "evaluate"]
