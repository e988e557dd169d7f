"""Which settings must match those of a checkpoint: all that affect results."""

import dataclasses

import micro_run
import pytest

from medmax_jax import config
from medmax_jax.checkpoints import resume
from medmax_jax.checkpoints.manager import CheckpointError


def meta(**changes: object) -> dict:
    metadata = {"config": config.to_dict(micro_run.run()), "base": "a", "data": "b", "plan": "p"}
    metadata["versions"] = {"jax": "1"}
    return metadata | changes


def with_field(section: str, field: str, value: object) -> dict:
    current = meta()
    current["config"][section][field] = value
    return current


FIELDS = [
    (section.name, field.name)
    for section in dataclasses.fields(config.Run)
    if section.name != "stages"  # a list: tests/programs/test_staged_run.py
    for field in dataclasses.fields(section.type)
]


@pytest.mark.parametrize("section, field", FIELDS)
def test_every_field_is_free_or_must_match(section, field):
    """A field that is added later binds until FREE names it, with the reason."""
    current, name = with_field(section, field, "another"), f"config.{section}.{field}"
    if (section, field) == ("train", "steps"):
        return
    if resume.is_free(f"{section}.{field}"):
        (note,) = resume.check_meta(meta(), current, extend=False)
        assert name in note and "another" in note
    else:
        with pytest.raises(CheckpointError, match=f"{name} was .*, is now 'another'"):
            resume.check_meta(meta(), current, extend=True)


def test_free_fields_exist_and_do_not_affect_results():
    field_names = {f"{s}.{f}" for s, f in FIELDS} | {s for s, _ in FIELDS}
    assert resume.FREE.keys() <= field_names
    checked = {"optim", "lora", "mixing", "vocab", "vq"}
    assert not {name.split(".")[0] for name in resume.FREE} & checked
    assert not {f"data.{f}" for f in ("batch_size", "seed", "mask", "pack")} & resume.FREE.keys()
    assert not {f"train.{f}" for f in ("seed", "prng_impl", "trains")} & resume.FREE.keys()


def test_checkpoints_without_views_resume_in_the_released_one():
    stages = [dict(steps=2, view="released"), dict(steps=3, view="released")]
    current = meta(config=meta()["config"] | {"stages": stages})
    old = meta(config=meta()["config"] | {"stages": [dict(steps=2), dict(steps=3)]})
    old["config"]["vq"] = {n: v for n, v in old["config"]["vq"].items() if "view" not in n}
    assert resume.check_meta(old, current, extend=False) == []
    current["config"]["vq"] |= {"view": "pad"}
    with pytest.raises(CheckpointError, match="config.vq.view was 'released', is now 'pad'"):
        resume.check_meta(old, current, extend=False)


@pytest.mark.parametrize("name", ["base", "data", "plan"])
def test_fingerprints_must_match(name):
    with pytest.raises(CheckpointError, match=f"{name} was .*, is now other"):
        resume.check_meta(meta(), meta(**{name: "other"}), extend=True)


def test_all_differences_are_shown_at_once():
    current = with_field("optim", "peak_lr", 9.0)
    current["config"]["data"]["seed"] = 7
    with pytest.raises(CheckpointError, match="data.seed was 0, is now 7; .*peak_lr was 0.01"):
        resume.check_meta(meta(), current, extend=False)


def test_steps_increase_only_with_extend():
    longer, shorter = with_field("train", "steps", 9), with_field("train", "steps", 3)
    (note,) = resume.check_meta(meta(), longer, extend=True)
    assert "was 5, is now 9 by --extend" in note
    for current, extend in ((longer, False), (shorter, False), (shorter, True)):
        with pytest.raises(CheckpointError, match="train.steps was 5"):
            resume.check_meta(meta(), current, extend=extend)


def test_version_changes_are_reported():
    (note,) = resume.check_meta(meta(), meta(versions={"jax": "2"}), extend=False)
    assert note == "jax was 1, is now 2"
