"""What can be evaluated: model folders, endpoints, recorded predictions, baselines.

base         What answers: any object with `generate(asks) -> one list of segments an ask`.
baselines    The floor of every table: answers that need no picture, and no model.
endpoint     An OpenAI-compatible vision endpoint as a model: each call guarded, cached, limited,
             paid for.
loading      --model=KIND:WHERE to a model: named first, without loading it, and opened when it is
             asked.
predictions  Answers that are there already, as a model: JSONL of {"id", "text", "images": [paths]}.
"""
