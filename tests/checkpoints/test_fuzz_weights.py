"""Seeded mutations of checkpoint files give a result or one printable line of an own error.

Each format has 60 mutations in the default suite and 500 that are marked slow.
"""

import copy
import json
import pathlib
import random
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from convert_setup import BASE, TINY, read_safetensors, shards, write_meta, write_pth
from safetensors.numpy import save_file
from test_convert import convert

from medmax_jax.checkpoints import safetensors_file
from medmax_jax.config import Vocab
from medmax_jax.convert import convert as conversion
from medmax_jax.convert import native, safetensors_stream, vqgan
from medmax_jax.io.errors import MAX_CHARS
from medmax_jax.models import tokenizer
from medmax_jax.models import vqgan as vqgan_model
from medmax_jax.storage.folder import Folder

FEW, MANY = 60, 500
SECONDS = 10.0  # of this process for one mutation; the point is that nothing runs without end
HOSTILE = (
    None, True, False, 0, -1, 1, 2, 3, 10**6, 10**9, 10**19, 10**400, -(10**30), 1.5, 1e308, -0.0,
    float("nan"), float("inf"), "", "x", "4", "\x1b[2J\n", "\u202e", "x" * 10_000, "../../etc",
    [], {}, [1], [[]], [1] * 1_000, {"a": 1}, [None], {"": {"": []}}, "\u00e9" * 9,
    "I32", "F8_E4M3", "BF16",
)  # fmt: skip
DEEP = "[" * 20_000 + "]" * 20_000


def place(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """(container, key) of a value inside a JSON value, as often near the top as deep inside."""
    while True:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            return value, key
        value = inner


def mutate_value(value: Any, rng: random.Random) -> Any:
    """One to three values replaced, removed, renamed, wrapped or exchanged."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not value:
            return copy.deepcopy(rng.choice(HOSTILE))
        holder, key = place(value, rng)
        kind = rng.randrange(6)
        if kind <= 2:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            holder[key] = [holder[key]] * rng.choice((1, 3))
        elif isinstance(holder, dict):
            holder[f"{key}{rng.choice(('', '.x', chr(27), '0' * 600))}"] = holder[key]
    return value


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, a range removed, repeated or overwritten, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 4, 50)))
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end] * rng.choice((1, 2, 100))
            case 3:
                data[at:end] = rng.randbytes(end - at)
            case 4:
                del data[at:]
            case _:
                data[at:at] = rng.choice((DEEP.encode(), b"9" * 5_000, b"\0", b"\xff", b"NaN"))
    return bytes(data)


def text_mutator(load: Callable, dump: Callable) -> Callable[[bytes, random.Random], bytes]:
    def mutate(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mutate_bytes(data, rng)
        return dump(mutate_value(load(data), rng)).encode()

    return mutate


mutate_json = text_mutator(json.loads, json.dumps)
mutate_yaml = text_mutator(yaml.safe_load, yaml.safe_dump)


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a changed header; its length is set right more often than not."""
    length = int.from_bytes(data[:8], "little")
    header, rest = mutate_json(data[8 : 8 + length], rng), data[8 + length :]
    size = len(header) if rng.random() < 0.8 else rng.choice((0, 7, 1 << 20, 1 << 60, length))
    return size.to_bytes(8, "little") + header + rest


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Small folders of each layout, without a VQGAN's weights but for the torch file."""
    root = tmp_path_factory.mktemp("made")
    states = shards(BASE, dtypes=("F32",), seed=0)
    folders = {"meta": write_meta(root / "meta", BASE, states, vqgan=True)}
    folders["plain"] = write_meta(root / "plain", BASE, states, vqgan=False)
    folders["hf"] = convert(folders["plain"], root / "hf", "hf")
    # Reading 9,728 names takes longer than all else, so only "tokenizer" has them.
    config = folders["hf"] / "config.json"
    small = json.loads(config.read_text())
    config.write_text(json.dumps(small | {"vocabulary_map": {"<s>": 0, "!": 8_712}}))
    (folders["hf"] / "tokenizer.json").unlink()
    (folders["plain"] / "tokenizer" / "text_tokenizer.json").unlink()
    arrays = read_safetensors(folders["hf"])
    folders["parts"] = pathlib.Path(shutil.copytree(folders["hf"], root / "parts"))
    (folders["parts"] / "model.safetensors").unlink()
    names, weight_map = sorted(arrays), {}
    for file, part in (("a.safetensors", names[:9]), ("b.safetensors", names[9:])):
        save_file({name: arrays[name] for name in part}, folders["parts"] / file)
        weight_map |= dict.fromkeys(part, file)
    (folders["parts"] / safetensors_stream.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    small = root / "small"
    small.mkdir()
    few = {"a.weight": np.ones((3, 4), np.float32), "b": np.arange(5, dtype=np.float16)}
    save_file(few, small / "few.safetensors", metadata={"format": "pt"})
    write_pth(small / "few.pth", few, wrap="state_dict")
    folders["small"] = small
    folders["peft"] = pathlib.Path(__file__).parents[1] / "parity" / "peft_adapter"
    return folders


def read_header(path: pathlib.Path) -> None:
    for tensor in safetensors_stream.read_file(Folder(path.parent).file(path.name)).values():
        if tensor.shape:
            tensor.read()
    struct = jax.ShapeDtypeStruct
    safetensors_file.load(
        path, {"a": {"weight": struct((3, 4), np.float32)}, "b": struct((5,), np.float16)}
    )


def read_torch(path: pathlib.Path) -> None:
    for tensor in safetensors_stream.read_torch(Folder(path.parent).file(path.name)).values():
        if tensor.shape:
            tensor.read()


def read_yaml(path: pathlib.Path) -> None:
    vq = vqgan.meta_vqgan_settings(Folder(path.parent), "")
    vqgan_model.check_blocks([], vq, path)


def read_tokenizer(path: pathlib.Path) -> None:
    vocab = Vocab(size=9_728, image_codes=256, text_start=8_712)
    tokenizer.Tokenizer.from_file(path, vocab).encode("Is it a CT? 3 cm")


def read_folder_above(path: pathlib.Path) -> None:
    conversion.read_checkpoint(path.parent)


FORMATS = {  # name -> (folder, file, mutation, what reads it)
    "safetensors": ("small", "few.safetensors", mutate_header, read_header),
    "index": ("parts", safetensors_stream.INDEX, mutate_json, read_folder_above),
    "config": ("hf", "config.json", mutate_json, read_folder_above),
    "params": ("plain", "models/7b/params.json", mutate_json, read_folder_above),
    "tokenizer": ("native", "tokenizer.json", mutate_json, read_tokenizer),
    "yaml": ("meta", "tokenizer/vqgan.yaml", mutate_yaml, read_yaml),
    "adapter": ("peft", "adapter_config.json", mutate_json, read_folder_above),
    "torch": ("small", "few.pth", mutate_bytes, read_torch),
    "native": ("native", "config.json", mutate_json, lambda p: native.settings(Folder(p.parent))),
}


def run(layouts, tmp_path: pathlib.Path, name: str, seeds: range) -> int:
    """Mutate and read once for each seed; return how many mutations were refused."""
    folder, file, mutate, read = FORMATS[name]
    source = layouts.get(folder, TINY)
    copied = pathlib.Path(shutil.copytree(source, tmp_path / name)) / file
    content, refused = copied.read_bytes(), 0
    for seed in seeds:
        copied.write_bytes(mutate(content, random.Random(f"{name} {seed}")))
        begin = time.process_time()
        try:
            read(copied)
        except conversion.ERRORS as error:
            refused += 1
            assert str(error).isprintable(), (name, seed, str(error))
            assert len(str(error)) <= MAX_CHARS, (name, seed)
        except BaseException as error:
            raise AssertionError(f"{name}, seed {seed}: {error!r:.500}") from error
        assert time.process_time() - begin < SECONDS, (name, seed)
    return refused


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_raise_one_line_errors(layouts, tmp_path, name):
    assert run(layouts, tmp_path, name, range(FEW)) > FEW // 4


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutated_files_raise_one_line_errors(layouts, tmp_path, name):
    assert run(layouts, tmp_path, name, range(FEW, FEW + MANY)) > MANY // 4
