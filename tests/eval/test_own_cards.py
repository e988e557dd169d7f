"""A benchmark of the user's own: cards in a Python file, items in plain fields, run and shown."""

import json
import pathlib
import shutil

import eval_setup
import pytest

from medmax_jax.config import build
from medmax_jax.configs import eval_tiny
from medmax_jax.eval import evaluate, report
from medmax_jax.eval.benchmarks.card import TaskSpec
from medmax_jax.eval.config import EvalError, Settings
from medmax_jax.eval.metrics import aggregate, per_record
from medmax_jax.eval.pipeline import stages
from medmax_jax.eval.records import read_records
from medmax_jax.eval.reporting import tables
from medmax_jax.eval.tasks import catalog, own_cards
from medmax_jax.eval.tasks.families import CHOICES
from medmax_jax.eval.tasks.items import TaskError
from medmax_jax.io import journal

IMAGES = sorted((pathlib.Path(__file__).parents[2] / "data" / "sample" / "images").iterdir())
HEAD = "from medmax_jax.eval.benchmarks.card import Published, TaskSpec\n"
CARD = (
    'TaskSpec(task="{task}", title="T", family="{family}", source="S here", licence="CC0 1.0", '
    'metric="{metric}"{more})'
)


def card(task="own_mcq", family="vqa_mcq", metric="accuracy", more=""):
    return CARD.format(task=task, family=family, metric=metric, more=more)


def write_cards(folder, *cards, text=""):
    path = folder / "my_cards.py"
    path.write_text(text or f"{HEAD}CARDS = ({', '.join(cards)},)\n")
    return path


def choice(n, **changes):
    fields = dict(question="Which?", options=["CT", "MRI"], answer="MRI", images=[f"{n}.jpg"],
                  group=f"p{n // 2}", tags=dict(organ="lung" if n % 2 else "brain"))  # fmt: skip
    return fields | changes


def write_items(folder, rows):
    for n, image in enumerate(IMAGES[:40]):
        shutil.copy(image, folder / f"{n}.jpg")
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(items):
    config = eval_tiny.get_config().unlock()
    config.update(questions=str(items), baselines="constant,majority", options=False)
    config.update(resamples=2_000, probes="blank,swapped,rotated")
    return build(Settings, config)


def run(items, out, cards, **flags):
    flags = dict(model="baseline:constant", progress=lambda line: None) | flags
    return stages.run(settings(items), out, cards=cards, **flags)


def test_own_items_run_like_the_built_in_ones(tmp_path):
    published = ', counts=40, published=(Published(model="GPT-9", value=71.5, metric="accuracy, %",'
    published += ' read="its paper"),), differs="five shots"'
    cards = write_cards(tmp_path, card(more=published), card("own_open", "vqa_open", "exact"))
    rows = [choice(n, task="own_mcq", answer="A" if n % 4 else "MRI") for n in range(40)]
    listed = [["portable", "old"], ["portable"], []]
    rows += [
        dict(task="own_open", question="What?", answer="a CT", images=f"{n}.jpg", id=f"o{n}",
             tags=listed[n % 3])
        for n in range(24)
    ]  # fmt: skip
    summary = run(write_items(tmp_path, rows), tmp_path / "out", cards)
    heads = {row.task: row for row in tables.headlines(summary.scores)}
    assert set(heads) == {"own_mcq", "own_open"}
    assert (heads["own_mcq"].n, heads["own_mcq"].groups) == (40, 20)
    assert heads["own_mcq"].value == 0.75 and heads["own_open"].metric == "exact"
    assert {row["probe"] for row in summary.probes["rows"]} >= {"blank", "swapped", "rotated_1"}
    assert [card["task"] for card in summary.cards] == ["own_mcq", "own_open"]
    records = read_records(tmp_path / "out" / "records.jsonl")
    tags = {record.id: dict(record.slices) for record in records}
    assert tags["0"] == {"organ": "brain"} and tags["o2"] == {"portable": "no", "old": "no"}
    assert tags["o0"] == {"portable": "yes", "old": "yes"}
    values = aggregate.scores_by_item(records)
    resampling = stages.intervals.Resampling(0, 2_000)
    sliced, few = tables.slices(records, values, summary, resampling=resampling)
    assert [row["slice"] for row in sliced] == ["organ: brain", "organ: lung"] and few == 4
    assert tables.not_run(summary, records) == []
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["cards"] == own_cards.digest(own_cards.load_cards(cards))
    page = (tmp_path / "out" / "report.html").read_text()
    for text in ("Cards of the tasks", "S here", "CC0 1.0", "GPT-9", "five shots", "organ: lung"):
        assert text in page
    # the page is made again from the workdir, without the file of the cards
    cards.unlink()
    report.rewrite_report(tmp_path / "out", "")
    assert (tmp_path / "out" / "report.html").read_text() == page


def test_a_workdir_belongs_to_its_cards(tmp_path):
    items = write_items(tmp_path, [choice(n) for n in range(4)])
    run(items, tmp_path / "out", write_cards(tmp_path, card()))
    write_cards(tmp_path, card(), text=f"# a comment\n{HEAD}\nCARDS = [{card()}]\n")
    run(items, tmp_path / "out", tmp_path / "my_cards.py")
    with pytest.raises(EvalError, match="another cards"):
        run(items, tmp_path / "out", write_cards(tmp_path, card(more=', split="all"')))


@pytest.mark.parametrize(
    "cards, message",
    [
        ((card(family="vqa_msq"),), "family is 'vqa_msq'; did you mean vqa_mcq"),
        ((card(family="visual_chat"),), "family is 'visual_chat'; use one of vqa_closed"),
        ((card(metric="bleu"),), "metric is 'bleu'; expected accuracy for vqa_mcq"),
        ((card("slake_closed"),), "the name is that of a built-in task"),
        ((card("vqa_mcq"),), "the name is that of a built-in task"),
        ((card("a b"),), "other characters than letters"),
        ((card(), card()), "two cards are named 'own_mcq'"),
        ((card(more=", counts=0"),), "counts is 0"),
        ((card(more=', data_class="secret"'),), "data_class is 'secret'; use one of open"),
        ((card(more=", published=(1,)"),), "published holds other values"),
        ((card(more=", split=3"),), "split is a int"),
        (
            (card(more=", published=(Published(model='m', value='9', metric='', read=''),)"),),
            "published has the value '9'; expected a number",
        ),
        ((card(more=", sets='case'"),), "sets is a str; expected QuestionSets"),
        (("3",), "CARDS holds a int"),
    ],
)
def test_unusable_cards_are_refused_before_anything_is_loaded(tmp_path, cards, message):
    path = write_cards(tmp_path, *cards)
    with pytest.raises(EvalError, match=message):
        run(tmp_path / "no_items.jsonl", tmp_path / "out", path, model="native:nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("CARD = 1\n", "has no CARDS"),
        ("import nothing_like_this\n", "ModuleNotFoundError: No module named"),
        ("CARDS = (\n", "SyntaxError"),
        ("raise SystemExit(0)\n", "SystemExit"),
        (f"{HEAD}CARDS = (TaskSpec(task='a'),)\n", "TypeError.*family"),
    ],
)
def test_a_file_without_cards_is_named(tmp_path, text, message):
    with pytest.raises(EvalError, match=f"my_cards.py.*{message}"):
        own_cards.load_cards(write_cards(tmp_path, text=text))
    with pytest.raises(EvalError, match="is not a file; name a Python file"):
        own_cards.load_cards(tmp_path / "none.py")


@pytest.mark.parametrize(
    "row, message",
    [
        (choice(0, option=["CT"]), "'option' is not a field of an item; did you mean options"),
        (choice(0, task="else"), "task is 'else'; use one of the cards own_mcq"),
        (choice(0, answer=None), "answer is missing"),
        (choice(0, tags="lung"), "tags is not a list of texts"),
        (choice(0, tags=[f"t{n}" for n in range(101)]), "more than 100 different tags"),
    ],
)
def test_unusable_items_are_named(row, message):
    own = TaskSpec(
        task="own_mcq", title="", family="vqa_mcq", source="", licence="", metric="accuracy"
    )
    with pytest.raises(EvalError, match=message):
        own_cards.read_items([("items.jsonl line 1", row)], [own])


def test_options_of_an_open_question_are_not_lost():
    own = TaskSpec(task="own", title="", family="vqa_open", source="", licence="", metric="exact")
    with pytest.raises(EvalError, match="line 1: options are not shown for card 'own' of .* vqa_o"):
        own_cards.read_items([("line 1", choice(0))], [own])


def test_rules_of_all_items_hold_for_own_ones():
    own = TaskSpec(task="own_mcq", title="", family="vqa_mcq", source="", licence="",
                   metric="accuracy", counts=2, data_class="credentialed")  # fmt: skip
    with pytest.raises(TaskError, match="items.jsonl line 1: the answer cannot be read"):
        own_cards.read_items([("items.jsonl line 1", choice(0, answer="PET"))], [own])
    with pytest.raises(EvalError, match="counts is 2, and the files have 1"):
        own_cards.read_items([("line 1", choice(0))], [own])
    (item, _) = own_cards.read_items([("line 1", choice(0)), ("line 2", choice(1))], [own])
    assert (item.task, item.data_class, item.group) == ("own_mcq", "credentialed", "p0")
    assert item.prompt == "Which?\nA: CT\nB: MRI"
    with pytest.raises(EvalError, match="name the file of its card with --cards"):
        own_cards.read_items([("line 1", choice(0))], [])
    released = dict(task_name="slake", question_type="closed", prompt="Is it?", answer="yes",
                    image_path="0.jpg")  # fmt: skip
    items = own_cards.read_items([("line 1", released), ("line 2", choice(1))],
                                 [TaskSpec(task="own_mcq", title="", family="vqa_mcq", source="",
                                           licence="", metric="accuracy")])  # fmt: skip
    assert [item.task for item in items] == ["slake_closed", "own_mcq"]


@pytest.mark.parametrize("family", own_cards.METRICS)
def test_each_family_takes_an_own_item(family):
    own = TaskSpec(task="own", title="", family=family, source="", licence="", metric="accuracy")
    answer = "7 mm" if family == "vqa_numeric" else "yes"
    row = dict(question="Is it?", answer=answer, images=["0.jpg"])
    row |= dict(options=["yes", "no"]) if family in CHOICES else {}
    (item,) = own_cards.read_items([("line 1", row)], [own])
    assert (item.task, item.family, item.images) == ("own", family, ("0.jpg",))


def test_the_metrics_of_cards_are_those_that_built_in_tasks_have():
    for spec in catalog.TASKS.values():
        if spec.family in own_cards.METRICS and not spec.sets:
            assert spec.metric in own_cards.METRICS[spec.family]
    record = eval_setup.record(eval_setup.item("a", "vqa_open", 0), "A CT.")
    assert next(iter(per_record.record_scores(record))) in own_cards.METRICS["vqa_open"]


def test_cards_from_python_and_with_the_sample(tmp_path):
    items = write_items(tmp_path, [choice(n) for n in range(4)])
    cards = write_cards(tmp_path, card())
    options = dict(baselines="", probes="", options=False, resamples=2_000, cards=cards)
    summary = evaluate("baseline:constant", items, tmp_path / "out", progress=print, **options)
    assert summary["scores"][0]["task"] == "own_mcq"
    with pytest.raises(EvalError, match="config.questions is sample"):
        evaluate("baseline:constant", "sample", tmp_path / "other", progress=print, **options)
    count = stages.export_items(settings(items), tmp_path / "exported.jsonl", cards=cards)
    assert count == 4 and journal.read_jsonl(tmp_path / "exported.jsonl")[0]["task"] == "own_mcq"
