"""python benchmarks/gpu.py --workdir D [--torch_python PY] [--parts ...] [--minutes 9] [--smoke]

Measures Chameleon-7B with random weights on one GPU, and with --torch_python HF and peft on the
same GPU in turn: training (train, qlora, int8), decode, image and vq, described in
accelerator_parts.py. The settings expected to be the best are measured first, one of every part.

Attach D/page.html and D/results.json to an issue. The same command resumes: a measurement is
stored when it is done, and running out of memory or of --limit_s is a result. If measurements are
left after --minutes, the exit code is 75. Each is next to what medmax_jax.plan computes for it. The
last line is results.json in one line; `comparison` has our best, theirs, and their ratio, which is
null unless both sides, alive and alternating, have shown that they compute the same.
"""

import accelerator
from accelerator_parts import Accelerator

GPU = Accelerator(
    platform="gpu",
    ours=(
        (4, "attn", "cudnn"), (8, "attn", "cudnn"), (2, "dots", "cudnn"), (4, "qkv_attn", "cudnn"),
        (16, "attn", "cudnn"), (16, "all", "cudnn"), (2, "attn", "xla"),
    ),
    theirs=(
        (4, True, False), (2, False, False), (8, True, False), (2, False, True),
        (16, True, False), (4, True, True),
    ),
)  # fmt: skip

if __name__ == "__main__":
    accelerator.main(GPU, __doc__)
