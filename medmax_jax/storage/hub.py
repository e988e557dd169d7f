"""Files that are published on the Hugging Face hub, as a local folder.

    locate("hf://GAIR/Anole-7b-v0.1")             downloads what the cache lacks, returns the folder
    locate("hf://mint-medmax/medmax_7b@REVISION/tokenizer")     a part of it, at a tag or commit
    locate("hf://datasets/ORG/NAME/train.jsonl")  a file of a data set; without "datasets/" a data
                                                  set is used where no model has the name
    locate("anole")                               "anole": any other path, unchanged
    pinned("hf://GAIR/Anole-7b-v0.1")             "hf://GAIR/Anole-7b-v0.1@COMMIT", for records
    origin(folder)                                the same, of a folder or file in the cache
    digests(folder)                               name -> digest that the hub states

huggingface_hub does the transfer: it resumes, locks, and reads HF_TOKEN, HF_ENDPOINT, HF_HUB_CACHE
and HF_HUB_OFFLINE. It compares sizes only, so each file is compared with the digest that the hub
states, once; a mark in the cache says so. Every failure is a StorageError in one line. Nothing is
sent but the request.
"""

import argparse
import contextlib
import functools
import glob
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from medmax_jax.io.errors import printable
from medmax_jax.io.progress import ByteProgress, log_to_stderr
from medmax_jax.storage.atomic_folder import check_space
from medmax_jax.storage.folder import StorageError, check_name

SCHEME = "hf://"
ATTEMPTS = 5  # of a request that the hub refuses for now
LONGEST_WAIT = 60.0  # seconds between two attempts; the hub may ask for more
CHECKED = ".checked"  # folder in the cache of a repository: one file for each verified digest
OUTPUTS = ("out", "save", "calls")  # arguments of programs that name what is written
_SNAPSHOT = re.compile(r"(model|dataset)s--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(/.+)?$")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LOCAL_DIR = ".cache/huggingface/download"  # records of `hf download --local-dir`
_located: dict[str, str] = {}  # so that all reads of a process are of one commit


class Address(NamedTuple):
    """The parts of hf://[KIND/]ORG/NAME[@REVISION][/PART]; `kinds` are those it may be of."""

    text: str
    kinds: tuple[str, ...]
    repo: str
    revision: str | None
    part: str

    @property
    def patterns(self) -> list[str] | None:
        """Return the patterns of its files for huggingface_hub; None for all."""
        name = glob.escape(self.part)
        return [name, f"{name}/*"] if name else None

    def contains(self, name: str) -> bool:
        """Return whether a file of the repository belongs to the part."""
        return not self.part or name == self.part or name.startswith(f"{self.part}/")


def locate(path: str | os.PathLike, say: Callable[[str], None] = log_to_stderr) -> str:
    """Return the local folder or file of an hf:// address; any other path unchanged.

    Raises StorageError where it cannot be downloaded, and before the download where the disk is too
    small.
    """
    text = os.fspath(path)
    if not text.startswith("hf:/"):
        return text
    text = SCHEME + text.removeprefix("hf:/").lstrip("/")  # pathlib.Path drops a slash
    if text not in _located:
        address = parse(text)
        local = str(Path(_download(address, say), address.part))
        _located[text] = _located[origin(local)] = local
    return _located[text]


def pinned(path: str | os.PathLike) -> str:
    """Return an hf:// address with its commit, after its download; any other path unchanged."""
    return origin(locate(path))


def locate_arguments(args: argparse.Namespace) -> None:
    """Replace each hf:// address among the arguments of a program by its local path.

    Raises StorageError also for an address in one of OUTPUTS.
    """
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        found = [v for v in values if isinstance(v, str | Path) and str(v).startswith("hf:/")]
        if found and name in OUTPUTS:
            raise StorageError(f"--{name} is on the hub, which is read only; use a local path")
        if found:
            local = [Path(locate(v)) if v in found else v for v in values]
            setattr(args, name, local if isinstance(value, list) else type(value)(local[0]))


def parse(path: str) -> Address:
    """Return the parts of an address; raise StorageError on anything else."""
    # Imported here: it takes time, and only these addresses need it.
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    try:
        uri = parse_hf_uri(path)
    except HfUriError as error:
        raise _invalid(path) from error
    if uri.type not in ("model", "dataset"):
        raise _invalid(path)
    stated = path.startswith((f"{SCHEME}models/", f"{SCHEME}datasets/"))
    kinds = (uri.type,) if stated else ("model", "dataset")
    part = uri.path_in_repo and check_name(path, uri.path_in_repo)
    return Address(path, kinds, uri.id, uri.revision, part)


def _invalid(path: str) -> StorageError:
    return StorageError(
        f"{printable(path, 80)}: not an address on the hub; use hf://ORG/NAME, "
        "hf://datasets/ORG/NAME/FILE or hf://ORG/NAME@REVISION, where REVISION is a branch, a tag "
        "or a commit"
    )


def origin(path: str | os.PathLike) -> str:
    """Return hf://ORG/NAME@COMMIT[/PART] for a path in the hub's cache, others unchanged."""
    text = os.fspath(path)
    if not (match := _SNAPSHOT.search(text)):
        return text
    kind = "datasets/" if match[1] == "dataset" else ""
    return f"{SCHEME}{kind}{match[2]}/{match[3]}@{match[4]}{match[5] or ''}"


def name_of(path: str | os.PathLike) -> str:
    """Return the origin of a path in the hub's cache, else its last name."""
    return source_note(path).get("from", Path(path).name)


def source_note(path: str | os.PathLike) -> dict[str, str]:
    """Return {"from": the origin} of a path in the hub's cache, else {}: folders are private."""
    address = origin(path)
    return {"from": address} if address.startswith(SCHEME) else {}


def is_cached_link(path: str | os.PathLike) -> bool:
    """Return whether a path is a link of the cache to the content of its own repository."""
    if not os.path.islink(path):
        return False
    path = Path(path).parent.resolve() / Path(path).name
    if not (match := _SNAPSHOT.search(str(path))):
        return False
    target = Path(os.path.abspath(path.parent / path.readlink()))
    return target.parent == Path(str(path)[: match.start()], match[0].split("/")[0], "blobs")


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
    """Return the folder of the address, which is of the first of its kinds that exists."""
    from huggingface_hub import errors

    logging.getLogger("httpx2").setLevel(logging.WARNING)  # else it logs every request
    absences = (errors.RepositoryNotFoundError, errors.LocalEntryNotFoundError)
    for kind in address.kinds:
        only = address._replace(kinds=(kind,))
        try:
            return _retried(functools.partial(_snapshot, only, say), say)
        except (errors.HTTPError, OSError, ValueError) as error:
            absent = isinstance(error, absences) and not isinstance(error, errors.GatedRepoError)
            if absent and kind != address.kinds[-1]:
                continue
            raise _explained(error, address if absent else only) from error
    raise AssertionError("unreachable: the last kind returns or raises")


def _snapshot(address: Address, say: Callable[[str], None]) -> str:
    """Download what the cache lacks, compare it with its digests, and return the folder."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    (kind,) = address.kinds
    which = dict(repo_id=address.repo, repo_type=kind, revision=address.revision)
    try:
        info = huggingface_hub.HfApi().repo_info(**which, files_metadata=True)
    except errors.HfHubHTTPError:
        raise
    except (errors.HTTPError, OSError) as error:  # offline, by choice or not
        folder = huggingface_hub.snapshot_download(
            **which, allow_patterns=address.patterns, local_files_only=True
        )
        say(f"{origin(folder)}: from the cache; the hub was not contacted ({_first_line(error)})")
        stated = digests(folder)
        _compare(folder, {n: d for n, d in stated.items() if address.contains(n)}, say)
        return folder
    files = [file for file in info.siblings if address.contains(file.rfilename)]
    if not files:
        raise StorageError(f"{address.text}: {address.repo} has no file {address.part}")
    missing = [
        file.size or 0
        for file in files
        if not huggingface_hub.try_to_load_from_cache(
            address.repo, file.rfilename, revision=info.sha, repo_type=kind
        )
    ]
    pin = f"{SCHEME}{'datasets/' if kind == 'dataset' else ''}{address.repo}@{info.sha}"
    if missing:
        say(f"{pin}: {sum(missing) / 1e9:.2f} GB to download, {len(missing)} files")
        fix = "set HF_HUB_CACHE to a folder on a larger disk"
        check_space(f"{constants.HF_HUB_CACHE}/{address.repo}", sum(missing), fix=fix)
    else:
        say(f"{pin}: complete in the cache")
    # By the name of the revision, under which the cache then finds it without the hub.
    folder = huggingface_hub.snapshot_download(**which, allow_patterns=address.patterns)
    if Path(folder).name != info.sha:  # a commit arrived in the meantime
        return _snapshot(address, say)
    _compare(folder, {f.rfilename: f.lfs.sha256 if f.lfs else f.blob_id for f in files}, say)
    return folder


def _compare(folder: str, stated: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Raise StorageError where files have not the digests that the hub states, and remove them."""
    checked = Path(folder).parents[1] / CHECKED
    todo = {}
    for name, digest in stated.items():
        status, mark = Path(folder, name).stat(), checked / digest
        stamp = f"{status.st_size} {status.st_mtime_ns}"
        if not mark.exists() or mark.read_text() != stamp:
            todo[name] = (mark, stamp, status.st_size)
    if not todo:
        return
    total = sum(size for *_, size in todo.values())
    say(f"{origin(folder)}: comparing {len(todo)} files, {total / 1e9:.2f} GB, with their digests")
    progress, wrong = ByteProgress(total, say), []
    for name, (mark, stamp, size) in todo.items():
        path = Path(folder, name)
        found = file_digest(path, stated[name])
        with contextlib.suppress(OSError):  # a cache that is read only is compared at every start
            if found == stated[name]:
                mark.parent.mkdir(exist_ok=True)
                mark.write_text(stamp)
            else:
                wrong.append(
                    f"{origin(path)}: its digest is {found}, the hub states {stated[name]}"
                )
                blob = path.parent / os.readlink(path) if path.is_symlink() else path
                for file in (path.resolve(), blob, path):  # a blob may be a link itself
                    file.unlink(missing_ok=True)
        progress(size)
    if wrong:
        raise StorageError(
            f"{wrong[0]} ({len(wrong)} of {len(stated)} files differ); they were removed from the "
            "cache, unless it is read only: run the same command again to download them again"
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

    prefix = "datasets/" if address.kinds == ("dataset",) else ""
    page = f"{constants.ENDPOINT}/{prefix}{address.repo}"
    sign_in = "run `hf auth login`, or set HF_TOKEN"
    cause = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
    response = _response(error)
    status = response.status_code if response is not None else None
    if isinstance(cause, errors.GatedRepoError):
        fix = f"its owner grants access: accept the terms on {page}, then {sign_in}"
    elif isinstance(cause, errors.RevisionNotFoundError):
        fix = f"no revision {address.revision}; choose one of {page}/commits/main"
    elif isinstance(cause, errors.RepositoryNotFoundError):
        what = f"{page} does not exist, or is private"
        if len(address.kinds) > 1:
            what = f"neither {page} nor the data set of this name exists, or it is private"
        fix = f"{what}: check the name; if it is private, {sign_in}"
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
