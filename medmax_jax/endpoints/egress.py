"""Where data may be sent: the one check that every outgoing call passes before its first byte.

    class            may be sent to
    open             any host
    licence-bound    any host: a license binds what is published, not who computes on it
    credentialed     hosts that the user listed for it, by host and port, over https or to itself

Data that is made from a record (a question, a verdict) has the class of the record. `check` returns
the parsed address, and callers connect to its parts: a URL that is parsed twice can be parsed in
two ways.
"""

import dataclasses
import ipaddress
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

from medmax_jax.io.errors import printable

OPEN, LICENCE_BOUND, CREDENTIALED = "open", "licence-bound", "credentialed"
CLASSES = (OPEN, LICENCE_BOUND, CREDENTIALED)  # the strictest last
PORTS = {"https": 443, "http": 80}
MAX_SHOWN = 9  # characters of a value in a message; a longer one may be text of a report


class OutgoingError(ValueError):
    """A call that must not be made; the message names the class, the host and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Address:
    """The destination of a call; `name` is host:port, as users list it."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def name(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Return whether bytes sent to it stay on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def check(url: str, data_class: str, *, listed: frozenset[str]) -> Address:
    """Return the parts of `url` if data of the class may be sent there; else raise OutgoingError.

    `listed`: hosts for credentialed data, as `host:port` (see `parse_allowed_hosts`).
        check("https://me.org/v1", "credentialed", listed=frozenset({"me.org:443"}))
    """
    address = parse_address(url)
    if data_class not in CLASSES:
        raise OutgoingError(
            f"data class {data_class!r} for {address.name}: use one of {', '.join(CLASSES)}"
        )
    if data_class != CREDENTIALED:
        return address
    if address.name not in listed:
        raise OutgoingError(
            f"credentialed data may not be sent to {address.name}, which is not listed as an "
            f"allowed host; exclude these rows, or list {address.name} if their data use "
            "agreement allows that host"
        )
    if address.scheme != "https" and not address.loopback:
        raise OutgoingError(
            f"credentialed data may not be sent to {address.name} unencrypted over http; use https"
        )
    return address


def parse_address(url: str) -> Address:
    """Return the parts of a URL; raise OutgoingError at anything that is ambiguous.

    Ambiguous means that two parsers could read it in two ways.
    """
    if not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        raise OutgoingError(
            f"url {url!r} is not plain ASCII without spaces and backslashes; correct it"
        )
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise OutgoingError(f"url {url!r}: {error}; use the form https://host:port/path") from error
    if parts.username is not None or parts.password is not None:
        # Not shown: the part before an @ is a secret.
        raise OutgoingError(
            "url contains a user or password; use an environment variable for the key"
        )
    host = (parts.hostname or "").removesuffix(".")
    if parts.scheme not in PORTS or not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host):
        raise OutgoingError(
            f"url {url!r} has no http or https host; use the form https://host:port/path"
        )
    if parts.query or parts.fragment or port == 0:
        raise OutgoingError(
            f"url {url!r} contains ?, # or port 0; use the form https://host:port/path"
        )
    return Address(
        scheme=parts.scheme, host=host, port=port or PORTS[parts.scheme], path=parts.path
    )


def parse_allowed_hosts(entries: Iterable[str]) -> frozenset[str]:
    """Return the hosts that a user listed as `host:port`, `host` (port 443), or a URL."""
    urls = [entry if "://" in entry else f"https://{entry}" for entry in entries]
    return frozenset(parse_address(url).name for url in urls)


def data_class_of(row: Mapping[str, Any], where: str, *, default: str | None = None) -> str:
    """Return the data class of a row; raise OutgoingError naming `where` if it is undecidable.

    This is the one place that decides the class of a row of any file: `data_class`, else the column
    `credential` of the MedMax release. credential yes is credentialed; no is licence-bound, since
    it states nothing about the license. Columns that disagree are refused. `default`: the class of
    a row that states neither, for instance that of its task; with it, `credential: no` cannot lower
    a credentialed task. Without a default such a row has no class: a program must not guess which
    data may leave the machine.

        data_class_of({"credential": "yes"}, "row 1")                    ->  "credentialed"
        data_class_of({"credential": "no", "data_class": "open"}, "..")  ->  "open"
    """
    stated, credential = row.get("data_class"), _credential_of(row, where)
    if stated in (None, ""):
        stated = None
    elif stated not in CLASSES:
        value = _shown(stated, credential)
        raise OutgoingError(f"{where}: data_class is {value}; use one of {', '.join(CLASSES)}")
    if stated and credential and (stated == CREDENTIALED) != (credential == "yes"):
        raise OutgoingError(
            f"{where}: data_class is {stated!r} but credential is {credential}; correct one of them"
        )
    if stated:
        return stated
    if credential:
        return strictest([class_of_credential(credential), *([default] if default else [])])
    if default is None:
        raise OutgoingError(
            f"{where}: data_class is missing and credential is {row.get('credential')!r}; "
            f"set data_class to one of {', '.join(CLASSES)}"
        )
    return default


def class_of_credential(credential: str) -> str:
    """Return the class that a record's `credential` represents; all but "no" is credentialed."""
    return LICENCE_BOUND if credential.strip().lower() == "no" else CREDENTIALED


def is_credentialed(credential: str) -> bool:
    """Return whether a record with this `credential` is credentialed."""
    return class_of_credential(credential) == CREDENTIALED


def describe(row: Mapping[str, Any], field: str) -> str:
    """Return the content of a field for a message: only its type if the row may be credentialed.

    describe({"text": ["words"], "credential": "yes"}, "text")  ->  "of type list"
    describe({"text": ["words"], "credential": "no"}, "text")   ->  "['words']"
    """
    if field not in row:
        return "missing"
    try:
        may_be_shown = data_class_of(row, "") != CREDENTIALED
    except OutgoingError:
        may_be_shown = False
    value = row[field]
    return printable(repr(value)) if may_be_shown else f"of type {type(value).__name__}"


def _credential_of(row: Mapping[str, Any], where: str) -> str:
    """Return yes, no, or "" where the row does not state it."""
    value = row.get("credential")
    if value is None or value == "":
        return ""
    answer = value.strip().lower() if isinstance(value, str) else ""
    if answer not in ("yes", "no"):
        raise OutgoingError(f"{where}: credential is {_shown(value, 'no')}; use yes or no")
    return answer


def _shown(value: Any, credential: str) -> str:
    """Return a value for a message: short text of a row that is not credentialed, else its type."""
    if isinstance(value, str) and len(value) <= MAX_SHOWN and credential != "yes":
        return printable(repr(value))
    return f"of type {type(value).__name__}"


def strictest(classes: Iterable[str]) -> str:
    """Return the class of data that is made from data of several classes."""
    return max(classes, key=CLASSES.index, default=OPEN)
