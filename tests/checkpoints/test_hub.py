"""hf:// addresses, against a real server with the hub's endpoints, with and without faults."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from hub_server import DENIED, GRANTED, SHA, Hub, etag, serving

from medmax_jax.checkpoints import hub
from medmax_jax.io.storage import StorageError

ROOT = pathlib.Path(__file__).parents[2]
FILES = {"config.json": b"{}", "tokenizer/a.json": b"[1]", "model.safetensors": bytes(5_000)}
NAMES = ("good", "gated", "private", "busy", "cut", "short", "huge")
LOCATE = """
import json, sys
from medmax_jax.checkpoints import hub
from medmax_jax.io.storage import StorageError
for address in sys.argv[1:]:
    try:
        print(json.dumps(["ok", hub.locate(address)]), flush=True)
    except StorageError as error:
        print(json.dumps(["error", str(error)]), flush=True)
"""


@pytest.fixture(scope="module", name="server")
def fixture_server():
    with serving(Hub({f"org/{name}": FILES for name in NAMES})) as url:
        yield url


def locate(url, cache, *addresses, **environment):
    """What `locate` returns or raises for each address, in a process of its own, and its log."""
    own = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    kept = {n: v for n, v in os.environ.items() if not n.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", LOCATE, *addresses], cwd=ROOT, env=kept | own | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def contents(folder):
    paths = [p for p in pathlib.Path(folder).rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def test_downloads_once_and_resumes_what_was_interrupted(server, tmp_path):
    addresses = [f"hf://org/{name}" for name in ("good", "busy", "cut")]
    found, log = locate(server, tmp_path, *addresses, "hf://org/good@v1", "plain/path")
    for kind, folder in found[:4]:
        assert kind == "ok", folder
        assert contents(folder) == FILES
    assert hub.origin(found[0][1]) == f"hf://org/good@{SHA}"
    assert found[3][1] == found[0][1] and found[4] == ["ok", "plain/path"]
    assert "the hub answered 429; trying again" in log
    assert f"hf://org/good@{SHA}: complete in the cache" in log
    expected = {name: etag(data) for name, data in FILES.items()}
    assert hub.digests(found[0][1]) == expected
    for name, digest in expected.items():
        assert hub.file_digest(f"{found[0][1]}/{name}", digest) == digest
    offline, log = locate(
        "http://127.0.0.1:9", tmp_path, "hf://org/good", "hf://org/gated", HF_HUB_OFFLINE="1"
    )
    assert offline[0] == found[0] and "the hub was not contacted" in log
    assert "not complete in the cache" in offline[1][1] and "HF_HUB_OFFLINE" in offline[1][1]


def test_part_of_a_repository(server, tmp_path):
    found, _ = locate(server, tmp_path, "hf://org/good/tokenizer", "hf://org/good/nothing")
    assert contents(found[0][1]) == {"a.json": b"[1]"}
    assert not list(tmp_path.rglob("model.safetensors"))
    assert "org/good has no file nothing" in found[1][1]


def test_refusals_are_one_line_with_the_fix(server, tmp_path):
    names = ("gated", "private", "absent", "good@v9", "short", "huge")
    found, _ = locate(server, tmp_path, *(f"hf://org/{name}" for name in names))
    expected = (
        f"accept the terms on {server}/org/gated, then run `hf auth login`",
        "is private: check the name",
        f"{server}/org/absent does not exist",
        "no revision v9",
        "run the same command again",
        "set HF_HUB_CACHE to a folder on a larger disk",
    )
    for (kind, message), name, part in zip(found, names, expected, strict=True):
        assert kind == "error" and message.isprintable(), message
        assert part in message and (name == "huge" or message.startswith(f"hf://org/{name}: "))
    assert "needs 3000000000000000 bytes" in found[-1][1]
    denied, _ = locate(server, tmp_path, "hf://org/gated", HF_TOKEN=DENIED)
    assert f"accept the terms on {server}/org/gated" in denied[0][1]
    granted, _ = locate(server, tmp_path, "hf://org/gated", HF_TOKEN=GRANTED)
    assert contents(granted[0][1]) == FILES


@pytest.mark.parametrize("path", ["hf://", "hf://org", "hf://org/a b", "hf://org/a@x y"])
def test_invalid_addresses(path):
    with pytest.raises(StorageError, match="not an address on the hub; use hf://ORG/NAME"):
        hub.parse(path)


def test_addresses_stay_inside_the_repository():
    with pytest.raises(StorageError, match="not a name inside this folder"):
        hub.parse("hf://org/a/../../b")
    assert hub.parse("hf://org/a.b@v1/c/d/")[1:] == ("org/a.b", "v1", "c/d")
    assert hub.parse("hf://org/a")[1:] == ("org/a", None, None)


def test_digests_of_a_download_into_a_folder(tmp_path):
    record = tmp_path / ".cache/huggingface/download/tokenizer/a.json.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(f"{SHA}\n{etag(b'[1]')}\n1700000000.0\n")
    (record.parent / "b.json.metadata").write_text(f"{SHA}\nnot-a-digest\n")
    assert hub.digests(tmp_path) == {"tokenizer/a.json": etag(b"[1]")}
