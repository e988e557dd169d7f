"""Read the files of the MedMax release: training rows, evaluation rows, image archives.

archives      The published image archives, unpacked under limits: images.tar.gz.aa to .aq, and
              slake.tar.gz.
chat_answers  The answer of a visual_chat row: a dictionary written as text, read without running
              any of it.
cli           The command line of the published files: `data.prepare import` and `data.prepare
              unpack`.
eval_rows     The published evaluation parquet as items.jsonl, which config.questions of eval.run
              names.
train_rows    The published train.jsonl and validation.jsonl as folders of records, row by row in
              one stream.
"""
