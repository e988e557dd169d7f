"""Tokenizing at scale: killed at any point, by several processes, with bad and equal pictures."""

import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import PIL.Image
import pytest
from gs_server import fixture_small_disk  # noqa: F401

from medmax_jax.data.image_tokens import store
from medmax_jax.data.image_tokens.batch_encoder import BatchEncoder
from medmax_jax.data.image_tokens.encoder import PrepareError, load_encoder
from medmax_jax.data.image_tokens.store import tokenize
from medmax_jax.data.image_tokens.store_reader import from_bytes, open_codes, to_bytes
from medmax_jax.data.prepare import SAMPLE, TINY, main
from medmax_jax.models import images

ROOT = pathlib.Path(__file__).parents[2]
PATHS = sorted(str(p.relative_to(SAMPLE)) for p in (SAMPLE / "images").iterdir())[:72]
HOW = dict(precision="highest", shard_size=8, batch=8, max_bad=0.1)
CHILD = """
import json, sys
sys.path.insert(0, ".")
from pathlib import Path
from medmax_jax.data.image_tokens import store
from medmax_jax.data.image_tokens.encoder import load_encoder

out, folder, paths, model, how, patience = json.loads(sys.argv[1])
store.TAKEOVER_SECONDS = patience
encoder = load_encoder(Path(model))
print("ready", flush=True)
store.tokenize(out, paths, folder=folder, encoder=encoder, **how)
"""


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(TINY)


def all_codes(folder: pathlib.Path) -> list[np.ndarray | None]:
    codes = open_codes(folder)
    return [codes[i] for i in range(len(codes))]


def same(a: pathlib.Path, b: pathlib.Path) -> bool:
    one, two = all_codes(a), all_codes(b)
    return len(one) == len(two) and all(np.array_equal(x, y) for x, y in zip(one, two, strict=True))


def child(out: pathlib.Path, *, patience: float = 60.0, **more: int) -> subprocess.Popen:
    given = json.dumps([str(out), str(SAMPLE), PATHS, str(TINY), HOW | more, patience])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, given], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    """Made by one process that nobody stops."""
    out = tmp_path_factory.mktemp("whole") / "codes"
    process = child(out)
    process.communicate(timeout=120)
    assert process.returncode == 0
    return out


def test_one_device_and_eight_give_the_same_codes(whole, encoder, tmp_path):
    """The child has one device, this process a mesh of eight; each encodes 8 pictures at once."""
    assert len(jax.local_devices()) == 8
    meta = tokenize(tmp_path / "codes", PATHS, folder=SAMPLE, encoder=encoder, **HOW)
    assert meta["unique"] == len(PATHS) and meta["agreement"] is None
    assert same(tmp_path / "codes", whole)


def test_killed_at_random_points_the_same_command_ends_with_the_same_codes(whole, tmp_path):
    draw, out = random.Random(0), tmp_path / "codes"
    for _ in range(3):
        process = child(out)
        process.stdout.readline()
        time.sleep(draw.uniform(0.1, 2.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    process = child(out)
    process.communicate(timeout=120)
    assert process.returncode == 0 and same(out, whole)
    assert json.loads((out / "dataset.json").read_text())["pictures"] == len(PATHS)


def test_two_processes_share_the_work_and_one_takes_over(whole, tmp_path):
    out = tmp_path / "codes"
    pair = [child(out, process=i, processes=2, patience=2.0) for i in range(2)]
    pair[1].stdout.readline()
    time.sleep(0.5)
    pair[1].kill()  # its part is made by the other one after a while
    assert pair[0].wait(timeout=120) == 0
    for each in pair:
        each.communicate()
    assert same(out, whole)


def test_three_processes_agree(whole, tmp_path):
    out = tmp_path / "codes"
    several = [child(out, process=i, processes=3) for i in range(3)]
    for each in several:
        each.communicate(timeout=180)
        assert each.returncode == 0
    assert same(out, whole)


def test_the_next_batches_are_decoded_while_one_is_encoded(encoder):
    batch = BatchEncoder(encoder, precision="highest", batch=1)
    ahead, first = threading.Event(), 8  # devices, so pictures of a batch

    def picture(i: int) -> np.ndarray:
        if i >= first:
            ahead.set()
        return images.preprocess(images.load(SAMPLE / PATHS[i], max_pixels=10**6), 64)

    codes = batch(functools.partial(picture, i) for i in range(2 * first))
    next(codes)  # of the first batch: nobody has asked for the second
    assert ahead.wait(20)
    assert len(list(codes)) == 2 * first - 1


def test_equal_files_are_encoded_once_and_broken_ones_are_told(encoder, tmp_path):
    folder, paths = tmp_path / "in", []
    folder.mkdir()
    for i, source in enumerate(PATHS[:20]):
        shutil.copyfile(SAMPLE / source, folder / f"{i}.jpg")
        paths.append(f"{i}.jpg")
    shutil.copyfile(folder / "3.jpg", folder / "again.jpg")
    (folder / "cut.jpg").write_bytes((folder / "4.jpg").read_bytes()[:300])
    clear = PIL.Image.new("RGBA", (70, 70), (0, 0, 0, 0))
    clear.save(folder / "clear.png")
    PIL.Image.new("RGB", (70, 70), "white").save(folder / "white.png")
    paths += ["again.jpg", "cut.jpg", "gone.jpg", "clear.png", "white.png"]
    meta = tokenize(tmp_path / "out", paths, folder=folder, encoder=encoder, **HOW)
    assert (meta["pictures"], meta["unique"], meta["unreadable"]) == (25, 23, 2)
    assert "damaged or truncated" in meta["reasons"]["cut.jpg"]
    assert "no such file" in meta["reasons"]["gone.jpg"]
    codes = open_codes(tmp_path / "out")
    np.testing.assert_array_equal(codes[3], codes[20])
    assert codes.index[3] == codes.index[20]
    assert codes[21] is None and codes[22] is None
    np.testing.assert_array_equal(codes[23], codes[24])  # alpha is blended with white
    with pytest.raises(PrepareError, match=r"2 of 25 pictures cannot be read.*the share 0.05"):
        tokenize(tmp_path / "b", paths, folder=folder, encoder=encoder, **HOW | {"max_bad": 0.05})
    for i in range(4):  # each copy counts, although one of them is tried
        shutil.copyfile(folder / "cut.jpg", folder / f"cut{i}.jpg")
    paths += [f"cut{i}.jpg" for i in range(4)]
    with pytest.raises(PrepareError, match=r"6 of 29 pictures cannot be read"):
        tokenize(tmp_path / "c", paths, folder=folder, encoder=encoder, **HOW)
    ask = dict(folder=folder, encoder=encoder) | HOW | {"max_bad": 0.5}
    meta = tokenize(tmp_path / "c", paths, **ask)  # and the same folder goes on
    assert meta["unreadable"] == 6 and meta["reasons"]["cut2.jpg"] == meta["reasons"]["cut.jpg"]


def test_a_picture_that_changes_on_the_way_stops_the_work(encoder, tmp_path):
    """Its codes would stand under the hash of what it was."""
    folder, names = tmp_path / "in", [f"{i}.jpg" for i in range(4)]
    folder.mkdir()
    for name, source in zip(names, PATHS, strict=False):
        shutil.copyfile(SAMPLE / source, folder / name)
    how = dict(folder=folder, encoder=encoder) | HOW
    with pytest.raises(PrepareError, match="4 of 8 pictures"):  # hashed, and stopped before shards
        tokenize(tmp_path / "out", names + [f"no{i}.jpg" for i in range(4)], **how)
    shutil.copyfile(SAMPLE / PATHS[9], folder / "2.jpg")
    with pytest.raises(PrepareError, match="2.jpg: changed since it was hashed"):
        tokenize(
            tmp_path / "out", names + [f"no{i}.jpg" for i in range(4)], **how | {"max_bad": 1.0}
        )


def test_who_comes_second_leaves_the_first_ones_shard(whole, tmp_path, encoder):
    """Two processes that make a shard at once: one file is named, the other is taken away."""
    out = tmp_path / "codes"
    shutil.copytree(whole, out)
    (out / "dataset.json").unlink()
    first = (out / "codes" / "00002.json").read_bytes()
    stray = out / "codes" / "00002-aaaaaaaa.array_record"
    stray.write_bytes(b"of a process that was killed")
    store._write(out / "codes" / "00002.json", b"{}")
    assert (out / "codes" / "00002.json").read_bytes() == first
    tokenize(out, PATHS, folder=SAMPLE, encoder=encoder, **HOW)
    assert same(out, whole) and not stray.exists() and not list(out.rglob("*.partial"))


def test_bfloat16_says_how_often_it_agrees(encoder, whole, tmp_path):
    how = HOW | {"precision": "bfloat16"}
    meta = tokenize(tmp_path / "out", PATHS[:16], folder=SAMPLE, encoder=encoder, **how)
    exact, rounded = open_codes(whole), open_codes(tmp_path / "out")
    seen = np.mean([(exact[i] == rounded[i]).mean() for i in range(16)])
    assert abs(meta["agreement"] - seen) < 0.1 and 0.5 < meta["agreement"] < 1


def test_a_folder_belongs_to_one_plan(encoder, whole, tmp_path):
    out = tmp_path / "codes"
    shutil.copytree(whole, out)
    ask = dict(folder=SAMPLE, encoder=encoder)
    with pytest.raises(PrepareError, match="holds codes with shard_size 8, this command has 16"):
        tokenize(out, PATHS, **ask, **HOW | {"shard_size": 16})
    with pytest.raises(PrepareError, match="holds codes with pictures"):
        tokenize(out, PATHS[:-1], **ask, **HOW)
    with pytest.raises(PrepareError, match="2 pictures, 1 different; list each once"):
        tokenize(tmp_path / "x", ["a.jpg", "a.jpg"], **ask, **HOW)
    with pytest.raises(PrepareError, match="precision is 'fp8'; use highest or bfloat16"):
        tokenize(tmp_path / "x", PATHS, **ask, **HOW | {"precision": "fp8"})
    for wrong in (dict(shard_size=0), dict(batch=0), dict(max_bad=1.5)):
        with pytest.raises(PrepareError, match="use 1 or more pictures, and a share from 0 to 1"):
            tokenize(tmp_path / "x", PATHS, **ask, **HOW | wrong)
    with pytest.raises(PrepareError, match="not finished"):
        open_codes(tmp_path / "x")


def test_a_full_disk_is_told_and_the_same_command_goes_on(encoder, small_disk, tmp_path):
    """1 MiB: the padding of one ArrayRecord file is a third of it."""
    ask = dict(folder=SAMPLE, encoder=encoder) | HOW | dict(shard_size=2)
    with pytest.raises(PrepareError, match="cannot be written .*No space left.*; make room"):
        tokenize(small_disk / "codes", PATHS[:40], **ask)
    shutil.copytree(small_disk / "codes", tmp_path / "codes")
    assert not (tmp_path / "codes" / "dataset.json").exists()
    assert tokenize(tmp_path / "codes", PATHS[:40], **ask)["unique"] == 40


def test_damage_is_noticed(whole, tmp_path):
    out = tmp_path / "codes"
    shutil.copytree(whole, out)
    path = next((out / "codes").glob("00001-*.array_record"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(PrepareError, match=r"00001-\w+.array_record: not the .* bytes written"):
        open_codes(out)[9]
    swapped = tmp_path / "swapped"
    shutil.copytree(whole, swapped)
    digests = np.load(swapped / "digests" / "00000.npy")
    np.save(swapped / "digests" / "00000.npy", digests[[1, 0, *range(2, len(digests))]])
    with pytest.raises(PrepareError, match="record 0: of another picture"):
        open_codes(swapped)[0]
    record = to_bytes(np.zeros(32, np.uint8), np.arange(5, dtype=np.uint16))
    digest, codes = from_bytes(record, "x")
    assert digest == bytes(32) and codes.tolist() == [0, 1, 2, 3, 4]
    for i in range(len(record)):
        broken = bytearray(record)
        broken[i] ^= 1
        with pytest.raises(PrepareError):
            from_bytes(bytes(broken), "x")


def test_the_program_lists_pictures_itself(tmp_path, capsys):
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    for i, source in enumerate(PATHS[:3]):
        shutil.copyfile(SAMPLE / source, folder / f"{i}.jpg")
    (folder / "notes.txt").write_text("no picture")
    words = ["tokenize", "--images", str(tmp_path / "in"), "--model", str(TINY), "--json"]
    words += ["--batch", "2"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == dict(pictures=3, unique=3, unreadable=0, agreement=None)
    rows = [{"image_path": f"deep/{i}.jpg"} for i in (2, 0, 2)] + [{"text": "no picture"}]
    listing = tmp_path / "rows.jsonl"
    listing.write_text("\n".join(map(json.dumps, rows)))
    assert main([*words, "--list", str(listing), "--out", str(tmp_path / "b")]) == 0
    one, two = open_codes(tmp_path / "a"), open_codes(tmp_path / "b")
    assert len(two) == 2 and (two[0] == one[2]).mean() > 0.98
    listing.write_text('{"image_path": "../secret.jpg"}')
    assert main([*words, "--list", str(listing), "--out", str(tmp_path / "c")]) == 1
    said = "row 1: image_path is '../secret.jpg', no name of a file below --images"
    assert said in capsys.readouterr().err
    assert main([*words, "--list", str(tmp_path / "no"), "--out", str(tmp_path / "c")]) == 1
    assert "not there; check --images and --list" in capsys.readouterr().err
