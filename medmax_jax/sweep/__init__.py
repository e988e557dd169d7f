"""Sweeps as data: a grid of runs, what they would cost, who starts them, what came out."""
