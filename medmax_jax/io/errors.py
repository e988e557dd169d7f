"""The base of errors about a file from elsewhere: one printable line, whatever the file holds.

    class PthError(FileError): ...
    str(PthError(f"{path}: key {name!r} ..."))    no control characters, at most MAX_CHARS of them

Messages quote names and values of the file. The bound is kept here, in one place, so that no
reader has to remember it; a reader still shortens what it quotes, so that the fix, which is the
end of the message, is not what is cut.
"""

from medmax_jax.io.text_files import printable

MAX_CHARS = 1_000


class FileError(ValueError):
    """A file that cannot be used; the message names the file, the problem and the fix."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message, MAX_CHARS)[:MAX_CHARS])


def quoted(value: object, max_chars: int = 80) -> str:
    """Return a name or value of a file as one printable line, cut short."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a number of over 20 digits"  # str() refuses integers of over 4,300
    return printable(repr(value), max_chars)
