"""Scores the answers of a prediction file again, strictly, and names each difference.

    verdicts of the file  +  strict scores  ->  published, strict, paired difference, reasons

A row is {file, format, model, benchmark, family, n, groups, few_groups, metric, strict, ci_low,
ci_high, best, n_unparsed, verdict, judged, published, published_low, published_high, stated, diff,
diff_low, diff_high, reasons}, one per family and verdict. `stated`: the total in a file next to
the predictions, of all its families. Items without a verdict are in `strict`, and not in `diff`.
"""

import collections
import string
from collections.abc import Mapping, Sequence
from typing import Any

from medmax_jax.endpoints import reasoning
from medmax_jax.eval.metrics import strict
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.metrics.strict import ItemScore
from medmax_jax.eval.parsing import answer_parser
from medmax_jax.eval.prediction_files.formats import JUDGE, Answer, PredictionFile
from medmax_jax.eval.stats import intervals

METRICS = {"vqa_closed": "accuracy", "vqa_mcq": "accuracy", "vqa_open": "exact"}
SAME_TOTAL = 5e-5  # totals are published with four digits
NO_REFERENCE = "the row has no reference"


def item_scores(file: PredictionFile) -> dict[str, dict[str, ItemScore]]:
    """Return family -> key -> strict score of each answer."""
    by_family: dict[str, dict[str, ItemScore]] = {}
    for answer in file.answers:
        by_family.setdefault(answer.family, {})[answer.key] = strict_score(answer)
    return by_family


def strict_score(answer: Answer) -> ItemScore:
    """Return the score of one answer by eval/metrics/strict.py; unscored without a reference."""
    if not answer.reference:
        return strict.unscored(NO_REFERENCE)
    if answer.family == "vqa_open":
        final = reasoning.final_answer(answer.text) or ""
        return strict.scored(text_metrics.exact(final, answer.reference))
    if answer.family == "vqa_closed":
        return strict.closed(answer.text, answer.reference, answer.question)
    expected = _reference_letter(answer)
    if expected is None:
        return strict.unscored("the reference is not one of the options")
    chosen = _chosen_letter(answer)
    return strict.scored(chosen == expected) if chosen else strict.unparsed("states no option")


def rescore(
    file: PredictionFile,
    scores: Mapping[str, Mapping[str, ItemScore]],
    *,
    resampling: intervals.Resampling,
) -> list[dict[str, Any]]:
    """Return the rows of a file. scores: those of `item_scores`."""
    rows = []
    for family, by_key in scores.items():
        answers = [answer for answer in file.answers if answer.family == family]
        total = strict.total([by_key[answer.key] for answer in answers])
        lower = [by_key[answer.key].lower for answer in answers]
        groups = list(map(group_of, answers))
        interval = intervals.mean_interval(lower, groups, resampling=resampling)
        head = dict(
            file=str(file.path), format=file.format, model=file.model, benchmark=file.benchmark,
            family=family, metric=METRICS[family],
        )  # fmt: skip
        head |= interval.row("strict") | dict(best=total.best, n_unparsed=total.n_unparsed)
        names = dict.fromkeys(name for answer in answers for name in answer.verdicts) or [""]
        rows += [
            head | _published(file, name, answers, by_key, resampling=resampling) for name in names
        ]
    return rows


def notes_of(file: PredictionFile) -> list[str]:
    """Return the notes of a file, its rows without a verdict, and totals that no verdicts have."""
    notes = list(file.notes)
    for family, name in dict.fromkeys((a.family, v) for a in file.answers for v in a.verdicts):
        own = [answer for answer in file.answers if answer.family == family]
        if missing := sum(name not in answer.verdicts for answer in own):
            notes.append(
                f"{name}: {missing} of {len(own)} rows ({family}) have no verdict; published and "
                "difference are of the others, strict is of all"
            )
    for name, stated in file.stated.items():
        verdicts = [answer.verdicts[name] for answer in file.answers if name in answer.verdicts]
        mean = sum(verdicts) / len(verdicts) if verdicts else None
        if mean is None or abs(mean - stated) > SAME_TOTAL:
            shown = "none" if mean is None else f"a mean of {mean:.4f}"
            notes.append(f"{name}: published is {stated:.4f}, the rows here have {shown}")
    return notes


def group_of(answer: Answer) -> str:
    """Return what the intervals resample: the answer's group, or itself."""
    return answer.group or answer.key


def _published(
    file: PredictionFile,
    name: str,
    answers: Sequence[Answer],
    scores: Mapping[str, ItemScore],
    *,
    resampling: intervals.Resampling,
) -> dict[str, Any]:
    """Return the columns of one verdict of the file."""
    judged = [answer for answer in answers if name in answer.verdicts]
    columns: dict[str, Any] = dict(
        verdict=name, judged=len(judged), stated=file.stated.get(name), reasons={}
    ) | dict.fromkeys(("published", "published_low", "published_high"))
    columns |= dict.fromkeys(("diff", "diff_low", "diff_high"))
    if not judged:
        return columns
    theirs = [answer.verdicts[name] for answer in judged]
    ours = [scores[answer.key].lower for answer in judged]
    groups = list(map(group_of, judged))
    published = intervals.mean_interval(theirs, groups, resampling=resampling)
    difference = intervals.paired_interval(theirs, ours, groups, resampling=resampling)
    for column, one in (("published", published), ("diff", difference)):
        columns[column] = one.mean
        columns |= {f"{column}_low": intervals.finite(one.low)}
        columns |= {f"{column}_high": intervals.finite(one.high)}
    reasons = collections.Counter(
        _reason(answer, answer.verdicts[name], scores[answer.key], is_judge=name == JUDGE)
        for answer in judged
    )
    del reasons[""]
    return columns | dict(reasons=dict(reasons.most_common()))


def _reason(answer: Answer, verdict: float, score: ItemScore, *, is_judge: bool) -> str:
    """Return why a verdict of the file differs from the strict score; "" where they are equal."""
    if verdict == score.lower:
        return ""
    if score.status == strict.UNSCORED:
        return f"not scored here: {score.why}"
    if 0 < verdict < 1:
        return "a part of the score is given"
    accepted = "the judge accepted" if is_judge else "accepted"
    if verdict:
        if not answer.text.strip():
            return f"{accepted} an empty answer"
        if answer.family == "vqa_open":
            return f"{accepted} other words than the reference's"
        if score.status == strict.UNPARSED:
            return f"{accepted} {_unparsed_kind(answer)}"
        return f"{accepted} an answer that states another option"
    rejected = "the judge rejected" if is_judge else "rejected"
    what = "words" if answer.family == "vqa_open" else "option"
    return f"{rejected} the reference's {what}"


def _unparsed_kind(answer: Answer) -> str:
    """Return what an answer is from which no option can be read."""
    if not reasoning.final_answer(answer.text):
        return "reasoning without an answer after it"
    letters = "".join(answer.options) or string.ascii_uppercase
    if answer.family == "vqa_mcq" and answer_parser.parse_choice(answer.text, {}, letters=letters):
        return "a letter with the text of another option"
    return "an answer that states no option"


def _reference_letter(answer: Answer) -> str | None:
    """Return the letter of the reference, also where it is the text of one option."""
    letter = answer.reference.strip().upper()
    if letter in answer.options:
        return letter
    wanted = text_metrics.tokens(answer.reference)
    same = [k for k, text in answer.options.items() if text_metrics.tokens(text) == wanted]
    return same[0] if len(same) == 1 and wanted else None


def _chosen_letter(answer: Answer) -> str | None:
    """Return the letter that the text states.

    Where the row holds only some options, it is a letter, or exactly the words of one of these.
    """
    if answer.all_options:
        letters = "".join(answer.options)
        return answer_parser.parse_choice(answer.text, answer.options, letters=letters)
    letter = answer_parser.parse_choice(answer.text, {}, letters=string.ascii_uppercase)
    same = [k for k, text in answer.options.items() if text_metrics.exact(answer.text, text)]
    return letter or (same[0] if len(same) == 1 and answer.text.strip() else None)
