"""Prompts from files and flags, the output folder, its gallery; errors of the program."""

import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from test_generate import folder  # noqa: F401

from medmax_jax import cli
from medmax_jax.generation import output_files
from medmax_jax.generation.model_bundle import Image, Text
from medmax_jax.generation.output_files import (
    OutputFolder,
    Prompt,
    prompts_from_flags,
    read_prompts,
)
from medmax_jax.generation.requests import GenerateError


def program(*args):
    command = [sys.executable, "-m", "medmax_jax.generate", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_images_in_any_order(tmp_path):
    (prompt,) = prompts_from_flags(["Is {a b.png} older than {c.png}?"], ["first.png"])
    assert [str(p) for p in prompt.parts] == [
        "first.png",
        "Is ",
        "a b.png",
        " older than ",
        "c.png",
        "?",
    ]
    assert prompt.shown() == "{first.png} Is {a b.png} older than {c.png} ?"
    file = tmp_path / "p.jsonl"
    rows = [
        {"prompt": [{"text": "A"}, {"image": "a.png"}], "id": 7},
        {"prompt": "{b.png}What?"},
    ]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    listed, inline = read_prompts(file)
    assert (listed.id, listed.named, listed.parts) == ("7", True, ("A", tmp_path / "a.png"))
    assert (inline.id, inline.named) == ("1", False)
    assert inline.parts == (tmp_path / "b.png", "What?")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1: not JSON"),
        (
            '{"prompt": "a", "temperature": 2}',
            "line 1: the fields are prompt, temperature; expected prompt and",
        ),
        ('{"prompt": [{"text": "a", "image": "b"}]}', "line 1: prompt must be a string or a list"),
        (
            '{"prompt": [{"video": "a"}]}',
            "line 1: a part of the prompt is 'video'; expected text or image",
        ),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}', "id '1' is not unique"),
        ("", "has no prompts; write one JSON object per line"),
    ],
)
def test_invalid_prompt_files_raise(tmp_path, line, message):
    file = tmp_path / "p.jsonl"
    file.write_text(line)
    with pytest.raises(GenerateError, match=message):
        read_prompts(file)


def test_killed_run_resumes_and_another_request_raises(tmp_path):
    first, second = (Prompt(id=n, named=True, parts=(n, tmp_path / "a.png")) for n in "ab")
    PIL.Image.new("RGB", (9, 7), "gray").save(tmp_path / "a.png")
    drawn = Image(PIL.Image.new("RGB", (4, 4), "red"), np.arange(4))
    output = OutputFolder(tmp_path, [first, second], dict(mode="mixed"))
    record = output.add(first, [Text("<b>red</b>"), drawn], "mixed")
    assert record["segments"] == [{"text": "<b>red</b>"}, {"image": "0000_1.png"}]
    with PIL.Image.open(tmp_path / "0000_1.png") as saved:
        assert output_files.NOTICE in saved.text["Comment"]
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write('{"id": "b", "segm')  # a kill truncates the line
    resumed = OutputFolder(tmp_path, [first, second], dict(mode="mixed"))
    assert resumed.records == {"a": record}
    resumed.add(second, [Text("blue")], "mixed")
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a", "b"]
    assert all(json.loads(line)["notice"] == output_files.NOTICE for line in lines)
    with pytest.raises(GenerateError, match="another value of prompts; use a new --out"):
        OutputFolder(tmp_path, [first], dict(mode="mixed"))
    with pytest.raises(GenerateError, match="another value of mode; use a new --out"):
        OutputFolder(tmp_path, [first, second], dict(mode="text"))
    page = resumed.gallery().read_text()
    assert output_files.NOTICE in page and "&lt;b&gt;red&lt;/b&gt;" in page and "<b>red" not in page
    assert page.count("data:image/png") == 3  # two inputs, one generated


def test_the_gallery_keeps_the_order_of_prompts_and_states_what_answered(tmp_path):
    drawn = Image(PIL.Image.new("RGB", (4, 4), "red"), np.arange(4))
    prompts = [Prompt(id=n, named=True, parts=(f"prompt {n}",)) for n in "abcd"]
    settings = dict(model="models/m", adapter="runs/lora", seed=7)
    output = OutputFolder(tmp_path, prompts, settings)
    for prompt in reversed(prompts):  # answers arrive in the order of their lengths
        output.add(prompt, [Text("blue")] if prompt.id == "b" else [drawn], "mixed")
    text = output.gallery().read_text()
    places = [text.index(f"prompt {n}") for n in "abcd"]
    assert places == sorted(places) and "generated: prompt a<" in text
    head = text.split('<p class="head">')[1]
    assert head.startswith("model models/m · adapter runs/lora · seed 7 · prompts 4, digest ")
    (start,) = json.loads((tmp_path / "request.json").read_text())["starts"]
    assert text.count(f"medmax_jax {start['medmax_jax']}") == 1 and start["machine"] in text
    OutputFolder(tmp_path, prompts, settings)  # answers nothing
    assert json.loads((tmp_path / "request.json").read_text())["starts"] == [start]


def test_every_start_that_answers_is_recorded(tmp_path):
    prompts = [Prompt(id=n, named=True, parts=(n,)) for n in "ab"]
    for prompt in prompts:
        output = OutputFolder(tmp_path, prompts, dict(seed=7))
        output.add(prompt, [Text("blue")], "text")
    assert len(json.loads((tmp_path / "request.json").read_text())["starts"]) == 2
    assert "start 2 · date " in output.gallery().read_text()


def test_a_folder_with_the_old_name_of_its_request_file_is_refused(tmp_path):
    prompts = [Prompt(id="a", named=True, parts=("a",))]
    OutputFolder(tmp_path, prompts, dict(mode="text")).add(prompts[0], [Text("b")], "text")
    (tmp_path / "request.json").rename(tmp_path / "asked.json")
    with pytest.raises(GenerateError, match="asked.json is named request.json now; use a") as error:
        OutputFolder(tmp_path, prompts, dict(mode="text"))
    subprocess.run(str(error.value).partition("or rename: ")[2], shell=True, check=True)
    assert list(OutputFolder(tmp_path, prompts, dict(mode="text")).records) == ["a"]


SLOW = pytest.mark.slow  # a process each


@pytest.mark.parametrize(
    "flags, status, message",
    [
        (["--prompt="], cli.ERROR, "error: prompt 0 is empty; it requires text or an"),
        (["--prompt=a", "--rows=0"], cli.ERROR, "(--rows) is 0; it must be at least 1"),
        pytest.param([], cli.ERROR, "set either --prompt or --prompts", marks=SLOW),
        pytest.param(["--prompt=a", "--hue=1"], cli.USAGE, "Unknown command line flag", marks=SLOW),
        pytest.param(["--prompt={no.png}"], cli.ERROR, "no.png: no such file", marks=SLOW),
        pytest.param(["--prompt=a <image>"], cli.ERROR, "pass the image there", marks=SLOW),
        pytest.param(["--prompt=a", "--config.sample.hue=1"], cli.USAGE, "no field", marks=SLOW),
        pytest.param(
            ["--prompt=a", "--merge"], cli.ERROR, "set adapter (--adapter) too", marks=SLOW
        ),
        pytest.param(["--prompt=a", "--adapter=no"], cli.ERROR, "no such file; an ad", marks=SLOW),
        pytest.param(
            ["--prompt=" + "z " * 58, "--mode=image"], cli.ERROR, "an image needs 5", marks=SLOW
        ),
        pytest.param(["--prompt=" + "z " * 60], cli.ERROR, "of the model has 64; sh", marks=SLOW),
    ],
)
def test_errors_leave_no_output(folder, tmp_path, flags, status, message):  # noqa: F811
    done = program(f"--model={folder}", f"--out={tmp_path / 'out'}", *flags)
    assert done.returncode == status, done.stderr
    assert message in done.stderr + done.stdout and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
