"""python -m medmax_jax.train --config=configs/medmax_7b_paper.py --workdir runs/paper

Trains MedMax-7B as published, with LoRA on Anole-7B.
It uses eight documents per step, one per row, and three epochs.

There are two differences. The MedMax release truncates a document at 2,048 tokens, through images
and answers; here a longer document is left out completely and listed in the log
(data.document_limit; 359 of 1.47 M by the length model of data/records/synthetic.py). And its
forward pass masks the logits of image ids, which makes the loss on image targets infinite; here
they are not masked.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import base

DOCUMENTS = 1_470_000  # MedMax's README; `python -m data.prepare stats` counts yours
EPOCHS = 3
DOCUMENTS_A_STEP = 8  # eight L40S, one document each, gradients averaged: document weights


def get_config() -> ConfigDict:
    config = base.get_config()  # rank, dropout, peak, schedule and AdamW are the published ones
    config.mesh.update(fsdp=8)  # changes no result; the release had one replica per GPU
    config.data.update(
        pack=False,
        batch_size=DOCUMENTS_A_STEP,
        mask="release",  # all after the first separator, later questions of a dialogue too
    )
    config.train.update(
        init_from="models/anole",
        steps=DOCUMENTS * EPOCHS // DOCUMENTS_A_STEP,
        log_every=50,
        eval_every=5_000,
        checkpoint_every=500,
    )
    return config
