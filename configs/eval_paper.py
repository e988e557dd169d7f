"""python -m eval.run --config=configs/eval_paper.py --model=native:M --adapter=A --workdir=D

The suite generated as published: for numbers beside the paper's, and for no claims. What differs
from configs/eval_suite.py stands here; docs/eval.md says what each of it does to the numbers.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import eval_suite, sampling


def get_config() -> ConfigDict:
    config = eval_suite.get_config().unlock()
    config.mode = "paper"  # one token for a closed answer or a letter, 60 for an open one
    config.prompt = "sft"  # as its commands for MedMax say
    config.probes = ""  # the release has none, so no family is probed
    config.options = False  # nor likelihoods
    config.judge.repeats = 1  # one call a verdict
    config.judge.paper = True  # the release's own messages, reference first
    config.judge.attempts = 1  # what cannot be read is dropped by the release's scoring
    config.sample.update(sampling.SETS["medmax_eval"])  # penalty 1.2 over the prompt too
    # Captions and chat up to the context, interleaved answers 1,024 tokens in each piece of text
    config.sample.update(max_gen_len=4_096, budget="segment")
    return config.lock()
