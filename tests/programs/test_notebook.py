"""The notebook: as it is in git, executed on a CPU, and what its cells compile to on a TPU."""

import ast
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import threading
import time

import micro_run
import nbclient
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.manager import start_new_kernel
from run_setup import environment

from medmax_jax.config import from_config_dict

# ml_collections reads config files with a method that Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")
ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "medmax_tour.ipynb"
MAX_CELL_LINES = 20
MAX_GIB = 15.0  # of the 15.75 GiB that a program may use on a v5e
MACHINES = ((1, "v5e:1x1"), (8, "v5e:2x4"))  # Colab's, Kaggle's
MAX_MEMORY, MAX_DISK = 12 * 10**9, 40 * 10**9
TRAIN = """
from medmax_jax import load_config, train
config = load_config("micro.py", {"data.train": "micro", "train.steps": 10_000})
train(config, "run")
"""
COMPILE = """
import json
from medmax_jax import plan
from medmax_jax.config import from_config_dict
from medmax_jax.plan import compile as plan_compile, topology

names = dict(tpu=True, chips={chips})
exec({book}, names)
config = names["config"]
print(json.dumps(plan(config, "{machine}", "plans", decode="none")))
if {chips} == 1:
    machine, run = topology.parse("{machine}", slices=1), from_config_dict(config)
    for mode, rows in (("image", 1), ("text", 4)):
        program = plan_compile.decode(run, machine, mode=mode, rows=rows, prompt=1_280)
        print(json.dumps(plan_compile.compile_(program, machine)))
"""


def cells(kind: str) -> list[nbformat.NotebookNode]:
    book = nbformat.read(NOTEBOOK, as_version=4)
    return [cell for cell in book.cells if cell.cell_type == kind]


def settings_cell() -> nbformat.NotebookNode:
    (cell,) = [c for c in cells("code") if "settings" in c.metadata.get("tags", ())]
    return cell


def settings(chips: int) -> dict:
    """What the cell of the settings defines on a TPU of so many chips."""
    names = {"tpu": True, "chips": chips}
    exec(settings_cell().source, names)
    return names


def test_outputs_are_not_in_git_and_cells_are_short_python():
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    assert set(book.metadata) == {"accelerator", "kernelspec", "language_info"}
    for cell in cells("code"):
        assert cell.outputs == [] and cell.execution_count is None, cell.source
        assert set(cell.metadata) <= {"tags"}, cell.metadata
        ast.parse(TransformerManager().transform_cell(cell.source))
        assert len(cell.source.splitlines()) <= MAX_CELL_LINES, cell.source


def test_settings_make_the_same_step_on_one_chip_and_on_eight():
    runs = [from_config_dict(settings(chips)["config"]) for chips, _ in MACHINES]
    assert [run.data.batch_size for run in runs] == [8, 8]
    for (chips, _), run in zip(MACHINES, runs, strict=True):
        assert run.mesh.data * run.optim.accumulate == 8 and run.mesh.data == chips
        assert (run.model.quant, run.data.seq_len) == ("nf4", 2_048)


@pytest.mark.slow
def test_every_cell_runs_on_a_cpu(tmp_path):
    variables = environment()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
            patch.setenv(name, variables[name])
        patch.setenv("PYTHONPATH", str(ROOT))
        book = nbformat.read(NOTEBOOK, as_version=4)
        place = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(book, timeout=900, resources=place).execute()
    outputs = [out for cell in book.cells for out in cell.get("outputs", ())]
    assert not [out for out in outputs if out.output_type == "error"]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 6  # 3 of data, curve, 2
    text = "".join(out.get("text", "") for out in outputs)
    assert "tiny model" in text and "Does the image show the chest? -> " in text
    (table,) = [
        out.data["text/markdown"] for out in outputs if "text/markdown" in out.get("data", {})
    ]
    assert "| ci_low | ci_high |" in table and "| vqa_closed | accuracy | 458 |" in table
    lines = (tmp_path / "runs/lora/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < losses[0] / 2
    assert (tmp_path / "lora_peft" / "adapter_config.json").exists()


@pytest.mark.slow
def test_interrupt_of_a_kernel_saves_and_the_cell_resumes(tmp_path):
    """Twice, in one kernel, which goes on; SIGINT is what a notebook's interrupt sends."""
    micro_run.write(tmp_path / "micro")
    (tmp_path / "micro.py").write_text("from micro_run import settings as get_config\n")
    variables = environment() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}"}
    manager, client = start_new_kernel(env=variables, cwd=str(tmp_path))
    log = tmp_path / "run" / "train.log"
    try:
        for start in ("starting a run of 10000", "resuming after step"):
            client.execute(TRAIN)
            while not (
                log.exists() and re.search(rf"{start}.*\nstep \d+0/", log.read_text(), re.S)
            ):
                time.sleep(0.1)
            manager.interrupt_kernel()
            reply = client.get_shell_msg(timeout=120)["content"]
            assert (reply["status"], reply["ename"]) == ("error", "Interrupted"), reply
            assert "checkpoint saved; run the same command again" in reply["evalue"]
        client.execute("1 + 1")
        assert client.get_shell_msg(timeout=60)["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize(("chips", "machine"), MACHINES)
def test_7b_cells_fit_the_tpus_of_notebooks(chips, machine, tmp_path):
    """Training, and decoding on one chip: an image with guidance, the rows of the evaluation."""
    book = json.dumps(settings_cell().source)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(book=book, chips=chips, machine=machine)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == (3 if chips == 1 else 1)
    for answer in answers:
        print(machine, answer.get("mode", "train"), answer["peak_hbm_gib"])
        assert answer["how"] == "compiled" and answer["peak_hbm_gib"] <= MAX_GIB, answer


@pytest.mark.slow
def test_conversion_of_7b_is_within_the_memory_and_disk_of_a_notebook(tmp_path):
    """A random 7B; RLIMIT_DATA is a hard limit on the memory that is private to the process."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import convert_7b

    convert_7b.make(tmp_path / "meta", layers=32)
    used = []

    def watch() -> None:
        while process.poll() is None:
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            used.append(sum(os.stat(path).st_blocks * 512 for path in files if path.exists()))
            time.sleep(0.5)

    words = ["--from", tmp_path / "meta", "--to", tmp_path / "nf4", "--format", "native"]
    process = subprocess.Popen(
        [sys.executable, "-m", "medmax_jax.convert", *map(str, words), "--quant", "nf4"], cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY)),
    )  # fmt: skip
    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.wait() == 0
    watcher.join()
    print(f"disk, at most: {max(used) / 1e9:.1f} GB")
    assert 14e9 < max(used) <= MAX_DISK
