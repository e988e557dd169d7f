"""Add documents to records whose answers a model generated, and that pass three filters.

annotate    Add pseudo documents to records: images, questions, answers, filters, caps, one folder.
cli         Define the command `python -m data.prepare pseudo`: its flags, its steps and its report.
evidence    Collect the evidence on every question in two stages, each in a journal: exactly once.
filters     Validate generated answers and decide which are kept: three filters, each with its
            threshold.
generators  Answer questions about images: with a model folder in the generation engine, or at an
            endpoint.
kinds       Define the kinds of documents that pseudo-annotation adds, and what texts state about an
            image.
overlap     Exclude the images of evaluation sets: no pseudo document may show one.
page        Write the page of a pseudo-annotation: its counts, and examples of what was kept and
            rejected.
questions   Read what records hold about each image, and make the questions of its missing kinds.
"""
