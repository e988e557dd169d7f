"""The base class of errors about files from elsewhere: one printable line, whatever they contain.

    class PthError(FileError): ...
    str(PthError(f"{path}: key {name!r} ..."))    no control characters, at most MAX_CHARS of them

Messages quote names and values of the file. The bound is enforced here, in one place, so that no
reader has to enforce it; a reader still shortens what it quotes, so that the fix at the end of the
message is not truncated.
"""

import logging
import unicodedata

MAX_CHARS = 1_000  # per error
MAX_MESSAGE_CHARS = 300  # of quoted text in an error


class FileError(ValueError):
    """A file that cannot be used; the message names the file, the problem and the fix."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message, MAX_CHARS)[:MAX_CHARS])


def quoted(value: object, max_chars: int = 80) -> str:
    """Return a name or value of a file as one printable line, truncated."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a number of over 20 digits"  # str() refuses integers of over 4,300
    return printable(repr(value), max_chars)


def printable(value: object, max_chars: int = MAX_MESSAGE_CHARS) -> str:
    r"""Return text from elsewhere as one line without control characters, cut to `max_chars`.

    printable("a\x1b[2J\nb") == "a\\x1b[2J\\nb"
    """
    text = str(value)
    if len(text) > max_chars:
        text = text[: max_chars - 3] + "..."
    return text if text.isprintable() else "".join(map(_escaped, text))


def printable_text(text: str) -> str:
    r"""Return text of a model or a server for a terminal: lines and tabs stay, controls do not.

    Escape sequences, other control characters, overrides of the writing direction and halves of
    characters become escapes; spaces of all kinds and joiners, which scripts need, stay.

    printable_text("a\x1b[2J\tb\nc") == "a\\x1b[2J\tb\nc"
    """
    kept = "\n\t\u200c\u200d"
    return "".join(
        c if c.isprintable() or c in kept or unicodedata.category(c) == "Zs" else ascii(c)[1:-1]
        for c in text.replace("\r\n", "\n")
    )


class PrintableFormatter(logging.Formatter):
    """Formats log lines for a terminal: `printable_text` of each."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return printable_text(super().format(record))


def _escaped(char: str) -> str:
    return char if char.isprintable() else ascii(char)[1:-1]
