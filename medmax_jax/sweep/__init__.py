"""Define sweeps as data: a grid of runs, their costs, their launch and their results.

__main__  Expand a sweep file, render it for a cluster or run it here, and collect a table of
          results.
axes      Convert the axes of a sweep file, dicts of one key, to lists of overrides: their product.
expand    Expand a sweep file to the list of its runs, each with a stable name and its estimated
          cost.
render    Write a sweep's runs as files for launchers; this module starts nothing and needs no
          password.
runner    Run a sweep on this machine, one process after another; it resumes if killed at any point.
status    Read the folders of a sweep's runs: the state of each run, and the table for a fit.
"""
