"""The evaluation suite: tasks, scores, intervals and reports."""

from eval.loop import evaluate

__all__ = ["evaluate"]
