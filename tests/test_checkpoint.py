"""Checkpoints: exact round trips on other meshes, damage found by digest, another run refused."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from medmax_jax import checkpoint, mesh
from medmax_jax.config import Mesh

META = {
    "config": {"model": {"hidden_size": 8}, "optim": {"peak_lr": 1.0}},
    "base": "a",
    "data": "b",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    weights: dict
    step: jax.Array


def state(m: jax.sharding.Mesh, value: float) -> State:
    arange = jnp.arange(64, dtype=jnp.float32).reshape(8, 8) + value
    kernel = jax.device_put(arange, NamedSharding(m, P("fsdp", "tp")))
    scale = jax.device_put(jnp.full(4, value, jnp.bfloat16), NamedSharding(m, P()))
    return State(
        {"kernel": kernel, "scale": scale}, jax.device_put(jnp.int32(value), NamedSharding(m, P()))
    )


def like(tree: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def opened(folder: pathlib.Path, lines: list[str]) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(folder, keep=2, log=lines.append)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Steps 2 and 3 of three saved ones (keep=2)."""
    m = mesh.make_mesh(Mesh(data=1, fsdp=4, tp=2))
    saver = opened(tmp_path, [])
    assert saver.latest() is None
    for step in (1, 2, 3):
        saver.save(step, state(m, step), cursor={"next": step}, meta=META)
    assert saver.latest() == 3
    saver.close()
    return tmp_path


def biggest(folder: pathlib.Path) -> pathlib.Path:
    return max(
        (p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


def flip(path: pathlib.Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_restores_bit_for_bit_on_another_mesh(folder):
    other = state(mesh.make_mesh(Mesh(data=2, fsdp=1, tp=4)), 0)
    reader = opened(folder, [])
    assert reader.latest() == 3 and reader.meta(3) == META
    found, cursor = reader.restore(3, like(other))
    reader.close()
    assert cursor == {"next": 3} and isinstance(found, State)
    np.testing.assert_array_equal(found.weights["kernel"], np.arange(64.0).reshape(8, 8) + 3)
    assert found.weights["scale"].dtype == jnp.bfloat16 and int(found.step) == 3
    assert found.weights["kernel"].sharding == other.weights["kernel"].sharding
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "manifest"])
def test_damage_is_reported_and_the_earlier_step_is_used(folder, harm):
    victim = biggest(folder / "3")
    if harm == "flip":
        flip(victim)
    elif harm == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif harm == "delete":
        victim.unlink()
    else:
        (folder / "3" / checkpoint.MANIFEST).write_text("{")
    lines = []
    reader = opened(folder, lines)
    assert reader.latest() == 2
    assert len(lines) == 1 and "checkpoint 3 is damaged" in lines[0]
    m = mesh.make_mesh(Mesh(data=1, fsdp=1, tp=1))
    found, _ = reader.restore(2, like(state(m, 0)))
    assert int(found.step) == 2
    reader.save(3, found, cursor={}, meta=META)  # the run comes past step 3 again
    assert reader.latest() == 3 and (folder / "damaged_3").is_dir()
    reader.close()


def test_orbax_alone_does_not_see_a_flipped_bit(tmp_path):
    """Why there are digests. When this fails, Orbax has learned to check, and they may go."""
    tree = {"noise": jnp.asarray(np.random.default_rng(0).standard_normal(4096, np.float32))}
    saver = opened(tmp_path, [])
    saver.save(1, tree, cursor={}, meta=META)
    saver.close()
    reader = opened(tmp_path, [])
    flip(biggest(tmp_path / "1"))
    found, _ = reader.restore(1, like(tree))
    reader.close()
    assert (np.asarray(found["noise"]) != np.asarray(tree["noise"])).sum() == 1
    assert "has changed" in checkpoint.damage(tmp_path / "1")


def test_an_unfinished_step_is_not_used(folder):
    (folder / "3" / checkpoint.MANIFEST).unlink()
    (folder / "4.orbax-checkpoint-tmp-17").mkdir()
    lines = []
    reader = opened(folder, lines)
    assert reader.latest() == 2 and len(lines) == 1 and "never finished" in lines[0]
    assert sorted(p.name for p in folder.iterdir()) == ["2", "damaged_3"]
    reader.close()


def changed(**sections: dict) -> dict:
    return META | {"config": META["config"] | sections}


def test_another_model_is_refused_by_name():
    with pytest.raises(
        checkpoint.CheckpointError, match=r"config.model.hidden_size = 8, .* has 16"
    ):
        checkpoint.check_meta(META, changed(model={"hidden_size": 16}))
    with pytest.raises(checkpoint.CheckpointError, match="init_from"):
        checkpoint.check_meta(META, META | {"base": "c"})


def test_other_settings_may_change_and_are_named():
    assert checkpoint.check_meta(META, META) == []
    notes = checkpoint.check_meta(META | {"plan": "p"}, META | {"plan": "q"})
    assert notes == ["the checkpoint was trained on plan p, this run has q"]
    notes = checkpoint.check_meta(META, changed(optim={"peak_lr": 0.5}) | {"data": "c"})
    assert notes[0] == "config.optim.peak_lr was 1.0, is now 0.5" and "data b" in notes[1]
