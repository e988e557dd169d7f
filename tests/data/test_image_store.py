"""Tests of tokenizing at scale: killed, by several processes, with bad and equal images."""

import functools
import json
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
from run_setup import environment

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
    left, right = all_codes(a), all_codes(b)
    return len(left) == len(right) and all(
        np.array_equal(x, y) for x, y in zip(left, right, strict=True)
    )


def child(out: pathlib.Path, *, patience: float = 60.0, **settings: int) -> subprocess.Popen:
    arguments = json.dumps([str(out), str(SAMPLE), PATHS, str(TINY), HOW | settings, patience])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> pathlib.Path:
    """Return the codes made by one uninterrupted process."""
    out = tmp_path_factory.mktemp("complete") / "codes"
    process = child(out)
    process.communicate(timeout=120)
    assert process.returncode == 0
    return out


@pytest.mark.slow
def test_one_device_and_eight_agree(complete, encoder, tmp_path):
    """The child has one device, this process a mesh of eight; each encodes 8 images at once.

    Another number of threads per device sums in another order, so a code may differ where two
    codebook entries are nearly equally far: 1 of 4,608 codes on an AMD EPYC with AVX-512.
    """
    assert len(jax.local_devices()) == 8
    meta = tokenize(tmp_path / "codes", PATHS, folder=SAMPLE, encoder=encoder, **HOW)
    assert meta["unique"] == len(PATHS) and meta["agreement"] is None
    one, eight = (np.concatenate(all_codes(f)) for f in (complete, tmp_path / "codes"))
    assert one.shape == eight.shape and np.mean(one != eight) < 1e-3


def test_command_killed_at_random_points_ends_with_the_same_codes(complete, tmp_path):
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
    assert process.returncode == 0 and same(out, complete)
    # Verbatim: part of the data.
    assert json.loads((out / "dataset.json").read_text())["pictures"] == len(PATHS)


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_takes_over(complete, tmp_path):
    out = tmp_path / "codes"
    pair = [child(out, process=i, processes=2, patience=2.0) for i in range(2)]
    pair[1].stdout.readline()
    time.sleep(0.5)
    pair[1].kill()  # its part is made by the other one after a while
    assert pair[0].wait(timeout=120) == 0
    for process in pair:
        process.communicate()
    assert same(out, complete)


@pytest.mark.slow
def test_three_processes_agree(complete, tmp_path):
    out = tmp_path / "codes"
    several = [child(out, process=i, processes=3) for i in range(3)]
    for process in several:
        process.communicate(timeout=180)
        assert process.returncode == 0
    assert same(out, complete)


def test_next_batches_are_decoded_during_encoding(encoder):
    batch = BatchEncoder(encoder, precision="highest", batch=1)
    ahead, first = threading.Event(), 8  # devices, so images of a batch

    def load_image(i: int) -> np.ndarray:
        if i >= first:
            ahead.set()
        return images.preprocess(images.load(SAMPLE / PATHS[i], max_pixels=10**6), 64)

    codes = batch(functools.partial(load_image, i) for i in range(2 * first))
    next(codes)  # of the first batch: the second has not been requested
    assert ahead.wait(20)
    assert len(list(codes)) == 2 * first - 1


def test_equal_files_are_encoded_once_and_unreadable_ones_reported(encoder, tmp_path):
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
    # Verbatim: part of the data.
    assert (meta["pictures"], meta["unique"], meta["unreadable"]) == (25, 23, 2)
    assert "damaged or truncated" in meta["reasons"]["cut.jpg"]
    assert "no such file" in meta["reasons"]["gone.jpg"]
    codes = open_codes(tmp_path / "out")
    np.testing.assert_array_equal(codes[3], codes[20])
    assert codes.index[3] == codes.index[20]
    assert codes[21] is None and codes[22] is None
    np.testing.assert_array_equal(codes[23], codes[24])  # alpha is blended with white
    with pytest.raises(PrepareError, match=r"2 of 25 images cannot be read.*the share 0.05"):
        tokenize(tmp_path / "b", paths, folder=folder, encoder=encoder, **HOW | {"max_bad": 0.05})
    for i in range(4):  # each copy counts, although one of them is tried
        shutil.copyfile(folder / "cut.jpg", folder / f"cut{i}.jpg")
    paths += [f"cut{i}.jpg" for i in range(4)]
    with pytest.raises(PrepareError, match=r"6 of 29 images cannot be read"):
        tokenize(tmp_path / "c", paths, folder=folder, encoder=encoder, **HOW)
    arguments = dict(folder=folder, encoder=encoder) | HOW | {"max_bad": 0.5}
    meta = tokenize(tmp_path / "c", paths, **arguments)  # the same folder is resumed
    assert meta["unreadable"] == 6 and meta["reasons"]["cut2.jpg"] == meta["reasons"]["cut.jpg"]


def test_image_changed_during_the_run_is_an_error(encoder, tmp_path):
    """Otherwise its codes would be stored under the hash of the former file."""
    folder, names = tmp_path / "in", [f"{i}.jpg" for i in range(4)]
    folder.mkdir()
    for name, source in zip(names, PATHS, strict=False):
        shutil.copyfile(SAMPLE / source, folder / name)
    how = dict(folder=folder, encoder=encoder) | HOW
    with pytest.raises(PrepareError, match="4 of 8 images"):  # hashed, and stopped before shards
        tokenize(tmp_path / "out", names + [f"no{i}.jpg" for i in range(4)], **how)
    shutil.copyfile(SAMPLE / PATHS[9], folder / "2.jpg")
    with pytest.raises(PrepareError, match="2.jpg: changed since it was hashed"):
        tokenize(
            tmp_path / "out", names + [f"no{i}.jpg" for i in range(4)], **how | {"max_bad": 1.0}
        )


def test_second_process_keeps_the_shard_of_the_first(complete, tmp_path, encoder):
    """If two processes write a shard at once, one file is kept and the other deleted."""
    out = tmp_path / "codes"
    shutil.copytree(complete, out)
    (out / "dataset.json").unlink()
    first = (out / "codes" / "00002.json").read_bytes()
    stray = out / "codes" / "00002-aaaaaaaa.array_record"
    stray.write_bytes(b"of a process that was killed")
    store._write(out / "codes" / "00002.json", b"{}")
    assert (out / "codes" / "00002.json").read_bytes() == first
    tokenize(out, PATHS, folder=SAMPLE, encoder=encoder, **HOW)
    assert same(out, complete) and not stray.exists() and not list(out.rglob("*.partial"))


def test_bfloat16_agreement_is_reported(encoder, complete, tmp_path):
    how = HOW | {"precision": "bfloat16"}
    meta = tokenize(tmp_path / "out", PATHS[:16], folder=SAMPLE, encoder=encoder, **how)
    exact, rounded = open_codes(complete), open_codes(tmp_path / "out")
    seen = np.mean([(exact[i] == rounded[i]).mean() for i in range(16)])
    assert abs(meta["agreement"] - seen) < 0.1 and 0.5 < meta["agreement"] < 1


def test_folder_of_another_plan_is_rejected(encoder, complete, tmp_path):
    out = tmp_path / "codes"
    shutil.copytree(complete, out)
    arguments = dict(folder=SAMPLE, encoder=encoder)
    with pytest.raises(
        PrepareError, match="codes was started with shard_size 8, not with 16; use another --out"
    ):
        tokenize(out, PATHS, **arguments, **HOW | {"shard_size": 16})
    with pytest.raises(PrepareError, match="started with another list of images; use another --o"):
        tokenize(out, PATHS[:-1], **arguments, **HOW)
    with pytest.raises(
        PrepareError, match="2 images, 1 of them different; list one or more, each once"
    ):
        tokenize(tmp_path / "x", ["a.jpg", "a.jpg"], **arguments, **HOW)
    with pytest.raises(PrepareError, match="precision is 'fp8'; use highest or bfloat16"):
        tokenize(tmp_path / "x", PATHS, **arguments, **HOW | {"precision": "fp8"})
    for wrong in (dict(shard_size=0), dict(batch=0), dict(max_bad=1.5)):
        with pytest.raises(PrepareError, match="use 1 or more images .*, and a share from 0 to 1"):
            tokenize(tmp_path / "x", PATHS, **arguments, **HOW | wrong)
    with pytest.raises(PrepareError, match="not finished"):
        open_codes(tmp_path / "x")


def test_full_disk_is_reported_and_the_same_command_resumes(encoder, small_disk, tmp_path):
    """The disk has 1 MiB: the padding of one ArrayRecord file is a third of it."""
    arguments = dict(folder=SAMPLE, encoder=encoder) | HOW | dict(shard_size=2)
    with pytest.raises(PrepareError, match="cannot be written .*No space left.*; free disk space"):
        tokenize(small_disk / "codes", PATHS[:40], **arguments)
    shutil.copytree(small_disk / "codes", tmp_path / "codes")
    assert not (tmp_path / "codes" / "dataset.json").exists()
    assert tokenize(tmp_path / "codes", PATHS[:40], **arguments)["unique"] == 40


def test_damage_is_detected(complete, tmp_path):
    out = tmp_path / "codes"
    shutil.copytree(complete, out)
    path = next((out / "codes").glob("00001-*.array_record"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        PrepareError, match=r"00001-\w+.array_record: size is .* bytes, but .* were written"
    ):
        open_codes(out)[9]
    swapped = tmp_path / "swapped"
    shutil.copytree(complete, swapped)
    digests = np.load(swapped / "digests" / "00000.npy")
    np.save(swapped / "digests" / "00000.npy", digests[[1, 0, *range(2, len(digests))]])
    with pytest.raises(PrepareError, match="record 0: belongs to another image"):
        open_codes(swapped)[0]
    record = to_bytes(np.zeros(32, np.uint8), np.arange(5, dtype=np.uint16))
    digest, codes = from_bytes(record, "x")
    assert digest == bytes(32) and codes.tolist() == [0, 1, 2, 3, 4]
    for i in range(len(record)):
        broken = bytearray(record)
        broken[i] ^= 1
        with pytest.raises(PrepareError):
            from_bytes(bytes(broken), "x")


def test_program_lists_images_of_a_folder(tmp_path, capsys):
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    for i, source in enumerate(PATHS[:3]):
        shutil.copyfile(SAMPLE / source, folder / f"{i}.jpg")
    (folder / "notes.txt").write_text("no image")
    command = ["tokenize", "--images", str(tmp_path / "in"), "--model", str(TINY), "--json"]
    command += ["--batch", "2"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    # Verbatim: part of the data.
    assert summary == dict(pictures=3, unique=3, unreadable=0, agreement=None)
    rows = [{"image_path": f"deep/{i}.jpg"} for i in (2, 0, 2)] + [{"text": "no image"}]
    listing = tmp_path / "rows.jsonl"
    listing.write_text("\n".join(map(json.dumps, rows)))
    assert main([*command, "--list", str(listing), "--out", str(tmp_path / "b")]) == 0
    of_folder, of_list = open_codes(tmp_path / "a"), open_codes(tmp_path / "b")
    assert len(of_list) == 2 and (of_list[0] == of_folder[2]).mean() > 0.98
    listing.write_text('{"image_path": "../secret.jpg"}')
    assert main([*command, "--list", str(listing), "--out", str(tmp_path / "c")]) == 1
    message = (
        "row 1: image_path '../secret.jpg' is invalid; expected the path of a file below --images"
    )
    assert message in capsys.readouterr().err
    assert main([*command, "--list", str(tmp_path / "no"), "--out", str(tmp_path / "c")]) == 1
    assert "does not exist; check --images and --list" in capsys.readouterr().err
