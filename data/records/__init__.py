"""Store training documents as records: write, read, stage and stream them.

document     Define one training document: its fields, trained tokens, validity checks and bytes.
jsonl        Read and write documents as text: JSONL in the schema of the MedMax release, without
             token ids.
reader       Read a folder of records in any order and detect corruption; writer.py writes one.
row_streams  Read files of rows as streams: JSON arrays, JSON lines, CSV, gzipped or not, within
             size limits.
staging      Copy records on gs:// to a disk of this host, once, and check them by hash.
synthetic    Make records as long as MedMax's, any number, from random ids: for benchmarks and
             tests.
writer       Write documents to a folder: shards, an index of counts and names, and a description of
             both.
"""
