"""Stages: which one a step belongs to, the schedules, what trains, and what a config refuses."""

import itertools

import jax
import jax.numpy as jnp
import micro_run
import numpy as np
import pytest

from medmax_jax import config
from medmax_jax.models import chameleon
from medmax_jax.sharding import make_mesh
from medmax_jax.training import optimizer, stages, step


def staged(*run_stages: object, **changes: object) -> config.Run:
    settings = micro_run.settings(**changes)
    settings.stages = run_stages
    return config.from_config_dict(settings)


def test_steps_belong_to_stages():
    run = staged(dict(steps=2), dict(steps=3))
    assert stages.ends(run) == [2, 5]
    assert [stages.at(run, done) for done in range(6)] == [0, 0, 1, 1, 1, 1]
    assert [stages.reported(run, s) for s in (1, 2, 3)] == [{"stage": n} for n in (0, 0, 1)]
    plain = micro_run.run()
    assert stages.ends(plain) == [5] and stages.at(plain, 3) == 0
    assert stages.reported(plain, 3) == {} and stages.trains(plain, 0) == ""


def test_a_stage_has_the_settings_of_the_run_that_it_does_not_set():
    run = staged(
        dict(steps=2, mixing=dict(weights="generated=1"), loss_weights=dict(image=0.5)),
        dict(steps=3, condition_dropout=dict(all=0.25)),
        mixing__fraction=0.5,
        data__seed=7,
        data__condition_dropout=dict(text=0.1, image=0.0, all=0.0),
    )
    first, second = (config.run_of_stage(run, n) for n in (0, 1))
    assert (first.mixing.weights, first.mixing.fraction) == ("generated=1", 0.5)
    assert (first.loss.weights.text, first.loss.weights.image) == (1.0, 0.5)
    assert first.data.condition_dropout == run.data.condition_dropout
    assert second.mixing == run.mixing and second.loss == run.loss
    assert second.data.condition_dropout == config.ConditionDropout(text=0.1, image=0.0, all=0.25)
    assert (first.data.seed, first.train.steps, second.train.steps) == (7, 2, 3)
    assert second.data.seed != 7 and first.stages == second.stages == ()
    assert config.from_config_dict(config.to_dict(run)) == run


def test_one_schedule_or_one_for_each_stage():
    run = staged(dict(steps=4), dict(steps=10), train__steps=14, optim__warmup_ratio=0.25)
    assert stages.schedule(run) == stages.schedule(micro_run.run(train__steps=14)) == (14,)
    own = staged(
        dict(steps=4), dict(steps=10),
        train__steps=14, optim__warmup_ratio=0.25, optim__schedule="stage",
    )  # fmt: skip
    assert stages.schedule(own) == (4, 10)

    def rates(steps: tuple[int, ...], counts: range) -> np.ndarray:
        rate = jax.jit(lambda k: optimizer.learning_rate(k, own.optim, steps=steps))
        return np.array([rate(k) for k in counts])

    joined = rates((4, 10), range(14))
    np.testing.assert_array_equal(joined[:4], rates((4,), range(4)))
    np.testing.assert_array_equal(joined[4:], rates((10,), range(10)))
    assert joined[0] == joined[4] == 0 and joined.argmax() in (1, 7)


def test_a_stage_trains_the_parameters_that_it_names():
    run = staged(dict(steps=2, trains="self_attn, up_proj"), dict(steps=3))
    with jax.set_mesh(make_mesh(run.mesh)):
        model = chameleon.abstract_model(run.model, run.vocab, run.lora)
        trainable = step.split_trainable(model, "lora")[1]
    stages.check_trains(run, trainable)
    with pytest.raises(config.ConfigError, match=r"stages\[0\]\.trains is ' ,': '' is no name"):
        stages.check_trains(staged(dict(steps=5, trains=" ,")), trainable)
    old = jax.tree.map(lambda x: jnp.zeros(x.shape), trainable)
    new = jax.tree.map(lambda x: jnp.ones(x.shape), trainable)
    kept = stages.keep_others(new, old, "self_attn, up_proj")
    changed = {name: bool(leaf.all()) for name, leaf in stages.flatten_named(kept).items()}
    named = {name: "self_attn" in name or "up_proj" in name for name in changed}
    assert changed == named and set(changed.values()) == {True, False}
    assert stages.keep_others(new, old, "") is new
    numbers = sum(x.size for n, x in stages.flatten_named(trainable).items() if named[n])
    assert stages.count_trained(trainable, "self_attn, up_proj") == numbers
    facts = stages.facts(run, trainable)
    assert facts[1]["first_step"] == 3 and facts[1]["trained"] == facts[1]["trainable"]
    assert facts[1]["tokens"] == 3 * 8 * 32
    assert f"trains self_attn, up_proj: {numbers:,} of" in stages.describe(facts[0])


def test_lengths_are_scaled_to_another_number_of_steps():
    assert stages.scaled([3, 2], 10) == [6, 4]
    assert stages.scaled([85, 120, 70], 11) == [3, 5, 3]
    for lengths, total in itertools.product(([1, 1000], [1000, 1], [5, 1, 9]), range(3, 40)):
        found = stages.scaled(lengths, total)
        assert sum(found) == total and min(found) >= 1
    run = stages.with_steps(staged(dict(steps=2), dict(steps=3)), 50)
    assert stages.ends(run) == [20, 50] and run.train.steps == 50
    config.check(run)
    assert stages.with_steps(micro_run.run(), 50) == micro_run.run(train__steps=50)


@pytest.mark.parametrize(
    "run_stages, message",
    [
        ((dict(steps=3), dict(steps=1)),
         r"config\.stages: steps is \[3, 1\]; it must be 5 in all, equal to train\.steps, not 4"),
        ((dict(steps=7), dict(steps=-2)), r"config\.stages\[1\]\.steps is -2; it must be above 0"),
        ((dict(steps=5.0),), r"config\.stages\[0\]\.steps is 5\.0 \(float\); it must be int"),
        ((dict(steps=3), dict(mixing=dict(weights=""))), r"config\.stages\[1\]\.steps is missing"),
        ((3,), r"config\.stages\[0\] is 3; it must be a section with the fields steps, mixing"),
        ((dict(step=5),),
         r"config\.stages\[0\]\.step is not a field; did you mean config\.stages\[0\]\.steps\?"),
        ((dict(steps=5, weights="a=1"),), r"config\.stages\[0\]\.weights is not a field"),
        ((dict(steps=5, loss_weights=dict(audio=1.0)),),
         r"config\.stages\[0\]\.loss_weights\.audio is not a field; the fields are text, image"),
        ((dict(steps=5, condition_dropout=dict(video=0.1)),),
         r"config\.stages\[0\]\.condition_dropout\.video is not a field"),
        ((dict(steps=5, condition_dropout=dict(text=1.5)),),
         r"config\.stages\[0\]: config\.data\.condition_dropout\.text is 1\.5; it must be a prob"),
        ((dict(steps=5, mixing=dict(by="image")),),
         r"config\.stages\[0\]: config\.mixing\.by is 'image'; it must be one of source, task"),
        ((dict(steps=2, view="released"), dict(steps=3, view="pad")),
         r"config\.stages\[1\]\.view is 'pad'; it must be released, as vq\.view: the records of a"),
        (65 * (dict(steps=1),), r"config\.stages is .*; it must be a list of at most 64 sections"),
    ],
)  # fmt: skip
def test_wrong_stages_are_refused_by_name(run_stages, message):
    with pytest.raises(config.ConfigError, match=message):
        staged(*run_stages)


def test_settings_without_stages_mean_what_they_meant():
    old = config.to_dict(micro_run.run())
    del old["stages"], old["optim"]["schedule"], old["vq"]["view"], old["vq"]["answer_view"]
    assert config.from_config_dict(old) == micro_run.run()
