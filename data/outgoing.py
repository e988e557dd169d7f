"""Where data may go: the one guard that every outgoing call passes before its first byte.

    class            leaves to
    open             any host
    licence-bound    any host: a licence binds what is published, not who computes on it
    credentialed     hosts that the user listed for it, by host and port, over https or to itself

What is made from a record (a question, a verdict) has the class of the record. `check` returns the
address in parts, and callers connect to these parts: a URL that is read twice can be read two ways.
"""

import dataclasses
import ipaddress
import re
import urllib.parse
from collections.abc import Iterable
from typing import Any

OPEN, LICENCE_BOUND, CREDENTIALED = "open", "licence-bound", "credentialed"
CLASSES = (OPEN, LICENCE_BOUND, CREDENTIALED)  # the strictest last
PORTS = {"https": 443, "http": 80}


class OutgoingError(ValueError):
    """A call that must not be made; the message names the class, the host and the mend."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Address:
    """Where a call goes. `name`: host:port, as users list it."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def name(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether bytes to it stay on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def check(url: str, data_class: str, *, listed: frozenset[str]) -> Address:
    """The parts of `url` if data of the class may go there; raises OutgoingError if not.

    `listed`: hosts for credentialed data, as `host:port` (see `hosts`).
        check("https://me.org/v1", "credentialed", listed=frozenset({"me.org:443"}))
    """
    address = parse(url)
    if data_class not in CLASSES:
        raise OutgoingError(
            f"class {data_class!r} of data for {address.name}: use one of {', '.join(CLASSES)}"
        )
    if data_class != CREDENTIALED:
        return address
    if address.name not in listed:
        raise OutgoingError(
            f"credentialed data may not go to {address.name}, which is not listed for it; leave "
            f"these rows out, or list {address.name} if their data use agreement allows that host"
        )
    if address.scheme != "https" and not address.loopback:
        raise OutgoingError(
            f"credentialed data may not go to {address.name} over http, where others can read it; "
            "use https"
        )
    return address


def parse(url: str) -> Address:
    """A URL in parts; raises OutgoingError at anything that two readers could read two ways."""
    if not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        raise OutgoingError(f"url {url!r}: use plain ASCII without spaces or backslashes")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise OutgoingError(f"url {url!r}: {error}; write https://host:port/path") from error
    if parts.username is not None or parts.password is not None:
        # Not shown: what stands before an @ is a secret.
        raise OutgoingError("url has a user or password in it; name a variable with the key")
    host = (parts.hostname or "").removesuffix(".")
    if parts.scheme not in PORTS or not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host):
        raise OutgoingError(f"url {url!r}: no http or https host; write https://host:port/path")
    if parts.query or parts.fragment or port == 0:
        raise OutgoingError(f"url {url!r}: has ?, # or port 0; write https://host:port/path")
    return Address(
        scheme=parts.scheme, host=host, port=port or PORTS[parts.scheme], path=parts.path
    )


def hosts(entries: Iterable[str]) -> frozenset[str]:
    """`listed` of what a user wrote: `host:port`, `host` (port 443), or a URL."""
    urls = [entry if "://" in entry else f"https://{entry}" for entry in entries]
    return frozenset(parse(url).name for url in urls)


def class_of(row: dict[str, Any], where: str) -> str:
    """The class that a row states: `data_class`, else by the released column `credential`.

    credential yes is credentialed; no is licence-bound, since it says nothing of the licence. A row
    that states neither has no class: which data may leave is not for a program to guess.
    """
    said, credential = row.get("data_class"), str(row.get("credential", "")).lower()
    if said is not None and said not in CLASSES:
        raise OutgoingError(f"{where}: data_class is {said!r}; use one of {', '.join(CLASSES)}")
    if credential == "yes" and said not in (None, CREDENTIALED):
        raise OutgoingError(f"{where}: data_class {said!r} but credential yes; mend one of them")
    if said is None and credential not in ("yes", "no"):
        raise OutgoingError(
            f"{where}: no data_class, and credential is {row.get('credential')!r}; "
            f"give it a data_class of {', '.join(CLASSES)}"
        )
    return said or (CREDENTIALED if credential == "yes" else LICENCE_BOUND)


def strictest(classes: Iterable[str]) -> str:
    """The class of what is made from data of several."""
    return max(classes, key=CLASSES.index, default=OPEN)
