"""Reports of evaluations, and comparisons of two.

comparison  Two evaluations side by side: who wins where, and where nobody can say.
curves      Does a model know when it is wrong, drawn: eval/pipeline/option_likelihoods.py's bins
            and curves, a chart a task.
page        One evaluation as a page and as Markdown: eval/report.py is the program.
tables      The tables of the page: headlines, published numbers beside, slices, what went wrong.
"""
