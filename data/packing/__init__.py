"""Which documents share a row, and which documents an epoch holds.

mixing     Which documents an epoch holds, how often, and which may share a row.
pack       Which documents share a row: a plan per epoch, made of lengths alone.
plan_file  A plan as a file: one epoch's rows, what they were made of, and a SHA-256 of all of it.
report     What `python -m data.prepare stats` and `plan` say: how full rows are, who is in one,
           pictures.
"""
