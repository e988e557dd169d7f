"""The libtpu of requirements-dev.txt compiles a training step for TPUs where there is none."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Read by libtpu when it is loaded: no metadata server is asked, and another process may have it.
PLACE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
STEP = """
import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType

from medmax_jax import config
from medmax_jax import sharding
from medmax_jax.configs import tiny
from medmax_jax.models import chameleon
from medmax_jax.training import step


settings = tiny.get_config()
settings.model.update(param_dtype="bfloat16", compute_dtype="bfloat16", remat="{remat}")
settings.model.attention = "{attention}"
settings.optim.accumulate = {accumulate}
run = config.from_config_dict(settings)
chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
m = jax.sharding.Mesh(np.array(chips).reshape(1, 2, 2), sharding.AXES, (AxisType.Explicit,) * 3)
with jax.set_mesh(m):
    like = chameleon.abstract_model(run.model, run.vocab, run.lora)
    graph, trainable, frozen = step.split_trainable(like, run.train.trains)
    state = sharding.with_shardings(jax.eval_shape(lambda t: step.init_state(t, run), trainable))
    batch = step.abstract_batch(run)
    key = sharding.with_shardings(jax.eval_shape(lambda: jax.random.key(0)))
    compiled = step.make_train_step(graph, run).lower(state, frozen, batch, key).compile()
print(chips[0].device_kind, compiled.memory_analysis().temp_size_in_bytes)
text = compiled.as_text()
print("all-gather" in text, "all-reduce" in text, text.count("tpu_custom_call") > 0)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu has no package for this machine"
)
@pytest.mark.parametrize(
    "attention, accumulate, remat",
    [
        pytest.param("splash", 2, "attn_offload", marks=pytest.mark.slow),
        pytest.param("xla", 1, "attn", marks=pytest.mark.slow),
    ],
)
def test_a_training_step_compiles_for_a_tpu(attention, accumulate, remat):
    code = STEP.replace("{attention}", attention).replace("{accumulate}", str(accumulate))
    code = code.replace("{remat}", remat)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | PLACE, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (*chip, temporary), collectives = (line.split() for line in done.stdout.splitlines())
    assert chip == ["TPU", "v5", "lite"] and 0 < int(temporary) < 2**27
    assert collectives[:2] == ["True", "True"]  # weights over fsdp, products over tp
    assert collectives[2] == str(attention == "splash")  # its kernels
