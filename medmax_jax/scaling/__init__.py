"""Scaling laws: what they are, fitted to a table of runs, with intervals and checks."""
