"""Checks of docs that mkdocs does not make: tables, lines, the start of a page, the navigation.

Links and anchors are checked by mkdocs; the blocks of tutorials by test_tutorials.py.
"""

import pathlib
import re

import pytest
import yaml

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
