"""Importing the project changes nothing for the user's own Flax modules: in child processes."""

import json
import subprocess
import sys

# Shared parts, a mutation under jit and the flags: each differs between NNX's two modes.
SCRIPT = """
import json
IMPORT
import jax
import jax.numpy as jnp
from flax import config, nnx


class Counter(nnx.Module):
    def __init__(self):
        self.count = nnx.Variable(jnp.zeros(()))


class Mine(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.second = self.first
        self.counter = Counter()


@nnx.jit
def step(model):
    model.counter.count[...] += 1
    return model.second(model.first(jnp.ones((1, 2)))).sum()


def attempt(function):
    try:
        return function()
    except Exception as error:
        return type(error).__name__


model = Mine()
said = dict(
    value=attempt(lambda: float(step(model))),
    count=float(model.counter.count[...]),
    leaves=attempt(lambda: len(jax.tree.leaves(nnx.split(model)[1]))),
    shared=attempt(lambda: (lambda m: m.first is m.second)(nnx.merge(*nnx.split(model)))),
    modules=attempt(lambda: len(list(nnx.iter_modules(model)))),
    flags=[nnx.set_graph_mode.current_value(), nnx.set_graph_updates.current_value()],
    x64=jax.config.jax_enable_x64,
)
print(json.dumps(said))
"""


def behavior(imports: str) -> dict:
    code = SCRIPT.replace("IMPORT", imports)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_user_module_behaves_the_same_with_and_without_the_import():
    expected = behavior("")
    assert expected["shared"] is True and expected["count"] == 1
    assert behavior("import medmax_jax") == expected
    every = "import medmax_jax.eval, medmax_jax.generate, medmax_jax.train, medmax_jax.train_vqgan"
    assert behavior(every) == expected
