"""Defines the metrics and columns of the pages, each with the direction that is better.

    METRICS["token_f1"]   ->  "F1 of the words shared with the reference …; higher is better"

The complete definitions are in docs/reference/metrics.md.
"""

from collections.abc import Mapping

HIGHER, LOWER = "higher is better", "lower is better"
METRICS: Mapping[str, str] = {
    "accuracy": f"share of correct answers; unparsed ones count as wrong; {HIGHER}",
    "unparsed": f"share of answers from which no option can be read; {LOWER}",
    "exact": f"share of answers with exactly the words of the reference; {HIGHER}",
    "token_f1": f"F1 of the words shared with the reference, 0 to 1; {HIGHER}",
    "rouge_l": "ROUGE-L: F-measure of the longest common subsequence of words with the "
    f"reference, 0 to 1; {HIGHER}",
    "rationale_rouge_l": f"ROUGE-L of the rationale with its reference, 0 to 1; {HIGHER}",
    "bleu": f"corpus BLEU-4 of sacrebleu, in lower case, 0 to 1; {HIGHER}",
    "cider": "CIDEr-D: cosine of the n-grams of caption and reference, rare ones weighted more, 0 "
    f"to 10; {HIGHER}",
    "fact_recall": f"share of the stated facts that the caption contains; {HIGHER}",
    "has_image": f"share of answers that contain an image; {HIGHER}",
    "modality_match": "share of generated images whose nearest centroid of training images has "
    f"the requested modality; {HIGHER}",
    "judge_correct": f"share of answers that the judge considers correct; {HIGHER}",
    "judge_relative": "mean score that the judge gives the model over that of the reference; 1: "
    f"equal; {HIGHER}",
    "paired_accuracy": "share of images all of whose questions of one type are answered "
    f"correctly; {HIGHER}",
    "set_accuracy": "share of sets of questions all of which are answered correctly, such as one "
    f"question about two images; {HIGHER}",
    "confusion": "share of sets whose questions all get the same option; unparsed ones count as "
    f"such; {LOWER}",
    "mra": "mean relative accuracy of a number: 1 minus its relative error, at least 0; unparsed "
    f"answers count as 0; {HIGHER}",
    **{
        f"within_{percent}": f"share of numbers within {percent} % of the reference; {HIGHER}"
        for percent in (5, 10, 20, 50)
    },
    "psnr": "peak signal-to-noise ratio to the reference image in dB, 100 if equal, 0 without an "
    f"image; {HIGHER}",
    "ssim": f"structural similarity to the reference image, -1 to 1; 0 without an image; {HIGHER}",
    "kid": "kernel inception distance between the generated and the real images, of the "
    f"scorer's embeddings; 0: equal distributions; {LOWER}",
    "diversity": "mean distance of two generated images; compare with that of the references",
    "ece": f"expected calibration error: mean gap of confidence and accuracy; {LOWER}",
    "brier": "squared distance of the options' probabilities from the truth, 0 to 2; " + LOWER,
    "binary_brier": "squared distance of the confidence from 1 for a correct answer and from 0 "
    f"for a wrong one, 0 to 1; {LOWER}",
    "accuracy_by_likelihood": "share of questions whose most likely option is correct; " + HIGHER,
    "confidence": "mean probability of the most likely option, or mean stated confidence; at best "
    "equal to the accuracy",
    "risk_coverage_area": "mean error rate over all shares of most confident answers; " + LOWER,
    "accuracy_at_80": f"accuracy of the most confident 80 % of the answers; {HIGHER}",
}
_IMAGE_METRICS = {  # by the end of a name, after the prefix of its scorer
    "_image_text": f"cosine of the embeddings of image and text, -1 to 1; {HIGHER}",
    "_image_image": f"cosine of the embeddings of generated and real image, -1 to 1; {HIGHER}",
    "_image_image_best": "cosine of the real image and the nearest generated one, -1 to 1; "
    + HIGHER,
    "_caption_caption": f"cosine of the embeddings of caption and reference, -1 to 1; {HIGHER}",
    "_combined": "harmonic mean of the image-text and the caption-caption cosine; " + HIGHER,
    "_recall_1": f"share of items whose own image or caption is the nearest; {HIGHER}",
    "_recall_5": f"share of items whose own image or caption is among the 5 nearest; {HIGHER}",
}
COLUMNS: Mapping[str, str] = {
    "n": "number of scored items",
    "groups": "number of patients or volumes that the items are of",
    "value": "mean over the items; answers that cannot be parsed or scored count as wrong",
    "unparsed": METRICS["unparsed"],
    "read by judge": "share of answers that cannot be parsed and from which the judge reads an "
    "option; they count in the value",
    "value, parsed only": "the value if the answers that only the judge can read were wrong",
    "95 % interval": "95 % confidence interval over groups; †: few groups, so approximate",
    "at best": "value if all unparsed and unscored answers were right; higher is better",
    "MDE": "minimum detectable effect: the smallest true difference from another model that an "
    "evaluation of this size detects with 80 % power; lower is better",
    "as released": "the same answers, scored as the MedMax release does, including its errors; for "
    "comparison with published numbers only",
    "own rule": "the same answers, scored as the benchmark's own code does; for comparison with "
    "its published numbers only",
    "best baseline": "highest score of an answer that uses neither the image nor a model",
    "model minus baseline": "difference of the scores on the same items; above 0: the model is "
    "better, except for unparsed",
    "modified minus original": "difference of the scores on the same items; below 0: the model "
    "scores lower on the modified questions",
    "original": "score on the questions as they are",
    "modified": "score on the modified questions",
    "flips": "share of answers whose content changed",
    "flips, 95 %": "95 % confidence interval of the flips over groups",
    "constant": "the same answer to all questions of a family",
    "majority": "the most common reference answer of each task",
    "random": "yes or no, a letter, or another question's reference, at random",
    "blind": "the most common training answer of each question's template, without the image",
    "slice": "items with the same value of a property, such as the modality of the image",
    "blank": "the same gray image for every question",
    "shuffled": "the images of the task in a new order",
    "swapped": "the image of another group",
    "rotated_all": "correct under every rotation of the options",
    "zero_shot": "the question without the examples before it",
    "shots_reversed": "the examples before the question in the reverse order",
    "shot_distractor": "one more example before the question, which is irrelevant",
    "empty": "answers without text and image",
    "unscored": "answers that the judge or a scorer failed to score; they count as wrong",
    "errors": "items whose request failed; they count as wrong",
    "wrong": "answers with a score of 0",
    "mean": "mean confidence of the bin",
    "likelihoods": "value of the probabilities of the most likely options",
    "verbalized": "value of the stated confidences in the answers",
    "verbalized minus likelihoods": "difference on the same items; below 0: the stated confidences "
    "have the smaller error",
    "confidences": "smallest and largest confidence of the bin",
}


def metric_definition(metric: str) -> str:
    """Return the definition of a metric; "" for an unknown one."""
    name = metric.split(" ")[0]  # paired_accuracy has a type of question behind it
    if name in METRICS:
        return METRICS[name]
    return next((text for end, text in _IMAGE_METRICS.items() if metric.endswith(end)), "")


def of_table(metrics: set[str]) -> dict[str, str]:
    """Return the definitions of a table that has these metrics: of them and of its columns."""
    defined = {name: metric_definition(name) for name in sorted(metrics)}
    return dict(COLUMNS) | {name: text for name, text in defined.items() if text}
