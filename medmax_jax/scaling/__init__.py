"""Scaling laws, fitted to a table of runs, with intervals and checks.

__main__     Fits a scaling law to a table of runs, with intervals, checks and a page.
allocation   How to spend compute C = f N D under E + A/N^alpha + B/D^beta: the size and tokens of
             least loss.
checklist    The words of a fit: its parameters, its checks, and the checklist that others need to
             repeat it.
diagnostics  Intervals by drawing runs again, and what they say about the fit.
fit          A law to a table: variable projection over a grid of exponents, then a polish of all
             parameters.
laws         The laws: losses as sums of power laws, each with the paper that it is from.
mixed        Two modalities in one model: what they cost or give each other (Aghajanyan et al. 2023,
newton       Minimizes many small functions of one kind at once, within bounds, by damped Newton
             steps.
report       The figures of a study, as PNG bytes: the law, its misses, its exponents, the best
             sizes.
study        All that is said of one law on one table: parameters, intervals, and what speaks
             against them.
table        A CSV of runs -> columns of numbers, with what was left out and which rows are one run.
"""
