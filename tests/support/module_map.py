"""Every module with the first line of its docstring: python -m tests.support.module_map --write

Writes docs/reference/modules.md. tests/test_house.py checks that the file is fresh.
"""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "modules.md"
FOLDERS = ("medmax_jax", "data", "eval", "configs")
HEADER = """# Modules

```bash
python -m tests.support.module_map --write    # writes this page
```

Each module and the first line of its docstring.
"""


def modules() -> list[pathlib.Path]:
    """Return every module of the package, each file once, without the links in medmax_jax/."""
    paths = []
    for name in FOLDERS:
        for path in sorted((ROOT / name).rglob("*.py"), key=lambda p: (p.parent, p.name)):
            parts = path.relative_to(ROOT).parts
            if parts[0] == "medmax_jax" and parts[1] in FOLDERS:
                continue
            paths.append(path)
    return paths


def summary(path: pathlib.Path) -> str:
    """Return the first line of a module's docstring; of a program the first sentence."""
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    if not lines:
        return ""
    if lines[0].startswith("python "):
        return next((line for line in lines if line[:1].isupper()), lines[0])
    return lines[0]


def render() -> str:
    """Return the page."""
    text, folder = HEADER, None
    for path in modules():
        here = path.parent.relative_to(ROOT)
        if here != folder:
            folder = here
            text += f"\n## {folder}/\n\n| module | |\n|---|---|\n"
        if path.name != "__init__.py":
            text += f"| `{path.name}` | {summary(path).replace('|', chr(92) + '|')} |\n"
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(render(), encoding="utf-8")
    else:
        print(render(), end="")
