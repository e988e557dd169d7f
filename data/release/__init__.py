"""Read the files of the MedMax release: training rows, evaluation rows, image archives.

archives      Unpack the published image archives under limits: images.tar.gz.aa to .aq, and
              slake.tar.gz.
chat_answers  Read the answer of a visual_chat row: a dictionary written as text, without running
              any of it.
cli           Define the commands of the published files: `data.prepare import` and `data.prepare
              unpack`.
eval_rows     Convert the published evaluation parquet to items.jsonl, read by eval.run's
              config.questions.
train_rows    Convert the published train.jsonl and validation.jsonl to folders of records, in one
              stream.
"""
