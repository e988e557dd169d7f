"""Read a folder of codes, by index in its list or by the bytes of an image file.

A record is one image: magic, CRC-32 of the rest, sha256 of its file, its codes (none if it could
not be read). store.py makes the folder and documents its layout.
"""

import functools
import hashlib
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import UInt8, UInt16

from medmax_jax.data.image_tokens.encoder import PrepareError
from medmax_jax.io.text_files import TextFileError, read_json_object
from medmax_jax.storage.folder import file_sha256

_HEAD = struct.Struct("<4sI32s")  # magic, CRC-32 of the rest, sha256 of the image file
_MAGIC = b"MMC1"


def open_codes(folder: str | Path) -> "CodeStore":
    """Open the codes of a finished folder; raise PrepareError if it is incomplete."""
    return CodeStore(Path(folder))


class CodeStore:
    """`codes[i]`: the codes of the i-th image of the list; None if it could not be read.

    `codes.by_digest(digest)`: those of an image by the sha256 of its file, wherever it is now.
    """

    def __init__(self, folder: Path):
        self.folder, self._readers = folder, {}
        try:
            self.meta = read_json_object(folder / "dataset.json")
            size = self.meta["plan"]["shard_size"]
            if type(size) is not int or size < 1:
                raise ValueError("dataset.json: plan.shard_size is not an integer above 0")
            self.index = np.load(folder / "index.npy", allow_pickle=False)
            slices = sorted((folder / "digests").glob("*.npy"))
            self._digests = np.concatenate([np.load(p, allow_pickle=False) for p in slices])
            if len(self._digests) != len(self.index) or self._digests.shape[1:] != (32,):
                raise ValueError(f"{len(self.index)} images have digests {self._digests.shape}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PrepareError(
                f"{folder}: not finished ({error}); rerun its tokenize command"
            ) from error

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> UInt16[np.ndarray, "K"] | None:
        position = int(self.index[i])
        if position < 0:
            return None
        shard, record = divmod(position, self.meta["plan"]["shard_size"])
        reader, path = self._reader(shard)
        digest, codes = from_bytes(reader.read([record])[0], f"{path}, record {record}")
        if digest != self._digests[i].tobytes():
            raise PrepareError(f"{path}, record {record}: belongs to another image; tokenize again")
        return codes

    def __contains__(self, digest: bytes) -> bool:
        return self._find(digest) is not None

    def by_digest(self, digest: bytes) -> UInt16[np.ndarray, "K"] | None:
        """Return the codes of the image with this sha256; None if it could not be read."""
        index = self._find(digest)
        if index is None:
            raise KeyError(digest)
        return self[index]

    def _find(self, digest: bytes) -> int | None:
        rows, order = self._sorted
        at = int(np.searchsorted(rows, np.frombuffer(digest, "V32")[0]))
        same = at < len(rows) and rows[at].tobytes() == digest and any(digest)
        return int(order[at]) if same else None

    @functools.cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        rows = np.ascontiguousarray(self._digests).view("V32")[:, 0]
        order = np.argsort(rows, kind="stable")
        return rows[order], order

    def _reader(self, shard: int) -> tuple[array_record_module.ArrayRecordReader, Path]:
        if shard not in self._readers:
            path, facts = shard_file(self.folder / "codes" / f"{shard:05d}.json")
            size = path.stat().st_size if path.exists() else 0
            if size != facts["bytes"]:  # ArrayRecord reads a short file as empty
                raise PrepareError(
                    f"{path}: size is {size} bytes, but {facts['bytes']} were written; copy it "
                    "again"
                )
            self._readers[shard] = array_record_module.ArrayRecordReader(str(path)), path
        return self._readers[shard]


def view_of(plan: dict[str, Any]) -> str:
    """Return the view of a folder's images; older plans do not state it and have the release's."""
    return str(plan.get("view", "released"))


def shard_file(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return (the file of a shard, its JSON); raise PrepareError on corruption."""
    try:
        facts = read_json_object(path)
    except TextFileError as error:
        raise PrepareError(f"{error}; delete it and tokenize again") from error
    types = dict(file=str, bytes=int, records=int, unreadable=dict)
    if wrong := [name for name, kind in types.items() if type(facts.get(name)) is not kind]:
        raise PrepareError(
            f"{path}: field {wrong[0]!r} is missing or invalid: damaged; delete it and tokenize "
            "again"
        )
    if Path(facts["file"]).name != facts["file"]:
        raise PrepareError(
            f"{path}: field 'file' leads out of the folder; delete it and tokenize again"
        )
    return path.parent / facts["file"], facts


def digest_of(image: Path | bytes) -> bytes:
    """Return the sha256 of an image file, or of its bytes; raise OSError."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    return bytes.fromhex(file_sha256(image))


def to_bytes(digest: UInt8[np.ndarray, "32"], codes: UInt16[np.ndarray, "K"]) -> bytes:
    """Return the bytes of one record."""
    body = digest.tobytes() + codes.astype("<u2").tobytes()
    return _HEAD.pack(_MAGIC, zlib.crc32(body), digest.tobytes()) + body[32:]


def from_bytes(record: bytes, where: str) -> tuple[bytes, UInt16[np.ndarray, "K"]]:
    """Return (sha256, codes); raise PrepareError, with `where` in it, on corruption."""
    if len(record) < _HEAD.size or record[:4] != _MAGIC:
        raise PrepareError(
            f"{where}: not codes in this format; the shard is damaged or was written by another "
            "program"
        )
    _, crc, digest = _HEAD.unpack_from(record)
    if zlib.crc32(record[8:]) != crc:
        raise PrepareError(f"{where}: CRC mismatch; delete the shard and tokenize again")
    return digest, np.frombuffer(record[_HEAD.size :], "<u2").astype(np.uint16)
