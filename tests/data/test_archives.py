"""Image archives: parts as one stream, resumed, and everything hostile refused before it harms."""

import fcntl
import gzip
import io
import os
import re
import resource
import subprocess
import sys
import tarfile
import tracemalloc

import numpy as np
import pytest

from medmax_jax.data import prepare
from medmax_jax.data.release import archives
from medmax_jax.data.release.archives import LIMITS, ArchiveError, Limits

SMALL = Limits(members=50, member_bytes=100_000, total_bytes=500_000, ratio=20)


def noise(n, size=5_000):
    return np.random.default_rng(n).bytes(size)


PICTURES = {f"images/{n % 3}/{n}.png": noise(n) for n in range(12)}


def member(name, data=b"x", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_of(*members, form=tarfile.GNU_FORMAT):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return raw.getvalue()


def packed(tmp_path, members, name="a.tar.gz", **form):
    path = tmp_path / name
    path.write_bytes(gzip.compress(tar_of(*members, **form), 1))
    return path


def pictures():
    return [member(name, data) for name, data in PICTURES.items()]


def parts_of(path, count=4):
    """Cut as `split` does: x.aa, x.ab, ..."""
    raw, names = path.read_bytes(), []
    step = -(-len(raw) // count)
    for n in range(count):
        names.append(path.with_name(f"{path.name}.a{chr(97 + n)}"))
        names[-1].write_bytes(raw[n * step : (n + 1) * step])
    return names


def unpack(parts, out, limits=SMALL):
    parts = parts if isinstance(parts, list) else [parts]
    return archives.unpack(parts, out, limits=limits, say=lambda _: None)


def files_in(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_parts_are_one_archive(tmp_path, form):
    extra = {f"./images/{'long' * 30}/é.JPG": b"1"} if form != tarfile.USTAR_FORMAT else {}
    folders = [member("./", b"", type=tarfile.DIRTYPE), member("images", b"", type=tarfile.DIRTYPE)]
    odd = [member("images/train.json", b"{}"), member("images/._0.png"), member("READ")]
    longer = [member(name, data) for name, data in extra.items()]
    path = packed(tmp_path, [*folders, *pictures(), *odd, *longer], form=form)
    told = unpack(parts_of(path), tmp_path / "out")
    expected = PICTURES | {name.removeprefix("./"): data for name, data in extra.items()}
    assert files_in(tmp_path / "out") == expected
    assert told == dict(written=len(expected), there=0, left_out=3)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    parts, out = parts_of(packed(tmp_path, pictures())), tmp_path / "out"
    place, calls = archives._place, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 6:
            (out / archives.PARTIAL).write_bytes(b"half")
            raise KeyboardInterrupt
        return place(*args)

    monkeypatch.setattr(archives, "_place", stop)
    with pytest.raises(KeyboardInterrupt):
        unpack(parts, out)
    monkeypatch.undo()
    stamps = {name: (out / name).stat().st_mtime_ns for name in files_in(out)}
    assert len(stamps) == 5
    assert unpack(parts, out) == dict(written=7, there=5, left_out=0)
    assert files_in(out) == PICTURES
    assert all((out / name).stat().st_mtime_ns == t for name, t in stamps.items())


def test_a_cut_off_part_keeps_what_was_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_READ", 4_096)  # else all of it is read at once
    parts = parts_of(packed(tmp_path, pictures()))
    whole = parts[-1].read_bytes()
    for damaged, said in ((whole[:-100], "ends early"), (b"", "ends early")):
        parts[-1].write_bytes(damaged)
        with pytest.raises(ArchiveError, match=f"a.tar.gz.aa and on: {said}.*goes on"):
            unpack(parts, tmp_path / "out")
        found = files_in(tmp_path / "out")
        assert found.items() <= PICTURES.items() and len(found) > 5
    parts[-1].write_bytes(whole)
    assert unpack(parts, tmp_path / "out")["there"] == len(found)
    assert files_in(tmp_path / "out") == PICTURES


@pytest.mark.parametrize("chosen", [(0, 2), (1, 2), (0, 1, 3), (1, 0), (0, 0)])
def test_parts_are_given_whole_and_in_order(tmp_path, chosen):
    parts = parts_of(packed(tmp_path, pictures()))
    with pytest.raises(ArchiveError, match="should stand here"):
        unpack([parts[n] for n in chosen], tmp_path / "out")
    with pytest.raises(ArchiveError, match="no such file; name the parts"):
        unpack(tmp_path / "none.tar.gz", tmp_path / "out")


HOSTILE = {
    "up": (member("../a.png"), "would leave"),
    "inside up": (member("a/../../b.png"), "would leave"),
    "absolute": (member("/tmp/medmax_hostile.png"), "would leave"),
    "backslash": (member("..\\a.png"), "would leave"),
    "newline": (member("a\nb.png"), "would leave"),
    "symlink": (member("a.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
    "inner symlink": (member("a.png", b"", type=tarfile.SYMTYPE, linkname="b.png"), "a link"),
    "hardlink": (member("a.png", b"", type=tarfile.LNKTYPE, linkname="ok.png"), "a link"),
    "device": (member("a.png", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "a device"),
    "pipe": (member("a.png", b"", type=tarfile.FIFOTYPE), "a device"),
    "sparse": (member("a.png", b"", type=tarfile.GNUTYPE_SPARSE), "a link or a device"),
    "twice": (member("ok.png", b"other"), "comes twice"),
    "large": (member("a.png", bytes(100_001)), "member_bytes is 100001, the limit 100000"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_members_stop_the_work(tmp_path, kind):
    bad, said = HOSTILE[kind]
    path = packed(tmp_path, [member("ok.png", b"good"), bad, member("later.png")])
    with pytest.raises(ArchiveError, match=said):
        unpack(path, tmp_path / "out")
    assert files_in(tmp_path / "out") == {"ok.png": b"good"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "out"]
    assert not os.path.exists("/tmp/medmax_hostile.png")


def test_links_that_lie_in_the_folder_are_not_followed(tmp_path):
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    (out / "images").symlink_to(outside)
    path = packed(tmp_path, [member("images/a.png")])
    with pytest.raises(ArchiveError, match="would leave"):
        unpack(path, out)
    (out / "images").unlink()
    (out / "images").mkdir()
    (outside / "b.png").write_bytes(b"x")
    (out / "images" / "a.png").symlink_to(outside / "b.png")
    with pytest.raises(ArchiveError, match="would leave"):
        unpack(path, out)
    (out / archives.PARTIAL).symlink_to(outside / "b.png")
    (out / "images" / "a.png").unlink()
    assert unpack(path, out)["written"] == 1 and (outside / "b.png").read_bytes() == b"x"


def test_what_is_there_is_never_overwritten(tmp_path):
    path, out = packed(tmp_path, pictures()), tmp_path / "out"
    (out / "images" / "0").mkdir(parents=True)
    (out / "images" / "0" / "0.png").write_bytes(b"mine")
    with pytest.raises(ArchiveError, match=r"0\.png is there .* of 5000 bytes; remove it"):
        unpack(path, out)
    assert files_in(out) == {"images/0/0.png": b"mine"}
    (out / "images" / "0" / "0.png").write_bytes(noise(99))  # as long as the archive's
    with pytest.raises(ArchiveError, match=r"0\.png is there and is not"):
        unpack(path, out)


def test_limits(tmp_path):
    path = packed(tmp_path, pictures())
    for changes, said in (
        (dict(members=5), r"members is 6, the limit 5; .* raise --max_members"),
        (dict(total_bytes=20_000), "total_bytes is 25000, the limit 20000"),
        (dict(member_bytes=4_999), "member_bytes is 5000"),
    ):
        limits = Limits(**(vars(SMALL) | changes))
        with pytest.raises(ArchiveError, match=said):
            unpack(path, tmp_path / str(len(said)), limits)


def bomb(tmp_path, make):
    """A gzip of a tar that `make` writes into, streamed: it would not fit in memory."""
    path = tmp_path / "bomb.tar.gz"
    with gzip.open(path, "wb", 1) as raw:
        make(raw)
    return path


def zeros(raw, size):
    for _ in range(size >> 20):
        raw.write(bytes(1 << 20))


def test_pickle_bombs_are_rejected(tmp_path):
    """Zeros as one picture, as a name of 1 GB, and after the end: stopped in little memory."""

    def picture(raw):
        raw.write(member("a.png", b"", size=300 << 20)[0].tobuf(tarfile.GNU_FORMAT))
        zeros(raw, 300 << 20)

    def name(raw):
        raw.write(member("n", b"", size=300 << 20, type=b"L")[0].tobuf(tarfile.GNU_FORMAT))
        zeros(raw, 300 << 20)

    def tail(raw):
        raw.write(tar_of(member("a.png")))
        zeros(raw, 300 << 20)

    large = Limits(members=50, member_bytes=1 << 30, total_bytes=1 << 30, ratio=20)
    tracemalloc.start()
    for make, said in (
        (picture, "over 20 times its size"),
        (name, "belong to no file"),
        (tail, "belong to no file"),
    ):
        path = bomb(tmp_path, make)
        tracemalloc.reset_peak()
        with pytest.raises(ArchiveError, match=said):
            unpack(path, tmp_path / make.__name__, large)
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
        assert not (tmp_path / make.__name__ / archives.PARTIAL).exists()
    tracemalloc.stop()


def test_any_damage_is_an_error_then_and_later(tmp_path, monkeypatch):
    """Pictures are written before gzip's CRC is read: a wrong one is found by the next run."""
    monkeypatch.setattr(archives, "_READ", 4_096)
    path, rng, found = packed(tmp_path, pictures()), np.random.default_rng(0), 0
    whole = path.read_bytes()
    for n in range(40):
        place = int(rng.integers(12, len(whole)))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(ArchiveError, match=re.escape(f"{path}: ")):
            unpack(path, tmp_path / str(n))
        path.write_bytes(whole)
        wrong = {k for k, v in files_in(tmp_path / str(n)).items() if PICTURES.get(k) != v}
        if wrong:
            found += 1
            with pytest.raises(ArchiveError, match="is there and is not this archive's file"):
                unpack(path, tmp_path / str(n))
    assert found > 5


def test_a_damaged_header_is_not_the_end(tmp_path):
    raw = bytearray(tar_of(*pictures()))
    raw[5 * (512 + 5_120) + 150] ^= 1  # the checksum of the sixth header
    path = tmp_path / "a.tar.gz"
    for tar, said in (
        (bytes(raw), "a damaged header"),
        (tar_of(*pictures())[: 512 + 5_120], "no end mark"),
        (tar_of(*pictures())[:1_000], "damaged"),
        (b"", "damaged"),
        (noise(0), "damaged"),
    ):
        path.write_bytes(gzip.compress(tar))
        with pytest.raises(ArchiveError, match=said):
            unpack(path, tmp_path / "out")
    path.write_bytes(tar_of(*pictures()))
    with pytest.raises(ArchiveError, match="no .tar.gz"):
        unpack(path, tmp_path / "out")


def test_one_process_a_folder(tmp_path):
    path, out = packed(tmp_path, pictures()), tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ArchiveError, match="another process unpacks into it"):
        unpack(path, out)
    os.close(descriptor)
    assert unpack(path, out)["written"] == 12


def test_open_files_stay_few(tmp_path):
    parts = parts_of(packed(tmp_path, pictures()), 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    have = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (have + 6, hard))
    try:
        assert unpack(parts, tmp_path / "out")["written"] == 12
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_program(tmp_path, capsys):
    parts = [str(p) for p in parts_of(packed(tmp_path, pictures()))]
    command = [sys.executable, "-m", "data.prepare", "unpack", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--from", *parts], cwd=prepare.TINY.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0 and "12 images written, 0 were there" in done.stderr
    assert files_in(tmp_path / "out") == PICTURES
    asked = ["unpack", "--out", str(tmp_path / "o"), "--from", *parts]
    assert prepare.main([*asked, "--max_members", "3"]) == 1
    assert "raise --max_members" in capsys.readouterr().err
    assert LIMITS.members > 725_000 and LIMITS.total_bytes > 17 * 5.37e9
