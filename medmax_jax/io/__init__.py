"""File access: local disks, Google Cloud Storage, text from other programs, logs and pages.

atomic_folder   Create a checkpoint folder atomically, on a local disk or under gs://.
charts          Charts by matplotlib, as inline SVG in the colors of the page, or as files.
csv_files       Read CSV that another program wrote, within stated bounds, and write CSV for
                spreadsheets.
environment     Describe what makes a result: version, commit, machine and date.
errors          The base class of errors about files from elsewhere: one printable line, whatever
                the file contains.
gcs             Access gs://bucket/prefix through TensorStore's KvStore; used through storage.py.
html_page       Self-contained HTML pages: no script, no request, all text escaped, images embedded.
image_paths     Resolve the image paths that data files state; a path never leaves its image folder.
journal         An append-only JSONL file that survives a kill: a line is on the disk before its
                use.
progress        Progress logs of long work: amount done, rate and remaining time, one line at a
                time.
settings_files  Read the settings, indexes and headers of checkpoints, JSON and YAML, within tighter
                bounds.
storage         The files of a checkpoint, under a local folder or under gs://bucket/prefix.
text_files      Read text, JSON and JSON Lines that another program wrote, within stated bounds.
"""
