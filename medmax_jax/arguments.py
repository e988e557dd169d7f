"""Defines what the command lines of all programs share: messages and help texts.

    error: --workdir and --config are required; --help lists all flags
    error: --config.optim.lr is not a field of the config; did you mean --config.optim.peak_lr?

`Parser` is for the programs of argparse; cli.py uses the other functions for those of absl.
"""

import argparse
import ast
import difflib
import inspect
import io
import re
import signal
import sys
import textwrap
import tokenize
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

WIDTH = 100  # columns of a help text
MISSING = "the following arguments are required: "  # argparse's message of missing arguments
REQUIRED = "must have a value other than None"  # absl's message of a required flag without a value


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the name that was probably meant, or ""; a field may be given without its section."""
    names = list(names)
    leaf = name.rpartition(".")[2]
    for ending in (f".{leaf}", f"_{leaf}"):
        if matches := [n for n in names if f".{n}".endswith(ending)]:
            return matches[0]
    return next(iter(difflib.get_close_matches(name, names, n=1)), "")


def required(names: Sequence[str]) -> str:
    """Return the error of missing flags: "--config and --workdir are required"."""
    *others, last = names
    text = f"{', '.join(others)} and {last} are" if others else f"{last} is"
    return f"{text} required; --help lists all flags"


def end_of_imports() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: during the imports it ends the process at once."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Parser(argparse.ArgumentParser):
    """Parses arguments; an error is one line with the nearest name, and status 2."""

    _words: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        """Print the error and exit; a misspelled flag comes before the ones that are missing."""
        if message.startswith(MISSING):
            for action in self._actions:
                action.required = False
            others = super().parse_known_args(self._words)[1]
            if unknown := [w for w in others if w.startswith("-") and "-config" not in w]:
                message = f"unrecognized arguments: {unknown[0]}"
        print(f"error: {self._explain(message)}", file=sys.stderr)
        sys.exit(2)

    def format_help(self) -> str:
        """Return the help text, required flags first."""
        self._optionals._group_actions.sort(key=lambda action: not action.required)
        return super().format_help()

    def reject(self, arguments: Sequence[str]) -> NoReturn:
        """Report the first of these unknown arguments and exit."""
        self.error(f"unrecognized arguments: {arguments[0]}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the arguments and the words that are none; also called for a sub-command."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the arguments; an unknown one is reported by the sub-command that it follows."""
        end_of_imports()
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.leaf(sys.argv[1:] if args is None else args).reject(unknown)
        return namespace

    def leaf(self, arguments: Sequence[str]) -> "Parser":
        """Return the parser of the sub-command that is among the arguments, or this parser."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word in arguments:
                    if word in action.choices:
                        return action.choices[word]
        return self

    def _explain(self, message: str) -> str:
        if message.startswith(MISSING):
            return required(message.removeprefix(MISSING).split(", "))
        if match := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            names = [o for o in self._option_string_actions if o.startswith("--")]
            near = nearest(match[1], names) if match[1].startswith("-") else ""
            hint = f"did you mean {near}?" if near else "--help lists all flags"
            kind = "a flag" if match[1].startswith("-") else "an argument"
            return f"{match[1]} is not {kind}; {hint}"
        if match := re.match(r"(.*): invalid choice: '(.*)' \(choose from (.*)\)", message):
            choices = [choice.strip("'") for choice in match[3].split(", ")]
            near = nearest(match[2], choices)
            hint = f"did you mean {near}?" if near else f"use one of {', '.join(choices)}"
            return f"{match[1].removeprefix('argument ')}: {match[2]!r} is unknown; {hint}"
        return message.removeprefix("argument ")


# ---- absl's flags ----


def folder(text: str) -> Path | str:
    """Return the value of a flag that names a folder to write: a local path, or gs:// as text."""
    return text if text.startswith("gs://") else Path(text)


def missing_flags(error: Exception) -> list[str]:
    """Return the required flags without a value that absl's error names."""
    return re.findall(rf"Flag (--\w+) {REQUIRED}", str(error))


def flags_help(values: flags.FlagValues, names: Sequence[str], given: Mapping[str, str]) -> str:
    """Return a program's flags, required ones first; `given`: the defaults that cli.run adds."""

    def is_required(name: str) -> bool:
        messages = [getattr(v, "message", "") or "" for v in values[name].validators]
        return name not in given and any(f"--{name} {REQUIRED}" in message for message in messages)

    ordered = sorted(dict.fromkeys(names), key=lambda name: (not is_required(name), name))
    lines = []
    for name in ordered:
        flag = values[name]
        shown = f"--[no]{name}" if flag.boolean else f"--{name}"
        default = given.get(name, flag.default)
        empty = default in (None, "", []) or flag.boolean and not default
        note = "required" if is_required(name) else "" if empty else f"default: {default}"
        text = " ".join(flag.help.split()) + (f" ({note})" if note else "")
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"  {shown:20} ", subsequent_indent=" " * 23
        )
    return "\n".join(lines)


# ---- The fields of a config ----


def fields(config: Any, section: str = "") -> dict[str, Any]:
    """Return dotted name -> value of the fields of a ConfigDict, sections left out."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            values |= fields(value, f"{section}{name}.")
        else:
            values[f"{section}{name}"] = value
    return values


def unknown_field(arguments: Sequence[str], config: Any) -> str:
    """Return the error of the first override whose field the config lacks, or ""."""
    names = list(fields(config))
    for argument in arguments:
        if not argument.startswith("--config."):
            continue
        name = argument.split("=")[0].removeprefix("--config.")
        bare = re.sub(r"\[.*?\]", "", name)
        if not any(n == bare or n.startswith(f"{bare}.") for n in names):
            near = nearest(bare, names)
            hint = f"did you mean --config.{near}?" if near else "--help_config lists all fields"
            return f"--config.{name} is not a field of the config; {hint}"
    return ""


def config_help(config: Any, sources: Sequence[Path]) -> str:
    """Return each field, its value and its meaning: the comment in one of the source files."""
    meanings: dict[str, str] = {}
    for path in sources:
        for name, text in _comments(path).items():
            meanings.setdefault(name, text)
    lines = []
    for name, value in fields(config).items():
        text = meanings.get(".".join(name.split(".")[-2:]), "")
        head = f"  --config.{name}={value!r}"
        lines += textwrap.wrap(f"{head:49} {text}", WIDTH, subsequent_indent=" " * 50)
    return "\n".join(lines)


def source_files(module: types.ModuleType) -> list[Path]:
    """Return the files of a module, and of the classes that it imported by name."""
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__.startswith("medmax_jax")
    ]
    files = [inspect.getsourcefile(item) for item in (module, *classes)]
    return [Path(file) for file in dict.fromkeys(files) if file]


def _comments(path: Path) -> dict[str, str]:
    """Return "section.field" -> the comment in its line, of dataclasses and of ConfigDicts."""
    text = path.read_text()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    lines = ["", *text.splitlines(), ""]
    meanings: dict[str, str] = {}
    for name, line in _definitions(ast.parse(text)):
        parts = [comments[line]] if line in comments else []
        while parts and lines[line + 1].lstrip().startswith("#"):
            line += 1
            parts.append(comments[line])
        if parts:
            meanings.setdefault(name, " ".join(parts))
    return meanings


def _definitions(tree: ast.AST) -> Iterable[tuple[str, int]]:
    """Yield ("section.field", the line of its end); a field without a section is "field"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.AnnAssign):
                    yield f"{node.name.lower()}.{part.target.id}", part.annotation.end_lineno
        elif isinstance(node, ast.FunctionDef):
            yield from _keywords(node.name, node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            target = node.targets[0]
            section = f"{target.value.attr}." if isinstance(target.value, ast.Attribute) else ""
            yield f"{section}{target.attr}", node.value.end_lineno
            yield from _keywords(target.attr, node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if isinstance(node.func.value, ast.Attribute):  # config.model.update(...)
                yield from _keywords(node.func.value.attr, node)


def _keywords(section: str, tree: ast.AST) -> Iterable[tuple[str, int]]:
    for node in ast.walk(tree):
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            yield f"{section}.{keyword.arg}", keyword.value.end_lineno
