"""Checkpoints: exact on other meshes, every flipped bit detected, a full disk reported."""

import dataclasses
import json
import pathlib
import random
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gs_server import fixture_small_disk  # noqa: F401
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from medmax_jax import sharding
from medmax_jax.checkpoints import checksums, manager
from medmax_jax.config import Mesh
from medmax_jax.storage.folder import Folder
from medmax_jax.storage.workdir import Workdir

META = {"config": {"model": {"hidden_size": 8}}, "base": "a", "data": "b"}
FLIPS = 240  # random bits over all files of a step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    weights: dict
    step: jax.Array


def state(m: jax.sharding.Mesh, value: float, size: int = 8) -> State:
    arange = jnp.arange(size * 8, dtype=jnp.float32).reshape(size, 8) + value
    kernel = jax.device_put(arange, NamedSharding(m, P("fsdp", "tp")))
    scale = jax.device_put(jnp.full(4, value, jnp.bfloat16), NamedSharding(m, P()))
    return State(
        {"kernel": kernel, "scale": scale}, jax.device_put(jnp.int32(value), NamedSharding(m, P()))
    )


def like(tree: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def open_manager(folder: pathlib.Path, lines: list[str]) -> manager.CheckpointManager:
    work = Workdir(str(folder.parent), folder.parent)
    return manager.CheckpointManager(work, keep=2, log=lines.append)


def split() -> jax.sharding.Mesh:
    return sharding.make_mesh(Mesh(data=1, fsdp=4, tp=2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """Steps 2 and 3 of three saved ones (keep=2)."""
    folder, m, lines = tmp_path_factory.mktemp("saved") / "checkpoints", split(), []
    saver = open_manager(folder, lines)
    assert saver.latest() is None
    for step in (1, 2, 3):
        saver.save(step, state(m, step), cursor={"next": step}, meta=META)
    saver.wait()
    assert saver.latest() == 3 and len(saver.blocked) == 3
    saver.close()
    noted = folder.with_name(f"{folder.name}.sha256")  # it can prove what was written
    assert noted.name in lines[-1] and noted.read_text().count("\n") == 3
    check = ["sha256sum", "--check", "--ignore-missing", "--strict", noted.name]
    done = subprocess.run(check, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 2, done.stderr
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def files(step: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in step.rglob("*") if p.is_file())


def biggest(step: pathlib.Path) -> pathlib.Path:
    return max(files(step / "state"), key=lambda p: p.stat().st_size)


def flip(path: pathlib.Path, bit: int | None = None) -> None:
    """One bit, of the middle byte where none is named."""
    data = bytearray(path.read_bytes())
    bit = len(data) // 2 * 8 if bit is None else bit
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_restores_bit_for_bit_on_another_mesh(folder):
    other = state(sharding.make_mesh(Mesh(data=2, fsdp=1, tp=4)), 0)
    reader = open_manager(folder, [])
    assert reader.latest() == 3 and reader.meta(3) == META
    restored, cursor = reader.restore(3, like(other))
    reader.close()
    assert cursor == {"next": 3} and isinstance(restored, State)
    np.testing.assert_array_equal(restored.weights["kernel"], np.arange(64.0).reshape(8, 8) + 3)
    assert restored.weights["scale"].dtype == jnp.bfloat16 and int(restored.step) == 3
    assert restored.weights["kernel"].sharding == other.weights["kernel"].sharding
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]
    step, arrays, meta = manager.read_latest(folder)
    assert (step, meta) == (3, META) and set(arrays) >= {"weights.kernel", "step"}


def test_every_shard_is_hashed_once(saved):
    digests = checksums.read_shards(Folder(saved / "3"))
    assert [len(digests[n]) for n in ("weights.kernel", "weights.scale", "step")] == [8, 1, 1]
    assert {"at": [[0, 2], [0, 4]]}.items() <= digests["weights.kernel"][0].items()


def test_every_flipped_bit_is_detected(folder):
    """Each file, the manifest and empty-looking ones included, at random places."""
    pick, step = random.Random(0), folder / "3"
    assert checksums.find_corrupt_file(Folder(step)) == ""
    nonempty = [p for p in files(step) if p.stat().st_size]
    assert {checksums.MANIFEST, "shards-0.json"} <= {p.name for p in nonempty}
    for n in range(FLIPS):
        victim = nonempty[n % len(nonempty)]
        bit = pick.randrange(victim.stat().st_size * 8)
        flip(victim, bit)
        assert checksums.find_corrupt_file(Folder(step)), f"bit {bit} of {victim.relative_to(step)}"
        flip(victim, bit)
    assert checksums.find_corrupt_file(Folder(step)) == ""


def test_changes_between_hashing_and_writing_are_detected(tmp_path):
    """The files agree with their manifest, and the arrays not with what was in memory."""
    m, lines, pick = split(), [], random.Random(1)
    saver = open_manager(tmp_path / "checkpoints", lines)
    saver.save(1, state(m, 1), cursor={}, meta=META)
    saver.wait()
    for step in range(2, 6):
        good = state(m, step)
        kernel = np.array(good.weights["kernel"])
        kernel.view(np.uint32)[pick.randrange(8), pick.randrange(8)] ^= 1 << pick.randrange(32)
        bad = jax.device_put(kernel, good.weights["kernel"].sharding)
        saver.write(
            step,
            State(good.weights | {"kernel": bad}, good.step),
            checksums.host_shards(good),
            cursor={},
            meta=META,
            begin=time.monotonic(),
        )
        saver.wait()
        assert checksums.find_corrupt_file(Folder(tmp_path / "checkpoints" / str(step))) == ""
        with pytest.raises(manager.DamagedError, match="kernel .* differs from what training had"):
            saver.restore(step, like(good))
        assert saver.latest() == 1 and (tmp_path / "checkpoints" / f"damaged_{step}").is_dir()
        assert f"checkpoint {step} is damaged" in lines[-1]
    saver.close()


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "add", "manifest", "no manifest"])
def test_damaged_step_is_reported_and_the_earlier_one_is_used(folder, harm):
    victim, manifest = biggest(folder / "3"), folder / "3" / checksums.MANIFEST
    {
        "flip": lambda: flip(victim),
        "truncate": lambda: victim.write_bytes(victim.read_bytes()[:-1]),
        "delete": victim.unlink,
        "add": lambda: (folder / "3" / "state" / "more").write_text("x"),
        "manifest": lambda: manifest.write_text("{"),
        "no manifest": manifest.unlink,
    }[harm]()
    (folder / "4.orbax-checkpoint-tmp").mkdir()  # of a killed process
    lines = []
    reader = open_manager(folder, lines)
    assert reader.latest() == 2
    assert len(lines) == 1 and "checkpoint 3 is damaged" in lines[0]
    assert sorted(p.name for p in folder.iterdir()) == ["2", "damaged_3"]
    m = sharding.make_mesh(Mesh(data=1, fsdp=1, tp=1))
    restored, _ = reader.restore(2, like(state(m, 0)))
    assert int(restored.step) == 2
    reader.save(3, restored, cursor={}, meta=META)  # the run comes past step 3 again
    reader.wait()
    assert reader.latest() == 3
    reader.close()


def test_orbax_alone_does_not_detect_a_flipped_bit(tmp_path):
    """Why there are digests. When this fails, Orbax has learned to check, and they may go."""
    tree = {"noise": jnp.asarray(np.random.default_rng(0).standard_normal(4096, np.float32))}
    saver = open_manager(tmp_path / "checkpoints", [])
    saver.save(1, tree, cursor={}, meta=META)
    saver.close()
    flip(biggest(tmp_path / "checkpoints/1"))
    with manager.ocp.StandardCheckpointer() as orbax:
        restored = orbax.restore(tmp_path / "checkpoints/1/state")
    assert (np.asarray(restored["noise"]) != np.asarray(tree["noise"])).sum() == 1
    assert "has changed" in checksums.find_corrupt_file(Folder(tmp_path / "checkpoints/1"))


def test_next_step_may_donate_the_state_being_saved(tmp_path):
    m = split()
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    saver, now = open_manager(tmp_path / "checkpoints", []), state(m, 1, size=1 << 16)
    for number in range(1, 4):
        saver.save(number, now, cursor={}, meta=META)
        before = like(now)
        for _ in range(3):
            now = step(now)
    saver.wait()
    restored, _ = saver.restore(3, before)
    expected = state(m, 1, size=1 << 16)
    for _ in range(6):
        expected = step(expected)
    np.testing.assert_array_equal(restored.weights["kernel"], expected.weights["kernel"])
    saver.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax
def test_full_disk_is_reported_and_the_earlier_step_is_kept(small_disk):
    m, lines = split(), []
    saver = open_manager(small_disk / "checkpoints", lines)
    saver.save(1, state(m, 1), cursor={}, meta=META)
    saver.wait()
    noise = np.random.default_rng(0).standard_normal((1 << 17, 8)).astype(np.float32)
    large = state(m, 2, size=1 << 17)
    large.weights["kernel"] = jax.device_put(noise, large.weights["kernel"].sharding)
    with pytest.raises(
        manager.CheckpointError, match="checkpoint 2 could not .*latest valid step is 1"
    ):
        saver.save(2, large, cursor={}, meta=META)
        saver.wait()
    assert saver.latest() == 1
    saver.close()
    reopened = open_manager(small_disk / "checkpoints", lines)
    assert reopened.latest() == 1 and int(reopened.restore(1, like(state(m, 0)))[0].step) == 1
    reopened.close()


def test_meta_is_plain_json(saved):
    assert json.loads((saved / "3" / "meta" / "metadata").read_text()) == META
