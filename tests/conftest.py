"""Eight virtual CPU devices, run-time shape checks, and no network: set before JAX is imported."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: F401  before the variables below: this process itself has no compile cache
from jaxtyping import install_import_hook

# Programs that tests start share one cache, and write none to the user's home.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else a worker, which inherits its folder
    cache = tempfile.mkdtemp(prefix="medmax_jax_compiled_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**30)  # with a limit, JAX locks the folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# Not data, eval, nor what was never checked: batches hold abstract values too, and the endpoint.
CHECKED = (
    "checkpoints cli config convert eval.encoders.biomedclip eval.encoders.efficientnet flops "
    "generate generation io.atomic_folder io.gcs io.html_page io.image_paths io.progress "
    "io.csv_files io.errors io.settings_files io.storage io.charts io.text_files models plan "
    "quickstart scaling sharding "
    "sweep train train_vqgan training.cross_entropy training.log_writer training.loss "
    "training.lpips training.metrics training.optimizer training.reporting training.samples "
    "training.setup training.step"
).split()
install_import_hook([f"medmax_jax.{name}" for name in CHECKED], "beartype.beartype")

# Traced programs are millions of long-lived objects, which each full collection would visit.
gc.set_threshold(100_000, 50, 50)


def pytest_collection_modifyitems(items):
    """Start the files of programs first: they take longest, and two workers then end together."""
    items.sort(key=lambda item: "tests/programs" not in item.nodeid)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
