"""Parsing of options, and of yes and no, from answers."""
