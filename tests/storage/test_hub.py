"""hf:// addresses, against a real server with the hub's endpoints, with and without faults."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import pytest
from hub_server import DENIED, GRANTED, SHA, Hub, etag, serving

from medmax_jax.storage import hub, image_paths
from medmax_jax.storage.folder import StorageError

ROOT = pathlib.Path(__file__).parents[2]
FILES = {"config.json": b"{}", "tokenizer/a.json": b"[1]", "model.safetensors": bytes(5_000)}
NAMES = ("good", "gated", "private", "forbidden", "busy", "cut", "short", "wrong", "huge", "slow")
ROWS = {"train.jsonl": b'{"id": 1}\n', "odd [1] name.jsonl": b"{}\n", "images/a.png": b"png"}
LOCATE = """
import json, sys
from medmax_jax.storage import hub
from medmax_jax.storage.folder import StorageError
for address in sys.argv[1:]:
    try:
        print(json.dumps(["ok", hub.locate(address)]), flush=True)
    except StorageError as error:
        print(json.dumps(["error", str(error)]), flush=True)
"""


@pytest.fixture(scope="module", name="hub_files")
def fixture_hub_files():
    repositories = {f"org/{name}": FILES for name in NAMES}
    return Hub(repositories | {"datasets/org/rows": ROWS, "datasets/org/rows_gated": ROWS})


@pytest.fixture(scope="module", name="server")
def fixture_server(hub_files):
    with serving(hub_files) as url:
        yield url


def start(url, cache, *addresses, **environment):
    own = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    kept = {n: v for n, v in os.environ.items() if not n.startswith("HF_")}
    return subprocess.Popen(
        [sys.executable, "-c", LOCATE, *addresses], cwd=ROOT, env=kept | own | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(process):
    """What `locate` returned or raised for each address, and its log."""
    output, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    return [json.loads(line) for line in output.splitlines()], log


def locate(url, cache, *addresses, **environment):
    return end(start(url, cache, *addresses, **environment))


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
    assert "the hub answered 429; trying again in 2 s" in log
    assert f"hf://org/good@{SHA}: complete in the cache" in log
    assert log.count(f"hf://org/good@{SHA}: comparing 3 files") == 1  # not again for @v1
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
    assert hub.origin(found[0][1]) == f"hf://org/good@{SHA}/tokenizer"


def test_data_sets_with_and_without_their_prefix(server, tmp_path):
    names = ("datasets/org/rows/train.jsonl", "org/rows/odd [1] name.jsonl", "org/rows/images")
    names += (f"datasets/org/rows@{SHA}/train.jsonl", "datasets/org/good", "org/rows_gated")
    found, _ = locate(server, tmp_path, *(f"hf://{name}" for name in names))
    assert [kind for kind, _ in found] == ["ok"] * 4 + ["error"] * 2
    assert pathlib.Path(found[0][1]).read_bytes() == ROWS["train.jsonl"]
    assert hub.origin(found[0][1]) == f"hf://datasets/org/rows@{SHA}/train.jsonl"
    assert hub.origin(found[1][1]) == f"hf://datasets/org/rows@{SHA}/odd [1] name.jsonl"
    assert hub.name_of(found[1][1]) == hub.origin(found[1][1])
    assert contents(found[2][1]) == {"a.png": b"png"} and found[3] == found[0]
    assert f"{server}/datasets/org/good does not exist" in found[4][1]
    assert f"accept the terms on {server}/datasets/org/rows_gated" in found[5][1]
    # its files are links to files outside the folder, which image paths otherwise must not be
    folder = pathlib.Path(found[2][1])
    assert image_paths.resolve(folder, "a.png").read_bytes() == b"png"
    for target in (tmp_path / "other.png", folder.parents[2] / "refs" / "main"):
        target.write_bytes(b"secret")
        (folder / "b.png").unlink(missing_ok=True)
        (folder / "b.png").symlink_to(target)
        with pytest.raises(image_paths.ImagePathError, match="outside the image folder"):
            image_paths.resolve(folder, "b.png")


def test_refusals_are_one_line_with_the_fix(server, tmp_path):
    names = ("gated", "private", "forbidden", "absent", "good@v9", "short", "huge")
    found, _ = locate(server, tmp_path, *(f"hf://org/{name}" for name in names))
    expected = (
        f"accept the terms on {server}/org/gated, then run `hf auth login`",
        "is private: check the name",
        f"the hub refused access (403); open {server}/org/forbidden, and run `hf auth login`",
        f"neither {server}/org/absent nor the data set of this name exists",
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


def test_a_file_with_another_digest_is_removed_and_downloaded_again(server, tmp_path):
    (bad, good), log = locate(server, tmp_path, "hf://org/wrong", "hf://org/wrong")
    assert bad[0] == "error" and "(3 of 3 files differ)" in bad[1] and bad[1].isprintable()
    assert f"hf://org/wrong@{SHA}/config.json: its digest is " in bad[1]
    assert good[0] == "ok" and contents(good[1]) == FILES
    weights = pathlib.Path(good[1], "model.safetensors")
    weights.resolve().write_bytes(bytes(4_999) + b"\1")  # as a disk might, with the same size
    offline, log = locate(server, tmp_path, "hf://org/wrong", HF_HUB_OFFLINE="1")
    assert "model.safetensors: its digest is" in offline[0][1] and "comparing 1 files" in log


def test_processes_share_a_download(server, hub_files, tmp_path):
    processes = [start(server, tmp_path, "hf://org/slow") for _ in range(2)]
    for found, _ in map(end, processes):
        assert found[0][0] == "ok" and contents(found[0][1]) == FILES
    assert hub_files.sent.count("org/slow/model.safetensors") == 1


@pytest.mark.parametrize("path", ["hf://", "hf://org", "hf://org/a b", "hf://spaces/org/a"])
def test_invalid_addresses(path):
    with pytest.raises(StorageError, match="not an address on the hub; use hf://ORG/NAME"):
        hub.parse(path)


def test_addresses_stay_inside_the_repository():
    with pytest.raises(StorageError, match="not a name inside this folder"):
        hub.parse("hf://org/a/../../b")
    both = ("model", "dataset")
    assert hub.parse("hf://org/a.b@v1/c/d/")[1:] == (both, "org/a.b", "v1", "c/d")
    assert hub.parse("hf://datasets/org/a")[1:] == (("dataset",), "org/a", None, "")


def test_arguments_of_programs(monkeypatch):
    address = pathlib.Path("hf://org/a/b")  # argparse's type=Path drops a slash
    monkeypatch.setitem(hub._located, "hf://org/a/b", "cache/b")
    args = argparse.Namespace(folder=address, model=str(address), parts=[address, 3], out="d")
    hub.locate_arguments(args)
    local = pathlib.Path("cache/b")
    assert vars(args) == dict(folder=local, model="cache/b", parts=[local, 3], out="d")
    with pytest.raises(StorageError, match="--out is on the hub, which is read only"):
        hub.locate_arguments(argparse.Namespace(out=address))


def test_digests_of_a_download_into_a_folder(tmp_path):
    record = tmp_path / ".cache/huggingface/download/tokenizer/a.json.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(f"{SHA}\n{etag(b'[1]')}\n1700000000.0\n")
    (record.parent / "b.json.metadata").write_text(f"{SHA}\nnot-a-digest\n")
    assert hub.digests(tmp_path) == {"tokenizer/a.json": etag(b"[1]")}
