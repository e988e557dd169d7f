"""The embedded sample: real biomedical images with documented licenses, and text of their facts.

build            Make the sample pictures: python -m data.sample.build --out DIR [--cache DIR]
                 [--extra]
dicom_selection  Which DICOM files are taken, and the header field that proves every fact said
                 about them.
documents        Documents made of manifest rows: training in the released MedMax schema,
                 pretraining, evaluation.
manifest         The manifest of the sample: one row per picture, read with every field checked.
medical_formats  Readers of the picture formats: NRRD, NIfTI and DICOM bytes to upright arrays,
                 without guesses.
packages         Where the sample pictures come from: pinned registry packages, fetched, checked
                 and read.
phrases          Words for facts: names, short phrases, captions and reports made of one manifest
                 row.
questions        Questions about the sample's pictures whose answers cannot be had without looking.
selection        Which pictures are taken out of the packages, and every fact said about them with
                 its source.
train_tokenizer  Trains the tiny tokenizer on the sample's training text.
"""

import importlib
import sys

if __name__ == "data.sample":
    # `python -m data.sample.PROGRAM` in a checkout: no module is loaded under two names.
    sys.modules[__name__] = importlib.import_module("medmax_jax.data.sample")
