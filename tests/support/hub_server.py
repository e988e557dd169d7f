"""A real HTTP server on 127.0.0.1 with the endpoints of the Hugging Face hub, and its faults."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping

from local_server import local_server

SHA = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1_000  # bytes from which a file is in LFS, so that its etag is a SHA-256
GRANTED, DENIED = "hf_granted", "hf_denied"  # tokens


class Hub:
    """Repositories by name, data sets with "datasets/" before it, and what the server saw.

    Their last word states their behavior: gated, private, forbidden (403), busy (each first request
    of a path is refused with 429 and Retry-After: 2), cut (each first body ends early), short
    (bodies lack a byte), wrong (each first body has another last byte), huge (sizes), slow.
    """

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]):
        self.repositories = repositories
        self.seen: list[str] = []  # requests that have a first time
        self.sent: list[str] = []  # files of which a body was sent
        self.lock = threading.Lock()

    def first(self, what: str) -> bool:
        """Return whether this is the first request of that kind."""
        with self.lock:
            self.seen.append(what)
            return self.seen.count(what) == 1


def oid(data: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def etag(data: bytes) -> str:
    """The digest that the hub states."""
    return hashlib.sha256(data).hexdigest() if len(data) >= LARGE else oid(data)


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The URL of the server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            path = path.replace("/api/models/", "/api/", 1)
            name = r"((?:datasets/)?[^/]+/[^/]+)"
            api = re.fullmatch(rf"/api/{name}(?:/(revision|tree)/([^/]+))?", path)
            file = re.fullmatch(rf"/{name}/resolve/([^/]+)/(.+)", path)
            repo = (api or file or [None, None])[1]
            files = hub.repositories.get(repo)
            if files is None or (repo.endswith("private") and not self.token()):
                status = 404 if self.token() else 401  # as the hub, which hides private names
                self.refuse(status, "RepoNotFound")
            elif (api and api[3] or file and file[2] or SHA) not in (SHA, "main", "v1"):
                self.refuse(404, "RevisionNotFound")
            elif repo.endswith("forbidden"):
                self.refuse(403, "")
            elif repo.endswith("busy") and hub.first(f"{self.command} {path}"):
                self.refuse(429, "", {"Retry-After": "2" if api and not api[2] else "0"})
            elif api:
                self.describe(repo, files, tree=api[2] == "tree")
            elif repo.endswith("gated") and self.token() != GRANTED:
                self.refuse(403 if self.token() else 401, "GatedRepo")
            elif file[3] not in files:
                self.refuse(404, "EntryNotFound")
            else:
                self.send_file(repo, path, files[file[3]])

        do_HEAD = do_GET  # noqa: N815

        def token(self) -> str:
            return self.headers.get("Authorization", "").removeprefix("Bearer ")

        def describe(self, repo, files, *, tree):
            entries = []
            for name, data in files.items():
                size = 10**15 if repo.endswith("huge") else len(data)
                lfs = {"sha256": etag(data), "oid": etag(data), "size": size, "pointerSize": 130}
                large = {"lfs": lfs} if len(data) >= LARGE else {}
                entry = {"type": "file", "path": name, "rfilename": name, "size": size}
                entries.append(entry | {"oid": oid(data), "blobId": oid(data)} | large)
            info = {"id": repo, "sha": SHA, "private": False, "siblings": entries}
            self.answer(200, json.dumps(entries if tree else info).encode())

        def send_file(self, repo, path, data):
            headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
            headers["X-Linked-Size"] = str(len(data))
            start = int(re.match(r"bytes=(\d+)-|", self.headers.get("Range", ""))[1] or 0)
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            body, keep = data[start:], len(data)
            if self.command == "GET":
                with hub.lock:
                    hub.sent.append(f"{repo}/{path.rpartition('/')[2]}")
                time.sleep(repo.endswith("slow") * 0.5)
            if repo.endswith("short"):
                body = body[:-1]
            if repo.endswith("wrong") and self.command == "GET" and hub.first(path):
                body = body[:-1] + bytes([body[-1] ^ 1])
            if self.command == "GET" and repo.endswith("cut") and hub.first(path):
                keep = len(data) // 2
            self.answer(206 if start else 200, body, headers, keep=keep)

        def refuse(self, status, code, headers=None):
            error = {"X-Error-Code": code, "X-Error-Message": code} | (headers or {})
            self.answer(status, json.dumps({"error": code}).encode(), error)

        def answer(self, status, body, headers=None, keep=None):
            self.send_response(status)
            headers = {"Content-Type": "application/json"} | (headers or {})
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:keep])
                self.close_connection = keep is not None and keep < len(body)

        def log_message(self, *_):
            pass

    with local_server(Handler) as url:
        yield url
