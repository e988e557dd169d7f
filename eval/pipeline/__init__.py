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
perturbation        Perturbs the images that a model is shown, as Kvasir-VQA-x1 does for its
                    transformed track.
reference_scoring   Compares generated images with the reference image of their item: PSNR and
                    SSIM.
run_facts           Records what the answers of a workdir depend on, in run.json, and refuses
                    another evaluation.
stages              Runs one evaluation in stages; each stage is a plain function of an `EvalRun`
                    and shares files.
verbalized_confidence
                    Asks a model how confident it is in each closed or multiple choice answer, and
                    measures that.
"""
