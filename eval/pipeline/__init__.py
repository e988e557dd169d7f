"""An evaluation, stage by stage.

contamination       Finds items that overlap with the training records, and repeats every headline
                    without them.
cost_estimate       Estimates an evaluation before it runs: requests, tokens, judge calls, price
                    and minutes.
image_scoring       Scores images and captions with an encoder; caches embeddings and writes
                    image_scores.jsonl.
inference           Runs a model on every item once, stores each answer on disk, and resumes after
                    interruptions.
judging             Judges the records of a workdir and writes judgments.jsonl, one line per
                    record and kind.
option_likelihoods  Scores the options of a question by likelihood, and measures the model's
                    calibration.
stages              Runs one evaluation in stages; each stage is a plain function of an `EvalRun`
                    and shares files.
"""
