"""Shots and the perturbation: what a model is shown, what records state, what is refused."""

import dataclasses
import json
from pathlib import Path

import benchmark_files as files
import numpy as np
import PIL.Image
import pytest

from medmax_jax.config import build
from medmax_jax.configs import eval_tiny
from medmax_jax.endpoints import cached_chat_api
from medmax_jax.eval import evaluate
from medmax_jax.eval.config import EvalError, Settings
from medmax_jax.eval.models import loading
from medmax_jax.eval.pipeline import cost_estimate, perturbation
from medmax_jax.eval.records import Shot, is_credentialed
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.eval.tasks import probes, selection, shots
from medmax_jax.eval.tasks.families import TaskError
from medmax_jax.eval.tasks.items import prompt_parts

OPTIONS = dict(progress=lambda line: None, baselines="", probes="", options=False)


class Recorder:
    """Answers yes and keeps what it was asked."""

    name = fingerprint = "recorder"

    def __init__(self):
        self.requests = []

    def generate(self, requests):
        self.requests += requests
        return [["yes" if len(r.parts) > 2 or r.parts[-1].endswith("0?") else "no"]
                for r in requests]  # fmt: skip


def write(folder, count=12, **changes):
    """Write questions about real images, two of each group."""
    rows = []
    for n in range(count):
        files.put(folder, f"{n}.jpg", files.image(n))
        rows.append(
            dict(
                task_name="vqa_rad", question_type="closed", id=f"q{n}", prompt=f"Is it {n}?",
                answer="yes" if n % 2 else "no", image_path=f"{n}.jpg", group=f"g{n // 2}",
            ) | changes
        )  # fmt: skip
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def items_of(folder, **changes):
    rows = [json.loads(line) for line in write(folder, **changes).read_text().splitlines()]
    return task_items.from_rows(rows)


def test_drawn_shots_are_of_other_groups_and_stay_the_same(tmp_path):
    items = items_of(tmp_path)
    drawn = shots.with_shots(items, items, 3, seed=0)
    groups = {item.id: item.group for item in items}
    for item in drawn:
        assert len({shot.id for shot in item.shots}) == 3
        assert item.group not in {groups[shot.id] for shot in item.shots}
    assert drawn == shots.with_shots(items[::-1], items, 3, seed=0)[::-1]  # by seed and id
    assert drawn != shots.with_shots(items, items, 3, seed=1)
    assert shots.with_shots(drawn, items, 0, seed=0) == items
    with pytest.raises(TaskError, match="11 shots of other groups and .* but 10 .* reduce [^,]*s$"):
        shots.with_shots(items, items, 11, seed=0)
    with pytest.raises(
        TaskError, match="shot_distractor of item .* but 0 .* leave shot_distractor"
    ):
        shots.with_distractor(drawn, drawn[:1], seed=0)


def test_a_row_s_own_shots_come_first(tmp_path):
    own = [dict(prompt=f"Shot {n}?", answer=str(n), image_path=f"{n}.jpg") for n in range(3)]
    items = items_of(tmp_path, shots=own)
    for count, expected in ((0, ""), (2, "01"), (5, "012"), (-1, "012")):
        shown = shots.with_shots(items, items, count, seed=0)
        assert {"".join(s.answer for s in item.shots) for item in shown} == {expected}
    plain = [dataclasses.replace(item, shots=()) for item in items]
    assert shots.with_shots(plain, plain, -1, seed=0) == plain  # none are drawn


@pytest.mark.parametrize("prompt", ["sft", "chameleon"])
def test_the_prompt_is_interleaved(tmp_path, prompt):
    item = items_of(tmp_path)[0]
    example = Shot(id="", prompt="Is it left?", answer="yes", images=("1.jpg",))
    parts = prompt_parts(dataclasses.replace(item, shots=(example, example)), tmp_path, prompt)
    question = prompt_parts(item, tmp_path, prompt)
    image, text = parts[:2]
    assert image == tmp_path / "1.jpg" and parts == (image, text, image, text, *question)
    assert text.endswith("Is it left?\nAnswer: yes\n\n")
    assert text.count("Answer:") == 1  # of the wording of a base model too


def test_shots_of_a_generation_task_have_the_image_as_their_answer(tmp_path):
    files.put(tmp_path, "a.jpg", files.image(0))
    rows = [
        dict(task_name="image_generation", question_type="x", prompt=f"Draw {n}.", answer="",
             image_path=f"{n}.jpg", id=f"{n}", group=f"g{n}")
        for n in range(3)
    ]  # fmt: skip
    rows += [
        dict(task_name="edit", question_type="editing", prompt="Remove it.", answer="", id=f"e{n}",
             image_path=f"{n}.jpg", reference_image=f"{n + 5}.jpg", group=f"g{n}")
        for n in range(2)
    ]  # fmt: skip
    items = task_items.from_rows(rows)
    drawn = shots.with_shots(items, items, 1, seed=0)
    other = {"0": ("1", "2")}[drawn[0].id]
    assert drawn[0].shots[0].id in other
    text, image, question = prompt_parts(drawn[0], tmp_path)
    assert text == f"Draw {drawn[0].shots[0].id}.\nAnswer:" and question == "Draw 0."
    assert image == tmp_path / f"{drawn[0].shots[0].id}.jpg"
    assert prompt_parts(drawn[3], tmp_path) == (
        *(tmp_path / "1.jpg", "Remove it.\nAnswer:", tmp_path / "6.jpg"),
        *(tmp_path / "0.jpg", "Remove it."),
    )
    with pytest.raises(TaskError, match="reference_image is missing; a image_editing row requires"):
        task_items.from_rows([{k: v for k, v in rows[3].items() if k != "reference_image"}])
    with pytest.raises(TaskError, match="a image_generation row has no reference_image"):
        task_items.from_rows([rows[0] | {"reference_image": "1.jpg"}])


def test_a_credentialed_shot_makes_the_question_credentialed(tmp_path):
    items = items_of(tmp_path)
    secret = [dataclasses.replace(item, data_class="credentialed") for item in items[2:]]
    (shown,) = shots.with_shots(items[:1], [*items[:2], *secret], 1, seed=0)
    assert is_credentialed(shown)


def test_an_evaluation_with_shots_states_them_and_probes_them(tmp_path):
    path, model = write(tmp_path / "data"), Recorder()
    changes = OPTIONS | dict(probes="zero_shot,shots_reversed,shot_distractor,blank", shots=2)
    summary = evaluate(model, path, tmp_path / "w", **changes)
    lines = (tmp_path / "w" / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(len(record["shots"]) == 2 and record["shots"][0]["id"] for record in records)
    images = [[p for p in r.parts if isinstance(p, Path)] for r in model.requests]
    assert [len(shown) for shown in images[:12]] == [3] * 12
    rows = {row["probe"]: row for row in summary["probes"]["rows"]}
    assert set(rows) == {"zero_shot", "shots_reversed", "shot_distractor", "blank"}
    # With shots it says yes; without them no, but to questions that end in 0.
    assert (rows["zero_shot"]["before"], rows["zero_shot"]["n"]) == (0.5, 12)
    assert rows["zero_shot"]["flips"] == 10 / 12 and rows["zero_shot"]["ci_low"] is not None
    assert rows["shots_reversed"]["flips"] == rows["shot_distractor"]["flips"] == 0
    probed = (tmp_path / "w" / "probe_shot_distractor.jsonl").read_text().splitlines()
    assert {len(json.loads(line)["shots"]) for line in probed} == {3}
    blank = [p.name for r in model.requests[12:24] for p in r.parts if isinstance(p, Path)]
    assert set(blank) == {"blank.png"} and len(blank) == 36  # those of the shots too
    facts = json.loads((tmp_path / "w" / "run.json").read_text())
    assert (facts["shots"], facts["perturbation"]) == (2, "")
    with pytest.raises(EvalError, match="holds an evaluation with another shots; use a new"):
        evaluate(model, path, tmp_path / "w", **OPTIONS)


def test_a_workdir_of_an_earlier_version_has_no_shots(tmp_path):
    path, model = write(tmp_path / "data"), Recorder()
    evaluate(model, path, tmp_path / "w", **OPTIONS)
    facts = json.loads((tmp_path / "w" / "run.json").read_text())
    del facts["shots"], facts["perturbation"]
    (tmp_path / "w" / "run.json").write_text(json.dumps(facts))
    count = len(model.requests)
    evaluate(model, path, tmp_path / "w", **OPTIONS)
    assert len(model.requests) == count  # every record is kept
    for changes, name in ((dict(shots=1), "shots"), (dict(perturbation="kvasir"), "perturbation")):
        with pytest.raises(EvalError, match=f"an evaluation with another {name}"):
            evaluate(model, path, tmp_path / "w", **OPTIONS | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(shots=-2), "config.shots is -2; use 0 for none, 1 to 32, or -1"),
        (dict(shots=33), "config.shots is 33"),
        (dict(perturbation="blur"), "config.perturbation is 'blur'; use '' or 'kvasir'"),
        (
            dict(probes="zero_shot"),
            "has 'zero_shot', but no item .* set config.shots",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises((EvalError, TaskError), match=message):
        evaluate(Recorder(), write(tmp_path / "data"), tmp_path / "w", **OPTIONS | changes)
    assert not (tmp_path / "w" / "records.jsonl").exists()


def test_the_plan_counts_the_shots(tmp_path):
    path, plans = write(tmp_path / "data"), {}
    settings = build(Settings, eval_tiny.get_config())
    for count in (0, 2):
        now = dataclasses.replace(
            settings, questions=(str(path),), images=str(path.parent), shots=count, probes=()
        )
        spec = loading.ModelSpec(
            kind="native", where="m", adapter="", merge=False, fingerprint="m", adapter_digest=""
        )
        arguments = (now, selection.load_eval_set(now), spec, tmp_path / "w", selection.WHOLE)
        plans[count] = cost_estimate.estimate_cost(*arguments)["tokens_in"]
    images = 12 * 2 * cached_chat_api.TOKENS_PER_IMAGE
    assert plans[2] - plans[0] > images


def test_perturbed_images_are_those_of_the_item_and_the_seed(tmp_path):
    path, model = write(tmp_path / "data", 4), Recorder()
    changes = OPTIONS | dict(perturbation="kvasir", shots=1, probes="blank")
    evaluate(model, path, tmp_path / "w", **changes)
    shown = {r.id: [p for p in r.parts if isinstance(p, Path)] for r in model.requests[:4]}
    assert all(p.parent.name == perturbation.FOLDER for paths in shown.values() for p in paths)
    assert len({p.read_bytes() for paths in shown.values() for p in paths}) == 8
    blank = [p.name for r in model.requests[4:] for p in r.parts if isinstance(p, Path)]
    assert set(blank) == {"blank.png"}  # not perturbed
    again = Recorder()
    evaluate(again, path, tmp_path / "other", **changes)
    for request in again.requests[:4]:
        paths = [p for p in request.parts if isinstance(p, Path)]
        assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in shown[request.id]]


def test_the_draws_are_within_the_published_bounds():
    for n in range(300):
        drawn = perturbation.draw((200, 120), f"42 {n} 0")
        left, top, width, height = drawn.crop
        assert 0.89 <= width * height / (200 * 120) <= 1.0
        assert 0.94 <= (width / height) / (200 / 120) <= 1.06
        assert 0 <= left <= 200 - width and 0 <= top <= 120 - height
        assert abs(drawn.degrees) <= 10 and abs(drawn.shift[0]) <= 20 and abs(drawn.shift[1]) <= 12
        assert 0.8 <= drawn.brightness <= 1.2 and 0.8 <= drawn.contrast <= 1.2
    crops = {perturbation.draw((200, 120), str(n)).crop for n in range(50)}
    assert len(crops) > 25  # also crops that cover less than the image


def test_each_operation_is_the_published_one():
    with PIL.Image.open(files.IMAGES[0]) as file:
        image = file.convert("RGB")
    width, height = image.size
    still = perturbation.Draw(
        crop=(0, 0, width, height), degrees=0.0, shift=(0, 0), brightness=1.0, contrast=1.0,
        contrast_first=False,
    )  # fmt: skip
    whole = np.asarray(image)
    apply = lambda **changes: np.asarray(  # noqa: E731
        perturbation.apply(image, dataclasses.replace(still, **changes))
    )
    assert (apply() == whole).all()
    shifted = apply(shift=(3, -2))
    assert (shifted[:-2, 3:] == whole[2:, :-3]).all()
    assert not shifted[-2:].any() and not shifted[:, :3].any()  # black
    assert (apply(brightness=0.8) == np.floor(whole * np.float32(0.8))).mean() > 0.99
    turned = apply(degrees=10.0)
    assert not turned[0, 0].any() and not turned[-1, -1].any()  # corners are uncovered
    gray = int(np.asarray(image.convert("L"), float).mean() + 0.5)
    low = gray + 0.8 * (whole.astype(float) - gray)
    assert np.abs(apply(contrast=0.8) - low).max() <= 1
    cropped = apply(crop=(4, 6, width - 8, height - 12))
    box = image.crop((4, 6, width - 4, height - 6)).resize(image.size, PIL.Image.BICUBIC)
    assert (cropped == np.asarray(box)).all()


def test_probes_of_shots_change_nothing_else(tmp_path):
    items = shots.with_shots(items_of(tmp_path), items_of(tmp_path), 2, seed=0)
    makers = probes.probe_items(items, probes.SHOT_NAMES, ("vqa_closed",))
    assert list(makers) == list(probes.SHOT_NAMES)
    for make in makers.values():
        changed = make(0, None)
        assert [dataclasses.replace(i, shots=()) for i in changed] == [
            dataclasses.replace(i, shots=()) for i in items
        ]
    assert [i.shots for i in makers["shots_reversed"](0, None)] == [i.shots[::-1] for i in items]
    for before, after in zip(items, makers["shot_distractor"](0, None), strict=True):
        assert set(before.shots) < set(after.shots)
