"""Data: records, packing, image tokens, published sources and the embedded sample.

loader         Step number -> the batch of that step: packed rows, and the loss weight of every
               token.
mixture        What MedMax is mixed of: thirteen sources and six tasks, as published; and the
               embedded sample.
objective      The share of a task is the sum of the loss weights of its targets, which is the
               share of the
prepare        From pictures and text to the folder of records that training reads.
tfds_builders  Folders of records as a TensorFlow data set, written and read without TensorFlow.
"""

import importlib
import sys

if __name__ == "data":
    # `python -m data.PROGRAM` in a checkout: no module is loaded under two names.
    sys.modules[__name__] = importlib.import_module("medmax_jax.data")
