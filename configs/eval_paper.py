"""python -m eval.run --config=configs/eval_paper.py --model=native:M --adapter=A --workdir=D

Runs the suite with generation as published.
The scores are for comparison with the paper's, not for claims. This file has the differences from
configs/eval_suite.py; docs/guides/eval.md describes the effect of each on the scores.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import eval_suite, sampling


def get_config() -> ConfigDict:
    config = eval_suite.get_config().unlock()
    config.mode = "paper"  # one token for a closed answer or a letter, 60 for an open one
    config.prompt = "sft"  # as in the paper's commands for MedMax
    config.probes = ""  # the MedMax release has none, so no family is probed
    config.options = False  # it has no likelihoods either
    config.judge.repeats = 1  # one call per verdict
    config.judge.paper = True  # the release's own messages, reference first
    config.judge.attempts = 1  # the release's scoring drops a reply that cannot be parsed
    config.sample.update(sampling.SETS["medmax_eval"])  # penalty 1.2 over the prompt too
    # Captions and chat up to the context, interleaved answers 1,024 tokens in each text segment
    config.sample.update(max_gen_len=4_096, budget="segment")
    return config.lock()
