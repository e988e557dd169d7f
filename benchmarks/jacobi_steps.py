"""python benchmarks/jacobi_steps.py [--windows 4,8,16,32] [--inits vertical]

Counts passes of the model per image with sample.jacobi_window, of the shipped model.

One line for each rule, guess, window and guidance (as in the defaults, or off): the passes, how
many times fewer than with one code per pass, and of how many prompts the image is the same. The
last line is one JSON object.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from medmax_jax import arguments
from medmax_jax.config import Sample
from medmax_jax.data.sample.documents import image_phrase, with_article
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.generation import (
    api,
    engine,
    jacobi,
    model_bundle,
    requests,
    sampling_params,
    scheduler,
)


def generate(
    g: model_bundle.ModelBundle, prompts: list[np.ndarray], sample: Sample
) -> list[scheduler.RequestOutput]:
    """Return an image for each prompt."""
    codes, count = g.vq_config.codes_per_image, len(prompts)
    settings = sampling_params.resolve(
        sample, g.vocab, mode="image", codes=codes, barred=g.tokenizer.barred
    )
    made = requests.make_requests(
        prompts, sample, g.vocab, mode="image", names=[str(n) for n in range(count)], codes=codes,
        context=g.config.context_length,
    )  # fmt: skip
    sizes = engine.EngineSizes(
        batch_size=count, num_slots=2 * count, cache_length=256, cache_dtype="model"
    )
    e, outputs = engine.make_engine(g.model, g.vocab, g.mesh, sizes, codes=codes), {}
    for changed in scheduler.run_requests(e, made, settings, seed=0):
        outputs |= {output.index: output for output in changed}
    return [outputs[n] for n in range(count)]


def main() -> None:
    """Run the program."""
    parser = arguments.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--windows", default="4,8,16,32")
    parser.add_argument("--inits", default=",".join(jacobi.INITS))
    parser.add_argument("--prompts", type=int, default=16)
    args = parser.parse_args()
    package = ROOT / "medmax_jax"
    g = model_bundle.load(package / "tiny", adapter=package / "tiny_adapter")
    rows = read_manifest(ROOT / "data" / "sample" / "manifest.jsonl")
    phrases = list(dict.fromkeys(map(image_phrase, rows)))[: args.prompts]
    texts = [[f"Generate {with_article(phrase)}."] for phrase in phrases]
    prompts = api.prompt_tokens(g, texts, end_of_turn=True)
    base = api.defaults("medmax_eval")
    unguided = dataclasses.replace(base, guidance_scale_text=1.0, guidance_scale_image=1.0)
    report: list[dict[str, Any]] = []
    for guided, sample in ((True, base), (False, unguided)):
        single = generate(g, prompts, sample)
        passes = np.mean([output.steps for output in single])
        for rule in jacobi.RULES:
            for init in args.inits.split(","):
                for window in map(int, args.windows.split(",")):
                    options = dict(jacobi_window=window, jacobi_rule=rule, jacobi_init=init)
                    windowed = generate(g, prompts, dataclasses.replace(sample, **options))
                    steps = float(np.mean([output.steps for output in windowed]))
                    same = sum(
                        np.array_equal(a.tokens, b.tokens)
                        for a, b in zip(single, windowed, strict=True)
                    )
                    report.append(
                        dict(rule=rule, init=init, window=window, guided=guided)
                        | dict(steps=steps, ratio=round(float(passes / steps), 2), same=same)
                    )
                    print(report[-1], flush=True)
    print(json.dumps(dict(rows=report, prompts=len(prompts))))


if __name__ == "__main__":
    main()
