"""Reports of evaluations, and comparisons of two.

comparison  Compares two evaluations: which is better on which task, and where the result is
            inconclusive.
curves      Draws calibration charts per task from the bins and curves of
            eval/pipeline/option_likelihoods.py.
definitions Defines the metrics and columns of the pages, each with the direction that is better.
hub_results Writes the scores of an evaluation in the two forms that model pages of the Hub read.
item_browser
            Writes every item of a run: a page that filters them, and a table for other programs.
leaderboard Ranks several evaluations in one table: which differences are significant, and which are
            not.
lmms_eval   Writes an evaluation as lmms-eval writes its own: one JSON of results, one JSONL per
            task.
page        Renders one evaluation as a page and as Markdown: eval/report.py is the program.
rescored    Compares the models of several prediction files, and renders the page of eval.rescore.
tables      Builds the tables of the page: headlines, published scores, slices and failures.
verdict     States the result of an evaluation: one sentence per headline, and all of them in one
            chart.
"""
