"""Names that the MedMax release bars from text are never generated; paths as text raise."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import PIL.Image
import pytest
from generate_setup import DRAWN, SAMPLE, VOCAB
from test_generate import folder, generate  # noqa: F401

from medmax_jax.checkpoints import safetensors_file
from medmax_jax.generation import api, grammar, model_bundle
from medmax_jax.generation.output_files import prompts_from_flags, read_prompts
from medmax_jax.generation.requests import GenerateError, names_image
from medmax_jax.models import vocab as ids

BARRED = {VOCAB.size - 2: "</", VOCAB.size - 1: "<sub>"}  # ids that the micro tokenizer leaves free


@pytest.fixture(scope="module")
def barred_g(folder, tmp_path_factory):  # noqa: F811
    """Return the micro model with two text tokens that are most likely and begin with "<"."""
    changed = tmp_path_factory.mktemp("barred")
    shutil.copytree(folder, changed, dirs_exist_ok=True)
    spec = json.loads((changed / "tokenizer.json").read_text())
    assert not set(BARRED) & set(spec["model"]["vocab"].values())
    spec["model"]["vocab"] |= {name: i for i, name in BARRED.items()}
    (changed / "tokenizer.json").write_text(json.dumps(spec))
    g = model_bundle.load(changed)
    arrays = {k: np.array(v) for k, v in safetensors_file.flatten_named(g.model).items()}
    head = arrays["lm_head.kernel"]
    head[:, list(BARRED)] = 30 * head[:, [8_739]]  # of "<", which is allowed
    head[:, VOCAB.size - 1] *= -1  # so that one of the two is always the most likely
    safetensors_file.save(changed / "model.safetensors", arrays, {})
    return model_bundle.load(changed)


def test_names_barred_by_the_release():
    barred = ["<s>", "<eoss>", "<reserved08706>", "</", "<sub>", "<<"]
    assert all(map(ids.is_barred_name, barred))
    assert not any(map(ids.is_barred_name, ["<", "Ġ<", "a<b", ">", ""]))
    mask = ids.text_mask(VOCAB, tuple(BARRED))
    assert set(np.flatnonzero(ids.text_mask(VOCAB) & ~mask)) == set(BARRED)
    for mode in grammar.MODES:
        assert not grammar.text_ids(VOCAB, mode=mode, barred=tuple(BARRED))[list(BARRED)].any()
    assert not grammar.parses(np.array([VOCAB.size - 1]), VOCAB, codes=4, barred=tuple(BARRED))


@pytest.mark.parametrize("mode, sample", [("text", SAMPLE), ("text", DRAWN), ("mixed", DRAWN)])
def test_barred_name_is_never_generated(barred_g, mode, sample):
    assert barred_g.tokenizer.barred == tuple(BARRED)
    prompts = [np.array([ids.BOS, 8_720 + n, 8_730]) for n in range(4)]
    answers = generate(barred_g, prompts, sample, mode, names=None)
    assert all(answers) and not {t for answer in answers for t in answer} & set(BARRED)
    # without the rule the model generates them
    tokenizer = copy.copy(barred_g.tokenizer)
    tokenizer.barred = ()
    unrestricted = dataclasses.replace(barred_g, tokenizer=tokenizer)
    free = generate(unrestricted, prompts, SAMPLE, "text", names=None)
    assert {t for answer in free for t in answer} & set(BARRED)


def test_chat_bars_them_too(barred_g):
    chat = api.Chat(barred_g, SAMPLE, mode="text", seed=0)
    assert isinstance(chat.send(["Is it?"])[0], model_bundle.Text)
    assert not set(BARRED) & set(chat.tokens.tolist())


# Paths given as text.


@pytest.mark.parametrize(
    "text, is_path",
    [
        ("scan.png", True),
        ("SCAN.JPEG", True),
        ("a/b/scan.dcm", True),
        ("/data/my scan.nii.gz", True),
        ("./my scan.png", True),
        ("notes", True),  # an existing file
        ("my scan.tif", True),  # another, with a space
        ("your scan.tif", False),
        ("Is this scan.png", False),
        ("scan.png ", False),
        ("scan.png?", False),
        ("a\nscan.png", False),
        ("No", False),
        ("", False),
        (".", False),
        ("x" * 5_000 + ".png", False),
        ("a\0b", False),
    ],
)
def test_text_that_is_the_path_of_an_image(tmp_path, text, is_path):
    for name in ("notes", "my scan.tif"):
        (tmp_path / name).write_text("here")
    assert names_image(text, tmp_path) == is_path


def test_path_as_text_raises_in_every_entry_point(barred_g, tmp_path, monkeypatch):
    g = barred_g
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (9, 7), "gray").save("chest", "PNG")
    calls = [
        lambda parts: api.generate(g, [parts], SAMPLE, mode="text", seed=0),
        lambda parts: list(api.as_completed(g, [parts], SAMPLE, mode="text", seed=0)),
        lambda parts: list(api.stream_chunks(g, [parts], SAMPLE, mode="text", seed=0)),
        lambda parts: api.score(g, [parts], [["a", "b"]]),
        lambda parts: api.Chat(g, SAMPLE, mode="text", seed=0).send(parts),
    ]
    for call in calls:
        for path in ("scan.png", "chest"):
            message = rf"prompt 0 has the text '{path}', which is the path .*; write pathlib.Path"
            with pytest.raises(GenerateError, match=message):
                call([path, "Is it a CT?"])
        with pytest.raises(ValueError, match="gone.png: no such file"):
            call([tmp_path / "gone.png", "Is it a CT?"])


@pytest.mark.parametrize("prompt", ["scan.png", [{"text": "chest"}, {"text": "Is it?"}]])
def test_path_as_text_in_a_prompt_file_raises(tmp_path, prompt):
    (tmp_path / "chest").write_bytes(b"")
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": prompt}))
    with pytest.raises(GenerateError, match=r'line 1 has the text .*; write \{"image": "FILE"\}'):
        read_prompts(file)
    with pytest.raises(GenerateError, match=r"--prompt has the text 'scan.png', .*--image=scan"):
        prompts_from_flags(["scan.png"], [])
