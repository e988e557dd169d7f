"""The compile cache: where it is, who may write to it, and what damaged entries do."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from medmax_jax import cli

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import jax, jax.numpy as jnp
from medmax_jax import cli

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
cli.use_compile_cache()
print(float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((3, 3)))), sum(hits))
"""


@pytest.fixture(autouse=True)
def no_cache():
    """The tests of this process have no cache, unless they set one."""
    own = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", own)


def start(home: pathlib.Path, **variables: str) -> tuple[str, str]:
    """Return what a new process printed: its result and the entries it read; and its messages."""
    own = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    own |= {"XDG_CACHE_HOME": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=own | variables, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip(), done.stderr


def test_damaged_entries_are_compiled_again(tmp_path):
    folder = tmp_path / "medmax_jax" / "compile"
    result, messages = start(tmp_path)
    assert result == "27.0 0"
    assert f"compile cache: {folder} (up to 1 GiB; --compile_cache=off)\n" in messages
    assert folder.stat().st_mode & 0o777 == 0o700
    entries = {path: path.read_bytes() for path in folder.glob("*-cache")}
    assert entries
    for path, content in entries.items():  # a write that was killed: JAX has not noted its time
        path.write_bytes(content[: len(content) // 2])
        path.with_name(path.name.removesuffix("cache") + "atime").unlink()
    result, messages = start(tmp_path)
    assert result == "27.0 0" and "Error" not in messages
    assert all(path.stat().st_size > len(c) // 2 for path, c in entries.items())
    for path, content in entries.items():  # a disk that lost the end of a file
        path.write_bytes(content[: len(content) // 2])
    result, messages = start(tmp_path)
    assert result == "27.0 0"
    assert messages.count("Error reading persistent compilation cache entry") == len(entries)
    for path in entries:
        path.unlink()
    start(tmp_path)
    result, messages = start(tmp_path)
    assert result == f"27.0 {len(entries)}" and "Error" not in messages


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "medmax_jax" / "compile"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    cli.use_compile_cache()
    assert jax.config.jax_compilation_cache_dir is None
    message = capsys.readouterr().err
    assert f"compile cache: off (other users can write to {folder})" in message


@pytest.mark.parametrize(
    "folder, name, value",
    [
        ("off", "jax_compilation_cache_dir", None),
        ("", "jax_compilation_cache_dir", "own"),
        ("", "jax_enable_compilation_cache", False),
    ],
)
def test_nothing_is_set_where_the_user_decided(
    folder, name, value, tmp_path, monkeypatch, capsys, request
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = getattr(jax.config, name)
    request.addfinalizer(lambda: jax.config.update(name, before))
    jax.config.update(name, value)
    cli.use_compile_cache(folder)
    assert getattr(jax.config, name) == value
    assert jax.config.jax_compilation_cache_dir in (None, "own")
    assert capsys.readouterr().err == "" and not list(tmp_path.iterdir())
