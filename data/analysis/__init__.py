"""Checks and statistics of records.

check            `python -m data.prepare check`: every record, what comes twice, what an evaluation
                 set shares.
eval_set         An evaluation set as training data is compared with it: words, codes, bytes and
                 looks of items.
findings         What the check of records finds: its lines, and the comparisons that make them.
near_duplicates  Equal and nearly equal: hashes of pictures and texts, and who meets whom by them.
provenance       `python -m data.prepare who_saw HASH --in FOLDER ...`: where an image lies, and
                 who has seen it.
scan             One pass over records: what is wrong with each document, and what equals what, as
                 columns.
stats            The page of `python -m data.prepare stats D --out PAGE`: what is in a folder, to
                 look at.
stats_plots      The plots of a page of statistics, each as PNG bytes, made of counts alone.
"""
