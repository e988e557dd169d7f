"""Sweeps as data: a grid of runs, their costs, their launch and their results.

__main__  Sweeps as data: expand a sweep file, render it for a cluster or run it here, collect a
        table.
axes    The axes of a sweep file, dicts of one key, to lists of overrides; a sweep is their product.
expand  A sweep file to the list of its runs, each with a stable name and what it would cost.
render  A sweep's runs as files for what starts them; nothing here starts anything or knows a
        password.
runner  Runs a sweep on this machine, one process after the other; killed at any point, it goes on.
status  What the folders of a sweep's runs say: who is done, who goes on, and the table for a fit.
"""
