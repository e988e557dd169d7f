"""Resolve the image paths that data files state; a path never leaves its image folder.

    a/b.png           accepted       ../b.png, a/../../b.png     refused
    /etc/b.png        refused        a symbolic link to a file outside the folder: refused, except
                                     the links by which the hub's cache stores a repository

A question file, a predictions file or an archive of a release from elsewhere could otherwise name
any image of this machine, which an evaluation would send to an endpoint and put on its report.
Readers call `is_inside` while they read rows, before any folder is known, and `resolve` before they
open a file.
"""

import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from medmax_jax.io.errors import printable
from medmax_jax.storage import hub


class ImagePathError(ValueError):
    """An image path that leads out of its folder; the message names the path and the fix."""


def is_inside(name: Any) -> bool:
    """Return whether a value is a relative path without `..`, so that it stays below its folder."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    path = PurePosixPath(name)
    return path != PurePosixPath(".") and not path.is_absolute() and ".." not in path.parts


def resolve(folder: str | os.PathLike, name: Any, *, label: str = "") -> Path:
    """Return folder/name; raise ImagePathError where it leads out of the folder.

    Symbolic links are followed for the check: a link inside the folder may point to another file
    of the folder, and the folder itself may be a link. `label` replaces the path in the message,
    for images whose names must not be repeated.
    """
    shown = label or f"image path {printable(repr(name))}"
    if not is_inside(name):
        raise ImagePathError(
            f"{shown} is outside the image folder; use a path relative to it, without '..'"
        )
    path = Path(folder, name)
    if not _may_have_link(folder, name):  # as almost all: resolving each is most of a plan's time
        return path
    try:
        real = path.parent.resolve() / path.name if hub.is_cached_link(path) else path.resolve()
        inside = real.is_relative_to(Path(folder).resolve())
    except (OSError, RuntimeError):  # a loop of links, or a name that is too long
        inside = False
    if not inside:
        where = "" if label else f" {folder}"
        raise ImagePathError(
            f"{shown} is a symbolic link to a file outside the image folder{where}; copy the file "
            "into the folder"
        )
    return path


def _may_have_link(folder: str | os.PathLike, name: str) -> bool:
    """Return whether a part of `name` is a symbolic link, or its state is not known."""
    path = os.fspath(folder)
    for part in PurePosixPath(name).parts:
        path = os.path.join(path, part)
        try:
            if stat.S_ISLNK(os.lstat(path).st_mode):
                return True
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
    return False
