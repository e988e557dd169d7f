"""Decide which documents an epoch holds, and which share a row.

condition_dropout
           Decide which documents of an epoch are trained without their condition, as guidance
           streams.
mixing     Decide which documents an epoch holds, how often, and which may share a row.
pack       Decide which documents share a row: one plan per epoch, computed from lengths alone.
plan_file  Save a plan as a file: one epoch's rows, what they were made from, and a SHA-256 of all
           of it.
report     Report for `python -m data.prepare stats` and `plan`: how full rows are, their documents,
           images.
stages     Load the stages of a run in sequence: each has its own mixture, epochs and plans.
"""
