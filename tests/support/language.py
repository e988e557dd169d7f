"""Finds words that do not belong in the text of the project: `python -m tests.support.language`.

It reads docstrings, comments, strings and names of Python files, and the prose of Markdown files.
A statement right after the comment `# Verbatim: part of the data.` is exempt: it holds text that a
model, a judge or a file format reads, which must not be corrected.
"""

import ast
import io
import pathlib
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]
INSTEAD = {
    "picture": "image",
    "mend": "fix",
    "lane": "slot",
    "doubles": "duplicates",
    "nobody": "no one, or the active voice",
    "somebody": "another process, a user",
    "whoever": "the one that",
    "beside": "next to, in addition to",
}
WORDS = re.compile(
    r"\b(pictures?|mend(?:s|ed|ing)?|lanes?|doubles|nobody|somebody|whoever|beside)\b",
    re.IGNORECASE,
)
VERBATIM = "# Verbatim: part of the data."
READ = ("medmax_jax", "data", "eval", "configs", "benchmarks", "tests", "docs")
PARTS = re.compile(r"_|(?<=[a-z0-9])(?=[A-Z])")


def exempt_lines(source: str) -> set[int]:
    """Return the lines of the statements that a verbatim comment stands before."""
    marks = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.string.startswith(VERBATIM)
    }
    lines = set(marks)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt | ast.expr) and node.lineno - 1 in marks:
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def in_python(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the word of each finding in a Python file."""
    exempt = exempt_lines(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            for number, text in enumerate(token.string.splitlines(), start=line):
                if number not in exempt:
                    yield from ((number, word) for word in WORDS.findall(text.replace("_", " ")))
        elif token.type == tokenize.NAME and line not in exempt:
            if any(WORDS.fullmatch(part) for part in PARTS.split(token.string)):
                yield line, token.string


def in_markdown(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the word of each finding in a Markdown file."""
    for number, line in enumerate(text.splitlines(), start=1):
        yield from ((number, word) for word in WORDS.findall(line))


def findings(paths: list[str]) -> list[str]:
    """Return `path:line: word` of each finding in the named files, which are relative to ROOT."""
    found = []
    for path in sorted(paths):
        text = (ROOT / path).read_text()
        source = in_python if path.endswith(".py") else in_markdown
        found += [f"{path}:{line}: {word}" for line, word in source(text)]
    return found


def tracked() -> list[str]:
    """Return the files of the repository that are read: what git tracks, each once."""
    command = ["git", "ls-files", "--", *READ, "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [
        path
        for path in listed.splitlines()
        if path.endswith((".py", ".md"))
        and not (ROOT / path).is_symlink()
        and path not in ("tests/support/language.py", "CHANGELOG.md")
    ]


if __name__ == "__main__":
    given = [path for path in sys.argv[1:] if path.endswith((".py", ".md"))]
    lines = findings(given or tracked())
    print("\n".join(lines))
    print(f"{len(lines)} findings; say instead: {INSTEAD}", file=sys.stderr)
    sys.exit(bool(lines))
