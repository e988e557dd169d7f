"""Prepare training data: records, packing, image tokens, sources and the embedded sample.

image_density  Rearrange records by image: the same tasks on few images (IMAX) or on many (DMAX).
loader         Map a step number to the batch of that step: packed rows, and the loss weight of
               every token.
mixture        Define the MedMax mixture: thirteen sources and six tasks, as published; and the
               embedded sample.
objective      Compute task shares of the objective.
prepare        Convert images and text to the folder of records that training reads.
tfds_builders  Convert folders of records to a TensorFlow data set, written and read without
               TensorFlow.
"""

import importlib
import sys
from typing import Any

if __name__ == "data":
    # `python -m data.PROGRAM` in a checkout: no module is loaded under two names.
    sys.modules[__name__] = importlib.import_module("medmax_jax.data")


def __getattr__(name: str) -> Any:
    """Import `prepare_sample` when it is first used: training needs the loader alone."""
    if name == "prepare_sample":
        return importlib.import_module("medmax_jax.data.prepare").prepare_sample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
