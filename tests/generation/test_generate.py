"""generate() against a plain loop without cache; alone, in batches, on meshes; refusals."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
from generate_setup import (
    CODES,
    DRAWN,
    IMAGE_VQ,
    LORA,
    MODEL,
    SAMPLE,
    VOCAB,
    Plain,
    noise,
    prompts,
)  # fmt: skip

from medmax_jax import cli
from medmax_jax.checkpoints import safetensors_file
from medmax_jax.checkpoints.export import base_fingerprint
from medmax_jax.config import Mesh, to_dict
from medmax_jax.generation import api, grammar, model_bundle, requests
from medmax_jax.models import chameleon, tokenizer, vqgan
from medmax_jax.models import vocab as ids
from medmax_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with random weights that like BOI and EOS, so that mixed answers are mixed."""
    folder = tmp_path_factory.mktemp("micro")
    sections = dict(model=to_dict(MODEL), vocab=to_dict(VOCAB), vq=to_dict(IMAGE_VQ))
    (folder / "config.json").write_text(json.dumps(sections))
    (folder / "tokenizer.json").write_text(tokenizer.train(["Is it a CT of the chest?"], VOCAB))
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        model = noise(chameleon.abstract_model(MODEL, VOCAB, chameleon.NO_LORA), std=0.1)
        model["lm_head.kernel"] *= 4
        model["lm_head.kernel"][:, [ids.BOI, ids.EOS]] *= 3
        safetensors_file.save(folder / "model.safetensors", model, {})
        safetensors_file.save(
            folder / "vqgan.safetensors", noise(vqgan.abstract(IMAGE_VQ), std=0.1), {}
        )
    return folder


@pytest.fixture(scope="module")
def g(folder):
    return model_bundle.load(folder)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """An adapter folder that changes answers."""
    path = tmp_path_factory.mktemp("adapter")
    base = base_fingerprint(folder)
    settings = to_dict(LORA) | {"base": base}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        like = chameleon.split_adapters(chameleon.abstract_model(MODEL, VOCAB, LORA))[1]
    safetensors_file.save(path / "adapter.safetensors", noise(like, std=0.5), {})
    return path


def written(g, tokens, sample, mode, *, names, rows=8):
    found = [None] * len(tokens)
    for batch, answers in api.generate_tokens(
        g, tokens, sample, mode=mode, seed=7, names=names, rows=rows
    ):
        for index, answer in zip(batch, answers, strict=True):
            found[index] = answer.tolist()
    return found


SLOW = pytest.mark.slow  # each program compiles for seconds


@pytest.mark.parametrize(
    "mode, sample, count",
    [
        ("text", SAMPLE, 5),
        ("image", DRAWN, 5),
        ("mixed", DRAWN, 5),
        pytest.param("text", DRAWN, 5, marks=SLOW),
        pytest.param("image", dataclasses.replace(DRAWN, image_greedy=True), 5, marks=SLOW),
        pytest.param("mixed", SAMPLE, 12, marks=SLOW),  # greedy text seldom opens an image
    ],
)
def test_equals_the_plain_loop_token_for_token(g, mode, sample, count):
    tokens, names = prompts(count), list("abcdefghijkl"[:count])
    plain, numbers = Plain(g), requests.sample_seeds(tokens, names)
    expected = [plain.answer(p, sample, mode, int(n)) for p, n in zip(tokens, numbers, strict=True)]
    assert written(g, tokens, sample, mode, names=names) == expected
    if mode == "mixed":
        assert sum(ids.BOI in answer for answer in expected) >= 2
        after = [a[a.index(ids.EOI) + 1 :] for a in expected if ids.EOI in a]
        assert any(after)  # text goes on after an image


@pytest.mark.parametrize(
    "mode", ["mixed", pytest.param("text", marks=SLOW), pytest.param("image", marks=SLOW)]
)
def test_alone_and_in_a_batch_alike(g, mode):
    tokens, names = prompts(), list("abcde")
    whole = written(g, tokens, DRAWN, mode, names=names)
    alone = [written(g, [t], DRAWN, mode, names=[n])[0] for t, n in zip(tokens, names, strict=True)]
    turned = written(g, tokens[::-1], DRAWN, mode, names=names[::-1], rows=2)[::-1]
    assert whole == alone == turned
    assert written(g, tokens, DRAWN, mode, names=list("fghij")) != whole


@pytest.mark.parametrize("mode", ["mixed", pytest.param("image", marks=SLOW)])
def test_every_mesh_alike(g, folder, mode):
    spread = model_bundle.load(folder, mesh=make_mesh(Mesh(data=1, fsdp=2, tp=2)))
    tokens, names = prompts(), list("abcde")
    short = dataclasses.replace(DRAWN, max_gen_len=4)
    assert written(spread, tokens, short, mode, names=names) == written(
        g, tokens, short, mode, names=names
    )


def test_answers_end_in_time_and_parse(g):
    tokens = prompts()
    for length in (1, 5):
        sample = dataclasses.replace(SAMPLE, max_gen_len=length)
        for answer in written(g, tokens, sample, "text", names=None):
            assert len(answer) <= length
            assert answer[-1] == ids.EOS or len(answer) == length
    long = dataclasses.replace(DRAWN, max_gen_len=1_000)
    for prompt, answer in zip(tokens, written(g, tokens, long, "mixed", names=None), strict=True):
        assert len(prompt) + len(answer) <= MODEL.context_length
        assert grammar.parses(np.array(answer), VOCAB, codes=CODES)
    for answer in written(g, tokens, DRAWN, "image", names=None):
        assert len(answer) == CODES and ids.is_image(np.array(answer), VOCAB).all()


def test_segments(g, tmp_path):
    picture = PIL.Image.new("RGB", (9, 7), "gray")
    path = tmp_path / "a.png"
    picture.save(path)
    code = np.array([1, 2, 3, 4])
    asked = [["Is it?", picture], [path, code, "a CT"], ["Draw."], ["A."], ["B."]]
    for mode, sample in (("text", SAMPLE), ("image", DRAWN), ("mixed", DRAWN)):
        answers = api.generate(g, asked, sample, mode=mode, seed=0)
        kinds = {type(part) for answer in answers for part in answer}
        assert kinds <= {"text": {model_bundle.Text}, "image": {model_bundle.Image}}.get(
            mode, kinds
        )
        for part in (part for answer in answers for part in answer):
            if isinstance(part, model_bundle.Image):
                assert part.image.size == (4, 4) and part.codes.shape == (CODES,)
    assert api.generate(g, [], DRAWN, mode="text", seed=0) == []
    same, other = (api.generate(g, [["Draw."]] * 3, DRAWN, mode="image", seed=s) for s in (0, 1))
    drawn = [tuple(a[0].codes) for a in same + other]
    assert len(set(drawn)) > 2  # equal prompts and other seeds give other pictures


def test_an_adapter_changes_answers_and_must_fit(g, folder, adapter, tmp_path):
    tokens = prompts()
    names = list("abcde")
    adapted = model_bundle.load(folder, adapter=adapter)
    assert written(adapted, tokens, SAMPLE, "text", names=names) != written(
        g, tokens, SAMPLE, "text", names=names
    )
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for key, value, message in (
        ("base", "0" * 64, "trained on base weights '000000000000'"),
        ("rank", 3, "has shape"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {key: value}))
        (tmp_path / "adapter.safetensors").write_bytes(
            (adapter / "adapter.safetensors").read_bytes()
        )
        with pytest.raises(ValueError, match=message):
            model_bundle.load(folder, adapter=tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image_temperature=0.0), "sample.image_temperature is 0.0"),
        (dict(text_top_p=1.5), "sample.text_top_p is 1.5"),
        (dict(max_gen_len=0), "sample.max_gen_len 0"),
        (dict(budget="day"), "sample.budget is 'day'; it must be answer or segment"),
        (dict(text_temperature=float("nan")), "sample.text_temperature is nan; .* a finite number"),
        (dict(guidance_scale_text=float("inf")), "sample.guidance_scale_text is inf; it must be a"),
        (
            dict(text_temperature=1e-46),
            "sample.text_temperature is 1e-46; it must be at least 1e-06",
        ),
        (dict(repetition_penalty=1e-40), "sample.repetition_penalty is 1e-40"),
        (dict(guidance_scale_image=1e39), "guidance_scale_image is 1e.39; .* at most 1e.06"),
        (dict(seed=-1), r"seed is -1; it must be an integer of 0 .. 4294967295"),
    ],
)
def test_invalid_spike_settings_are_rejected(g, change, message):
    with pytest.raises(requests.GenerateError, match=message):
        api.generate(g, [["a"]], dataclasses.replace(SAMPLE, **change), mode="text", seed=0)


def test_requests_that_make_no_sense(g, folder, tmp_path):
    def ask(*parts, mode="text", names=None):
        return api.generate(g, [list(parts)], SAMPLE, mode=mode, seed=0, names=names)

    with pytest.raises(ValueError, match="mode is 'film'"):
        ask("a", mode="film")
    with pytest.raises(ValueError, match="missing.png"):
        ask(tmp_path / "missing.png", "a")
    with pytest.raises(requests.GenerateError, match="the model holds 64; shorten"):
        ask("word " * 64)
    for tokens, message in (
        ([ids.BOS, 8_720, 5], "token 5 at place 2 stands outside an image"),
        ([ids.BOS, ids.BOI, 4, 5, 6, ids.EOI], "8196 at place 5 stands 3 codes into an image"),
        ([ids.BOS, ids.BOI, 4, 5, 6, 7, 8], "token 8 at place 6 stands 4 codes into an image"),
        ([ids.BOS, ids.BOI, 4, 5], "prompt 0 ends inside an image"),
        ([ids.BOS, 8_720, ids.EOS], "token 2 at place 2 stands outside an image"),
        ([ids.BOS, VOCAB.size], "outside 0"),
        ([8_720], "prompt 0 is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            written(g, [np.array(tokens, np.int32)], SAMPLE, "text", names=None)
    with pytest.raises(requests.GenerateError, match="prompt 0 is empty; give it words"):
        ask("", "")
    with pytest.raises(requests.GenerateError, match="rows is 0"):
        api.generate(g, [["a"]], SAMPLE, mode="text", seed=0, rows=0)
    with pytest.raises(requests.GenerateError, match="an image needs 5, the model holds 64"):
        ask("z" * 80, mode="image")
    with pytest.raises(ValueError, match="kind is 'int4'"):
        api.generate(g, [["a"]], SAMPLE, mode="text", seed=0, kind="int4")
    with pytest.raises(requests.GenerateError, match="1 prompts but 2 different names"):
        ask("a", names=["x", "y"])
    with pytest.raises(requests.GenerateError, match=r"seed is 4294967296; it must be an integer"):
        api.generate(g, [["a"]], SAMPLE, mode="text", seed=2**32)
    with pytest.raises(requests.GenerateError, match="config.json: no such file"):
        model_bundle.load(tmp_path)
    with pytest.raises(requests.GenerateError, match="adapter_config.json: no such file"):
        model_bundle.load(folder, adapter=tmp_path)
    with pytest.raises(requests.GenerateError, match="merge .--merge. adds an adapter to the base"):
        model_bundle.load(folder, merge=True)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("Is it a CT?", r"prompt 1 is 'Is it a CT\?'; write a list of parts: \[picture, words\]"),
        ([], "prompt 1 is empty; give it words or a picture"),
        ([np.zeros((4, 4, 3), np.uint8)], r"shape \(4, 4, 3\) and type uint8; an array is 4 VQ"),
        ([np.zeros(3, int)], r"prompt 1 has an array of shape \(3,\)"),
        ([np.zeros(CODES)], "prompt 1 has an array of shape .* and type float64"),
        ([np.full(CODES, 16)], r"VQ codes 16..16 leave 0..15"),
        ([PIL.Image.new("RGB", (0, 5))], "has 0 x 5 pixels; give a picture of some"),
        (["\ud800"], "prompt 1 has half a character in '.ud800'; write whole ones"),
        (["a <image>?"], "a prompt's words have <image>; put the picture there, as a part of its"),
    ],
)
def test_parts_that_make_no_sense(g, prompt, message):
    with pytest.raises(ValueError, match=message):
        api.generate(g, [["a"], prompt], SAMPLE, mode="text", seed=0)


def test_types_that_make_no_sense(folder):
    """In a process of its own: the tests' check of all types would come first."""
    script = """
import sys
from medmax_jax.generation import api
from medmax_jax.generation import model_bundle
from medmax_jax.generation import requests
g, sample = model_bundle.load(sys.argv[1]), api.defaults("medmax")
for parts, names in ((["a", 7], None), (["a"], [7])):
    try:
        api.generate(g, [parts], sample, mode="text", seed=0, names=names)
    except requests.GenerateError as error:
        print(error)
"""
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "prompt 0 has a part of type int; parts are words (str), pictures (Path of a file, "
        "PIL.Image) and VQ codes (array)",
        "a name is 7; names are str, one for each prompt",
    ], done.stderr


def program(*args):
    command = [sys.executable, "-m", "medmax_jax.generate", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "change, status, message",
    [
        ("--model=nowhere", cli.ERROR, "error: nowhere/config.json: no such file"),
        ("--mode=film", cli.USAGE, "value should be one of <text|image|mixed>"),
    ],
)
def test_the_program_says_what_is_wrong(folder, tmp_path, change, status, message):
    done = program(f"--model={folder}", "--prompt=a", f"--out={tmp_path}", change)
    assert done.returncode == status and message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_program_writes_answers_and_pictures(folder, adapter, tmp_path):
    picture = tmp_path / "a.png"
    PIL.Image.new("RGB", (9, 7), "gray").save(picture)
    asked = ("--prompt=Draw one.", "--prompt=Draw two.", f"--image={picture}", "--mode=image")
    done = program(f"--model={folder}", f"--adapter={adapter}", f"--out={tmp_path / 'out'}", *asked)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    image = {"image": str(picture)}
    assert [r["prompt"] for r in records] == [
        [image, {"text": text}] for text in ("Draw one.", "Draw two.")
    ]
    for record in records:
        (segment,) = record["segments"]
        with PIL.Image.open(tmp_path / "out" / segment["image"]) as made:
            assert made.size == (4, 4)
