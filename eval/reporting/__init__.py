"""Reports of evaluations, and comparisons of two.

comparison  Compares two evaluations: which is better on which task, and where the result is
            inconclusive.
curves      Draws calibration charts per task from the bins and curves of
            eval/pipeline/option_likelihoods.py.
page        Renders one evaluation as a page and as Markdown: eval/report.py is the program.
tables      Builds the tables of the page: headlines, published scores, slices and failures.
"""
