"""Files: disks, buckets, text from elsewhere, logs and pages.

atomic_folder   A folder of a checkpoint that appears whole or not at all, on a disk or under gs://.
csv_files       Reads CSV that another program wrote, within stated bounds; what is wrong is named
                by its row.
errors          The base of errors about a file from elsewhere: one printable line, whatever the
                file holds.
gcs             gs://bucket/prefix through TensorStore's KvStore; medmax_jax/io/storage.py is the
                door to it.
html_page       HTML pages that stand alone: no script, no request, every text escaped; pictures
                ride inside.
image_paths     Resolves the image paths that data files state; a path never leaves its image
                folder.
journal         An append-only JSONL file that outlives a kill: a line is on the disk before anyone
                relies on it.
progress        How far long work is, how fast it goes and when it will be done, a line at a time.
settings_files  Reads the settings, indexes and headers of checkpoints, JSON and YAML, within
                tighter bounds.
storage         The files of a checkpoint, under a local folder or under gs://bucket/prefix.
svg_charts      Charts as SVG inside a page: small, several side by side, in the page's colours,
                light or dark.
text_files      Reads text, JSON and JSON Lines that another program wrote, within stated bounds.
"""
