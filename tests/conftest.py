"""Eight virtual CPU devices, quick compilation, run-time shape checks: set before JAX is imported.

What XLA compiles is shared by the processes of a session, through a folder that is removed at its
end; none of them writes to the user's cache. To keep it from one session to the next:
JAX_COMPILATION_CACHE_DIR=D pytest
"""

import gc
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NO_GCE_CHECK"] = "true"  # Google's client would look for the server of a cloud machine
os.environ["XLA_FLAGS"] = (  # most of the time of the suite is that of LLVM
    "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
)
OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ  # not in workers, which inherit it
if OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="medmax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

from jaxtyping import install_import_hook

# Not data, eval, nor what was never checked: batches hold abstract values too, and the endpoint.
CHECKED = (
    "checkpoints cli config convert environment eval.encoders.biomedclip "
    "eval.encoders.efficientnet flops generate generation "
    "io.html_page io.progress io.csv_files io.errors io.settings_files "
    "io.charts io.text_files storage "
    "models plan quickstart scaling serve serving sharding "
    "sweep train train_vqgan training.cross_entropy training.log_writer training.loss "
    "training.lpips training.metrics training.optimizer training.reporting training.samples "
    "training.setup training.stages training.step"
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


def pytest_unconfigure():
    if OWN_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
