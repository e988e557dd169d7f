"""Checkpoints of a run: Orbax for the arrays, and digests that detect damage.

    D/checkpoints/300/state          trained parameters, optimizer, step; never the frozen base
                     /cursor         JSON: the positions of the input and of the reports
                     /meta           JSON: config, fingerprints of the base and of the records
                     /shards-0.json  digests of the arrays, taken in memory before they were saved
                     /sha256.json    digests of the files, written last; required for a valid step
    D/checkpoints/damaged_300        a step that does not match; set aside, never used
    D/checkpoints.sha256             the digest of each step's sha256.json, to prove what was saved:
                                     cd D && sha256sum -c --ignore-missing checkpoints.sha256

`save` blocks only while the arrays are copied to the host; a thread writes and commits the step and
removes old ones. Older steps are removed only when a newer one is committed. The folder is local,
mounted or under gs://, where a folder has no rename: its files count once sha256.json exists, and
the logs of the run are in the bucket before that.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from medmax_jax.checkpoints import checksums, safetensors_file
from medmax_jax.checkpoints.barriers import PEER_TIMEOUT
from medmax_jax.storage.folder import Folder
from medmax_jax.storage.workdir import Workdir

COMMITTED = "commit_success.txt"  # of Orbax, on gs:// only
NAME = "checkpoints"  # folder of the steps


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message states the cause and the fix."""


class DamagedError(CheckpointError):
    """A step whose arrays are not those that were saved; it has been set aside."""


class CheckpointManager:
    """The steps of one workdir.

    Every process calls every method; process 0 keeps the digests.
    """

    def __init__(self, work: Workdir, *, keep: int, log: Callable[[str], None]) -> None:
        self.folder, self.log, self._keep = Folder(work.url(NAME)), log, keep
        self._work, self._digests = work, work.folder / f"{NAME}.sha256"
        epath.Path(self.folder.path).mkdir(parents=True, exist_ok=True)
        self._latest_valid = _agree(self._clean)
        self._level = (absl := logging.getLogger("absl")).level
        absl.setLevel(logging.ERROR)  # Orbax logs every operation
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None
        self.blocked: list[float] = []  # seconds that each save blocked training

    def latest(self) -> int | None:
        """Return the newest step that was valid when this folder was opened, or committed since."""
        return self._latest_valid

    def save(self, step: int, state: PyTree, *, cursor: dict, meta: dict) -> None:
        """Start to write a step; return when `state` may change. See `wait`."""
        begin = time.monotonic()
        self.wait()
        self._work.check()
        shards = checksums.host_shards(state)
        self.write(step, state, shards, cursor=cursor, meta=meta, begin=begin)

    def write(
        self,
        step: int,
        state: PyTree,
        shards: checksums.Copies,
        *,
        cursor: dict,
        meta: dict,
        begin: float,
    ) -> None:
        """Run the second half of `save`: write `state` to files, and the digests of `shards`."""
        try:
            self._orbax.save(
                self._step(step).path,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(safetensors_file.flatten_named(state)),
                    cursor=ocp.args.JsonSave(cursor),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(step, error) from error
        self.blocked.append(time.monotonic() - begin)
        self._thread = threading.Thread(
            target=self._complete, args=(step, shards, self.blocked[-1]), name="checkpoint"
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
        step_folder = self._step(step)
        abstract_arrays = safetensors_file.flatten_named(like)
        with ocp.StandardCheckpointer() as reader:
            restored = reader.restore(f"{step_folder.path}/state", abstract_arrays)
        arrays = {name: restored[name] for name in abstract_arrays}
        if problem := _on_any_host(
            checksums.find_corrupt_shard(checksums.read_shards(step_folder), arrays)
        ):
            self._latest_valid = _agree(lambda: self._reject(step, problem))
            raise DamagedError(f"checkpoint {step}: {problem}")
        state = jax.tree.unflatten(jax.tree.structure(like), list(arrays.values()))
        # Means over nothing, such as of image targets in an interval without any, are NaN in the
        # cursor.
        return state, step_folder.json("cursor/metadata", allow_nonfinite=True)

    def close(self) -> None:
        """Wait for the thread; its error has been raised or is logged here."""
        try:
            self.wait()
        except CheckpointError as error:
            self.log(f"WARNING: {error}")
        self._orbax.close()
        logging.getLogger("absl").setLevel(self._level)

    def _complete(self, step: int, shards: checksums.Copies, blocked: float) -> None:
        """Write digests, complete Orbax's writing, commit and remove old steps, in the thread."""
        begin = time.monotonic()
        try:
            digests = checksums.shard_digests(shards)
            self._orbax.wait_until_finished()
            step_folder = self._step(step)
            # Process 0 renames the folder, which a file written before would obstruct; on gs:// it
            # writes an object that marks the end.
            _await(lambda: self._is_written(step_folder), f"folder of step {step}")
            own = checksums.SHARDS.format(jax.process_index())
            step_folder.write(own, [json.dumps(digests).encode()])
            if jax.process_index() == 0:
                for process in range(jax.process_count()):
                    name = checksums.SHARDS.format(process)
                    _await(lambda name=name: step_folder.has(name), f"{name} of another host")
                self._work.flush()  # a resumed run keeps the rows up to its step
                self._work.check()
                digest = checksums.write_manifest(step_folder)
                self.log(
                    f"checkpoint {step}: blocked training for {blocked:.2f} s, committed "
                    f"{time.monotonic() - begin:.1f} s later, digest in {self._digests.name}"
                )
                self._note_digest(step, digest)
                self._remove_old(step)
            self._latest_valid = step
        except Exception as error:  # noqa: BLE001  a thread has no caller to raise to
            self._failed = self._write_error(step, error)

    def _note_digest(self, step: int, digest: str) -> None:
        """Add a line to the file of digests, which no program reads."""
        try:
            with self._digests.open("a") as file:
                file.write(f"{digest}  {NAME}/{step}/{checksums.MANIFEST}\n")
        except OSError as error:
            self.log(f"WARNING: cannot write {self._digests} ({error.strerror}): {digest}")

    def _write_error(self, step: int, error: BaseException) -> CheckpointError:
        latest = self._latest_valid
        previous = (
            "there is no earlier one" if latest is None else f"the latest valid step is {latest}"
        )
        lines = str(error).strip().splitlines()
        return CheckpointError(
            f"checkpoint {step} could not be written ({lines[0][:300] if lines else error!r}); "
            f"{previous}. Free space in {self.folder.path} or fix the cause, then run the same "
            "command again to resume"
        )

    def _step(self, step: int) -> Folder:
        return Folder(f"{self.folder.path}/{step}")

    @staticmethod
    def _is_written(step_folder: Folder) -> bool:
        return bool(step_folder.has(COMMITTED)) if step_folder.remote else step_folder.exists()

    def _remove_old(self, newest: int) -> None:
        """Remove all but the `keep` newest steps; the commit file of each is removed first."""
        steps = sorted((s for s in _steps(self.folder) if s <= newest), reverse=True)
        for old in steps[self._keep :]:
            self._step(old).delete(checksums.MANIFEST)
            self._step(old).remove()

    def _clean(self) -> int:
        """Set newer damaged or unfinished steps aside; return the newest valid step, or -1."""
        for entry in self.folder.children():
            if ".orbax-checkpoint-tmp" in entry:
                Folder(f"{self.folder.path}/{entry}").remove()  # the process died during the write
        for step in sorted(_steps(self.folder), reverse=True):
            if not (problem := checksums.find_corrupt_file(self._step(step))):
                return step
            self._set_aside(step, problem)
        return -1

    def _reject(self, step: int, problem: str) -> int:
        self._set_aside(step, problem)
        return self._clean()

    def _set_aside(self, step: int, problem: str) -> None:
        damaged = Folder(f"{self.folder.path}/damaged_{step}")
        damaged.remove()
        self._step(step).move_to(damaged)
        self.log(
            f"WARNING: checkpoint {step} is damaged ({problem}); renamed it to damaged_{step}; "
            "using the latest valid earlier checkpoint"
        )


def read_latest(folder: str | os.PathLike) -> tuple[int, dict[str, Any], dict]:
    """Return (step, arrays by name, meta) of the newest valid step, for reading only."""
    steps = Folder(folder)
    for step in sorted(_steps(steps), reverse=True):
        step_folder = Folder(f"{steps.path}/{step}")
        if not checksums.find_corrupt_file(step_folder):
            with ocp.StandardCheckpointer() as reader:
                arrays = reader.restore(f"{step_folder.path}/state")
            if not checksums.find_corrupt_shard(checksums.read_shards(step_folder), arrays):
                return step, arrays, step_folder.json("meta/metadata")
    raise CheckpointError(
        f"{folder} contains no valid checkpoint; continue training or use another run"
    )


def _steps(folder: Folder) -> list[int]:
    return [int(name) for name in folder.children() if name.isdigit()]


def _await(condition: Callable[[], bool], what: str) -> None:
    """Wait until `condition` returns true.

    Hosts synchronize through the shared folder, so that no collective delays a step.
    """
    end = time.monotonic() + PEER_TIMEOUT
    while not condition():
        if time.monotonic() > end:
            raise CheckpointError(
                f"timed out after {PEER_TIMEOUT:.0f} s waiting for {what}; check that all hosts "
                "share the workdir"
            )
        time.sleep(0.02)


def _on_any_host(problem: str) -> str:
    """Return the error of this host, or that another host has one: all hosts decide alike."""
    if jax.process_count() == 1:
        return problem
    problems = multihost_utils.process_allgather(np.array(bool(problem)))
    return problem or ("another host restored other values" if problems.any() else "")


def _agree(choose: Callable[[], int]) -> int | None:
    """Return process 0's choice on all processes, or None if it is negative; a barrier too."""
    if jax.process_count() == 1:
        choice = choose()
    else:
        mine = choose() if jax.process_index() == 0 else 0
        choice = int(multihost_utils.broadcast_one_to_all(np.int32(mine)))
    return choice if choice >= 0 else None
