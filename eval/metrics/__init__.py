"""Scores of answers, of images and of sets of them.

aggregate       Records to numbers: rows of a task and metric with bounds, intervals, and the
                release's score.
answer_context  Prepares an answer for parsing, and finds what denies or hedges a phrase of it.
answer_parser   Parses which option, or which of yes and no, an answer states; None where it states
                none.
embeddings      Scores on embeddings: unit rows [n, E] of pictures and texts, one space for both.
image_sets      Whole sets of pictures with intervals over groups: KID's MMD^2, and diversity.
llm_judge       A language model as judge of answers: asked several times, in both orders, and
                never trusted.
per_record      What judges and scorers said of a workdir's records, and each record's verdicts by
                metric.
release         The scoring of the MedMax release (its evaluation/ at 20b7055), as it is, errors
                and all.
strict          Right scores of one answer, and totals that drop nothing and guess nothing.
text            Scores of one answer against one reference, and the options that a question lists.
yes_no_parser   Parses which of yes and no an answer states; None where it states neither, or both.
"""
