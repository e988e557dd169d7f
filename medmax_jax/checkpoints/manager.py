"""Checkpoints of a run: Orbax for the arrays, and digests that detect damage.

    D/checkpoints/300/state          trained parameters, optimizer, step; never the frozen base
                     /cursor         JSON: the positions of the input and of the reports
                     /meta           JSON: config, fingerprints of the base and of the records
                     /shards-0.json  digests of the arrays, taken in memory before they were saved
                     /sha256.json    digests of the files, written last; required for a valid step
    D/checkpoints/damaged_300        a step that does not match; set aside, never used

`save` blocks only while the arrays are copied to the host; a thread writes and commits the step and
removes old ones. Older steps are removed only when a newer one is committed. The folder is on a
local or mounted file system.
"""

import json
import logging
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import multihost

from medmax_jax.checkpoints import checksums, safetensors_file
from medmax_jax.io.storage import Folder

PEERS = 600.0  # seconds that hosts wait for each other's files of a step


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message states the cause and the fix."""


class DamagedError(CheckpointError):
    """A step whose arrays are not those that were saved; it has been set aside."""


class CheckpointManager:
    """The steps under one folder.

    Every process calls every method; process 0 keeps the digests.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int, log: Callable[[str], None]) -> None:
        self.folder, self.log, self._keep = pathlib.Path(folder).absolute(), log, keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._newest_sound = _agree(self._clean)
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every operation
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None
        self.blocked: list[float] = []  # seconds that each save blocked training

    def latest(self) -> int | None:
        """Return the newest step that was valid when this folder was opened, or committed since."""
        return self._newest_sound

    def save(self, step: int, state: PyTree, *, cursor: dict, meta: dict) -> None:
        """Start to write a step; return when `state` may change. See `wait`."""
        begin = time.monotonic()
        self.wait()
        held = checksums.host_shards(state)
        self.write(step, state, held, cursor=cursor, meta=meta, begin=begin)

    def write(
        self,
        step: int,
        state: PyTree,
        held: checksums.Copies,
        *,
        cursor: dict,
        meta: dict,
        begin: float,
    ) -> None:
        """Run the second half of `save`: write `state` to files, and the digests of `held`."""
        try:
            self._orbax.save(
                self.folder / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(safetensors_file.flatten_named(state)),
                    cursor=ocp.args.JsonSave(cursor),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(step, error) from error
        self.blocked.append(time.monotonic() - begin)
        self._thread = threading.Thread(
            target=self._complete, args=(step, held, self.blocked[-1]), name="checkpoint"
        )
        self._thread.start()

    def check(self) -> None:
        """Raise CheckpointError if the last save has failed since."""
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def wait(self) -> None:
        """Wait until the last save is committed; raise CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def meta(self, step: int) -> dict:
        """Return the JSON that was saved with the arrays."""
        return self._step(step).json("meta/metadata")

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict]:
        """Return (state, cursor) of a step.

        `like` gives structure, shapes and shardings (any mesh). Raises DamagedError when the arrays
        are not the ones that were saved.
        """
        place = self._step(step)
        wanted = safetensors_file.flatten_named(like)
        with ocp.StandardCheckpointer() as reader:
            found = reader.restore(self.folder / str(step) / "state", wanted)
        arrays = {name: found[name] for name in wanted}
        if wrong := _anywhere(checksums.find_corrupt_shard(checksums.read_shards(place), arrays)):
            self._newest_sound = _agree(lambda: self._reject(step, wrong))
            raise DamagedError(f"checkpoint {step}: {wrong}")
        state = jax.tree.unflatten(jax.tree.structure(like), list(arrays.values()))
        # Means over nothing, such as of image targets in an interval without any, are NaN in the
        # cursor.
        return state, place.json("cursor/metadata", allow_nonfinite=True)

    def close(self) -> None:
        """Wait for the thread; its error has been raised or is logged here."""
        try:
            self.wait()
        except CheckpointError as error:
            self.log(f"WARNING: {error}")
        self._orbax.close()

    def _complete(self, step: int, held: checksums.Copies, blocked: float) -> None:
        """Write digests, complete Orbax's writing, commit and remove old steps, in the thread."""
        begin = time.monotonic()
        try:
            digests = checksums.shard_digests(held)
            self._orbax.wait_until_finished()
            place = self._step(step)
            # Process 0 renames the folder; a file written before that would obstruct the rename.
            _await(lambda: (self.folder / str(step)).is_dir(), f"folder of step {step}")
            own = checksums.SHARDS.format(jax.process_index())
            place.write(own, [json.dumps(digests).encode()])
            if jax.process_index() == 0:
                for process in range(jax.process_count()):
                    name = checksums.SHARDS.format(process)
                    _await(lambda name=name: place.has(name), f"{name} of another host")
                root = checksums.write_manifest(place)
                self.log(
                    f"checkpoint {step}: held training up {blocked:.2f} s, sealed "
                    f"{time.monotonic() - begin:.1f} s later, root {root}"
                )
                self._tidy(step)
            self._newest_sound = step
        except Exception as error:  # noqa: BLE001  a thread has no caller to raise to
            self._failed = self._unwritten(step, error)

    def _unwritten(self, step: int, error: BaseException) -> CheckpointError:
        good = self._newest_sound
        kept = "there is none before it" if good is None else f"step {good} is sound"
        said = str(error).strip().splitlines()
        return CheckpointError(
            f"checkpoint {step} could not be written ({said[0][:300] if said else repr(error)}); "
            f"{kept}. Free some space in {self.folder} or mend what it names; the same command "
            "goes on"
        )

    def _step(self, step: int) -> Folder:
        return Folder(self.folder / str(step))

    def _tidy(self, newest: int) -> None:
        """Remove all but the `keep` newest steps; the commit file of each is removed first."""
        steps = sorted((s for s in _steps(self.folder) if s <= newest), reverse=True)
        for old in steps[self._keep :]:
            (self.folder / str(old) / checksums.MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.folder / str(old))

    def _clean(self) -> int:
        """Set newer damaged or unfinished steps aside; return the newest valid step, or -1."""
        for entry in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(entry)  # the process died during the write
        for step in sorted(_steps(self.folder), reverse=True):
            if not (wrong := checksums.find_corrupt_file(self._step(step))):
                return step
            self._put_aside(step, wrong)
        return -1

    def _reject(self, step: int, wrong: str) -> int:
        self._put_aside(step, wrong)
        return self._clean()

    def _put_aside(self, step: int, wrong: str) -> None:
        aside = self.folder / f"damaged_{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / str(step)).rename(aside)
        self.log(
            f"WARNING: checkpoint {step} is damaged ({wrong}); put aside as {aside.name}, "
            "using the newest sound earlier one"
        )


def read_latest(folder: str | os.PathLike) -> tuple[int, dict[str, Any], dict]:
    """Return (step, arrays by name, meta) of the newest valid step, for reading only."""
    for step in sorted(_steps(pathlib.Path(folder)), reverse=True):
        place = Folder(pathlib.Path(folder) / str(step))
        if not checksums.find_corrupt_file(place):
            with ocp.StandardCheckpointer() as reader:
                found = reader.restore((pathlib.Path(folder) / str(step) / "state").absolute())
            if not checksums.find_corrupt_shard(checksums.read_shards(place), found):
                return step, found, place.json("meta/metadata")
    raise CheckpointError(f"{folder}: holds no sound checkpoint; train on, or name another run")


def _steps(folder: pathlib.Path) -> list[int]:
    return [int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()]


def barrier(name: str) -> None:
    """Synchronize all hosts through the coordinator; each name is used once.

    It is used after a compilation, whose duration differs: Gloo gives the peers of the first
    collective only 30 s.
    """
    if jax.process_count() > 1:
        everybody = set(range(jax.process_count()))
        multihost.sync_global_processes(name, processes=everybody, timeout=int(PEERS))


def _await(holds: Callable[[], bool], what: str) -> None:
    """Wait until `holds` returns true.

    Hosts synchronize through the shared folder, so that no collective delays a step.
    """
    end = time.monotonic() + PEERS
    while not holds():
        if time.monotonic() > end:
            raise CheckpointError(f"no {what} after {PEERS:.0f} s; is the workdir shared?")
        time.sleep(0.02)


def _anywhere(wrong: str) -> str:
    """Return the error of this host, or that another host has one: all hosts decide alike."""
    if jax.process_count() == 1:
        return wrong
    found = multihost_utils.process_allgather(np.array(bool(wrong)))
    return wrong or ("another host read other numbers" if found.any() else "")


def _agree(choose: Callable[[], int]) -> int | None:
    """Return process 0's choice on all processes, or None if it is negative; a barrier too."""
    if jax.process_count() == 1:
        choice = choose()
    else:
        mine = choose() if jax.process_index() == 0 else 0
        choice = int(multihost_utils.broadcast_one_to_all(np.int32(mine)))
    return choice if choice >= 0 else None
