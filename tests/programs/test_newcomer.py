"""README's "Train 7B", command by command, on the embedded tiny model instead of the published one.

The commands are read from the README. What differs is written here: downloads are left out, the
shipped model replaces `anole`, embedded images the published rows, and configs/tiny.py 7B.
"""

import json
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("models", "records", "runs", "answers", "lora_peft", "medmax_mine")
TINY = (
    "--config=configs/tiny.py --config.train.init_from=models/anole "
    "--config.data.train=records/train --config.data.validation=records/validation "
    "--config.train.steps=3 --config.train.eval_every=0 --config.optim.warmup_ratio=0.0"
)
SKIPPED = ("hf download", "python -m medmax_jax.convert check")  # the network; published files only


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    block = text[text.index("## Train 7B") :].split("```bash\n")[1].split("```")[0]
    return [line for line in block.splitlines() if line and not line.startswith("#")]


def on_tiny(command: str) -> str:
    """The same command for the tiny model."""
    command = command.replace("--from anole ", "--from medmax_jax/tiny ")
    if "data.prepare import" in command:
        out = command.split("--out ")[1]
        split = pathlib.Path(out).name
        command = f"python -m data.prepare sample --out {out} --split {split} --model models/anole"
    if "medmax_jax.train " in command:
        command = command.replace("--config=configs/medmax_7b_lora.py", TINY)
    return command


def placed(word: str, folder: pathlib.Path) -> str:
    """A word of a command with its output folders under `folder`."""
    flag, equals, value = word.rpartition("=")
    return f"{flag}{equals}{folder / value}" if value.split("/")[0] in FOLDERS else word


@pytest.mark.slow
def test_readme_commands_lead_from_weights_to_an_exported_adapter(tmp_path):
    output = {}
    for command in commands():
        if command.startswith(SKIPPED):
            continue
        words = [placed(word, tmp_path) for word in shlex.split(on_tiny(command))]
        assert words[0] == "python", command
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        output[words[2]] = done.stdout
    assert {"medmax_jax.convert", "medmax_jax.train", "medmax_jax.plan", "data.objective"} <= set(
        output
    )
    assert "VQA" in output["data.objective"]
    answers = (tmp_path / "answers" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 1 and list((tmp_path / "answers").glob("*.png"))
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
        if words[0] == "hf":
            continue
        assert words[:2] == ["python", "-m"], command
        done = ROOT / (words[2].replace(".", "/") + ".py")
        assert done.exists() or (ROOT / words[2].replace(".", "/") / "__main__.py").exists(), words
        for word in words:
            if word.startswith("--config=configs/"):
                assert (ROOT / word.split("=")[1]).exists(), word
