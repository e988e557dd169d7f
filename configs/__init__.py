"""Contains run settings as ml_collections ConfigDicts; each file's first line is its command."""
