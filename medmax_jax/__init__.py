"""medmax_jax: MedMax in JAX. Sets the two NNX flags that make modules pytrees, nothing else."""

from flax import nnx

__version__ = "0.1.0"

# Tree mode (Flax FLIP 5310): modules are stateless pytrees; jit, grad and scan are JAX's own.
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
