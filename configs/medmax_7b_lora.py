"""python -m medmax_jax.train --config=configs/medmax_7b_lora.py --workdir runs/lora

Applies the published recipe to packed rows: 16 rows of 8,192 tokens, about 106 documents per step.

The recipe of 8 documents per step (configs/medmax_7b_paper.py) was adapted as follows. None of this
is published or measured for MedMax: it is an assumption, to be checked by a sweep of optim.peak_lr.

    steps      the same three epochs
    warm-up    the same tenth of them, so the same number of documents
    peak lr    x sqrt(106 / 8), the square-root rule of Malladi et al. 2022 (arXiv 2205.10287) for
               Adam. That rule also changes b1 and b2; at 13 times the batch it has no b1 above 0
               (1 - 13 x 0.1), so both are unchanged. Linear scaling would give 1.3e-3.
    loss       a mean over documents in both, so packing changes no document's weight
"""

import math

from ml_collections import ConfigDict

from medmax_jax.configs import medmax_7b_paper as paper

ROWS, ROW_TOKENS = 16, 8_192
# 1.47 M documents in 221,742 rows: `python benchmarks/loader.py`, lengths as in
# data/records/synthetic.py;
# `python -m data.prepare plan D --seq_len 8192 --document_limit 2048` prints the rows of your
# records.
ROWS_AN_EPOCH = 221_742
DOCUMENTS_A_STEP = paper.DOCUMENTS / ROWS_AN_EPOCH * ROWS  # 106


def get_config() -> ConfigDict:
    config = paper.get_config()
    config.mesh.update(data=4, fsdp=4)  # v5e:4x4; weights are gathered within rings of four
    config.model.update(attention="splash")  # on GPUs: cudnn
    config.data.update(pack=True, seq_len=ROW_TOKENS, batch_size=ROWS, mask="answers")
    scale = math.sqrt(DOCUMENTS_A_STEP / paper.DOCUMENTS_A_STEP)
    config.optim.update(peak_lr=round(config.optim.peak_lr * scale, 6))
    config.train.update(
        compile="gather",  # of the TPU compiler; elsewhere: default
        steps=ROWS_AN_EPOCH * paper.EPOCHS // ROWS,
        log_every=10,
        eval_every=1_000,
        checkpoint_every=100,
    )
    return config
