"""Reads files of predictions that other evaluation programs wrote, and scores them again.

formats    Reads predictions in the formats of four evaluation programs, found by their columns.
matching   Matches the answers of a prediction file to items, by id or by content.
rescoring  Scores the answers of a prediction file again, strictly, and names each difference.
tables     Reads the rows of a prediction file: CSV, TSV, XLSX, JSON Lines, a JSON array.
"""
