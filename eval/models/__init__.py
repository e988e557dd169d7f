"""What can be evaluated: model folders, endpoints, recorded predictions, baselines.

base         Defines the model interface: any object with `generate(requests)`, one result per
             request.
baselines    Computes baselines: answers that require no image and no model.
endpoint     Runs an OpenAI-compatible vision endpoint as a model, with guarded, cached, paced and
             priced calls.
loading      Resolves --model=KIND:WHERE to a model, and loads the model when it is first used.
predictions  Reads recorded answers as a model, JSONL of {"id", "text", "images": [paths]}; writes
             the items.
"""
