"""The record format: one training document, written, read, staged and streamed.

document     One training document: its fields, which of its tokens are trained, when it is whole,
             its bytes.
jsonl        Documents as text, JSONL in the released schema, before they are token ids and after.
reader       Reads a folder of records, in any order, and notices damage. writer.py writes one.
row_streams  Files of rows as streams: JSON arrays, JSON lines, CSV, gzipped or not, with bounds.
staging      Records on gs:// are copied to a disk of this host, once, and checked by hash.
synthetic    Records as long as MedMax's, of any number, made of random ids: for benchmarks and
             tests.
writer       Writes documents to a folder: shards, an index of counts and names, and what it all
             holds.
"""
