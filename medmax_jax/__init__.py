"""medmax_jax: MedMax in JAX. Importing it changes no setting of Flax or JAX.

Modules are stateless pytrees that jit, grad and scan of JAX itself take. Where NNX would treat one
as a graph of objects (`nnx.split`, `nnx.iter_modules`), the call says `graph=False` (Flax FLIP
5310): tree mode is chosen where it is needed, and models of the caller keep their own mode.
"""

__version__ = "0.2.0"
