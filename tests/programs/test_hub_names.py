"""hf:// names as a user writes them: the programs that read published files, from a real server."""

import json
import pathlib

import numpy as np
import pytest
from forked_programs import forked
from hub_server import SHA, Hub, serving

from medmax_jax.models.vocab import BOS, EOS, SEP

ROOT = pathlib.Path(__file__).parents[2]
TINY, ADAPTER = (f"hf://org/{name}@{SHA}" for name in ("tiny", "tiny_adapter"))
IMAGES = sorted((ROOT / "data" / "sample" / "images").glob("film-child-19*.jpg"))[:4]
ROW = dict(text="Is it?<reserved08706>yes", task="VQA", source="pathvqa", credential="no")
TOKENS = [BOS, 8_720, 8_721, SEP, 8_722, EOS]
ITEM = dict(task_name="slake", question_type="closed", prompt="Is it a CT?", answer="no")
QUESTION = dict(
    img_id=1, img_name="xmlab1/source.jpg", question="What is it?", answer="MRI", q_lang="en",
    answer_type="OPEN", qid=11,
)  # fmt: skip


def files_of(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module", name="hub")
def fixture_hub():
    names = [path.name for path in IMAGES]
    documents = [
        ROW | dict(text=f"<image>{ROW['text']}", image_path=name, id=name, group=name, turns=1)
        for name in names
    ]
    data = {f"images/{path.name}": path.read_bytes() for path in IMAGES} | {
        "train.jsonl": lines([ROW | dict(tokens=TOKENS, image_path="")] * 3),
        "documents.jsonl": lines(documents),
        "items.jsonl": lines(ITEM | dict(image_path=name) for name in names),
    }
    return Hub({
        "org/tiny": files_of(ROOT / "medmax_jax" / "tiny"),
        "org/tiny_adapter": files_of(ROOT / "medmax_jax" / "tiny_adapter"),
        "datasets/org/data": data,
        "datasets/org/slake": {"test.json": json.dumps([QUESTION]).encode()},
    })  # fmt: skip


@pytest.fixture(name="server")
def fixture_server(hub, tmp_path, monkeypatch):
    with serving(hub) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield url


def run(*commands):
    for status, output in forked(*commands):
        assert status == 0, output[-3000:]


def notes(folder):
    return json.loads((folder / "dataset.json").read_text())["notes"]


def documents(out):
    command = "data.prepare documents --from hf://org/data/documents.jsonl".split()
    command += ["--images", "hf://datasets/org/data/images", "--model", "hf://org/tiny"]
    return [*command, "--out", str(out)]


def test_prepare(server, hub, tmp_path):
    imported, items, records = (tmp_path / name for name in ("imported", "items", "records"))
    rows = "data.prepare import --from hf://org/data/train.jsonl --model_layout hf://org/tiny"
    benchmark = "data.prepare eval_items --benchmark slake --allow_counts --from hf://org/slake"
    run(
        [*rows.split(), "--out", str(imported)],
        [*benchmark.split(), "--out", str(items)],
        documents(records),
    )
    data = f"hf://datasets/org/data@{SHA}"
    assert notes(imported)["file"] == f"{data}/train.jsonl" and notes(imported)["rows"] == 3
    assert notes(records)["source"] == f"{data}/documents.jsonl"
    assert json.loads((records / "dataset.json").read_text())["documents"] == len(IMAGES)
    summary = json.loads((items / "import.json").read_text())
    assert summary["from"] == f"hf://datasets/org/slake@{SHA}" and summary["rows"] == 1
    assert hub.sent.count("datasets/org/data/items.jsonl") == 0  # not asked for
    assert hub.sent.count("org/tiny/model.safetensors") == 1
    refused = ["data.prepare", "sample", "--out", "hf://org/data/new"]
    ((status, output),) = forked(refused)
    assert status == 1 and "error: --out is on the hub, which is read only" in output


@pytest.mark.slow
def test_train_generate_and_evaluate(server, hub, tmp_path):
    records = tmp_path / "records"
    run(documents(records))
    hub.repositories["datasets/org/records"] = files_of(records)
    train, answers, evaluated = (tmp_path / name for name in ("train", "answers", "evaluated"))
    training = "medmax_jax.train --config=configs/tiny.py --config.train.init_from=hf://org/tiny"
    training += " --config.train.steps=1 --config.train.eval_every=0 --config.train.samples=0"
    training += " --config.data.validation="
    generation = "medmax_jax.generate --model=hf://org/tiny --adapter=hf://org/tiny_adapter"
    generation += f" --image={IMAGES[0]} --config.sample.max_gen_len=2"
    evaluation = "eval.run --config=configs/eval_tiny.py --model=native:hf://org/tiny"
    evaluation += " --adapter=hf://org/tiny_adapter --config.questions=hf://org/data/items.jsonl"
    evaluation += " --config.images=hf://datasets/org/data/images --config.probes="
    evaluation += " --config.resamples=2000"
    run(
        [*training.split(), "--config.data.train=hf://org/records", f"--workdir={train}"],
        [*generation.split(), "--prompt=A CT?", f"--out={answers}"],
        [*evaluation.split(), f"--workdir={evaluated}"],
        ["eval.report", f"--workdir={evaluated}"],
    )
    config = json.loads((train / "config.json").read_text())["config"]
    assert config["train"]["init_from"] == TINY
    assert config["data"]["train"] == f"hf://datasets/org/records@{SHA}"
    request = json.loads((answers / "request.json").read_text())
    assert (request["model"], request["adapter"]) == (TINY, ADAPTER)
    summary = json.loads((evaluated / "summary.json").read_text())
    assert (summary["model"], summary["adapter"]) == (TINY, ADAPTER)
    data = f"hf://datasets/org/data@{SHA}"
    assert summary["settings"]["questions"] == [f"{data}/items.jsonl"]
    assert summary["settings"]["images"] == f"{data}/images"
    assert not np.isnan(summary["scores"][0]["value"]) and summary["errors"] == 0


@pytest.mark.slow
def test_convert_and_the_layout_of_hugging_face(server, hub, tmp_path):
    published, peft, workdir = (tmp_path / name for name in ("published", "peft", "evaluated"))
    convert = "medmax_jax.convert --from hf://org/tiny_adapter --base hf://org/tiny".split()
    run(
        [*convert, "--to", str(peft), "--format", "peft"],
        [*convert, "--to", str(published), "--format", "hf"],
    )
    settings = json.loads((peft / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/tiny", SHA)
    assert f"native layout of `{TINY}`" in (published / "README.md").read_text()
    hub.repositories["org/tiny_hf"] = files_of(published)
    evaluation = ["eval.run", "--config=configs/eval_tiny.py", "--model=hf://org/tiny_hf"]
    ((status, output),) = forked([*evaluation, "--dry_run", f"--workdir={workdir}"])
    assert status == 0, output
    assert f"converting hf://org/tiny_hf@{SHA} to {tmp_path / 'cache'}" in output
