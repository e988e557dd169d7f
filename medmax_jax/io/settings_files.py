"""Read the settings, indexes and headers of checkpoints, JSON and YAML, within tighter bounds.

A file is refused in a fraction of a second, before its values are built: Python takes up to 24
bytes for each byte of JSON. YAML is limited to what JSON can express: mappings with text keys,
lists, texts, finite numbers, true, false and null. Aliases and anchors are refused (nine lines of
them can represent 10^9 values), and so are tags, timestamps, a key that occurs twice, and more than
MAX_YAML_DEPTH levels. Every error is a TextFileError of one printable line.
"""

import collections
import math
from typing import Any

import yaml

from medmax_jax.io.errors import printable
from medmax_jax.io.text_files import TextFileError, decode, parse_json

MAX_JSON_BYTES = 32 << 20  # an index of the largest checkpoints has 9 MB, Chameleon's tokenizer 4
MAX_JSON_VALUES = 1 << 21  # a tokenizer of 280,000 merges, each a list, has 1.1 million
MAX_YAML_BYTES = 64 << 10  # PyYAML reads about 100 KB a second; a published vqgan.yaml has 1,490
MAX_YAML_DEPTH = 32
MAX_YAML_VALUES = 10_000


def parse_settings(data: bytes, where: object, *, allow_nonfinite: bool = False) -> Any:
    """Return the value of JSON of a checkpoint: config, index, header, tokenizer.

    allow_nonfinite: see parse_json, also for what is refused. Raises TextFileError naming `where`.
    """
    if len(data) > MAX_JSON_BYTES:
        raise TextFileError(
            f"{where}: more than {MAX_JSON_BYTES:,} bytes; not a file of a checkpoint"
        )
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise TextFileError(
            f"{where}: more than {MAX_JSON_VALUES:,} values; not a file of a checkpoint"
        )
    return parse_json(data, where, allow_nonfinite=allow_nonfinite)


def parse_yaml(data: bytes | str, where: object) -> Any:
    """Return the value of a YAML document; raise TextFileError naming `where`.

    parse_yaml(b"model: {params: {embed_dim: 256}}", "a.yaml") -> the same as nested dicts
    """
    if len(data) > MAX_YAML_BYTES:
        raise TextFileError(f"{where}: more than {MAX_YAML_BYTES:,} bytes; not a settings file")
    text = decode(data, where) if isinstance(data, bytes) else data
    try:
        _check_events(text, where)
        value = yaml.load(text, _Loader)  # noqa: S506, a SafeLoader
    # A value may look like a number and not be one, such as 0x_ or 2001-99-99.
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, IndexError) as error:
        if isinstance(error, TextFileError):
            raise
        problem = printable(" ".join(str(error).split()), 200)
        raise TextFileError(f"{where}: not YAML ({problem}); copy it again") from error
    _check_values(value, where)
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without duplicate keys; its input has passed _check_events."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.YAMLError(f"key {printable(key.value, 60)!r} is not text")
        if len(set(keys)) != len(keys):
            twice = collections.Counter(keys).most_common(1)[0][0]
            raise yaml.YAMLError(f"key {printable(twice, 60)!r} occurs twice")
        return super().construct_mapping(node, deep)


def _check_events(text: str, where: object) -> None:
    """Raise TextFileError before anything is built: the event parser does not recurse."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if count > MAX_YAML_VALUES:
            raise TextFileError(
                f"{where}: more than {MAX_YAML_VALUES:,} values; not a settings file"
            )
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise TextFileError(f"{where}: has an anchor or alias; write the value out")
        if getattr(event, "tag", None):
            tag = printable(event.tag, 60)
            raise TextFileError(f"{where}: has the tag {tag!r}; remove it")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise TextFileError(f"{where}: nested more than {MAX_YAML_DEPTH} levels deep")


def _check_values(value: Any, where: object) -> None:
    level = [value]
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise TextFileError(f"{where}: contains {item}, which is not a finite number")
            elif not isinstance(item, str | int | float | bool | None):
                kind = type(item).__name__
                raise TextFileError(f"{where}: contains a {kind}; use numbers, strings and lists")
        level = below
