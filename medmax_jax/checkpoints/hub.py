"""Files that are published on the Hugging Face hub, as a local folder.

    locate("hf://GAIR/Anole-7b-v0.1")             downloads what the cache lacks, returns the folder
    locate("hf://mint-medmax/medmax_7b@REVISION/tokenizer")     a part of it, at a tag or commit
    locate("anole")                               "anole": any other path, unchanged
    origin(folder)                                "hf://GAIR/Anole-7b-v0.1@COMMIT"
    digests(folder)                               name -> digest that the hub states

huggingface_hub does the transfer: it resumes, and it reads HF_TOKEN, HF_ENDPOINT, HF_HUB_CACHE and
HF_HUB_OFFLINE. Every failure is a StorageError in one line. Nothing is sent but the request.
"""

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from medmax_jax.io.atomic_folder import check_space
from medmax_jax.io.errors import printable
from medmax_jax.io.storage import StorageError, check_name

SCHEME = "hf://"
ATTEMPTS = 5  # of a request that the hub refuses for now
LONGEST_WAIT = 60.0  # seconds between two attempts; the hub may ask for more
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/([\w./-]+?))?/?")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LOCAL_DIR = ".cache/huggingface/download"  # records of `hf download --local-dir`


class Address(NamedTuple):
    """The parts of hf://ORG/NAME[@REVISION][/PART]."""

    text: str
    repo: str
    revision: str | None
    part: str | None

    @property
    def patterns(self) -> list[str] | None:
        """Return the patterns of its files for huggingface_hub; None for all."""
        return None if self.part is None else [self.part, f"{self.part}/*"]

    def contains(self, name: str) -> bool:
        """Return whether a file of the repository belongs to the part."""
        return self.part is None or name == self.part or name.startswith(f"{self.part}/")


def log_to_stderr(line: str) -> None:
    """Print a line to stderr, since stdout may be JSON."""
    print(line, file=sys.stderr, flush=True)


def locate(path: str, say: Callable[[str], None] = log_to_stderr) -> str:
    """Return the local folder or file of an hf:// address; any other path unchanged.

    Raises StorageError where it cannot be downloaded, and before the download where the disk is too
    small.
    """
    if not path.startswith(SCHEME):
        return path
    # Imported here: it takes a second, and only these addresses need it.
    from huggingface_hub import errors

    address = parse(path)
    try:
        folder = _retried(lambda: _download(address, say), say)
    except (errors.HTTPError, OSError, ValueError) as error:
        raise _explained(error, address) from error
    return folder if address.part is None else str(Path(folder) / address.part)


def parse(path: str) -> Address:
    """Return the parts of an address; raise StorageError on anything else."""
    match = _ADDRESS.fullmatch(path)
    if match is None:
        raise StorageError(
            f"{printable(path, 80)}: not an address on the hub; use hf://ORG/NAME or "
            "hf://ORG/NAME@REVISION, where REVISION is a branch, a tag or a commit"
        )
    repo, revision, part = match.groups()
    return Address(path, repo, revision, part and check_name(path, part))


def origin(path: str | os.PathLike) -> str:
    """Return hf://ORG/NAME@COMMIT for a folder in the hub's cache, any other path unchanged."""
    match = _SNAPSHOT.search(str(path))
    return f"{SCHEME}{match[1]}/{match[2]}@{match[3]}" if match else str(path)


def digests(folder: str | os.PathLike) -> dict[str, str]:
    """Return name -> digest, as the hub stated it at the download, of the files of a local folder.

    64 digits: SHA-256; 40: git's SHA-1 of the file. Files are links to blobs of that name in the
    cache, and `hf download --local-dir` writes a record for each. Other files are left out.
    """
    found, root = {}, Path(folder)
    for path in (p for p in root.rglob("*") if not p.is_dir()):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = path.readlink().name
        elif name.startswith(_LOCAL_DIR) and name.endswith(".metadata"):
            lines = path.read_text(errors="replace")[:1_000].splitlines()
            original = name.removeprefix(f"{_LOCAL_DIR}/").removesuffix(".metadata")
            found[original] = lines[1].strip() if len(lines) > 1 else ""
    return {name: digest for name, digest in sorted(found.items()) if _DIGEST.fullmatch(digest)}


def file_digest(path: str | os.PathLike, like: str) -> str:
    """Return the digest of a file, of the kind of the digest `like`."""
    kind = "sha256"
    if len(like) == 40:
        header = f"blob {os.path.getsize(path)}\0".encode()
        kind = lambda: hashlib.sha1(header, usedforsecurity=False)  # noqa: E731
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _download(address: Address, say: Callable[[str], None]) -> str:
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        info = huggingface_hub.HfApi().model_info(
            address.repo, revision=address.revision, files_metadata=True
        )
    except errors.HfHubHTTPError:
        raise
    except (errors.HTTPError, OSError) as error:  # offline, by choice or not
        folder = huggingface_hub.snapshot_download(
            address.repo, revision=address.revision, allow_patterns=address.patterns,
            local_files_only=True,
        )  # fmt: skip
        say(f"{origin(folder)}: from the cache; the hub was not contacted ({_first_line(error)})")
        return folder
    files = [file for file in info.siblings if address.contains(file.rfilename)]
    if not files:
        raise StorageError(f"{address.text}: {address.repo} has no file {address.part}")
    missing = [
        file.size or 0
        for file in files
        if not huggingface_hub.try_to_load_from_cache(
            address.repo, file.rfilename, revision=info.sha
        )
    ]
    pinned = f"{SCHEME}{address.repo}@{info.sha}"
    if missing:
        say(f"{pinned}: {sum(missing) / 1e9:.2f} GB to download, {len(missing)} files")
        fix = "set HF_HUB_CACHE to a folder on a larger disk"
        check_space(f"{constants.HF_HUB_CACHE}/{address.repo}", sum(missing), fix=fix)
    else:
        say(f"{pinned}: complete in the cache")
    # By the name of the revision, under which the cache then finds it without the hub.
    return huggingface_hub.snapshot_download(
        address.repo, revision=address.revision, allow_patterns=address.patterns
    )


def _retried(call: Callable[[], str], say: Callable[[str], None]) -> str:
    """Call until the hub answers, at most ATTEMPTS times."""
    wait = 1.0
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except OSError as error:
            response = _response(error)
            busy = response is not None and response.status_code in (429, 500, 502, 503, 504)
            if not busy or attempt == ATTEMPTS:
                raise
            asked = response.headers.get("Retry-After", "")
            seconds = min(float(asked) if asked.isdigit() else wait, LONGEST_WAIT)
            say(f"the hub answered {response.status_code}; trying again in {seconds:.0f} s")
            time.sleep(seconds)
            wait *= 2
    raise AssertionError("unreachable: the last attempt returns or raises")


def _response(error: BaseException) -> Any:
    """Return the response of the hub behind an error, or None.

    huggingface_hub looks into its cache after an error, and then raises that it found nothing.
    """
    causes = (error, error.__cause__)
    return next((r for cause in causes if (r := getattr(cause, "response", None))), None)


def _explained(error: Exception, address: Address) -> StorageError:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{address.repo}"
    sign_in = "run `hf auth login`, or set HF_TOKEN"
    cause = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
    response = _response(error)
    status = response.status_code if response is not None else None
    if isinstance(cause, errors.GatedRepoError):
        fix = f"its owner grants access: accept the terms on {page}, then {sign_in}"
    elif isinstance(cause, errors.RevisionNotFoundError):
        fix = f"no revision {address.revision}; choose one of {page}/commits/main"
    elif isinstance(cause, errors.RepositoryNotFoundError):
        fix = f"{page} does not exist, or is private: check the name; if it is private, {sign_in}"
    elif status in (401, 403):
        fix = f"the hub refused access ({status}); open {page}, and {sign_in}"
    elif status is not None:
        fix = f"the hub answered {status}; try again later, the download resumes"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        fix = (
            f"not complete in the cache {constants.HF_HUB_CACHE}, and the hub was not reached; "
            "connect to the network and unset HF_HUB_OFFLINE"
        )
    else:
        fix = f"{_first_line(error)}; run the same command again, the download resumes"
    return StorageError(f"{address.text}: {fix}")


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    lines = str(error).strip().splitlines()
    return printable(lines[0] if lines else type(error).__name__, 200)
