"""Reads files of predictions that other evaluation programs wrote, and scores them again."""
