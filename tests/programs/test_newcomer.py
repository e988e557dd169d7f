"""README's "Train 7B", command by command, on the embedded tiny model instead of the published one.

The commands are read from the README. What differs is written here: downloads are left out, the
shipped model replaces `anole`, embedded images the published rows, and configs/tiny.py 7B.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from gs_server import fixture_gs, fixture_server  # noqa: F401
from safetensors.numpy import load_file

from medmax_jax.storage import workdir
from medmax_jax.storage.folder import Folder

ROOT = pathlib.Path(__file__).parents[2]
ANOLE, ROWS = "hf://GAIR/Anole-7b-v0.1", r"hf://mint-medmax/medmax_data/(\w+)\.jsonl"
LOCAL = ("lora_peft", "medmax_mine")  # outputs that the commands write to the current folder
TINY = (
    "--config=configs/tiny.py --config.train.steps=3 --config.train.eval_every=0 "
    "--config.optim.warmup_ratio=0.0"
)
SKIPPED = ("python -m medmax_jax.convert check",)  # published files only


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    block = text[text.index("## Train 7B") :].split("```bash\n")[1].split("```")[0]
    lines = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert lines[0].startswith("export BUCKET=gs://")
    return lines[1:]


def on_tiny(command: str) -> str:
    """The same command for the tiny model."""
    command = command.replace(f"--from {ANOLE} ", "--from medmax_jax/tiny ")
    if "data.prepare import" in command:
        split, out = re.search(ROWS, command)[1], command.split("--out ")[1]
        given = f"--split {split} --model $BUCKET/models/anole"
        command = f"python -m data.prepare sample --out {out} {given}"
    return command.replace(
        "--config=configs/medmax_7b_lora.py --config.train", f"{TINY} --config.train"
    )


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["local", "gs"])
def test_readme_commands_lead_from_weights_to_an_exported_adapter(bucket, tmp_path, request):
    place = str(tmp_path / "bucket") if bucket == "local" else request.getfixturevalue("gs")
    output, variables = {}, os.environ | {workdir.STAGE_VARIABLE: str(tmp_path / "stage")}
    for command in commands():
        if command.startswith(SKIPPED):
            continue
        words = shlex.split(on_tiny(command).replace("$BUCKET", place))
        words = [str(tmp_path / word) if word in LOCAL else word for word in words]
        assert words[0] == "python", command
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, env=variables
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        output[words[2]] = done.stdout
    assert {"medmax_jax.convert", "medmax_jax.train", "medmax_jax.plan", "data.objective"} <= set(
        output
    )
    assert "VQA" in output["data.objective"]
    answers = Folder(f"{place}/answers")
    assert len(answers.read("answers.jsonl").tobytes().splitlines()) == 1
    assert any(name.endswith(".png") for name in answers.names())
    adapter = load_file(tmp_path / "lora_peft" / "adapter_model.safetensors")
    moved = [a for name, a in adapter.items() if "lora_B" in name]
    assert moved and all(np.abs(a).max() > 0 for a in moved)  # trained: B is born zero
    settings = json.loads((tmp_path / "medmax_mine" / "config.json").read_text())
    assert "chameleon" in settings["model_type"]


def test_every_command_is_one_of_this_repository():
    found = commands()
    assert len(found) > 8
    for command in found:
        words = shlex.split(command)
        assert words[:2] == ["python", "-m"], command
        done = ROOT / (words[2].replace(".", "/") + ".py")
        assert done.exists() or (ROOT / words[2].replace(".", "/") / "__main__.py").exists(), words
        for word in words:
            if word.startswith("--config=configs/"):
                assert (ROOT / word.split("=")[1]).exists(), word
