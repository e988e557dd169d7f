"""Checks of docs that mkdocs does not make: tables, lines, a page's start, navigation, configs.

Links and anchors are checked by mkdocs; the blocks of tutorials by test_tutorials.py.
"""

import functools
import pathlib
import re
import types
from collections.abc import Iterator
from unittest import mock

import jax
import numpy as np
import pytest
import yaml
from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from medmax_jax import config
from medmax_jax.training import step

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
KINDS = ("tutorials", "guides", "reference", "explanation")
MAX_COLUMNS = 5
MAX_LINE = 100


def lines_outside_code(page: str) -> list[tuple[int, str]]:
    """Return the numbered lines of a page without its code blocks and its mkdocstrings options."""
    kept, in_code, in_directive = [], False, False
    for number, line in enumerate((DOCS / page).read_text().splitlines(), start=1):
        if line.startswith("```"):
            in_code = not in_code
            continue
        in_directive = line.startswith(":::") or (in_directive and line.startswith("    "))
        if not in_code and not in_directive:
            kept.append((number, line))
    return kept


@pytest.mark.parametrize("page", PAGES)
def test_tables_have_at_most_five_columns(page):
    wide = [
        number
        for number, line in lines_outside_code(page)
        if line.startswith("|") and len(re.findall(r"(?<!\\)\|", line)) - 1 > MAX_COLUMNS
    ]
    assert not wide, f"docs/{page}: lines {wide}: split the table"


@pytest.mark.parametrize("page", PAGES)
def test_prose_is_wrapped(page):
    long = [
        number
        for number, line in lines_outside_code(page)
        if not line.startswith("|") and len(re.sub(r"\]\([^)]*\)", "]", line)) > MAX_LINE
    ]
    assert not long, f"docs/{page}: lines {long} have over {MAX_LINE} characters"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_starts_with_a_command(page):
    title, blank, third = (DOCS / page).read_text().splitlines()[:3]
    assert title.startswith("# ") and not blank
    assert third.startswith("```"), f"docs/{page}: start with the command that its reader needs"


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def files(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry if isinstance(entry, list) else list(entry.values())
        return [name for part in parts for name in files(part)]

    listed = files(settings["nav"])
    assert sorted(listed) == PAGES
    sections = {next(iter(part)): files(part) for part in settings["nav"]}
    assert sections.pop("Home") == ["index.md"]
    assert [name.lower() for name in sections] == list(KINDS)
    for name, pages in sections.items():
        assert all(page.split("/")[0] == name.lower() for page in pages), name


TEXTS = ("README.md", *(f"docs/{page}" for page in PAGES))
NO_CONFIGS = ("__init__", "sampling")
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in NO_CONFIGS)
# ml_collections reads config files with a method that Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")
COMMAND = re.compile(r"--config=(?:\S*/)?configs/(\w+)\.py")
OVERRIDE = re.compile(r"--config\.([a-z_]+(?:\.[a-z_]+)*)(?==|[\s`),])")
PLACEHOLDER = "section.field"


def parse(*flags: str) -> ConfigDict:
    """Return the config of `--config=...` and its overrides, as a program reads them."""
    values = absl_flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    with mock.patch("sys.argv", ["program", *flags]):  # config_flags reads overrides from there
        values(["program", *flags])
    return values.config


def commands(text: str) -> list[str]:
    """Return the commands of the code blocks of a page, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if COMMAND.search(line)]


def overrides(command: str) -> list[str]:
    """Return the `--config` flags of a command, without those that a shell variable sets."""
    return re.findall(r"--config[=.][^\s$\"]+(?=[\s\"]|$)", command)


@functools.cache
def fields(config_name: str) -> frozenset[str]:
    """Return the dotted names of the sections and fields of configs/NAME.py."""

    def names(section: ConfigDict, prefix: str) -> Iterator[str]:
        for name in section:
            yield prefix + name
            if isinstance(value := section.get_ref(name).get(), ConfigDict):
                yield from names(value, f"{prefix}{name}.")

    return frozenset(names(parse(f"--config={ROOT}/configs/{config_name}.py"), ""))


@pytest.mark.parametrize("page", TEXTS)
def test_config_flags_name_fields(page):
    text = (ROOT / page).read_text()
    for command in commands(text):
        name = COMMAND.search(command)[1]
        unknown = set(OVERRIDE.findall(command + " ")) - fields(name)
        assert not unknown, f"{page}: {command}: configs/{name}.py has no {sorted(unknown)}"
    known = frozenset().union(*map(fields, CONFIGS)) | {PLACEHOLDER}
    unknown = set(OVERRIDE.findall(text)) - known
    assert not unknown, f"{page}: no config has {sorted(unknown)}"


@pytest.mark.parametrize("page", TEXTS)
def test_training_commands_have_valid_settings(page):
    for command in commands((ROOT / page).read_text()):
        if "medmax_jax.train " in command or "medmax_jax.plan " in command:
            config.from_config_dict(parse(*overrides(command)))


def machines() -> list[tuple[str, list[str]]]:
    """Return the rows of the table of machines in the training guide: machine, flags."""
    text = (DOCS / "guides" / "training.md").read_text()
    rows = text.split("| machine | set |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    return [(row.split("|")[1].strip(), overrides(row.replace("`", " "))) for row in rows]


NUMBER = {"one": 1, "four": 4, "sixteen": 16}


@pytest.mark.parametrize(("machine", "flags"), machines())
def test_the_training_guide_has_flags_that_run_on_each_machine(machine, flags):
    run = config.from_config_dict(parse("--config=configs/medmax_7b_lora.py", *flags))
    count, kind = machine.split()[:2]
    assert run.mesh.data * run.mesh.fsdp * run.mesh.tp == NUMBER[count]
    platform = kind.lower().rstrip("s")
    devices = np.array([types.SimpleNamespace(platform=platform)])
    step.check(run, mock.Mock(spec=jax.sharding.Mesh, devices=devices))
