"""The evaluation suite: tasks, scores, intervals and reports."""
