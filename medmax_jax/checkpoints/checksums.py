"""Verify that a saved step equals what training had in memory, by two chains of SHA-256.

    device --copy--> host --sha256 of every shard--> shards-0.json     before anything is written
      |                                                   |
      +-----> Orbax -----> files --sha256 of each--> sha256.json       last: the commit file

Both chains are checked on restore. Orbax restores flipped bits without an error. The digests of the
files detect changes on the disk, those of the shards detect changes on the way there. A shard is
named by its position in the global array, so that a restore onto any mesh and any number of hosts
can check it. The digest of the manifest is in D/checkpoints.sha256: with that file it can be proved
which files a run wrote.
"""

import concurrent.futures
import hashlib
import json
from typing import Any

import numpy as np
from jaxtyping import PyTree

from medmax_jax.checkpoints.safetensors_file import fetch_to_host, flatten_named
from medmax_jax.io.text_files import TextFileError, parse_json
from medmax_jax.storage.folder import Folder, StorageError

MANIFEST = "sha256.json"
SHARDS = "shards-{}.json"  # one file per process

Copies = dict[str, list[tuple[list[list[int]], np.ndarray]]]  # name -> (position, values) of shards


def host_shards(tree: PyTree) -> Copies:
    """Return host copies of the shards that this process saves; each shard is in one process."""
    leaves = flatten_named(tree)
    for leaf in leaves.values():
        leaf.copy_to_host_async()
    mine = {
        name: [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
        for name, leaf in leaves.items()
    }
    with concurrent.futures.ThreadPoolExecutor() as pool:
        # np.array copies: on a CPU the buffer would be the one that the next step donates
        values = pool.map(lambda s: np.array(s.data), (s for own in mine.values() for s in own))
        return {
            name: [(_place(s.index, leaves[name].shape), next(values)) for s in own]
            for name, own in mine.items()
        }


def shard_digests(shards_by_name: Copies) -> dict[str, list[dict[str, Any]]]:
    """Return the digests of the shards by name.

    Name -> [{"at": [[start, stop] of each axis], "sha256": of dtype and bytes}].
    """
    flat = [
        (name, position, values)
        for name, shards in shards_by_name.items()
        for position, values in shards
    ]
    digests: dict[str, list[dict[str, Any]]] = {name: [] for name in shards_by_name}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the GIL
        for (name, position, _), digest in zip(
            flat, pool.map(_digest, [values for *_, values in flat]), strict=True
        ):
            digests[name].append({"at": position, "sha256": digest})
    return digests


def find_corrupt_shard(expected: dict[str, list[dict[str, Any]]], tree: PyTree) -> str:
    """Return the first array of `tree` that differs from what was hashed; empty if none does.

    Every process must call this: arrays that are distributed over hosts are gathered, one at a
    time.
    """
    leaves = flatten_named(tree)
    if expected.keys() != leaves.keys():
        return f"{sorted(expected.keys() ^ leaves.keys())[:3]}: digests or arrays are missing"
    for name, leaf in leaves.items():
        values = fetch_to_host(leaf)
        covered = 0
        for shard in expected[name]:
            part = np.asarray(values[tuple(slice(*ends) for ends in shard["at"])])
            covered += part.size
            if _digest(part) != shard["sha256"]:
                return f"{name} {shard['at']} differs from what training had in memory"
        if covered != values.size:
            return f"{name}: digests cover {covered} of its {values.size} elements"
    return ""


def read_shards(folder: Folder) -> dict[str, list[dict[str, Any]]]:
    """Return the digests of the shards of all processes."""
    digests: dict[str, list[dict[str, Any]]] = {}
    for name in folder.names():
        if name.startswith("shards-"):
            for array, shards in folder.json(name).items():
                digests.setdefault(array, []).extend(shards)
    return digests


def write_manifest(folder: Folder) -> str:
    """Write the manifest of a finished step and return its digest; the step is now trusted."""
    text = _manifest(file_digests(folder))
    folder.write(MANIFEST, [text])
    return manifest_digest(text)


def find_corrupt_file(folder: Folder) -> str:
    """Return a short description of the first defect of a step's files; empty if all match."""
    try:
        if not folder.has(MANIFEST):
            return "it was never committed"
        text = folder.read(MANIFEST).tobytes()
        expected = _parsed(text)
        actual = file_digests(folder)
    except StorageError as error:
        return str(error)
    if expected is None:
        return f"{MANIFEST} has changed since it was written"
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not in {MANIFEST}"
        if actual[name] != expected[name]:
            return f"{name} has changed since it was written"
    return ""


def manifest_digest(manifest: bytes) -> str:
    """Return the digest that identifies the complete content of a step."""
    return hashlib.sha256(manifest).hexdigest()


def file_digests(folder: Folder) -> dict[str, str]:
    """Return name -> digest of every file below except the manifest."""
    names = [name for name in folder.names() if name != MANIFEST]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: folder.file(name).digest("sha256"), names)
        return dict(zip(names, digests, strict=True))


def _manifest(digests: dict[str, str]) -> bytes:
    """Return a manifest in its only valid form, with a digest of itself.

    Therefore no bit of it can change undetected.
    """
    body = json.dumps(digests, sort_keys=True, indent=0)
    own = hashlib.sha256(body.encode()).hexdigest()
    return f"{own}\n{body}\n".encode()


def _parsed(text: bytes) -> dict[str, str] | None:
    """Parse what `_manifest` wrote; return None for anything else."""
    try:
        digests = parse_json(text.partition(b"\n")[2], MANIFEST)
        return digests if isinstance(digests, dict) and _manifest(digests) == text else None
    except TextFileError:
        return None


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[list[int]]:
    return [list(part.indices(size)[:2]) for part, size in zip(index, shape, strict=True)]


def _digest(values: np.ndarray) -> str:
    digest = hashlib.sha256(str(values.dtype).encode())
    digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    return digest.hexdigest()
