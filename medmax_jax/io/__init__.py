"""File formats and pages: text and CSV from other programs, logs, charts, HTML.

charts          Charts by matplotlib, as inline SVG in the colors of the page, or as files.
csv_files       Read CSV that another program wrote, within stated bounds, and write CSV for
                spreadsheets.
errors          The base class of errors about files from elsewhere: one printable line, whatever
                the file contains.
html_page       Self-contained HTML pages: no script, no request, all text escaped, images embedded.
journal         An append-only JSONL file that survives a kill: a line is on the disk before its
                use.
progress        Progress logs of long work: amount done, rate and remaining time, one line at a
                time.
run_files       Writes and reads the files that a run does not depend on: its log and its metrics.
settings_files  Read the settings, indexes and headers of checkpoints, JSON and YAML, within tighter
                bounds.
text_files      Read text, JSON and JSON Lines that another program wrote, within stated bounds.
"""
