"""Eight virtual CPU devices, run-time shape checks, and no network: set before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

install_import_hook("medmax_jax", "beartype.beartype")
