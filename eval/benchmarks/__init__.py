"""Benchmarks beyond MedMax's own, each with its card and the reader of its published files."""
