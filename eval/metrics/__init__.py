"""Scores of answers, of images and of sets of images.

aggregate       Aggregates records into rows per task and metric: values, intervals, the MedMax
                release's score.
captions        Computes the metrics of captions and reports that are not a mean of each answer's
                own score.
embeddings      Scores embeddings: unit rows [n, E] of images and texts in one space.
full_reference  Computes PSNR and SSIM of a generated image against its reference, as
                MedGEN-Bench does.
image_sets      Scores complete image sets with intervals over groups: KID's MMD^2, and diversity.
llm_judge       Judges answers with a language model: several votes, both orders, tagged verdicts.
per_record      Reads the results of judges and scorers, and computes each record's scores by
                metric.
question_sets   Scores questions that count together, and defines a benchmark's own score of a
                task.
release         Reproduces the scoring of the MedMax release (its evaluation/ at 20b7055), errors
                included.
strict          Scores one answer strictly; totals drop no answer and guess no verdict.
text            Scores one answer against one reference, and reads the options of a question.
"""
