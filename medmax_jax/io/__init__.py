"""Files from elsewhere.

text_files: text, JSON and JSON Lines, read within stated bounds.
"""
