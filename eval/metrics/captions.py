"""Computes the metrics of captions and reports that are not a mean of each answer's own score.

    bleu    corpus BLEU-4 of the package sacrebleu: counts of n-grams summed over the items
    cider   CIDEr-D: cosine of the n-grams of answer and reference, rare n-grams of the task's
            references weighted more, 0 to 10; 0 with one item, as no n-gram is rare then

    "no effusion is seen" against "no pleural effusion is seen": 1-grams 4 of 4, 2-grams 2 of 3, ...

METRICS_NOT_RUN are those that need weights or data in addition to their package.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from medmax_jax.eval.stats import intervals

MAX_NGRAM = 4
CIDER_SPAN = (0.0, 10.0)
SIGMA = 6.0  # words; of CIDEr-D's penalty on the difference of the lengths
METRICS_NOT_RUN: Mapping[str, str] = {
    "METEOR": "needs the WordNet files of nltk",
    "BERTScore": "needs the package bert-score and the weights of a BERT",
    "RadGraph-F1": "needs the package radgraph and its weights",
    "RaTEScore": "needs the package RaTEScore and the weights of its two models",
    "GREEN": "needs the package green-score and the weights of its 7B model",
    "CheXbert F1": "needs the package f1chexbert and the weights of CheXbert",
    "RAD-DINO similarity": "needs the weights of RAD-DINO; it compares generated images",
}
Ngrams = collections.Counter[tuple[str, ...]]


def bleu_interval(
    answers: Sequence[str],
    references: Sequence[str],
    groups: Sequence[str],
    *,
    resampling: intervals.Resampling,
) -> intervals.Interval:
    """Return corpus BLEU, 0 to 1, with its interval over groups.

    Its signature is nrefs:1|case:lc|eff:no|tok:13a|smooth:exp; sacrebleu prints 100 times this.
    """
    from sacrebleu.metrics import BLEU  # here: the import is slow, and few tasks have captions

    metric = BLEU(lowercase=True, effective_order=True)  # of the counts, which it does not change
    pairs = zip(answers, references, strict=True)
    scores = [metric.sentence_score(answer, [reference]) for answer, reference in pairs]
    counts = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores])

    def corpus_bleu(indices: np.ndarray) -> np.ndarray:
        sums = counts[indices].sum(0).tolist()
        score = BLEU.compute_bleu(
            sums[:MAX_NGRAM], sums[MAX_NGRAM:-2], *sums[-2:], smooth_method="exp"
        )
        return np.array([score.score / 100])

    spans = [intervals.SHARE]
    (interval,) = intervals.pointwise_intervals(
        corpus_bleu, groups, resampling=resampling, spans=spans
    )
    return interval


def cider(answers: Sequence[str], references: Sequence[str]) -> Float[np.ndarray, "n"]:
    """Return CIDEr-D of each answer, with one reference each; words are [a-z0-9]+ in lower case.

    Equal to pycocoevalcap on texts of such words (its own tokenizer needs Java).
    """
    answer_ngrams, reference_ngrams = ([_ngrams(t) for t in side] for side in (answers, references))
    documents = collections.Counter(ngram for ngrams in reference_ngrams for ngram in ngrams)
    total = math.log(len(references))
    return np.array(
        [
            _similarity(answer, reference, documents, total)
            for answer, reference in zip(answer_ngrams, reference_ngrams, strict=True)
        ]
    )


def _ngrams(text: str) -> Ngrams:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return collections.Counter(
        tuple(words[start : start + size])
        for size in range(1, MAX_NGRAM + 1)
        for start in range(len(words) - size + 1)
    )


def _similarity(answer: Ngrams, reference: Ngrams, documents: Ngrams, total: float) -> float:
    """Return 10 times the mean over the sizes of the clipped cosines, less for other lengths."""
    vectors = [
        {ngram: n * (total - math.log(max(1, documents[ngram]))) for ngram, n in side.items()}
        for side in (answer, reference)
    ]
    words = [sum(n for ngram, n in side.items() if len(ngram) == 2) for side in (answer, reference)]
    cosines = 0.0
    for size in range(1, MAX_NGRAM + 1):
        ours, theirs = ({g: w for g, w in v.items() if len(g) == size} for v in vectors)
        norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        dot = sum(min(w, theirs[g]) * theirs[g] for g, w in ours.items() if g in theirs)
        cosines += dot / norms if norms else dot
    penalty = math.exp(-((words[0] - words[1]) ** 2) / (2 * SIGMA**2))
    return 10.0 * penalty * cosines / MAX_NGRAM
