"""Checkpoints of a run: Orbax for the arrays, and a SHA-256 of every file.

    D/checkpoints/300/state        trained parameters, optimiser, step; never the frozen base
                     /cursor       JSON: where the input and the reports stand
                     /meta         JSON: config, fingerprint of the base weights, versions
                     /sha256.json  file -> digest, written last: without it a step is not finished
    D/checkpoints/damaged_300      a step whose files do not match; put aside, never used

Orbax restores flipped bits without an error: hence the digests.

The folder must be a local or mounted file system.
"""

import concurrent.futures
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from medmax_jax import weights

MANIFEST = "sha256.json"
STATE_SECTIONS = ("vocab", "model", "lora")  # what the saved arrays depend on
HOW_NOT_WHAT = ("model.remat", "model.attention")  # of these sections, but free to change


class CheckpointError(RuntimeError):
    """A checkpoint that must not be used here; the message says what differs and what to do."""


class Checkpoints:
    """The steps under one folder. Every process calls every method; process 0 keeps the digests."""

    def __init__(self, folder: str | os.PathLike, *, keep: int, log: Callable[[str], None]) -> None:
        self.folder, self.log = pathlib.Path(folder).absolute(), log
        self.folder.mkdir(parents=True, exist_ok=True)
        self._newest_sound = _agree(self._clean)
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports its every move
        # Synchronous: adapters are small, and the manifest needs finished files.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "cursor", "meta")
        )

    def latest(self) -> int | None:
        """The newest step that was whole when this folder was opened, or that was saved since."""
        return self._newest_sound

    def save(self, step: int, state: PyTree, *, cursor: dict, meta: dict) -> None:
        """Writes a step whole or not at all; returns when it is safe on disk."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(weights.named(state)),
                cursor=ocp.args.JsonSave(cursor),
                meta=ocp.args.JsonSave(meta),
            ),
        )
        if jax.process_index() == 0:
            _write_manifest(self.folder / str(step))
        _agree(lambda: 0)  # nobody goes on before the manifest stands
        self._newest_sound = step

    def meta(self, step: int) -> dict:
        """The JSON that was saved beside the arrays."""
        wanted = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=wanted)["meta"]

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict]:
        """(state, cursor) of a step; `like` gives structure, shapes and shardings (any mesh)."""
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(weights.named(like)), cursor=ocp.args.JsonRestore()
            ),
        )
        arrays = [found["state"][name] for name in weights.named(like)]
        return jax.tree.unflatten(jax.tree.structure(like), arrays), found["cursor"]

    def close(self) -> None:
        self._manager.close()

    def _clean(self) -> int:
        """Puts newer steps that are damaged or unfinished aside; the newest sound step, or -1."""
        for entry in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(entry)  # the process died while it wrote
        steps = (int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit())
        for step in sorted(steps, reverse=True):
            if not (wrong := damage(self.folder / str(step))):
                return step
            aside = self.folder / f"damaged_{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
            self.log(
                f"WARNING: checkpoint {step} is damaged ({wrong}); put aside as {aside.name}, "
                "using the newest sound earlier one"
            )
        return -1


def damage(folder: pathlib.Path) -> str:
    """What is wrong with the files of a step, in a few words; empty when every digest matches."""
    if not (folder / MANIFEST).exists():
        return "never finished"
    try:
        expected = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    actual = _digests(folder)
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong there"
        if actual[name] != expected[name]:
            return f"{name} has changed since it was written"
    return ""


def newest(folder: str | os.PathLike) -> tuple[int, dict[str, Any], dict]:
    """(step, arrays by name, meta) of the newest sound step, for reading only."""
    folder = pathlib.Path(folder)
    steps = (int(e.name) for e in folder.glob("*") if e.name.isdigit())
    for step in sorted(steps, reverse=True):
        if not damage(folder / str(step)):
            meta = json.loads((folder / str(step) / "meta" / "metadata").read_text())
            with ocp.StandardCheckpointer() as reader:
                return step, reader.restore((folder / str(step) / "state").absolute()), meta
    raise CheckpointError(f"{folder}: holds no sound checkpoint; train on, or name another run")


def check_meta(saved: dict, now: dict) -> list[str]:
    """The harmless differences; raises CheckpointError where the run cannot continue from there."""
    harmless = []
    for name, (old, new) in sorted(_differences(saved["config"], now["config"]).items()):
        section = name.split(".")[0]
        refuse = section in STATE_SECTIONS and name not in HOW_NOT_WHAT or name == "train.trains"
        if refuse:
            raise CheckpointError(
                f"the checkpoint was trained with config.{name} = {old!r}, this run has {new!r}; "
                "set it back, or use another --workdir"
            )
        harmless.append(f"config.{name} was {old!r}, is now {new!r}")
    for name in ("base", "data", "plan"):
        if (old := saved.get(name)) != (new := now.get(name)):
            text = f"the checkpoint was trained on {name} {old}, this run has {new}"
            if name == "base":
                raise CheckpointError(
                    f"{text}; set config.train.init_from back, or use another --workdir"
                )
            harmless.append(text)
    return harmless


def _differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (old, new) wherever two nested configs differ."""
    found = {}
    for name in old.keys() | new.keys():
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found[prefix + name] = (a, b)
    return found


def _digests(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(
            zip([str(f.relative_to(folder)) for f in files], pool.map(sha256, files), strict=True)
        )


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: pathlib.Path) -> None:
    temporary = folder / (MANIFEST + ".tmp")
    digests = _digests(folder)
    with open(temporary, "w") as out:
        json.dump(digests, out, indent=0)
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(folder / MANIFEST)


def _agree(choose: Callable[[], int]) -> int | None:
    """Process 0's choice, known to all; negative means none. A barrier too."""
    if jax.process_count() == 1:
        choice = choose()
    else:
        mine = choose() if jax.process_index() == 0 else 0
        choice = int(multihost_utils.broadcast_one_to_all(jax.numpy.int32(mine)))
    return choice if choice >= 0 else None
