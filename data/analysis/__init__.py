"""Check records, compute their statistics and compare them with evaluation sets.

check            `python -m data.prepare check`: check records for corruption, duplicates and
                 eval-set overlap.
eval_set         Read an evaluation set for comparison with training data: text, codes, bytes and
                 hashes of items.
findings         Format the findings of the check of records, and make the comparisons that they
                 come from.
near_duplicates  Find equal and nearly equal images and texts by their hashes.
provenance       `python -m data.prepare who_saw HASH --in FOLDER ...`: find an image and the runs
                 that read it.
scan             Scan records once: problems of each document, and hashes that reveal equality, as
                 columns.
stats            Write the page of `python -m data.prepare stats D --out PAGE`: the contents of a
                 folder.
stats_plots      Draw the plots of a page of statistics, each as PNG bytes, from counts only.
"""
