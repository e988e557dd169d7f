"""Measures how long a save of the 7B LoRA state (0.48 GB) blocks training, compared with Orbax.

python benchmarks/checkpoint.py [--rounds 5] [--folder D]

    ours      seconds that `CheckpointManager.save` blocks; digests and writing follow
    theirs    seconds of Orbax's own synchronous save of the same state, without digests
    committed seconds until the step is committed; restore: reading it with all digests checked

Rounds alternate between the two, each after the other has finished. Prints a JSON object as its
last line. The files go to a temporary folder below D, by default the system's.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
import orbax.checkpoint as ocp

from medmax_jax import arguments, config
from medmax_jax.checkpoints import safetensors_file
from medmax_jax.checkpoints.manager import CheckpointManager
from medmax_jax.configs import base
from medmax_jax.models import chameleon
from medmax_jax.sharding import make_mesh
from medmax_jax.storage.workdir import Workdir
from medmax_jax.training import step


def main() -> None:
    """Run the measurements and print the results."""
    parser = arguments.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None)
    args = parser.parse_args()
    run = config.from_config_dict(base.get_config())
    with jax.set_mesh(make_mesh(run.mesh)), tempfile.TemporaryDirectory(dir=args.folder) as folder:
        state = _state(run)
        results = _measure(state, Path(folder), args.rounds)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    count = len(jax.tree.leaves(state))
    print(f"{size / 1e6:.0f} MB in {count} arrays; load {os.getloadavg()[0]:.1f}")
    ratio = results["theirs"] / results["ours"]
    machine = {"bytes": size, "load": os.getloadavg()[0], "cores": os.cpu_count()}
    versions = {"jax": jax.__version__, "orbax": ocp.__version__}
    print(json.dumps(results | {"ratio": ratio} | machine | {"versions": versions}))


def _state(run: config.Run) -> step.TrainState:
    """Return adapters, two moments and the counters of 7B, filled with random numbers.

    Random numbers do not compress.
    """
    like = chameleon.abstract_model(run.model, run.vocab, run.lora)
    shapes = step.split_trainable(like, "lora")[1]
    state = jax.eval_shape(lambda t: step.init_state(t, run), shapes)
    rng = np.random.default_rng(0)

    def random_like(x: jax.ShapeDtypeStruct) -> jax.Array:
        if x.dtype == np.float32 and x.shape:
            return jax.device_put(rng.standard_normal(x.shape, np.float32))
        return jax.device_put(np.zeros(x.shape, x.dtype))

    return jax.tree.map(random_like, state)


def _measure(state: step.TrainState, folder: Path, rounds: int) -> dict[str, float]:
    ours = CheckpointManager(Workdir(str(folder / "ours"), folder / "ours"), keep=1, log=print)
    committed, theirs = [], []
    for number in range(1, rounds + 1):
        ours.save(number, state, cursor={}, meta={})
        begin = time.monotonic()
        ours.wait()
        committed.append(time.monotonic() - begin)
        begin = time.monotonic()
        with ocp.StandardCheckpointer() as orbax:
            orbax.save(folder / f"theirs_{number}", safetensors_file.flatten_named(state))
            orbax.wait_until_finished()
        theirs.append(time.monotonic() - begin)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    begin = time.monotonic()
    ours.restore(rounds, like)
    restore = time.monotonic() - begin
    ours.close()
    seconds = {"ours": ours.blocked, "theirs": theirs, "committed": committed}
    return {name: round(statistics.median(v), 3) for name, v in seconds.items()} | {
        "ours_worst": round(max(ours.blocked), 3),
        "restore": round(restore, 3),
    }


if __name__ == "__main__":
    main()
