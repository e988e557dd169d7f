"""Files from elsewhere.

text_files: text, JSON and JSON Lines, read within stated bounds.
csv_files: the same for CSV.
run_files: metrics.jsonl and the logs of a run, which goes on without them.
"""
