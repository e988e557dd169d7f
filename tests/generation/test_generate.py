"""generate() against a plain loop without cache; alone, in batches, on meshes; invalid input."""

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
    LORA,
    MODEL,
    SAMPLE,
    VOCAB,
    VQ_CONFIG,
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
    """Return a model folder with random weights that favor BOI and EOS: mixed answers are mixed."""
    folder = tmp_path_factory.mktemp("micro")
    sections = dict(model=to_dict(MODEL), vocab=to_dict(VOCAB), vq=to_dict(VQ_CONFIG))
    (folder / "config.json").write_text(json.dumps(sections))
    (folder / "tokenizer.json").write_text(tokenizer.train(["Is it a CT of the chest?"], VOCAB))
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        model = noise(chameleon.abstract_model(MODEL, VOCAB, chameleon.NO_LORA), std=0.1)
        model["lm_head.kernel"] *= 4
        model["lm_head.kernel"][:, [ids.BOI, ids.EOS]] *= 3
        safetensors_file.save(folder / "model.safetensors", model, {})
        safetensors_file.save(
            folder / "vqgan.safetensors", noise(vqgan.abstract(VQ_CONFIG), std=0.1), {}
        )
    return folder


@pytest.fixture(scope="module")
def g(folder):
    return model_bundle.load(folder)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """Return an adapter folder that changes answers."""
    path = tmp_path_factory.mktemp("adapter")
    base = base_fingerprint(folder)
    settings = to_dict(LORA) | {"base": base}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        like = chameleon.split_adapters(chameleon.abstract_model(MODEL, VOCAB, LORA))[1]
    safetensors_file.save(path / "adapter.safetensors", noise(like, std=0.5), {})
    return path


def generate(g, prompts, sample, mode, *, names, batch_size=8):
    answers = [None] * len(prompts)
    for batch, tokens in api.generate_tokens(
        g, prompts, sample, mode=mode, seed=7, names=names, batch_size=batch_size
    ):
        for index, answer in zip(batch, tokens, strict=True):
            answers[index] = answer.tolist()
    return answers


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
    plain, seeds = Plain(g), requests.sample_seeds(tokens, names)
    expected = [plain.answer(p, sample, mode, int(s)) for p, s in zip(tokens, seeds, strict=True)]
    assert generate(g, tokens, sample, mode, names=names) == expected
    if mode == "mixed":
        assert sum(ids.BOI in answer for answer in expected) >= 2
        after = [a[a.index(ids.EOI) + 1 :] for a in expected if ids.EOI in a]
        assert any(after)  # text continues after an image


@pytest.mark.parametrize(
    "mode", ["mixed", pytest.param("text", marks=SLOW), pytest.param("image", marks=SLOW)]
)
def test_answers_do_not_depend_on_the_batch(g, mode):
    tokens, names = prompts(), list("abcde")
    expected = generate(g, tokens, DRAWN, mode, names=names)
    alone = [
        generate(g, [t], DRAWN, mode, names=[n])[0] for t, n in zip(tokens, names, strict=True)
    ]
    reverse = generate(g, tokens[::-1], DRAWN, mode, names=names[::-1], batch_size=2)[::-1]
    assert expected == alone == reverse
    assert generate(g, tokens, DRAWN, mode, names=list("fghij")) != expected


@pytest.mark.parametrize("mode", ["mixed", pytest.param("image", marks=SLOW)])
def test_answers_do_not_depend_on_the_mesh(g, folder, mode):
    sharded = model_bundle.load(folder, mesh=make_mesh(Mesh(data=1, fsdp=2, tp=2)))
    tokens, names = prompts(), list("abcde")
    short = dataclasses.replace(DRAWN, max_gen_len=4)
    assert generate(sharded, tokens, short, mode, names=names) == generate(
        g, tokens, short, mode, names=names
    )


def test_answers_respect_their_limits_and_the_grammar(g):
    tokens = prompts()
    for length in (1, 5):
        sample = dataclasses.replace(SAMPLE, max_gen_len=length)
        for answer in generate(g, tokens, sample, "text", names=None):
            assert len(answer) <= length
            assert answer[-1] == ids.EOS or len(answer) == length
    long = dataclasses.replace(DRAWN, max_gen_len=1_000)
    for prompt, answer in zip(tokens, generate(g, tokens, long, "mixed", names=None), strict=True):
        assert len(prompt) + len(answer) <= MODEL.context_length
        assert grammar.parses(np.array(answer), VOCAB, codes=CODES)
    for answer in generate(g, tokens, DRAWN, "image", names=None):
        assert len(answer) == CODES and ids.is_image(np.array(answer), VOCAB).all()


def test_answers_are_segments_of_text_and_images(g, tmp_path):
    image = PIL.Image.new("RGB", (9, 7), "gray")
    path = tmp_path / "a.png"
    image.save(path)
    codes = np.array([1, 2, 3, 4])
    prompts = [["Is it?", image], [path, codes, "a CT"], ["Draw."], ["A."], ["B."]]
    for mode, sample in (("text", SAMPLE), ("image", DRAWN), ("mixed", DRAWN)):
        answers = api.generate(g, prompts, sample, mode=mode, seed=0)
        kinds = {type(part) for answer in answers for part in answer}
        assert kinds <= {"text": {model_bundle.Text}, "image": {model_bundle.Image}}.get(
            mode, kinds
        )
        for part in (part for answer in answers for part in answer):
            if isinstance(part, model_bundle.Image):
                assert part.image.size == (4, 4) and part.codes.shape == (CODES,)
    assert api.generate(g, [], DRAWN, mode="text", seed=0) == []
    first, second = (api.generate(g, [["Draw."]] * 3, DRAWN, mode="image", seed=s) for s in (0, 1))
    drawn = [tuple(answer[0].codes) for answer in first + second]
    assert len(set(drawn)) > 2  # equal prompts and other seeds give other images


def test_adapter_changes_answers_and_must_fit_its_base(g, folder, adapter, tmp_path):
    tokens = prompts()
    names = list("abcde")
    adapted = model_bundle.load(folder, adapter=adapter)
    assert generate(adapted, tokens, SAMPLE, "text", names=names) != generate(
        g, tokens, SAMPLE, "text", names=names
    )
    run = tmp_path / "run"  # the workdir of a training run
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="exported no adapter yet; finish it, or export its last"):
        model_bundle.load(folder, adapter=run)
    (run / "adapter").symlink_to(adapter)
    assert model_bundle.adapter_folder(run) == run / "adapter"
    assert model_bundle.load(folder, adapter=str(run)).config == adapted.config
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
        (dict(max_gen_len=0), "sample.max_gen_len is 0"),
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
def test_invalid_sampling_settings_raise(g, change, message):
    with pytest.raises(requests.GenerateError, match=message):
        api.generate(g, [["a"]], dataclasses.replace(SAMPLE, **change), mode="text", seed=0)


def test_invalid_requests_raise(g, folder, tmp_path):
    def answer(*parts, mode="text", names=None):
        return api.generate(g, [list(parts)], SAMPLE, mode=mode, seed=0, names=names)

    with pytest.raises(ValueError, match="mode is 'film'"):
        answer("a", mode="film")
    with pytest.raises(ValueError, match="missing.png"):
        answer(tmp_path / "missing.png", "a")
    with pytest.raises(requests.GenerateError, match="context of the model has 64; shorten"):
        answer("word " * 64)
    for tokens, message in (
        ([ids.BOS, 8_720, 5], "token 5 at position 2 is invalid outside an image"),
        (
            [ids.BOS, ids.BOI, 4, 5, 6, ids.EOI],
            "8196 at position 5 is invalid after 3 codes of an image",
        ),
        (
            [ids.BOS, ids.BOI, 4, 5, 6, 7, 8],
            "token 8 at position 6 is invalid after 4 codes of an image",
        ),
        ([ids.BOS, ids.BOI, 4, 5], "prompt 0 ends inside an image"),
        ([ids.BOS, 8_720, ids.EOS], "token 2 at position 2 is invalid outside an image"),
        ([ids.BOS, VOCAB.size], "outside 0"),
        ([8_720], "prompt 0 is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(g, [np.array(tokens, np.int32)], SAMPLE, "text", names=None)
    with pytest.raises(requests.GenerateError, match="prompt 0 is empty; it requires text"):
        answer("", "")
    with pytest.raises(requests.GenerateError, match=r"batch_size \(--rows\) is 0"):
        api.generate(g, [["a"]], SAMPLE, mode="text", seed=0, batch_size=0)
    with pytest.raises(
        requests.GenerateError, match="an image needs 5, but the context of the model has 64"
    ):
        answer("z" * 80, mode="image")
    with pytest.raises(ValueError, match="cache_dtype is 'int4'"):
        api.generate(g, [["a"]], SAMPLE, mode="text", seed=0, cache_dtype="int4")
    with pytest.raises(requests.GenerateError, match="1 prompts but 2 different names"):
        answer("a", names=["x", "y"])
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
        ("Is it a CT?", r"prompt 1 is 'Is it a CT\?'; pass a list of parts: \[image, text\]"),
        ([], "prompt 1 is empty; it requires text or an image"),
        (
            [np.zeros((4, 4, 3), np.uint8)],
            r"shape \(4, 4, 3\) and dtype uint8; an array must be 4 VQ",
        ),
        ([np.zeros(3, int)], r"prompt 1 has an array of shape \(3,\)"),
        ([np.zeros(CODES)], "prompt 1 has an array of shape .* and dtype float64"),
        ([np.full(CODES, 16)], r"VQ codes 16..16 are outside 0..15"),
        ([PIL.Image.new("RGB", (0, 5))], "has 0 x 5 pixels; each side requires at least one"),
        (["\ud800"], "prompt 1 has half of a surrogate pair in '.ud800'; use complete characters"),
        (
            ["a <image>?"],
            "the text of a prompt contains <image>; pass the image there as a separate part",
        ),
    ],
)
def test_invalid_parts_of_a_prompt_raise(g, prompt, message):
    with pytest.raises(ValueError, match=message):
        api.generate(g, [["a"], prompt], SAMPLE, mode="text", seed=0)


def test_invalid_types_raise(folder):
    """This uses a separate process: here the type checker of the tests would raise first."""
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
        "prompt 0 has a part of type int; parts are text (str), images (Path of a file, "
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
def test_program_reports_errors(folder, tmp_path, change, status, message):
    done = program(f"--model={folder}", "--prompt=a", f"--out={tmp_path}", change)
    assert done.returncode == status and message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_program_writes_answers_and_images(folder, adapter, tmp_path):
    path = tmp_path / "a.png"
    PIL.Image.new("RGB", (9, 7), "gray").save(path)
    request = ("--prompt=Draw one.", "--prompt=Draw two.", f"--image={path}", "--mode=image")
    out = f"--out={tmp_path / 'out'}"
    done = program(f"--model={folder}", f"--adapter={adapter}", out, *request)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    image = {"image": str(path)}
    assert [r["prompt"] for r in records] == [
        [image, {"text": text}] for text in ("Draw one.", "Draw two.")
    ]
    for record in records:
        (segment,) = record["segments"]
        with PIL.Image.open(tmp_path / "out" / segment["image"]) as drawn:
            assert drawn.size == (4, 4)
