"""python benchmarks/tpu.py --workdir D [--parts ...] [--minutes 9] [--smoke]

Measures Chameleon-7B with random weights on a TPU, on one chip and on all chips of this host:
training (train, qlora, int8), decode, image and vq, described in accelerator_parts.py. The settings
expected to be the best are measured first, one of every part. Training shards over fsdp, generation
over tp.

Attach D/page.html and D/results.json to an issue. The same command resumes: a measurement is
stored when it is done, and running out of memory or of --limit_s is a result. If measurements are
left after --minutes, the exit code is 75. Each is next to what medmax_jax.plan computes for it. The
last line is results.json in one line.
"""

import accelerator
from accelerator_parts import Accelerator

TPU = Accelerator(
    platform="tpu",
    ours=(
        (4, "attn", "splash"), (8, "attn", "splash"), (2, "dots", "splash"), (1, "all", "splash"),
    ),
    meshes=True,
)  # fmt: skip

if __name__ == "__main__":
    accelerator.main(TPU, __doc__)
