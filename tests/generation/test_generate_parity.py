"""Whole greedy answers in text equal those of HF's generate, in both sizes of the family."""

import pathlib

import chameleon_setup as setup
import jax
import numpy as np
import pytest
from parity import chameleon_cases as cases
from parity import generate_cases

from medmax_jax.config import Mesh, Sample
from medmax_jax.generation import engine, scheduler
from medmax_jax.generation.requests import Request
from medmax_jax.sharding import make_mesh

PARITY = pathlib.Path(__file__).parents[1] / "parity"
SAMPLE = Sample(
    text_temperature=1.0, text_top_p=1.0, text_greedy=True,
    repetition_penalty=generate_cases.PENALTY, image_temperature=1.0, image_top_p=1.0,
    image_greedy=True, guidance_scale_text=3.0, guidance_scale_image=1.2,
    max_gen_len=generate_cases.NEW, budget="answer", boi_ends=False, seed=0,
)  # fmt: skip
NOISE = 1e-3  # of a logit in fp32: a choice that was closer may fall either way


@pytest.mark.parametrize("case", cases.CASES.values(), ids=cases.CASES)
def test_greedy_text_is_that_of_hf(case):
    golden = np.load(PARITY / f"generate_{case.name}.npz")
    mesh = make_mesh(Mesh(data=1, fsdp=1, tp=1))
    with jax.set_mesh(mesh):
        model = setup.load(setup.config(case), cases.weights(case, lora=False))
    e = engine.make_engine(
        model, setup.VOCAB, mesh, codes=24, rows=2, lanes=2, slots=128, kind="model"
    )  # fmt: skip
    requests = [
        Request(p, n, generate_cases.NEW) for n, p in enumerate(generate_cases.prompts(cases.ids()))
    ]
    found = {}
    for news in scheduler.run_requests(e, requests, SAMPLE, mode="text", seed=0):
        found |= {each.index: each.tokens for each in news}
    for number in range(len(requests)):
        want, margins = golden[f"tokens{number}"], golden[f"margins{number}"]
        close = np.flatnonzero(margins < NOISE)
        sure = close[0] if close.size else len(want)
        assert sure == len(want)  # the golden is of use to its end
        np.testing.assert_array_equal(found[number], want)
