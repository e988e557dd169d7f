"""Complete greedy text answers equal those of HF's generate, in both sizes of the family."""

import pathlib

import chameleon_setup as setup
import jax
import numpy as np
import pytest
from parity import chameleon_cases as cases
from parity import generate_cases

from medmax_jax.config import Mesh, Sample
from medmax_jax.generation import engine, sampling_params, scheduler
from medmax_jax.generation.requests import Request
from medmax_jax.sharding import make_mesh

PARITY = pathlib.Path(__file__).parents[1] / "parity"
SAMPLE = Sample(
    text_temperature=1.0, text_top_p=1.0, text_greedy=True,
    repetition_penalty=generate_cases.PENALTY, image_temperature=1.0, image_top_p=1.0,
    image_greedy=True, guidance_scale_text=3.0, guidance_scale_image=1.2,
    max_gen_len=generate_cases.NEW, budget="answer", boi_ends=False,
    jacobi_window=0, jacobi_rule="gumbel", jacobi_init="vertical", seed=0,
)  # fmt: skip
NOISE = 1e-3  # of a logit in fp32: closer choices are ambiguous


@pytest.mark.parametrize("case", cases.CASES.values(), ids=cases.CASES)
def test_greedy_text_equals_hf(case):
    golden = np.load(PARITY / f"generate_{case.name}.npz")
    mesh = make_mesh(Mesh(data=1, fsdp=1, tp=1))
    with jax.set_mesh(mesh):
        model = setup.load(setup.config(case), cases.weights(case, lora=False))
    sizes = engine.EngineSizes(batch_size=2, num_slots=2, cache_length=128, cache_dtype="model")
    e = engine.make_engine(model, setup.VOCAB, mesh, sizes, codes=24)
    requests = [
        Request(p, n, generate_cases.NEW) for n, p in enumerate(generate_cases.prompts(cases.ids()))
    ]
    settings = sampling_params.resolve(SAMPLE, setup.VOCAB, mode="text", codes=24)
    answers = {}
    for outputs in scheduler.run_requests(e, requests, settings, seed=0):
        answers |= {output.index: output.tokens for output in outputs}
    for number in range(len(requests)):
        expected, margins = golden[f"tokens{number}"], golden[f"margins{number}"]
        close = np.flatnonzero(margins < NOISE)
        unambiguous = close[0] if close.size else len(expected)
        assert unambiguous == len(expected)  # the complete golden answer can be compared
        np.testing.assert_array_equal(answers[number], expected)
