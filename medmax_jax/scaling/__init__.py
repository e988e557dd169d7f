"""Fit scaling laws to a table of runs, with intervals and checks.

__main__     Fit a scaling law to a table of runs, with intervals, checks and an HTML page.
allocation   Find the size and tokens of least loss for compute C = f N D under E + A/N^alpha +
             B/D^beta.
checklist    Write the text of a fit: its parameters, its checks, and the checklist needed to repeat
             it.
diagnostics  Compute bootstrap intervals by resampling runs, and check the fit with them.
fit          Fit a law to a table: variable projection over a grid of exponents, then refine all
             parameters.
laws         Define the laws: losses as sums of power laws, each with the paper that it is from.
mixed        Fit the law of two modalities in one model, with their competition (Aghajanyan et al.
             2023).
newton       Minimize many small functions of one kind at once, within bounds, by damped Newton
             steps.
report       Draw the figures of a study, as PNG bytes: the law, its residuals, exponents and best
             sizes.
study        Study one law on one table: parameters, intervals, and the evidence against them.
table        Read a CSV of runs as columns of numbers; record excluded rows and which rows are one
             run.
"""
